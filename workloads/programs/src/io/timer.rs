//! `timer_*`, `hlt_wake`, `self_ipi`: interrupts that the processor asks for itself.
//!
//! A timer's iteration: arm it as a one-shot for SIZE microseconds, halt, take the interrupt. The
//! histogram holds how much later than asked for the handler began. `hlt_wake` does that with
//! whatever timer the machine has at hand, and its histogram goes up to the instruction after the
//! halt. `self_ipi` sends itself an interrupt and takes it; its histogram goes from the sending to
//! the handler's beginning.
//!
//! The checksum counts expiries: each iteration takes exactly one.

use super::Io;
use crate::{Group, Platform, Refusal, Ring, Workload, fold, workload::Program};

/// Most microseconds: a second.
pub const MOST: u64 = 1_000_000;
/// Most microseconds of a PIT, whose counter has 16 bits at 1.193182 MHz.
pub const PIT_MOST: u64 = 54_000;

/// A one-shot timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// Channel 0 of the 8254, mode 0.
    Pit,
    /// The local APIC's timer, one-shot mode.
    Lapic,
    /// The local APIC's timer, TSC-deadline mode.
    Deadline,
    /// The host's, by hypercall.
    Paravirtual,
}

const fn workload(
    name: &'static str,
    size: u64,
    iterations: u64,
    operation: &'static str,
    io: Io,
) -> Workload {
    Workload {
        name,
        group: Group::Io,
        ring: Ring::Kernel,
        size,
        iterations,
        operation,
        program: Program::Io(io),
    }
}

pub(crate) const PIT: Workload = workload(
    "timer_pit",
    200,
    20,
    "the PIT's channel 0 as one-shot of SIZE us, hlt, its interrupt",
    Io::Timer(Timer::Pit),
);
pub(crate) const LAPIC: Workload = workload(
    "timer_lapic",
    200,
    20,
    "the local APIC's timer as one-shot of SIZE us, hlt, its interrupt",
    Io::Timer(Timer::Lapic),
);
pub(crate) const DEADLINE: Workload = workload(
    "timer_tscdl",
    200,
    20,
    "the local APIC's TSC deadline SIZE us ahead, hlt, its interrupt",
    Io::Timer(Timer::Deadline),
);
pub(crate) const PARAVIRTUAL: Workload = workload(
    "timer_pv",
    200,
    20,
    "the host's one-shot timer of SIZE us by hypercall, block, its event",
    Io::Timer(Timer::Paravirtual),
);
pub(crate) const HALT_WAKE: Workload = workload(
    "hlt_wake",
    50,
    20,
    "hlt, woken by a one-shot timer SIZE us later",
    Io::HaltWake,
);
pub(crate) const SELF_INTERRUPT: Workload = workload(
    "self_ipi",
    1,
    100,
    "an interrupt that the processor sends to itself",
    Io::SelfInterrupt,
);

#[inline(always)]
pub(super) fn expiries<P: Platform>(
    platform: &mut P,
    timer: Timer,
    microseconds: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.expire(timer, microseconds)?);
    }
    Ok(sum)
}

#[inline(always)]
pub(super) fn wakes<P: Platform>(
    platform: &mut P,
    microseconds: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.wake(microseconds)?);
    }
    Ok(sum)
}

#[inline(always)]
pub(super) fn self_interrupts<P: Platform>(
    platform: &mut P,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.self_interrupt()?);
    }
    Ok(sum)
}
