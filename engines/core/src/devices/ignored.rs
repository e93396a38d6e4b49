//! Registers that a PC guest writes by habit and that need no answer: reads as zeros.
//!
//! Port 0x80 is the POST code display, which is also written as a short delay.

use super::{Action, Device};

/// A named range that takes writes and reads as zeros.
#[derive(Debug)]
pub struct Ignored(pub &'static str);

impl Device for Ignored {
    fn name(&self) -> &'static str {
        self.0
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Action {
        data.fill(0);
        Action::None
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Action {
        Action::None
    }
}
