//! The mark port: brackets the measured window. A foreign VMM has nothing there and ignores it.

use super::{Action, Device};

/// Port [`abi::port::MARK`].
#[derive(Debug, Default)]
pub struct MarkPort;

impl Device for MarkPort {
    fn name(&self) -> &'static str {
        "mark"
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Action {
        Action::None
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        data.first()
            .map_or(Action::None, |&value| Action::Mark(value))
    }
}
