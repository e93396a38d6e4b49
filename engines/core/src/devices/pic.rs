//! One 8259A interrupt controller, as far as a guest goes that initialises and masks it and then
//! uses the local APIC: the initialisation words are followed, the mask reads back, and no request
//! is ever raised, because no device here has an interrupt line.

use super::{Action, Device};

/// One 8259A: offset 0 is its command port, offset 1 its data port.
#[derive(Debug)]
pub struct Pic {
    mask: u8,
    /// Initialisation words that are still to come through the data port.
    expected: u8,
}

impl Default for Pic {
    fn default() -> Self {
        Pic {
            mask: 0xff,
            expected: 0,
        }
    }
}

/// ICW1: this is an initialisation word.
const ICW1: u8 = 1 << 4;
/// ICW1: no cascade, so no ICW3.
const ICW1_SINGLE: u8 = 1 << 1;
/// ICW1: ICW4 follows.
const ICW1_ICW4: u8 = 1;

impl Device for Pic {
    fn name(&self) -> &'static str {
        "pic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if let Some(byte) = data.first_mut() {
            // Command port: IRR or ISR, both empty.
            *byte = if offset == 1 { self.mask } else { 0 };
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some(&value) = data.first() else {
            return Action::None;
        };
        if offset == 0 {
            if value & ICW1 != 0 {
                self.mask = 0;
                // ICW2 always follows; ICW3 and ICW4 as announced (8259A data sheet).
                self.expected =
                    1 + u8::from(value & ICW1_SINGLE == 0) + u8::from(value & ICW1_ICW4 != 0);
            }
        } else if self.expected > 0 {
            self.expected -= 1;
        } else {
            self.mask = value;
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_reads_back_after_four_initialisation_words() {
        let mut pic = Pic::default();
        pic.write(0, &[0x11]);
        for word in [0x20, 0x04, 0x01] {
            pic.write(1, &[word]);
        }
        pic.write(1, &[0xfb]);
        let mut mask = [0xff];
        pic.read(1, &mut mask);
        assert_eq!(mask, [0xfb]);
    }
}
