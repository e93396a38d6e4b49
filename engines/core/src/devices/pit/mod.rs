//! The 8254 interval timer of a PC and port 0x61 (Intel 8254 data sheet; 82371 data sheet for the
//! port).
//!
//! Counter 0 drives IRQ 0, its gate is high for good. Counter 1, once the memory's refresh, drives
//! nothing. Counter 2's gate and output are bits of port 0x61, by which kernels time other clocks.
//! Nothing sounds.
//!
//! Only rising edges of counter 0 reach the interrupt controllers: the line falls just before it
//! rises again, so a periodic counter needs one host timer a period. Periods that the host slept
//! through are lost.

mod counter;

#[cfg(test)]
mod tests;

use counter::Counter;

use super::{Action, Device};
use crate::clock::Clock;
use crate::interrupt::Line;

/// Interrupt of counter 0.
pub const IRQ: u8 = 0;
/// Offset of port 0x61, after the timer's own four registers.
const SYSTEM_CONTROL: u64 = 4;
const CONTROL: u64 = 3;

/// Interrupts closer than this would leave the guest no time between them.
const SHORTEST_PERIOD: u64 = 20_000;
/// Half a period of the refresh request that port 0x61 shows.
const REFRESH: u64 = 15_085;

/// The timer and port 0x61.
#[derive(Debug)]
pub struct Pit {
    clock: Clock,
    line: Line,
    counters: [Counter; 3],
    speaker: bool,
    /// When counter 0's output rises next.
    rise: Option<u64>,
}

impl Pit {
    /// A timer that counts nothing yet and interrupts through `line`.
    pub fn new(clock: Clock, line: Line) -> Self {
        Pit {
            clock,
            line,
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            speaker: false,
            rise: None,
        }
    }

    /// Counter 0 has been set anew.
    fn follow(&mut self, now: u64) {
        self.line.set(self.counters[0].output(now));
        self.rise = self.counters[0].next_rise(now);
    }

    fn command(&mut self, word: u8, now: u64) {
        let number = usize::from(word >> 6);
        if let Some(counter) = self.counters.get_mut(number) {
            if word >> 4 & 3 == 0 {
                counter.latch(now);
            } else {
                counter.control(word);
                if number == 0 {
                    self.follow(now);
                }
            }
            return;
        }
        // Read back: low bits mean yes.
        for (number, counter) in self.counters.iter_mut().enumerate() {
            if word >> (number + 1) & 1 == 1 {
                if word & 0x20 == 0 {
                    counter.latch(now);
                }
                if word & 0x10 == 0 {
                    counter.latch_status(now);
                }
            }
        }
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        let now = self.clock.now();
        match offset {
            0..=2 => self.counters[offset as usize].read(now),
            // The control register can't be read.
            CONTROL => 0xff,
            _ => {
                let refresh = (now / REFRESH) & 1 == 1;
                u8::from(self.counters[2].gate())
                    | u8::from(self.speaker) << 1
                    | u8::from(refresh) << 4
                    | u8::from(self.counters[2].output(now)) << 5
            }
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let now = self.clock.now();
        match offset {
            0..=2 => {
                self.counters[offset as usize].write(value, now);
                if offset == 0 {
                    self.follow(now);
                }
            }
            CONTROL => self.command(value, now),
            _ => {
                self.counters[2].set_gate(value & 1 != 0, now);
                self.speaker = value & 2 != 0;
            }
        }
    }
}

impl Device for Pit {
    fn name(&self) -> &'static str {
        "pit"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        for (at, byte) in (offset..=SYSTEM_CONTROL).zip(data) {
            *byte = self.read_byte(at);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        for (at, &byte) in (offset..=SYSTEM_CONTROL).zip(data) {
            self.write_byte(at, byte);
        }
        Action::None
    }

    fn deadline(&self) -> Option<u64> {
        self.rise
    }

    fn advance(&mut self, now: u64) {
        if self.rise.is_some_and(|rise| rise <= now) {
            self.line.set(false);
            self.line.set(true);
            let next = self.counters[0].next_rise(now);
            self.rise = next.map(|rise| rise.max(now + SHORTEST_PERIOD));
        }
    }
}
