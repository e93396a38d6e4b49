//! The ACPI power-management timer (ACPI specification 4.8.2.1): 3.579545 MHz, 24 bits, read only.
//!
//! Its overflow interrupts nobody: there is no SCI.

use super::{Action, Device};
use crate::clock::{Clock, SECOND};

/// First port of the timer on a PC with a PIIX4, as QEMU puts it.
pub(crate) const PORT: u16 = 0x608;

const HZ: u64 = 3_579_545;
const MASK: u32 = 0xff_ffff;

/// The timer.
#[derive(Debug)]
pub struct PmTimer {
    clock: Clock,
}

impl PmTimer {
    /// A timer that starts with the machine.
    pub fn new(clock: Clock) -> Self {
        PmTimer { clock }
    }
}

impl Device for PmTimer {
    fn name(&self) -> &'static str {
        "pm-timer"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let ticks = u128::from(self.clock.now()) * u128::from(HZ) / u128::from(SECOND);
        let value = (ticks as u32 & MASK).to_le_bytes();
        for (byte, value) in data.iter_mut().zip(&value[(offset as usize).min(4)..]) {
            *byte = *value;
        }
        Action::None
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Action {
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_at_its_rate_and_wraps_at_24_bits() {
        let clock = Clock::manual();
        let mut timer = PmTimer::new(clock.clone());
        let mut read = |seconds: u64| {
            clock.set(seconds * SECOND);
            let mut data = [0xff; 4];
            timer.read(0, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0), 0);
        assert_eq!(read(1), HZ as u32);
        assert_eq!(read(5), (5 * HZ as u32) & MASK);
        assert!(read(5) < read(4));
    }
}
