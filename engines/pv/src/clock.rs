//! The guest's clock page: CLOCK_MONOTONIC as a function of the TSC.
//!
//! The rate is measured over the time since the guest was made, so it gets better as the guest runs;
//! the page is written anew every now and then. A guest sees steps of the order of the former error.

use std::arch::x86_64::_rdtsc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use abi::hypercall::Clock;

/// How often the page is written.
const REFRESH: Duration = Duration::from_millis(500);

/// A moment on both clocks.
#[derive(Clone, Copy, Debug)]
struct Moment {
    tsc: u64,
    ns: u64,
}

impl Moment {
    fn now() -> Self {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` is writable for the duration of the call.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        // SAFETY: every x86-64 processor has a TSC that Linux leaves readable.
        let tsc = unsafe { _rdtsc() };
        Moment {
            tsc,
            ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
        }
    }
}

/// Keeps the clock page.
#[derive(Debug)]
pub(crate) struct Keeper {
    first: Moment,
    written: u64,
}

impl Keeper {
    /// Starts to measure.
    pub(crate) fn start() -> Self {
        Keeper {
            first: Moment::now(),
            written: 0,
        }
    }

    /// Writes the page if it is time.
    pub(crate) fn refresh(&mut self, page: &Clock) {
        let now = Moment::now();
        if now.ns - self.written >= REFRESH.as_nanos() as u64 {
            self.write(page, now);
        }
    }

    /// Writes the page before anybody reads it.
    pub(crate) fn publish(&mut self, page: &Clock) {
        self.write(page, Moment::now());
    }

    fn write(&mut self, page: &Clock, now: Moment) {
        self.written = now.ns;
        let ticks = (now.tsc - self.first.tsc).max(1);
        let ns = now.ns - self.first.ns;
        // ns per tick with 32 fraction bits; below 1 on any processor above 1 GHz.
        let mut rate = (u128::from(ns) << 32) / u128::from(ticks);
        let mut shift = 0u32;
        while rate > u128::from(u32::MAX) {
            rate >>= 1;
            shift += 1;
        }
        page.version.fetch_add(1, SeqCst);
        page.tsc_timestamp.store(now.tsc, Relaxed);
        page.system_time.store(now.ns, Relaxed);
        page.multiplier.store(rate as u32, Relaxed);
        page.shift.store(shift, Relaxed);
        page.version.fetch_add(1, SeqCst);
    }
}
