//! The two ports that a chipset resets the machine by: system control port A (port 0x92, IBM PS/2
//! technical reference) and the reset control register (port 0xcf9, Intel 82371SB data sheet 3.6.5).
//!
//! What this does not do: gate A20. Its bit is kept and has no effect.

use super::{Action, Device};

/// First and number of the ports, in the order of their offsets.
pub(super) const PORTS: &[(u16, u16)] = &[(0x92, 1), (0xcf9, 1)];
const CONTROL_A: u64 = 0;

/// Port 0x92: a rise resets the processor; address line 20 is open.
const FAST_RESET: u8 = 1;
const A20: u8 = 2;
/// Port 0xcf9: whether what follows is a hard reset, and to do it.
const HARD: u8 = 2;
const RESET: u8 = 4;

/// Both registers.
#[derive(Debug)]
pub struct ResetPorts {
    control: u8,
    kind: u8,
}

impl Default for ResetPorts {
    /// As after power-up.
    fn default() -> Self {
        ResetPorts {
            control: A20,
            kind: 0,
        }
    }
}

impl Device for ResetPorts {
    fn name(&self) -> &'static str {
        "reset"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if let Some(byte) = data.first_mut() {
            *byte = if offset == CONTROL_A {
                self.control
            } else {
                self.kind
            };
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some(&value) = data.first() else {
            return Action::None;
        };
        let resets = if offset == CONTROL_A {
            let rises = value & !self.control & FAST_RESET != 0;
            self.control = value;
            rises
        } else {
            self.kind = value & HARD;
            value & RESET != 0
        };
        if resets { Action::Reset } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_of_the_reset_bits_resets_and_nothing_else_does() {
        let mut ports = ResetPorts::default();
        let read = |ports: &mut ResetPorts, offset| {
            let mut data = [0xff];
            ports.read(offset, &mut data);
            data[0]
        };
        assert_eq!(read(&mut ports, 0), 2);
        for (offset, value, expected) in [
            (0, 0, Action::None),
            (0, 3, Action::Reset),
            (0, 1, Action::None),
            (0, 2, Action::None),
            (0, 1, Action::Reset),
            (1, 2, Action::None),
            (1, 6, Action::Reset),
            (1, 4, Action::Reset),
        ] {
            assert_eq!(ports.write(offset, &[value]), expected, "{offset} {value}");
        }
        assert_eq!((read(&mut ports, 0), read(&mut ports, 1)), (1, 0));
    }
}
