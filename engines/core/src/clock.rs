//! The guest's clock: one per machine, the only time its devices know.
//!
//! Nanoseconds since the machine was put together, from the host's CLOCK_MONOTONIC, so that the
//! host's timers can be set by it without a conversion. It goes on while the guest is stopped, as
//! time does on a machine. It is never used to measure.
//!
//! [`tsc_hz`] ties the time-stamp counter to it, for the TSC-deadline timer.
//!
//! Invariant: it never goes back.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;

/// Host time spent once to find out how fast the time-stamp counter runs.
const CALIBRATION: u64 = 2_000_000;

#[derive(Clone, Debug)]
enum Source {
    /// CLOCK_MONOTONIC, less this.
    Host(u64),
    /// A test turns the hands.
    Manual(Arc<AtomicU64>),
}

/// A machine's clock; clones show the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

impl Default for Clock {
    fn default() -> Self {
        Clock(Source::Host(host_now()))
    }
}

impl Clock {
    /// A clock that stands at 0 until [`set`](Clock::set) moves it: for tests of devices.
    pub fn manual() -> Self {
        Clock(Source::Manual(Arc::default()))
    }

    /// Moves a [`manual`](Clock::manual) clock; the others are moved by nobody.
    pub fn set(&self, now: u64) {
        if let Source::Manual(time) = &self.0 {
            time.store(now, Ordering::Relaxed);
        }
    }

    /// Nanoseconds since the machine was put together.
    #[inline]
    pub fn now(&self) -> u64 {
        match &self.0 {
            Source::Host(start) => host_now() - start,
            Source::Manual(time) => time.load(Ordering::Relaxed),
        }
    }

    /// The host's CLOCK_MONOTONIC, in nanoseconds, at `time` of this clock.
    pub fn to_host(&self, time: u64) -> u64 {
        match &self.0 {
            Source::Host(start) => start.saturating_add(time),
            Source::Manual(_) => time,
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
fn host_now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * SECOND + now.tv_nsec as u64
}

/// The host's time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// How fast the time-stamp counter runs, in Hz, to some 20 parts in a million. Found out on first
/// use, which takes [`CALIBRATION`]; whoever needs to be exact looks at the counter again.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        let (from, from_ns) = paired();
        while host_now() - from_ns < CALIBRATION {
            std::hint::spin_loop();
        }
        let (to, to_ns) = paired();
        let ticks = u128::from(to.wrapping_sub(from));
        (ticks * u128::from(SECOND) / u128::from(to_ns - from_ns)).max(1) as u64
    })
}

/// Counter and time of one moment: the tightest of a few tries, as any may be interrupted.
fn paired() -> (u64, u64) {
    (0..8)
        .map(|_| {
            let before = tsc();
            let now = host_now();
            let after = tsc();
            (
                after.wrapping_sub(before),
                (before + (after - before) / 2, now),
            )
        })
        .min_by_key(|(width, _)| *width)
        .map_or_else(|| (tsc(), host_now()), |(_, pair)| pair)
}

/// `value * to / from`, rounded up, without overflow.
pub fn scale(value: u64, from: u64, to: u64) -> u64 {
    let scaled = (u128::from(value) * u128::from(to)).div_ceil(u128::from(from.max(1)));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_show_the_same_time_and_the_host_clock_moves_on() {
        let manual = Clock::manual();
        let clone = manual.clone();
        manual.set(7);
        assert_eq!(clone.now(), 7);
        let host = Clock::default();
        let before = host.now();
        while host.now() == before {}
        assert!(host.now() > before);
        host.set(u64::MAX);
        assert!(host.now() < u64::MAX / 2);
    }

    #[test]
    fn the_counters_rate_agrees_with_the_clock() {
        let hz = tsc_hz();
        let (from, from_ns) = paired();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (to, to_ns) = paired();
        let seen = scale(to - from, hz, SECOND) as f64 / (to_ns - from_ns) as f64;
        assert!((0.99..1.01).contains(&seen), "{seen}");
    }

    #[test]
    fn scaling_rounds_up_and_saturates() {
        assert_eq!(scale(1, 3, 10), 4);
        assert_eq!(scale(u64::MAX, 1, SECOND), u64::MAX);
    }
}
