//! Device memory under instructions that the runtime executes.
//!
//! Such an instruction is executed anew with each answer of a device until it knows all that it reads;
//! what it writes goes out when it has ended. Strings, which have registers to remember how far they
//! are, see to their devices themselves but for elements across two pages.
//!
//! Invariant: an execution that waits for an answer has changed nothing.

use crate::fault::Fault;

/// Largest access to a device.
const WIDEST: usize = 8;

/// What one instruction has read from devices, and what it wants to know next.
#[derive(Debug, Default)]
pub(crate) struct DeviceLog {
    /// An instruction is being executed that can wait. For all others no device is there.
    listening: bool,
    answers: Vec<(u64, usize, [u8; WIDEST])>,
    wanted: Option<(u64, usize)>,
    writes: Vec<(u64, usize, [u8; WIDEST])>,
}

impl DeviceLog {
    /// An instruction starts, for the first time or again.
    pub(crate) fn start(&mut self) {
        self.listening = true;
        self.wanted = None;
        self.writes.clear();
    }

    /// An execution is under way that can wait.
    pub(crate) fn listening(&self) -> bool {
        self.listening
    }

    /// The instruction has ended. What it leaves to write.
    pub(crate) fn end(&mut self) -> Vec<(u64, usize, [u8; WIDEST])> {
        self.listening = false;
        self.answers.clear();
        std::mem::take(&mut self.writes)
    }

    /// Address and length of what the execution waits for.
    pub(crate) fn wanted(&mut self) -> Option<(u64, usize)> {
        self.wanted.take()
    }

    /// A device's answer to what was wanted.
    pub(crate) fn answer(&mut self, phys: u64, len: usize, value: [u8; WIDEST]) {
        self.answers.push((phys, len, value));
    }

    /// Reads from device memory.
    ///
    /// # Errors
    /// A fault that stands for waiting, where the answer isn't known yet.
    pub(crate) fn read(&mut self, phys: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        if !self.listening {
            bytes.fill(0xff);
            return Ok(());
        }
        for (at, piece) in (phys..).step_by(WIDEST).zip(bytes.chunks_mut(WIDEST)) {
            let known = self
                .answers
                .iter()
                .find(|(phys, len, _)| (*phys, *len) == (at, piece.len()));
            let Some((_, len, value)) = known else {
                self.wanted = Some((at, piece.len()));
                return Err(Fault::waiting());
            };
            piece.copy_from_slice(&value[..*len]);
        }
        Ok(())
    }

    /// Notes a write to device memory.
    pub(crate) fn write(&mut self, phys: u64, bytes: &[u8]) {
        if !self.listening {
            return;
        }
        for (at, piece) in (phys..).step_by(WIDEST).zip(bytes.chunks(WIDEST)) {
            let mut value = [0; WIDEST];
            value[..piece.len()].copy_from_slice(piece);
            self.writes.push((at, piece.len(), value));
        }
    }
}
