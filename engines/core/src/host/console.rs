//! Console output on its way from the guest to the host.
//!
//! The first byte of a line goes out at once, since whoever measures closes the window on it; the
//! rest of the line follows with its newline, when the buffer is full, or when the guest has
//! turned to something else ([`Output::flush_now`]). Bytes are never reordered or dropped.
//!
//! Invariant: writing never blocks past the end of a run. Each write is preceded by a poll that an
//! event of [`flag::FINAL`](super::events::flag) ends, and is small enough (`PIPE_BUF`) that a pipe
//! which polled as writable takes it whole (pipe(7)).

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::events::{Events, flag};

/// PIPE_BUF on Linux.
const CHUNK: usize = 4096;

/// Where console output goes.
#[derive(Debug)]
pub enum Sink {
    /// A descriptor of the host, blocking or not.
    Descriptor(OwnedFd),
    /// Kept in memory: [`Output::kept`].
    Memory(Vec<u8>),
}

/// Console output.
#[derive(Debug)]
pub struct Output {
    sink: Sink,
    events: Arc<Events>,
    buffer: Vec<u8>,
    /// The next byte is the first of its line.
    line_start: bool,
    closed: bool,
}

impl Output {
    /// Output to `sink`.
    pub fn new(sink: Sink, events: Arc<Events>) -> Self {
        Output {
            sink,
            events,
            buffer: Vec::with_capacity(CHUNK),
            line_start: true,
            closed: false,
        }
    }

    /// What a [`Sink::Memory`] holds; empty for others.
    pub fn kept(&self) -> &[u8] {
        match &self.sink {
            Sink::Descriptor(_) => &[],
            Sink::Memory(kept) => kept,
        }
    }

    /// True when the host's end is gone.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// True once the run ends: what can go out still does, but nobody should begin much.
    pub fn ending(&self) -> bool {
        self.events.pending() & flag::FINAL != 0
    }

    /// Takes one byte of the guest.
    ///
    /// # Errors
    /// The host's, when the sink is broken.
    pub fn put(&mut self, byte: u8) -> io::Result<()> {
        self.buffer.push(byte);
        let first = std::mem::replace(&mut self.line_start, byte == b'\n');
        if first || byte == b'\n' || self.buffer.len() >= CHUNK {
            self.flush_now()?;
        }
        Ok(())
    }

    /// Takes many bytes and writes them out at once. False if they could not be, since the sink is
    /// broken or the run ends.
    pub fn put_all(&mut self, bytes: &[u8]) -> bool {
        if let Some(&last) = bytes.last() {
            self.line_start = last == b'\n';
        }
        self.buffer.extend_from_slice(bytes);
        self.flush_now().is_ok() && self.buffer.is_empty()
    }

    /// Writes out what is buffered. Leaves it buffered if the run ends first.
    ///
    /// # Errors
    /// The host's, when the sink is broken.
    pub fn flush_now(&mut self) -> io::Result<()> {
        let result = self.write_buffer();
        if result.is_err() {
            self.closed = true;
            self.buffer.clear();
        }
        result
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let fd = match &mut self.sink {
            Sink::Memory(kept) => {
                kept.append(&mut self.buffer);
                return Ok(());
            }
            Sink::Descriptor(fd) => fd,
        };
        while !self.buffer.is_empty() {
            if !self.events.sleep_until_writable(fd.as_fd()) {
                break;
            }
            let chunk = &self.buffer[..self.buffer.len().min(CHUNK)];
            match rustix::io::write(&*fd, chunk) {
                Ok(count) => drop(self.buffer.drain(..count)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.put(byte)?;
        }
        Ok(bytes.len())
    }

    /// Does nothing: vm-superio flushes after each byte, and this type decides itself when to write.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> (OwnedFd, Output, Arc<Events>) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let events = Arc::new(Events::new().unwrap());
        let output = Output::new(Sink::Descriptor(writer), Arc::clone(&events));
        (reader, output, events)
    }

    fn arrived(reader: &OwnedFd) -> Vec<u8> {
        let mut bytes = [0; 8192];
        let count = rustix::io::read(reader, &mut bytes).unwrap_or(0);
        bytes[..count].to_vec()
    }

    #[test]
    fn first_byte_and_end_of_a_line_go_out_at_once() {
        let (reader, mut output, _events) = pipe();
        output.put(b'e').unwrap();
        assert_eq!(arrived(&reader), b"e");
        output.put(b'n').unwrap();
        assert_eq!(arrived(&reader), b"");
        output.write_all(b"d\n").unwrap();
        assert_eq!(arrived(&reader), b"nd\n");
    }

    #[test]
    fn a_stalled_reader_does_not_outlast_the_deadline() {
        let (reader, mut output, events) = pipe();
        let late = Arc::clone(&events);
        let timer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            late.raise(flag::DEADLINE);
        });
        let line = [b'x'; 1023];
        let mut lines = 0;
        while events.pending() == 0 {
            output.write_all(&line).unwrap();
            output.write_all(b"\n").unwrap();
            lines += 1;
        }
        timer.join().unwrap();
        assert!(lines >= 4, "a pipe takes a page at least");
        drop(reader);
    }

    #[test]
    fn a_closed_reader_is_an_error_not_a_signal() {
        let (reader, mut output, _events) = pipe();
        drop(reader);
        assert!(output.write_all(b"x\n").is_err());
        assert!(output.closed());
    }
}
