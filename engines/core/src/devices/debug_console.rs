//! The debug console (QEMU's isa-debugcon, from Bochs): a byte written to its port is text for
//! whoever debugs the guest, and reading the port tells that it is there.

use std::io::Write;

use super::{Action, Device};

/// Its port, and what that reads as.
pub(super) const PORT: u16 = 0xe9;

/// The debug console.
pub struct DebugConsole {
    output: Option<Box<dyn Write + Send>>,
}

impl DebugConsole {
    /// A console that writes to `output`; without one, text goes nowhere.
    pub fn new(output: Option<Box<dyn Write + Send>>) -> Self {
        DebugConsole { output }
    }
}

impl Device for DebugConsole {
    fn name(&self) -> &'static str {
        "debug-console"
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Action {
        if let Some(byte) = data.first_mut() {
            *byte = PORT as u8;
        }
        Action::None
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        if let (Some(output), Some(byte)) = (&mut self.output, data.first())
            && output.write_all(&[*byte]).is_err()
        {
            // The guest has no way to know, and its run does not depend on it.
            self.output = None;
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_out_and_the_port_identifies_itself() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut console = DebugConsole::new(Some(Box::new(writer)));
        let mut data = [0];
        console.read(0, &mut data);
        assert_eq!(data, [0xe9]);
        console.write(0, b"h");
        console.write(0, b"i");
        let mut text = [0; 2];
        std::io::Read::read_exact(&mut reader, &mut text).unwrap();
        assert_eq!(&text, b"hi");
        // Nobody reads any more: the guest does not notice.
        drop(reader);
        assert_eq!(console.write(0, b"x"), Action::None);
        assert_eq!(console.write(0, b"x"), Action::None);
    }
}
