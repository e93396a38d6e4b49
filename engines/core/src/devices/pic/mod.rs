//! The pair of 8259A interrupt controllers of a PC, cascaded on IRQ 2, with the edge/level
//! registers that the EISA bus added (8259A data sheet; Intel 82371 data sheet for ELCR).
//!
//! Followed: the initialisation words, masks, all EOI forms, rotation, automatic EOI, special mask
//! and special fully nested mode, polling, reading IRR and ISR, and the default interrupt 7 (15)
//! when a request vanishes before it is acknowledged. Not followed: MCS-80 mode and buffered mode,
//! which no PC uses.
//!
//! An edge stays latched when its line falls, as in QEMU's and KVM's 8259s (the data sheet wants it
//! held until it is acknowledged), so that devices may pulse. The cascade follows the slave's
//! output as a level.
//!
//! Invariant: the slave's request is input 2 of the master and nothing else is.

#[cfg(test)]
mod tests;

use super::{Action, Device};

/// Input of the master that the slave drives.
const CASCADE: u8 = 2;

const ICW1: u8 = 1 << 4;
const ICW1_ICW4: u8 = 1;
const ICW1_SINGLE: u8 = 1 << 1;
const ICW1_LEVEL: u8 = 1 << 3;
const OCW3: u8 = 1 << 3;
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_NESTED: u8 = 1 << 4;

/// What is expected at the data port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expected {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug, Default)]
struct Pic {
    /// Levels of the inputs.
    lines: u8,
    requested: u8,
    in_service: u8,
    mask: u8,
    /// Inputs that are level-triggered.
    level: u8,
    /// Every input is: ICW1's LTIM.
    all_level: bool,
    /// Vector of input 0.
    base: u8,
    /// The input with the highest priority.
    first: u8,
    expected: Expected,
    icw4_follows: bool,
    single: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    nested: bool,
    special_mask: bool,
    read_in_service: bool,
    poll: bool,
}

impl Pic {
    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rises = level && self.lines & bit == 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.is_level(bit) {
            self.requested = self.requested & !bit | self.lines & bit;
        } else if rises {
            self.requested |= bit;
        }
    }

    fn is_level(&self, bit: u8) -> bool {
        self.all_level || self.level & bit != 0
    }

    /// How far down from the highest priority the first input of `set` is; 8 for none.
    fn priority(&self, set: u8) -> u8 {
        set.rotate_right(self.first.into()).trailing_zeros() as u8
    }

    /// The input that would be acknowledged now.
    fn request(&self, master: bool) -> Option<u8> {
        let wanted = self.priority(self.requested & !self.mask);
        if wanted == 8 {
            return None;
        }
        let mut serving = self.in_service;
        if self.special_mask {
            serving &= !self.mask;
        }
        if self.nested && master {
            // The slave may interrupt its own service.
            serving &= !(1 << CASCADE);
        }
        (wanted < self.priority(serving)).then_some((wanted + self.first) & 7)
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (input + 1) & 7;
        }
        if !self.is_level(bit) {
            self.requested &= !bit;
        }
    }

    fn command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            *self = Pic {
                lines: self.lines,
                level: self.level,
                base: self.base,
                all_level: value & ICW1_LEVEL != 0,
                single: value & ICW1_SINGLE != 0,
                icw4_follows: value & ICW1_ICW4 != 0,
                expected: Expected::Icw2,
                ..Pic::default()
            };
            // The edge detectors start anew; levels that are there count.
            self.requested = self.lines & if self.all_level { 0xff } else { self.level };
        } else if value & OCW3 != 0 {
            self.poll = value & 0b100 != 0;
            match value & 0b11 {
                0b10 => self.read_in_service = false,
                0b11 => self.read_in_service = true,
                _ => {}
            }
            match value >> 5 & 0b11 {
                0b10 => self.special_mask = false,
                0b11 => self.special_mask = true,
                _ => {}
            }
        } else {
            self.end_of_interrupt(value);
        }
    }

    /// OCW2.
    fn end_of_interrupt(&mut self, value: u8) {
        let (rotate, specific, end) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let named = value & 7;
        if !end {
            match (rotate, specific) {
                // Set priority: the named input becomes the lowest.
                (true, true) => self.first = (named + 1) & 7,
                (rotate, false) => self.rotate_on_auto_eoi = rotate,
                (false, true) => {}
            }
            return;
        }
        let input = if specific {
            named
        } else {
            let serving = self.priority(self.in_service);
            if serving == 8 {
                return;
            }
            (serving + self.first) & 7
        };
        self.in_service &= !(1 << input);
        if rotate {
            self.first = (input + 1) & 7;
        }
    }

    fn data(&mut self, value: u8) {
        match self.expected {
            Expected::Mask => self.mask = value,
            Expected::Icw2 => {
                self.base = value & 0xf8;
                self.expected = match (self.single, self.icw4_follows) {
                    (false, _) => Expected::Icw3,
                    (true, true) => Expected::Icw4,
                    (true, false) => Expected::Mask,
                };
            }
            // The cascade is wired and can't be chosen.
            Expected::Icw3 => {
                self.expected = if self.icw4_follows {
                    Expected::Icw4
                } else {
                    Expected::Mask
                };
            }
            Expected::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.nested = value & ICW4_NESTED != 0;
                self.expected = Expected::Mask;
            }
        }
    }
}

/// Number of registers: two of the master, two of the slave, two of the edge/level control.
pub const REGISTERS: u64 = 6;
const MASTER: usize = 0;
const SLAVE: usize = 1;
/// Inputs whose triggering can be chosen: not the timer, the keyboard, the cascade, the clock and
/// the coprocessor (82371, ELCR1 and ELCR2).
const CHOOSABLE: [u8; 2] = [0xf8, 0xde];

/// Both 8259As, master first.
#[derive(Debug)]
pub struct Pics {
    pics: [Pic; 2],
}

impl Default for Pics {
    /// Everything masked and no vectors set: nothing is delivered before a guest initialises them.
    fn default() -> Self {
        let pic = || Pic {
            mask: 0xff,
            ..Pic::default()
        };
        Pics {
            pics: [pic(), pic()],
        }
    }
}

impl Pics {
    /// Drives ISA IRQ `irq`, 0 to 15; the cascade's own is ignored.
    pub fn set_line(&mut self, irq: u8, level: bool) {
        if irq >= 16 || irq == CASCADE {
            return;
        }
        self.pics[usize::from(irq >> 3)].set_line(irq & 7, level);
        self.cascade();
    }

    fn cascade(&mut self) {
        let wanted = self.pics[SLAVE].request(false).is_some();
        let master = &mut self.pics[MASTER];
        master.set_line(CASCADE, wanted);
        if !wanted {
            // The slave's output is followed as a level.
            master.requested &= !(1 << CASCADE);
        }
    }

    /// The INTR output.
    pub fn output(&self) -> bool {
        self.pics[MASTER].request(true).is_some()
    }

    /// The acknowledge cycle: the vector of the highest request, or the default one if it has
    /// vanished.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.pics[MASTER].request(true) {
            Some(CASCADE) => {
                self.pics[MASTER].acknowledge(CASCADE);
                let slave = &mut self.pics[SLAVE];
                let input = slave.request(false);
                if let Some(input) = input {
                    slave.acknowledge(input);
                }
                slave.base | input.unwrap_or(7)
            }
            Some(input) => {
                self.pics[MASTER].acknowledge(input);
                self.pics[MASTER].base | input
            }
            None => self.pics[MASTER].base | 7,
        };
        // The slave's output falls with each acknowledge, so that the next request is seen.
        self.pics[MASTER].lines &= !(1 << CASCADE);
        self.cascade();
        vector
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        if offset >= 4 {
            return self.pics[(offset & 1) as usize].level;
        }
        let index = (offset >> 1) as usize;
        let pic = &mut self.pics[index];
        if std::mem::take(&mut pic.poll) {
            // A poll is an acknowledge cycle by hand.
            let Some(input) = pic.request(index == MASTER) else {
                return 0;
            };
            pic.acknowledge(input);
            self.cascade();
            return 0x80 | input;
        }
        match (offset & 1 == 1, pic.read_in_service) {
            (true, _) => pic.mask,
            (false, true) => pic.in_service,
            (false, false) => pic.requested,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let index = (offset >> 1 & 1) as usize;
        match offset {
            0 | 2 => self.pics[index].command(value),
            1 | 3 => self.pics[index].data(value),
            _ => {
                let index = (offset & 1) as usize;
                self.pics[index].level = value & CHOOSABLE[index];
            }
        }
        self.pics[MASTER].lines &= !(1 << CASCADE);
        self.cascade();
    }
}

impl Device for Pics {
    fn name(&self) -> &'static str {
        "pic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        for (at, byte) in (offset..REGISTERS).zip(data) {
            *byte = self.read_byte(at);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        for (at, &byte) in (offset..REGISTERS).zip(data) {
            self.write_byte(at, byte);
        }
        Action::None
    }
}
