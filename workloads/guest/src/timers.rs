//! One-shot timers and interrupts to itself.
//!
//! Lateness counts from the time asked for: the time stamp before arming, plus the interval. A timer
//! that expires before that, by more than what its clock's rate may be off, is broken.

use crate::{
    clock, cpu,
    interrupts::{self, PIT_LINE, SELF, TIMER, Trigger, apic},
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use programs::{
    Refusal,
    io::{Histogram, Timer, histogram::Scale},
};

/// The deadline's MSR.
const DEADLINE: u32 = 0x6e0;
/// The timer's mode in its local vector: TSC deadline.
const DEADLINE_MODE: u32 = 2 << 17;
/// The timer's mode in its local vector: periodic.
const PERIODIC: u32 = 1 << 17;
/// Divide configuration: by 1 (SDM 3A figure 11-10).
const BY_1: u32 = 0b1011;

const NO_RATE: &str = "nothing here tells the rate of the time-stamp counter, not even a PIT";
const NO_APIC: &str = "the processor has no local APIC";
const SILENT: &str = "the timer never expires";

/// Counts a second of the local APIC's timer; 0 while unknown.
static APIC_HERTZ: AtomicU64 = AtomicU64::new(0);

/// An open timer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OneShot {
    timer: Timer,
    scale: Scale,
    expiries: u64,
}

impl OneShot {
    /// Finds the timer and tries it once.
    pub(crate) fn open(timer: Timer) -> Result<Self, Refusal> {
        clock::set_up();
        let scale = clock::scale().ok_or(Refusal::Unsupported(NO_RATE))?;
        interrupts::set_up();
        let one_shot = OneShot {
            timer,
            scale,
            expiries: 0,
        };
        match timer {
            Timer::Pit => {
                if clock::against_pit(1193).is_none() {
                    return Err(Refusal::Unsupported("no PIT answers"));
                }
                // Channel 0, low byte then high byte, mode 0; a count stops it until it is written.
                cpu::port_out(clock::CONTROL, 0x30);
                interrupts::unmask(PIT_LINE, Trigger::Edge);
            }
            Timer::Lapic => {
                need_apic()?;
                set_apic_rate(scale);
                interrupts::set_local(apic::DIVIDE, BY_1);
                interrupts::set_local(apic::TIMER, TIMER.into());
            }
            Timer::Deadline => {
                need_apic()?;
                if cpu::leaf(1)[2] & 1 << 24 == 0 {
                    return Err(Refusal::Unsupported(
                        "the processor has no TSC-deadline timer",
                    ));
                }
                interrupts::set_local(apic::TIMER, DEADLINE_MODE | u32::from(TIMER));
            }
            Timer::Paravirtual => {
                return Err(Refusal::Unsupported(
                    "this guest knows of no host to ask for a timer",
                ));
            }
        }
        // An edge that came while the line was masked may still be there.
        cpu::take_interrupts();
        let before = one_shot.taken();
        one_shot.arm(50)?;
        if !interrupts::wait(Some(scale.ticks(1_000_000_000)), || {
            one_shot.taken() != before
        }) {
            one_shot.close();
            return Err(Refusal::Broken(SILENT));
        }
        Ok(one_shot)
    }

    /// Silences the timer; returns its expiries.
    pub(crate) fn close(&self) -> u64 {
        match self.timer {
            Timer::Pit => interrupts::mask(PIT_LINE),
            Timer::Lapic | Timer::Deadline => {
                interrupts::set_local(apic::TIMER, apic::MASKED | u32::from(TIMER));
                cpu::take_interrupts();
            }
            Timer::Paravirtual => {}
        }
        self.expiries
    }

    #[inline(always)]
    fn taken(&self) -> u64 {
        match self.timer {
            Timer::Pit => interrupts::taken(PIT_LINE),
            Timer::Lapic | Timer::Deadline | Timer::Paravirtual => interrupts::taken_local(TIMER),
        }
    }

    /// Arms the timer; returns the time stamp that was asked for.
    #[inline(always)]
    fn arm(&self, microseconds: u64) -> Result<u64, Refusal> {
        let interval = self.scale.ticks(microseconds * 1000);
        let start = cpu::time_stamp();
        let due = start + interval;
        match self.timer {
            Timer::Pit => {
                // Mode 0 takes one clock more than the count (8254 data sheet).
                let count = microseconds * clock::PIT_HERTZ / 1_000_000;
                cpu::port_out(clock::CHANNEL_0, count as u8);
                cpu::port_out(clock::CHANNEL_0, (count >> 8) as u8);
            }
            Timer::Lapic => {
                let counts = microseconds * APIC_HERTZ.load(Relaxed) / 1_000_000;
                let Ok(counts @ 1..) = u32::try_from(counts) else {
                    return Err(Refusal::Broken("the interval does not fit the timer"));
                };
                interrupts::set_local(apic::INITIAL_COUNT, counts);
            }
            Timer::Deadline => {
                // SAFETY: the vector has a handler.
                unsafe { cpu::write_msr(DEADLINE, due) };
            }
            Timer::Paravirtual => {}
        }
        Ok(due)
    }

    /// See [`programs::Platform::expire`] and [`programs::Platform::wake`]; `whole` is the latter.
    #[inline(always)]
    pub(crate) fn expire(
        &mut self,
        microseconds: u64,
        whole: bool,
        latencies: &mut Histogram,
    ) -> Result<u64, Refusal> {
        let before = self.taken();
        let due = self.arm(microseconds)?;
        while self.taken() == before {
            cpu::halt();
        }
        let end = if whole {
            cpu::time_stamp()
        } else {
            interrupts::began()
        };
        // What rates may be off, and a clock of the PIT.
        let slack = self.scale.ticks(microseconds * 16 + 2000);
        if interrupts::began() + slack < due {
            return Err(Refusal::Broken("the timer expires before its time"));
        }
        latencies.record(end.saturating_sub(due));
        self.expiries += self.taken().wrapping_sub(before);
        Ok(self.expiries)
    }
}

fn need_apic() -> Result<(), Refusal> {
    if interrupts::has_local() {
        Ok(())
    } else {
        Err(Refusal::Unsupported(NO_APIC))
    }
}

/// Measures the rate of the local APIC's timer against the time-stamp counter, for 10 ms.
fn set_apic_rate(scale: Scale) {
    if APIC_HERTZ.load(Relaxed) != 0 {
        return;
    }
    let ticks = scale.ticks(10_000_000);
    interrupts::set_local(apic::TIMER, apic::MASKED | u32::from(TIMER));
    interrupts::set_local(apic::DIVIDE, BY_1);
    interrupts::set_local(apic::INITIAL_COUNT, u32::MAX);
    let count = || interrupts::local(apic::CURRENT_COUNT);
    let (first, start) = clock::closest(count);
    while cpu::time_stamp().wrapping_sub(start) < ticks {
        cpu::pause();
    }
    let (last, end) = clock::closest(count);
    interrupts::set_local(apic::INITIAL_COUNT, 0);
    let nanoseconds = scale.nanoseconds(end.wrapping_sub(start)).max(1);
    let counts = u64::from(first.wrapping_sub(last));
    APIC_HERTZ.store(counts * 1_000_000_000 / nanoseconds, Relaxed);
}

/// Wakes whoever halts about twice a second, so that who waits can see how long. Without a local
/// APIC nothing does.
pub(crate) fn start_watch() {
    clock::set_up();
    let Some(scale) = clock::scale().filter(|_| interrupts::has_local()) else {
        return;
    };
    set_apic_rate(scale);
    interrupts::set_local(apic::DIVIDE, BY_1);
    interrupts::set_local(apic::TIMER, PERIODIC | u32::from(TIMER));
    let counts = APIC_HERTZ.load(Relaxed) / 2;
    interrupts::set_local(
        apic::INITIAL_COUNT,
        u32::try_from(counts).unwrap_or(u32::MAX),
    );
}

/// Ends [`start_watch`].
pub(crate) fn stop_watch() {
    if interrupts::has_local() {
        interrupts::set_local(apic::INITIAL_COUNT, 0);
        interrupts::set_local(apic::TIMER, apic::MASKED | u32::from(TIMER));
        cpu::take_interrupts();
    }
}

/// Finds what is needed for [`self_interrupt`] and tries it once.
pub(crate) fn open_self(latencies: &mut Histogram) -> Result<(), Refusal> {
    clock::set_up();
    interrupts::set_up();
    need_apic()?;
    self_interrupt(latencies).map(|_| ())
}

/// See [`programs::Platform::self_interrupt`].
#[inline(always)]
pub(crate) fn self_interrupt(latencies: &mut Histogram) -> Result<u64, Refusal> {
    /// Looks at whether it has arrived.
    const MOST: u32 = 10_000_000;
    let before = interrupts::taken_local(SELF);
    let taken = || interrupts::taken_local(SELF).wrapping_sub(before);
    cpu::let_interrupts();
    let start = cpu::time_stamp();
    interrupts::send_self();
    // The window stays open: one of a single instruction would have to meet the moment at which a
    // host that emulates this kernel looks for interrupts.
    let arrived = (0..MOST).any(|_| taken() != 0);
    cpu::mask_interrupts();
    if !arrived {
        return Err(Refusal::Broken("the interrupt does not arrive"));
    }
    latencies.record(interrupts::began().wrapping_sub(start));
    Ok(taken())
}
