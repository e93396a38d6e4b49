//! The MC146818 real-time clock and its CMOS memory (Motorola MC146818 data sheet; the bytes of
//! memory after the clock as PC firmware lays them out).
//!
//! It starts with the host's time of day (UTC) and keeps time by the machine's clock. Periodic,
//! update-ended and alarm interrupts arrive on IRQ 8. Flags are worked out when somebody looks; the
//! host's timer is needed only while an interrupt is enabled.
//!
//! Not there: daylight saving, and the square wave, whose pin a PC leaves open: its enable bit is kept
//! and does nothing else.
//!
//! Invariant: while register B's SET bit is clear, the time registers are a function of the clock.

mod calendar;

#[cfg(test)]
mod tests;

use std::time::{SystemTime, UNIX_EPOCH};

use calendar::DateTime;

use super::{Action, Device};
use crate::GuestPhys;
use crate::clock::{Clock, SECOND};
use crate::interrupt::Line;

/// Interrupt of the clock.
pub const IRQ: u8 = 8;

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const A: usize = 10;
const B: usize = 11;
const C: usize = 12;
const D: usize = 13;
/// Where PC firmware looks after a reset for what to do.
const SHUTDOWN: usize = 15;
/// Where PC firmware keeps the century.
const CENTURY: usize = 0x32;

const UPDATE_IN_PROGRESS: u8 = 0x80;
/// Divider running from the 32768 Hz crystal.
const DIVIDER: u8 = 0x20;
const DIVIDER_RESET: u8 = 0x60;
const SET: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Interrupt enables in register B are the flags in register C.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const INTERRUPT: u8 = 0x80;
const VALID: u8 = 0x80;
const AFTERNOON: u8 = 0x80;
/// Alarm bytes from here on match anything.
const ANY: u8 = 0xc0;

const CRYSTAL_HZ: u64 = 32_768;
/// How long before an update UIP is set (data sheet, tBUC).
const BEFORE_UPDATE: u64 = 244_000;

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    clock: Clock,
    line: Line,
    index: usize,
    memory: [u8; 128],
    /// Nanoseconds since 1970 at the machine's time 0.
    epoch: i128,
    /// Up to when flags have been worked out.
    looked: u64,
}

impl Rtc {
    /// A clock that shows the host's time, with CMOS memory that tells of `memory`.
    pub fn new(clock: Clock, line: Line, memory: &[(GuestPhys, u64)]) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall = since.map_or(0, |since| since.as_nanos() as i128);
        Self::at(clock, line, memory, wall)
    }

    /// As [`new`](Rtc::new), at a time of the caller's choosing, in nanoseconds since 1970.
    pub fn at(clock: Clock, line: Line, memory: &[(GuestPhys, u64)], wall: i128) -> Self {
        let now = clock.now();
        let mut cmos = [0; 128];
        // The rate that firmware sets: 1024 Hz.
        cmos[A] = DIVIDER | 6;
        cmos[B] = HOURS_24;
        cmos[D] = VALID;
        memory_sizes(&mut cmos, memory);
        Rtc {
            clock,
            line,
            index: 0,
            memory: cmos,
            epoch: wall - i128::from(now),
            looked: now,
        }
    }

    /// Nanoseconds since 1970.
    fn wall(&self, now: u64) -> i128 {
        self.epoch + i128::from(now)
    }

    /// The time stands still: software sets it, or holds the divider in reset.
    fn stopped(&self) -> bool {
        self.memory[B] & SET != 0 || self.divider_reset()
    }

    /// Divider bits 11x (data sheet, register A): nothing counts, and the first update comes half a
    /// second after they are taken back. Kernels do this while they set the time.
    fn divider_reset(&self) -> bool {
        self.memory[A] & DIVIDER_RESET == DIVIDER_RESET
    }

    fn encode(&self, value: u8) -> u8 {
        if self.memory[B] & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.memory[B] & BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.memory[B] & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) {
            12
        } else {
            hour % 12
        };
        self.encode(twelve) | if hour >= 12 { AFTERNOON } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.memory[B] & HOURS_24 != 0 {
            return self.decode(byte);
        }
        self.decode(byte & !AFTERNOON) % 12 + if byte & AFTERNOON != 0 { 12 } else { 0 }
    }

    /// Puts the time of `now` into the registers.
    fn show(&mut self, now: u64) {
        let seconds = self.wall(now).div_euclid(i128::from(SECOND)) as i64;
        let time = DateTime::from_seconds(seconds);
        for (register, value) in [
            (SECONDS, time.second),
            (MINUTES, time.minute),
            (WEEKDAY, time.weekday),
            (DAY, time.day),
            (MONTH, time.month),
            (YEAR, time.year.rem_euclid(100) as u8),
            (CENTURY, time.year.div_euclid(100) as u8),
        ] {
            self.memory[register] = self.encode(value);
        }
        self.memory[HOURS] = self.encode_hour(time.hour);
    }

    /// Takes the time from the registers; `fraction` of a second has passed of it.
    fn set(&mut self, now: u64, fraction: i128) {
        let value = |register: usize| self.decode(self.memory[register]);
        let seconds = DateTime {
            year: i64::from(value(CENTURY)) * 100 + i64::from(value(YEAR)),
            month: value(MONTH),
            day: value(DAY),
            weekday: 0,
            hour: self.decode_hour(self.memory[HOURS]),
            minute: value(MINUTES),
            second: value(SECONDS),
        }
        .to_seconds();
        self.epoch = i128::from(seconds) * i128::from(SECOND) + fraction - i128::from(now);
    }

    /// Period of the periodic interrupt, in ticks of the crystal.
    fn period(&self) -> Option<u64> {
        if self.divider_reset() {
            return None;
        }
        match u32::from(self.memory[A] & 0xf) {
            0 => None,
            // The first two rates repeat slower ones.
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// When the periodic flag is set next after `from`.
    fn next_period(&self, from: u64) -> Option<u64> {
        let period = self.period()?;
        let scaled = |value: u64, to: u64, by: u64| {
            (u128::from(value) * u128::from(to) / u128::from(by)) as u64
        };
        let tick = scaled(from, CRYSTAL_HZ, SECOND);
        let next = (tick / period + 1) * period;
        Some(crate::clock::scale(next, CRYSTAL_HZ, SECOND).max(from + 1))
    }

    /// When the next second begins after `from`.
    fn next_second(&self, from: u64) -> Option<u64> {
        if self.stopped() {
            return None;
        }
        let into = self.wall(from).rem_euclid(i128::from(SECOND)) as u64;
        Some(from + SECOND - into)
    }

    /// True if the alarm matches some second after `from` and up to `to`.
    fn alarm_matches(&self, from: u64, to: u64) -> bool {
        let second = |time| self.wall(time).div_euclid(i128::from(SECOND)) as i64;
        let (first, last) = (second(from) + 1, second(to));
        // Times of day repeat.
        (first..=last).take(86_400).any(|seconds| {
            let time = DateTime::from_seconds(seconds);
            let matches = |register: usize, shown: u8| {
                self.memory[register] >= ANY || self.memory[register] == shown
            };
            matches(SECONDS_ALARM, self.encode(time.second))
                && matches(MINUTES_ALARM, self.encode(time.minute))
                && matches(HOURS_ALARM, self.encode_hour(time.hour))
        })
    }

    /// Works out the flags up to `now`, and the interrupt.
    fn look(&mut self, now: u64) {
        let from = self.looked;
        let mut flags = 0;
        if self.next_period(from).is_some_and(|time| time <= now) {
            flags |= PERIODIC;
        }
        if self.next_second(from).is_some_and(|time| time <= now) {
            flags |= UPDATE;
            if self.alarm_matches(from, now) {
                flags |= ALARM;
            }
        }
        self.memory[C] |= flags;
        self.looked = now;
        self.request();
    }

    fn request(&mut self) {
        let wanted = self.memory[C] & self.memory[B] & (PERIODIC | ALARM | UPDATE) != 0;
        if wanted {
            self.memory[C] |= INTERRUPT;
        }
        self.line.set(wanted);
    }

    fn read_register(&mut self) -> u8 {
        let now = self.clock.now();
        let index = self.index;
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY if !self.stopped() => {
                self.show(now);
                self.memory[index]
            }
            A => {
                let left = self.next_second(now).map_or(u64::MAX, |next| next - now);
                let updating = if left <= BEFORE_UPDATE {
                    UPDATE_IN_PROGRESS
                } else {
                    0
                };
                self.memory[A] | updating
            }
            C => {
                self.look(now);
                // Reading acknowledges.
                let flags = std::mem::take(&mut self.memory[C]);
                self.line.set(false);
                flags
            }
            _ => self.memory[index],
        }
    }

    fn write_register(&mut self, value: u8) {
        let now = self.clock.now();
        self.look(now);
        let index = self.index;
        let fraction = self.wall(now).rem_euclid(i128::from(SECOND));
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                if self.stopped() {
                    self.memory[index] = value;
                } else {
                    self.show(now);
                    self.memory[index] = value;
                    self.set(now, fraction);
                }
            }
            A | B => {
                let was_stopped = self.stopped();
                if !was_stopped {
                    self.show(now);
                }
                self.memory[index] = match index {
                    A => value & !UPDATE_IN_PROGRESS,
                    // SET clears the update-ended interrupt enable.
                    _ if value & SET != 0 => value & !UPDATE,
                    _ => value,
                };
                if was_stopped && !self.stopped() {
                    // The first update comes half a second later (data sheet, SET).
                    self.set(now, i128::from(SECOND / 2));
                }
                self.request();
            }
            C | D => {}
            _ => self.memory[index] = value,
        }
    }
}

/// The sizes of memory as firmware leaves them: below 1 MiB, from there to 64 MiB in KiB, from 16
/// MiB to 4 GiB and above 4 GiB in units of 64 KiB.
fn memory_sizes(cmos: &mut [u8; 128], memory: &[(GuestPhys, u64)]) {
    const MIB: u64 = 1 << 20;
    let below = memory
        .iter()
        .filter(|(start, _)| start.0 < 4 << 30)
        .map(|(start, size)| start.0 + size)
        .max()
        .unwrap_or(0);
    let above: u64 = memory
        .iter()
        .filter(|(start, _)| start.0 >= 4 << 30)
        .map(|(_, size)| size)
        .sum();
    let mut put = |at: &[usize], value: u64| {
        for (byte, &at) in value.to_le_bytes().iter().zip(at) {
            cmos[at] = *byte;
        }
    };
    let kib = |bytes: u64| (bytes >> 10).min(0xffff);
    put(&[0x15, 0x16], (below >> 10).min(640));
    let extended = kib(below.saturating_sub(MIB));
    put(&[0x17, 0x18], extended);
    put(&[0x30, 0x31], extended);
    put(
        &[0x34, 0x35],
        (below.saturating_sub(16 * MIB) >> 16).min(0xffff),
    );
    put(&[0x5b, 0x5c, 0x5d], (above >> 16).min(0xff_ffff));
}

impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn shutdown_code(&self) -> u8 {
        self.memory[SHUTDOWN]
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        // The index can't be read.
        if let (1, [byte, ..]) = (offset, data) {
            *byte = self.read_register();
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            // Bit 7 masks NMIs, of which there are none.
            (0, &[value]) => self.index = usize::from(value & 0x7f),
            // A word names a register and fills it.
            (0, &[index, value, ..]) => {
                self.index = usize::from(index & 0x7f);
                self.write_register(value);
            }
            (1, &[value, ..]) => self.write_register(value),
            _ => {}
        }
        Action::None
    }

    fn deadline(&self) -> Option<u64> {
        let enabled = self.memory[B] & !self.memory[C];
        let periodic = (enabled & PERIODIC != 0)
            .then(|| self.next_period(self.looked))
            .flatten();
        let second = (enabled & (UPDATE | ALARM) != 0)
            .then(|| self.next_second(self.looked))
            .flatten();
        periodic.into_iter().chain(second).min()
    }

    fn advance(&mut self, now: u64) {
        self.look(now);
    }
}
