//! Power management (ACPI specification 4.8): the timer, the event and control registers of block
//! PM1a, and the two sleep states that a machine without buttons needs: off, and suspended to RAM.
//!
//! The timer counts at 3.579545 MHz, in 24 bits, and is the only source of events: each change of its
//! highest bit sets TMR_STS. ACPI is always on, for there is no SMI to switch it by. Whoever is
//! suspended goes on at once, at the reset vector, where firmware waits for what wakes it.
//!
//! Layout and numbers of sleep types are those of a PIIX4 (Intel 82371AB data sheet 7.2), which guests
//! of QEMU know.

use super::{Action, Device};
use crate::clock::{Clock, SECOND};
use crate::interrupt::Line;

/// Status and enable of events, control, then the timer, in the order of their offsets.
pub(super) const PORTS: &[(u16, u16)] = &[(EVENTS, 4), (CONTROL, 2), (TIMER, 4)];
/// First port of PM1a_EVT_BLK.
pub(crate) const EVENTS: u16 = 0x600;
/// First port of PM1a_CNT_BLK.
pub(crate) const CONTROL: u16 = 0x604;
/// First port of the timer.
pub(crate) const TIMER: u16 = 0x608;
/// The system control interrupt. A PC's is 9, where this machine has its network.
pub(crate) const IRQ: u8 = 15;

const STATUS_AT: u64 = 0;
const ENABLE_AT: u64 = 2;
const CONTROL_AT: u64 = 4;
const TIMER_AT: u64 = 6;

/// TMR_STS and TMR_EN.
const TIMER_EVENT: u16 = 1;
/// WAK_STS.
const WOKEN: u16 = 1 << 15;
/// TMR, GBL, PWRBTN, SLPBTN and RTC of the enable register.
const EVENTS_KNOWN: u16 = 0x0721;
const SCI_ENABLED: u16 = 1;
/// SCI_EN, BM_RLD, SLP_TYP: GBL_RLS and SLP_EN read as zero.
const CONTROL_KEPT: u16 = 0x1c03;
const SLEEP: u16 = 1 << 13;
/// SLP_TYP of S5; `_S5_` in the DSDT says so.
pub(crate) const OFF: u8 = 0;
/// SLP_TYP of S3.
const SUSPEND: u8 = 1;

const HZ: u64 = 3_579_545;
const MASK: u32 = 0xff_ffff;
/// Ticks between changes of the highest bit.
const HALF: u64 = 1 << 23;

/// Timer and registers.
#[derive(Debug)]
pub struct Power {
    clock: Clock,
    line: Line,
    enabled: u16,
    control: u16,
    /// How many changes of the timer's highest bit the guest has acknowledged.
    seen: u64,
    /// It has been suspended, and the guest has not acknowledged that it goes on.
    woken: bool,
}

fn ticks(now: u64) -> u64 {
    (u128::from(now) * u128::from(HZ) / u128::from(SECOND)) as u64
}

impl Power {
    /// Registers after reset, with a timer that starts with the machine; `line` is the SCI.
    pub fn new(clock: Clock, line: Line) -> Self {
        Power {
            clock,
            line,
            enabled: 0,
            control: SCI_ENABLED,
            seen: 0,
            woken: false,
        }
    }

    fn status(&self) -> u16 {
        let passed = ticks(self.clock.now()) / HALF > self.seen;
        let bit = |set: bool, bit: u16| if set { bit } else { 0 };
        bit(passed, TIMER_EVENT) | bit(self.woken, WOKEN)
    }

    fn request(&self) {
        self.line.set(self.status() & self.enabled != 0);
    }

    /// All registers, as they lie.
    fn registers(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        let words = [self.status(), self.enabled, self.control];
        for (word, value) in bytes.chunks_exact_mut(2).zip(words) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        let timer = ticks(self.clock.now()) as u32 & MASK;
        bytes[TIMER_AT as usize..].copy_from_slice(&timer.to_le_bytes());
        bytes
    }

    fn sleep(&mut self) -> Action {
        match (self.control >> 10 & 7) as u8 {
            OFF => Action::Off,
            SUSPEND => {
                self.woken = true;
                Action::Suspend
            }
            // Other states are nobody's here.
            _ => Action::None,
        }
    }
}

impl Device for Power {
    fn name(&self) -> &'static str {
        "power"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let registers = self.registers();
        let wanted = &registers[(offset as usize).min(registers.len())..];
        // Nothing drives what lies beyond.
        for (byte, value) in data.iter_mut().zip(wanted) {
            *byte = *value;
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut sleeps = false;
        for (at, &byte) in (offset..).zip(data) {
            let shift = 8 * (at & 1);
            let value = u16::from(byte) << shift;
            let put = |register: &mut u16| *register = *register & !(0xff << shift) | value;
            match at {
                // Ones clear.
                STATUS_AT..ENABLE_AT => {
                    if value & TIMER_EVENT != 0 {
                        self.seen = ticks(self.clock.now()) / HALF;
                    }
                    self.woken &= value & WOKEN == 0;
                }
                ENABLE_AT..CONTROL_AT => {
                    put(&mut self.enabled);
                    self.enabled &= EVENTS_KNOWN;
                }
                CONTROL_AT..TIMER_AT => {
                    put(&mut self.control);
                    sleeps |= self.control & SLEEP != 0;
                    self.control = self.control & CONTROL_KEPT | SCI_ENABLED;
                }
                _ => {}
            }
        }
        self.request();
        if sleeps { self.sleep() } else { Action::None }
    }

    fn deadline(&self) -> Option<u64> {
        // Who has been told already waits for the guest.
        if self.enabled & TIMER_EVENT == 0 || self.line.level() {
            return None;
        }
        let at = u128::from((self.seen + 1) * HALF) * u128::from(SECOND);
        Some(at.div_ceil(u128::from(HZ)) as u64)
    }

    fn advance(&mut self, _now: u64) {
        self.request();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power() -> (Power, Clock, Line) {
        let (clock, line) = (Clock::manual(), Line::disconnected());
        (Power::new(clock.clone(), line.clone()), clock, line)
    }

    fn read(power: &mut Power, offset: u64) -> u16 {
        let mut data = [0xff; 2];
        power.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_timer_counts_at_its_rate_and_wraps_at_24_bits() {
        let (mut power, clock, _) = power();
        let mut read = |seconds: u64| {
            clock.set(seconds * SECOND);
            let mut data = [0xff; 4];
            power.read(TIMER_AT, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0), 0);
        assert_eq!(read(1), HZ as u32);
        assert_eq!(read(5), (5 * HZ as u32) & MASK);
        assert!(read(5) < read(4));
        let mut data = [0xff; 8];
        power.read(TIMER_AT + 3, &mut data);
        assert_eq!(data, [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn a_change_of_the_highest_bit_is_an_event_until_it_is_acknowledged() {
        let (mut power, clock, line) = power();
        clock.set(2 * SECOND);
        assert_eq!(read(&mut power, STATUS_AT), 0);
        clock.set(3 * SECOND);
        assert_eq!(read(&mut power, STATUS_AT), TIMER_EVENT);
        assert!(!line.level() && power.deadline().is_none());
        power.write(STATUS_AT, &[1, 0]);
        power.write(ENABLE_AT, &[0xff, 0xff]);
        assert_eq!(read(&mut power, ENABLE_AT), EVENTS_KNOWN);
        let due = power.deadline().expect("the next change");
        assert!((4 * SECOND..5 * SECOND).contains(&due));
        clock.set(due - 1);
        power.advance(due - 1);
        assert!(!line.level());
        clock.set(due);
        power.advance(due);
        assert!(line.level() && power.deadline().is_none());
        power.write(STATUS_AT, &[1, 0]);
        assert!(!line.level() && power.deadline() > Some(due));
    }

    #[test]
    fn control_is_always_on_and_sleeps_when_told_to() {
        let (mut power, _, _) = power();
        assert_eq!(read(&mut power, CONTROL_AT), SCI_ENABLED);
        assert_eq!(power.write(CONTROL_AT, &[0x04, 0x14]), Action::None);
        assert_eq!(read(&mut power, CONTROL_AT), 0x1401);
        // The type may come with the bit that enters it, or before it.
        assert_eq!(power.write(CONTROL_AT, &[0x01, 0x20]), Action::Off);
        assert_eq!(power.write(CONTROL_AT, &[0x00, 0x24]), Action::Suspend);
        assert_eq!(read(&mut power, STATUS_AT), WOKEN);
        power.write(STATUS_AT, &[0, 0x80]);
        assert_eq!(read(&mut power, STATUS_AT), 0);
        assert_eq!(power.write(CONTROL_AT + 1, &[0x20]), Action::Off);
        assert_eq!(power.write(CONTROL_AT, &[0x00, 0x3c]), Action::None);
        assert_eq!(read(&mut power, CONTROL_AT), 0x1c01);
    }
}
