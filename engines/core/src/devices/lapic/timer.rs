//! The local APIC's timer (SDM 3A 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! It counts at 1 GHz before the divider, as KVM's does (arch/x86/kvm/lapic.h,
//! APIC_BUS_CYCLE_NS). Whether an expiry becomes an interrupt is decided by the caller, which owns
//! the timer's LVT entry; while that is masked the timer needs no host timer and only catches up.
//!
//! Invariant: `deadline` is not 0 exactly while the TSC-deadline timer is armed.

use crate::clock::{self, Clock, SECOND};

/// LVT bits 18 and 17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    /// 0b11 is reserved; it behaves as TSC-deadline, which KVM makes of it too.
    pub(super) fn of(lvt: u32) -> Mode {
        match lvt >> 17 & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            _ => Mode::TscDeadline,
        }
    }
}

/// A period shorter than this would leave the guest no time between two interrupts.
pub(super) const SHORTEST_PERIOD: u64 = 20_000;

#[derive(Debug)]
pub(super) struct Timer {
    clock: Clock,
    mode: Mode,
    initial: u32,
    divide: u32,
    /// When the count reaches zero, or when the deadline is estimated to come.
    expiry: Option<u64>,
    /// IA32_TSC_DEADLINE.
    deadline: u64,
    /// The guest's time-stamp counter less the host's.
    tsc_offset: u64,
}

impl Timer {
    pub(super) fn new(clock: Clock) -> Self {
        Timer {
            clock,
            mode: Mode::OneShot,
            initial: 0,
            divide: 0,
            expiry: None,
            deadline: 0,
            tsc_offset: 0,
        }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// When the timer expires, if it runs.
    pub(super) fn expiry(&self) -> Option<u64> {
        self.expiry
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// IA32_TSC_DEADLINE as it reads: 0 once it has passed.
    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Follows the LVT entry. Going to or from TSC-deadline disarms (SDM 3A 11.5.4.1).
    pub(super) fn set_mode(&mut self, mode: Mode) {
        if (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline) {
            self.stop();
        }
        self.mode = mode;
    }

    fn stop(&mut self) {
        self.expiry = None;
        self.deadline = 0;
        self.initial = 0;
    }

    /// A write to the initial-count register; ignored in TSC-deadline mode.
    pub(super) fn start(&mut self, count: u32) {
        if self.mode != Mode::TscDeadline {
            self.initial = count;
            self.expiry = (count != 0).then(|| self.clock.now() + self.period());
        }
    }

    /// A write to the divide-configuration register: the count goes on from where it is.
    pub(super) fn set_divide(&mut self, value: u32) {
        let left = self.current();
        self.divide = value & 0b1011;
        if self.mode != Mode::TscDeadline && self.expiry.is_some() {
            self.expiry = Some(self.clock.now() + u64::from(left) * self.tick());
        }
    }

    /// A write to IA32_TSC_DEADLINE, while the guest's counter stands at `guest_tsc`; ignored in
    /// the other modes.
    pub(super) fn set_deadline(&mut self, value: u64, guest_tsc: u64) {
        if self.mode != Mode::TscDeadline {
            return;
        }
        self.tsc_offset = guest_tsc.wrapping_sub(clock::tsc());
        self.deadline = value;
        self.expiry = (value != 0).then(|| self.estimate(self.clock.now()));
    }

    /// When the guest's counter will have reached the deadline, as far as can be told.
    fn estimate(&self, now: u64) -> u64 {
        let counter = clock::tsc().wrapping_add(self.tsc_offset);
        let left = self.deadline.saturating_sub(counter);
        now.saturating_add(clock::scale(left, clock::tsc_hz(), SECOND))
    }

    /// Whether the timer has expired by `now`, and if so sets what comes next.
    pub(super) fn expired(&mut self, now: u64) -> bool {
        let Some(expiry) = self.expiry.filter(|&expiry| expiry <= now) else {
            return false;
        };
        match self.mode {
            Mode::OneShot => self.expiry = None,
            // Periods that the host slept through are lost, as on a machine with interrupts off.
            Mode::Periodic => self.expiry = Some((expiry + self.period()).max(now)),
            Mode::TscDeadline => {
                // The estimate may be early; the guest must not see its own counter before it.
                if clock::tsc().wrapping_add(self.tsc_offset) < self.deadline {
                    self.expiry = Some(self.estimate(now).max(now.saturating_add(1)));
                    return false;
                }
                self.stop();
            }
        }
        true
    }

    /// Lets expiries pass that nobody hears of, because the LVT entry is masked.
    pub(super) fn skip_expiries(&mut self) {
        let now = self.clock.now();
        if self.mode == Mode::Periodic {
            if self.expiry.is_some_and(|expiry| expiry <= now) {
                self.expiry = Some(now + self.period());
            }
        } else {
            self.expired(now);
        }
    }

    /// The current-count register.
    pub(super) fn current(&self) -> u32 {
        let running = self.expiry.filter(|_| self.mode != Mode::TscDeadline);
        running.map_or(0, |expiry| {
            let left = expiry.saturating_sub(self.clock.now());
            u32::try_from(left / self.tick()).unwrap_or(u32::MAX)
        })
    }

    /// Nanoseconds of one count.
    pub(super) fn tick(&self) -> u64 {
        // Bits 3, 1 and 0 of the divide configuration; 0b111 divides by 1 (SDM 3A figure 11-10).
        let code = (self.divide >> 1 & 0b100) | (self.divide & 0b11);
        if code == 0b111 { 1 } else { 2 << code }
    }

    fn period(&self) -> u64 {
        let exact = u64::from(self.initial) * self.tick();
        if self.mode == Mode::Periodic {
            exact.max(SHORTEST_PERIOD)
        } else {
            exact
        }
    }
}
