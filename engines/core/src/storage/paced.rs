//! Storage that lets go when the run ends.
//!
//! How much one request moves is the guest's choice: a hostile one can ask for as many bytes as the
//! disk has, or the same memory over and over. Time limits and signals must not wait for that. So
//! requests go to the backing in pieces, and once something has ended the run no further piece does:
//! what is not done by then fails, as it would if the host were switched off, and was never
//! acknowledged.

use std::io;
use std::sync::Arc;

use super::Storage;
use crate::buffer::{Buffer, total, window};
use crate::host::events::{Events, flag};

/// Bytes moved between two looks: a few milliseconds of a slow disk.
const PIECE: usize = 1 << 20;

/// A storage, and what may end the run.
pub(crate) struct Paced {
    storage: Box<dyn Storage>,
    events: Arc<Events>,
}

impl Paced {
    pub(crate) fn new(storage: Box<dyn Storage>, events: Arc<Events>) -> Self {
        Paced { storage, events }
    }

    fn go_on(&self) -> io::Result<()> {
        if self.events.pending() & flag::FINAL == 0 {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the run ends"))
    }

    fn in_pieces(
        &mut self,
        offset: u64,
        buffers: &[Buffer<'_>],
        step: fn(&mut dyn Storage, u64, &[Buffer<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.go_on()?;
        let whole = total(buffers);
        if whole <= PIECE {
            return step(&mut *self.storage, offset, buffers);
        }
        // The buffers before `first` are done; looking for them again in each piece would take
        // the longer the further it is.
        let (mut rest, mut done, mut skip) = (buffers, 0, 0);
        while done < whole {
            self.go_on()?;
            let count = PIECE.min(whole - done);
            step(
                &mut *self.storage,
                offset + done as u64,
                &window(rest, skip, count),
            )?;
            done += count;
            skip += count;
            while let Some((first, others)) = rest.split_first()
                && first.len() <= skip
            {
                skip -= first.len();
                rest = others;
            }
        }
        Ok(())
    }
}

impl Storage for Paced {
    fn sectors(&self) -> u64 {
        self.storage.sectors()
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn id(&self) -> &str {
        self.storage.id()
    }

    fn read_at(&mut self, offset: u64, into: &[Buffer<'_>]) -> io::Result<()> {
        self.in_pieces(offset, into, |storage, offset, part| {
            storage.read_at(offset, part)
        })
    }

    fn write_at(&mut self, offset: u64, from: &[Buffer<'_>]) -> io::Result<()> {
        self.in_pieces(offset, from, |storage, offset, part| {
            storage.write_at(offset, part)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.storage.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the offset and the bytes of each call, and ends the run after some of them.
    struct Log {
        calls: Calls,
        end_after: usize,
        events: Arc<Events>,
    }

    impl Storage for Log {
        fn sectors(&self) -> u64 {
            1 << 32
        }

        fn read_only(&self) -> bool {
            false
        }

        fn id(&self) -> &str {
            "log"
        }

        fn read_at(&mut self, offset: u64, into: &[Buffer<'_>]) -> io::Result<()> {
            for part in into {
                part.copy_from(&vec![offset as u8; part.len()]);
            }
            self.write_at(offset, into)
        }

        fn write_at(&mut self, offset: u64, from: &[Buffer<'_>]) -> io::Result<()> {
            let mut bytes = Vec::new();
            for part in from {
                let mut copy = vec![0; part.len()];
                part.copy_to(&mut copy);
                bytes.extend(copy);
            }
            let mut calls = self.calls.lock().unwrap();
            calls.push((offset, bytes));
            if calls.len() == self.end_after {
                self.events.raise(flag::DEADLINE);
            }
            Ok(())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Calls = Arc<std::sync::Mutex<Vec<(u64, Vec<u8>)>>>;

    fn paced(end_after: usize) -> (Paced, Calls) {
        let events = Arc::new(Events::new().unwrap());
        let calls = Calls::default();
        let log = Log {
            calls: Arc::clone(&calls),
            end_after,
            events: Arc::clone(&events),
        };
        (Paced::new(Box::new(log), events), calls)
    }

    #[test]
    fn pieces_are_the_request_whatever_its_buffers() {
        let (mut storage, calls) = paced(usize::MAX);
        let mut memory: Vec<u8> = (0..3 * PIECE + 1024).map(|at| (at / 7) as u8).collect();
        let expected = memory.clone();
        let mut buffers = Vec::new();
        let mut rest = &mut memory[..];
        for length in [1, 511, PIECE, 3, PIECE - 3, 2, PIECE - 2, 512] {
            let (part, others) = rest.split_at_mut(length);
            buffers.push(Buffer::new(part));
            rest = others;
        }
        assert!(rest.is_empty());
        storage.write_at(4096, &buffers).unwrap();
        let calls = calls.lock().unwrap();
        let mut at = 4096;
        let mut seen = Vec::new();
        for (offset, bytes) in calls.iter() {
            assert_eq!(*offset, at);
            assert!(bytes.len() <= PIECE);
            at += bytes.len() as u64;
            seen.extend_from_slice(bytes);
        }
        assert_eq!(calls.len(), 4);
        assert_eq!(seen, expected);
    }

    #[test]
    fn nothing_is_begun_after_the_end_of_the_run() {
        let (mut storage, calls) = paced(2);
        let mut memory = vec![0; 5 * PIECE];
        let error = storage.read_at(0, &[Buffer::new(&mut memory)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        assert_eq!(calls.lock().unwrap().len(), 2);
        assert!(storage.write_at(0, &[Buffer::new(&mut [0; 512])]).is_err());
        assert_eq!(calls.lock().unwrap().len(), 2);
    }
}
