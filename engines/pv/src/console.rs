//! The guest's console: rings shared with the guest on one side, the host's descriptors on the other.
//!
//! Invariant: what K wrote into the rings' indices is checked at every use; the buffers are bounded;
//! writing never blocks, because it happens only when the descriptor takes output.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::hypercall::ConsoleRing;
use engine_core::host::console::Sink;
use engine_core::machine::Source;
use rustix::event::{PollFd, PollFlags, Timespec};

/// Output that may wait for the host's reader before the guest is held.
const WAITING: usize = 64 * 1024;
/// PIPE_BUF: what a pipe that polls as writable takes at once.
const CHUNK: usize = 4096;

/// The guest has put nonsense into a ring's indices, or the host's end has failed.
#[derive(Debug)]
pub(crate) enum Broken {
    /// A producer or consumer where it can't be.
    Ring,
    /// The host's reader is gone.
    Closed,
}

/// Both ends of the console.
#[derive(Debug)]
pub(crate) struct Console {
    input: Option<OwnedFd>,
    /// Input that does not fit into the ring yet.
    arrived: Vec<u8>,
    ended: bool,
    output: Sink,
    waiting: Vec<u8>,
}

impl Console {
    pub(crate) fn new(input: Source, output: Sink) -> Self {
        let (input, arrived) = match input {
            Source::Descriptor(fd) => (Some(fd), Vec::new()),
            Source::Bytes(bytes) => (None, bytes),
        };
        Console {
            ended: input.is_none(),
            input,
            arrived,
            output,
            waiting: Vec::new(),
        }
    }

    /// What a sink in memory has kept.
    pub(crate) fn kept(&self) -> &[u8] {
        match &self.output {
            Sink::Descriptor(_) => &[],
            Sink::Memory(kept) => kept,
        }
    }

    /// The descriptor to wait for input on, if there is room for some.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input
            .as_ref()
            .filter(|_| self.arrived.is_empty())
            .map(AsFd::as_fd)
    }

    /// The descriptor to wait for, while output waits for it.
    pub(crate) fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.output {
            Sink::Descriptor(fd) if !self.waiting.is_empty() => Some(fd.as_fd()),
            Sink::Descriptor(_) | Sink::Memory(_) => None,
        }
    }

    /// Input waits for room in the ring.
    pub(crate) fn held(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// No input will come any more and all has been taken.
    pub(crate) fn exhausted(&self, ring: &ConsoleRing) -> bool {
        self.ended
            && self.arrived.is_empty()
            && ring.input_consumer.load(Acquire) == ring.input_producer.load(Relaxed)
    }

    /// Reads input that has arrived.
    pub(crate) fn read(&mut self) {
        let Some(fd) = &self.input else { return };
        let mut buffer = [0; CHUNK];
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) => {
                self.ended = true;
                self.input = None;
            }
            Ok(count) => self.arrived.extend_from_slice(&buffer[..count]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => {
                self.ended = true;
                self.input = None;
            }
        }
    }

    /// Moves input into the ring. True if the guest has to be told.
    pub(crate) fn feed(&mut self, ring: &ConsoleRing) -> Result<bool, Broken> {
        let size = ring.input.len() as u32;
        let producer = ring.input_producer.load(Relaxed);
        let used = producer.wrapping_sub(ring.input_consumer.load(Acquire));
        if used > size {
            return Err(Broken::Ring);
        }
        let count = self.arrived.len().min((size - used) as usize);
        for (index, byte) in self.arrived.drain(..count).enumerate() {
            let at = producer.wrapping_add(index as u32) % size;
            ring.input[at as usize].store(byte, Relaxed);
        }
        ring.input_producer
            .store(producer.wrapping_add(count as u32), Release);
        let ends = self.ended && self.arrived.is_empty() && ring.input_ended.swap(1, Release) == 0;
        Ok(count > 0 || ends)
    }

    /// Takes what the guest has put into the ring, as long as there is room, and writes what the
    /// host takes at once. True if the ring is empty now; if not, [`output`](Self::output) is what to
    /// wait for.
    pub(crate) fn take(&mut self, ring: &ConsoleRing) -> Result<bool, Broken> {
        let size = ring.output.len() as u32;
        loop {
            let consumer = ring.output_consumer.load(Relaxed);
            let used = ring.output_producer.load(Acquire).wrapping_sub(consumer);
            if used > size {
                return Err(Broken::Ring);
            }
            if used == 0 {
                self.write(false)?;
                return Ok(true);
            }
            if self.waiting.len() + used as usize > WAITING {
                self.write(false)?;
                // Writing may have made room, and then nothing waits for a descriptor any more.
                if self.waiting.len() + used as usize > WAITING {
                    return Ok(false);
                }
            }
            for index in 0..used {
                let at = consumer.wrapping_add(index) % size;
                self.waiting.push(ring.output[at as usize].load(Relaxed));
            }
            ring.output_consumer
                .store(consumer.wrapping_add(used), Release);
        }
    }

    /// Writes what waits: as much as the host takes at once, or, at the end of a run, what it takes
    /// within a short while.
    pub(crate) fn write(&mut self, last: bool) -> Result<(), Broken> {
        let fd = match &mut self.output {
            Sink::Memory(kept) => {
                kept.append(&mut self.waiting);
                return Ok(());
            }
            Sink::Descriptor(fd) => fd,
        };
        let patience = Timespec {
            tv_sec: last.into(),
            tv_nsec: 0,
        };
        while !self.waiting.is_empty() {
            let mut poll = [PollFd::new(&*fd, PollFlags::OUT)];
            match rustix::event::poll(&mut poll, Some(&patience)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return Err(Broken::Closed),
            }
            let chunk = &self.waiting[..self.waiting.len().min(CHUNK)];
            match rustix::io::write(&*fd, chunk) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    self.waiting.clear();
                    return Err(Broken::Closed);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn fill(ring: &ConsoleRing) -> u64 {
        let size = ring.output.len() as u32;
        let producer = ring.output_producer.load(Relaxed);
        let used = producer.wrapping_sub(ring.output_consumer.load(Relaxed));
        let end = producer.wrapping_add(size - used);
        ring.output_producer.store(end, Relaxed);
        u64::from(size - used)
    }

    #[test]
    fn output_is_taken_or_waited_for_whenever_the_reader_moves() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let output = Sink::Descriptor(OwnedFd::from(writer));
        let mut console = Console::new(Source::Bytes(Vec::new()), output);
        // SAFETY: numbers and atomics, for which zero is valid.
        let ring: Box<ConsoleRing> = unsafe { Box::new(std::mem::zeroed()) };
        let (mut sent, mut received) = (0, 0);
        let mut buffer = vec![0; 1 << 20];
        for step in 0..2000 {
            sent += fill(&ring);
            let empty = console.take(&ring).unwrap();
            assert!(empty || console.output().is_some(), "step {step}");
            // Nothing, a little, or all that has come.
            let most = [0, 1000, 0, 0, 0, 1 << 20][step % 6];
            if let Ok(count) = reader.read(&mut buffer[..most]) {
                received += count as u64;
            }
            if step % 500 == 0 {
                // The reader stands still until the guest is held.
                while console.take(&ring).unwrap() {
                    sent += fill(&ring);
                }
            }
        }
        console.take(&ring).unwrap();
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            received += count as u64;
            console.take(&ring).unwrap();
        }
        assert_eq!(received, sent);
    }
}
