//! The exit port: a write ends the guest (QEMU's isa-debug-exit, with the code unscaled).

use super::{Action, Device};

/// Port [`abi::port::EXIT`].
#[derive(Debug, Default)]
pub struct ExitPort;

impl Device for ExitPort {
    fn name(&self) -> &'static str {
        "exit"
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Action {
        Action::None
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        let mut code = [0; 4];
        for (slot, &byte) in code.iter_mut().zip(data) {
            *slot = byte;
        }
        Action::Exit(u32::from_le_bytes(code))
    }
}
