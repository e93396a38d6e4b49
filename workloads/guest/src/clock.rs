//! How fast the time-stamp counter ticks.
//!
//! The processor says so in CPUID, or a hypervisor does; else it is measured against the 8254's
//! channel 0, as operating systems do. Measured once, outside of every window.

use crate::cpu;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use programs::io::histogram::Scale;

/// The 8254's clock, in hertz (the colour burst of NTSC times 4, by 12).
pub(crate) const PIT_HERTZ: u64 = 1_193_182;

/// Channel 0, and the control register.
pub(crate) const CHANNEL_0: u16 = 0x40;
pub(crate) const CONTROL: u16 = 0x43;

/// Ticks a second; 0 while unknown.
static HERTZ: AtomicU64 = AtomicU64::new(0);

/// Set by the first try: another would find no more.
static TRIED: AtomicBool = AtomicBool::new(false);

/// Finds the rate out, if that has not been done.
pub(crate) fn set_up() {
    if !TRIED.swap(true, Relaxed) {
        let hertz = announced().or_else(measured).unwrap_or(0);
        HERTZ.store(hertz, Relaxed);
    }
}

/// What a tick is; `None` if that can't be found out.
pub(crate) fn scale() -> Option<Scale> {
    Scale::new(HERTZ.load(Relaxed))
}

/// The rate by CPUID: leaf 15h (SDM 3A 18.7.3), or the timing leaf 4000_0010h that hypervisors have.
fn announced() -> Option<u64> {
    if cpu::leaf(0)[0] >= 0x15 {
        let [denominator, numerator, crystal, _] = cpu::leaf(0x15).map(u64::from);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            return Some(crystal * numerator / denominator);
        }
    }
    let hypervisor = cpu::leaf(1)[2] >> 31 != 0;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&cpu::leaf(0x4000_0000)[0]) {
        let kilohertz: u64 = cpu::leaf(0x4000_0010)[0].into();
        if kilohertz != 0 {
            return Some(kilohertz * 1000);
        }
    }
    None
}

/// The rate against the 8254: two measurements of 10 ms in a row that agree. The count wraps after
/// 55 ms, so who is kept from running for so long in the middle of one measures nonsense.
fn measured() -> Option<u64> {
    const TRIES: u32 = 20;
    let mut last = against_pit(11_932)?;
    for _ in 0..TRIES {
        let next = against_pit(11_932)?;
        if next.abs_diff(last) <= last / 256 {
            return Some(next);
        }
        last = next;
    }
    None
}

/// The rate against `clocks` clocks of the 8254; `None` if there is none. Channel 0 is used, whose
/// line is masked: not every PC has the port by which channel 2 is heard. Leaves it counting once.
pub(crate) fn against_pit(clocks: u16) -> Option<u64> {
    /// Looks at the count, most.
    const MOST: u32 = 10_000_000;
    // Low byte then high byte, mode 0: counts down once from the top.
    cpu::port_out(CONTROL, 0x30);
    cpu::port_out(CHANNEL_0, 0xff);
    cpu::port_out(CHANNEL_0, 0xff);
    let (first, start) = closest(latched);
    for _ in 0..MOST {
        let passed = first.wrapping_sub(latched());
        if passed >= clocks {
            let (last, end) = closest(latched);
            let passed = u64::from(first.wrapping_sub(last)).max(1);
            return Some(end.wrapping_sub(start) * PIT_HERTZ / passed);
        }
        // An empty bus reads all ones for ever. So many ticks are 50 ms and more.
        if passed == 0 && cpu::time_stamp().wrapping_sub(start) > 1 << 28 {
            return None;
        }
    }
    None
}

/// Reads another clock and the time stamp at once: of some tries, the one that took the shortest. Who
/// runs this machine may do something else in the middle of any.
pub(crate) fn closest<T: Copy>(read: impl Fn() -> T) -> (T, u64) {
    let try_once = || {
        let before = cpu::time_stamp();
        let value = read();
        let width = cpu::time_stamp().wrapping_sub(before);
        (width, value, before + width / 2)
    };
    let mut best = try_once();
    for _ in 0..8 {
        let next = try_once();
        if next.0 < best.0 {
            best = next;
        }
    }
    (best.1, best.2)
}

/// The count of channel 0, latched (8254 data sheet, counter latch command).
fn latched() -> u16 {
    cpu::port_out(CONTROL, 0);
    let low = cpu::port_in(CHANNEL_0);
    u16::from_le_bytes([low, cpu::port_in(CHANNEL_0)])
}
