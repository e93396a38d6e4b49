//! Devices that conformance images test their processor with, laid out as QEMU's pc-testdev lays
//! them out: ports and memory that keep what is written to them, and the interrupt lines at ports.
//!
//! What this does not do: the page-flushing port, which is taken and ignored; there is nothing that
//! it could flush.

use super::{Action, Device};
use crate::{GuestPhys, Line, Machine};

/// Ports that keep what is written.
const KEEPER: (u16, u16) = (0xe0, 4);
const FLUSH: (u16, u16) = (0xe4, 4);
const LINES: (u16, u16) = (0x2000, 24);
const MEMORY: GuestPhys = GuestPhys(0xff00_0000);
const MEMORY_BYTES: u64 = 0x1_0000;

/// Adds them all.
///
/// # Errors
/// The host's.
pub fn add(machine: &mut Machine) -> std::io::Result<()> {
    let lines = (0..LINES.1)
        .map(|number| machine.line(number as u8))
        .collect();
    machine.add_ports(&[KEEPER], Box::new(Keeper(vec![0; KEEPER.1.into()])))?;
    machine.add_ports(&[FLUSH], Box::new(Keeper(Vec::new())))?;
    machine.add_ports(&[LINES], Box::new(Lines(lines)))?;
    let memory = Keeper(vec![0; MEMORY_BYTES as usize]);
    machine.add_memory(MEMORY, MEMORY_BYTES, Box::new(memory))?;
    Ok(())
}

/// Bytes that are there to be written and read, without being RAM.
struct Keeper(Vec<u8>);

impl Device for Keeper {
    fn name(&self) -> &'static str {
        "testdev"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let kept = self.0.iter().skip(offset as usize);
        data.iter_mut()
            .zip(kept)
            .for_each(|(byte, kept)| *byte = *kept);
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let kept = self.0.iter_mut().skip(offset as usize);
        kept.zip(data).for_each(|(kept, byte)| *kept = *byte);
        Action::None
    }
}

/// One port a line: what is written there is its level.
struct Lines(Vec<Line>);

impl Device for Lines {
    fn name(&self) -> &'static str {
        "testdev lines"
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) -> Action {
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let (Some(line), Some(&level)) = (self.0.get(offset as usize), data.first()) {
            line.set(level != 0);
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_no_more() {
        let mut keeper = Keeper(vec![0; 4]);
        keeper.write(1, &[1, 2]);
        keeper.write(3, &[3, 4, 5]);
        let mut data = [0xff; 6];
        keeper.read(0, &mut data);
        assert_eq!(data, [0, 1, 2, 3, 0xff, 0xff]);
    }
}
