//! Backends in memory: a disk whose faults are made to order, and a wire with two ends.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use engine_core::buffer::{Buffer, gather, scatter, total};
use engine_core::net::{FrameCounts, LONGEST, NetBackend, Received};
use engine_core::storage::{SECTOR, Storage};

/// What a faulty disk does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Reads that touch a byte from here on fail, as on a file cut short.
    pub(crate) end: Option<u64>,
    /// Every read fails with this error.
    pub(crate) read: Option<i32>,
    /// Every write fails with this error, after its first sector was written.
    pub(crate) write: Option<i32>,
    /// Every flush fails with this error.
    pub(crate) flush: Option<i32>,
    /// Writes are refused, and the disk says so.
    pub(crate) read_only: bool,
}

/// What is on a disk, and what happened to it.
#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(crate) bytes: Vec<u8>,
    /// What would survive the end of the host.
    pub(crate) durable: Vec<u8>,
    pub(crate) faults: Faults,
    pub(crate) flushes: usize,
}

/// A disk in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk(pub(crate) Arc<Mutex<Content>>);

impl Disk {
    /// A disk whose byte n is n / 512 + n.
    pub(crate) fn new(sectors: u64) -> Disk {
        let bytes: Vec<u8> = (0..sectors * SECTOR)
            .map(|at| (at / SECTOR + at) as u8)
            .collect();
        Disk(Arc::new(Mutex::new(Content {
            durable: bytes.clone(),
            bytes,
            ..Content::default()
        })))
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Content) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    /// Orders faults from now on.
    pub(crate) fn fail(&self, faults: Faults) {
        self.with(|content| content.faults = faults);
    }

    /// One sector as it is now.
    pub(crate) fn sector(&self, number: u64) -> Vec<u8> {
        let at = (number * SECTOR) as usize;
        self.with(|content| content.bytes[at..at + SECTOR as usize].to_vec())
    }

    pub(crate) fn boxed(&self) -> Box<dyn Storage> {
        Box::new(self.clone())
    }
}

fn error(code: Option<i32>) -> io::Result<()> {
    code.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
}

impl Storage for Disk {
    fn sectors(&self) -> u64 {
        self.with(|content| content.bytes.len() as u64 / SECTOR)
    }

    fn read_only(&self) -> bool {
        self.with(|content| content.faults.read_only)
    }

    fn id(&self) -> &str {
        "memory-disk"
    }

    fn read_at(&mut self, offset: u64, into: &[Buffer<'_>]) -> io::Result<()> {
        self.with(|content| {
            error(content.faults.read)?;
            let end = offset + total(into) as u64;
            // Whole sectors within the capacity: what devices promise backends.
            assert!(offset.is_multiple_of(SECTOR) && end.is_multiple_of(SECTOR));
            if content.faults.end.is_some_and(|short| end > short) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            scatter(into, 0, &content.bytes[offset as usize..end as usize]);
            Ok(())
        })
    }

    fn write_at(&mut self, offset: u64, from: &[Buffer<'_>]) -> io::Result<()> {
        self.with(|content| {
            assert!(!content.faults.read_only, "devices refuse by themselves");
            let end = offset + total(from) as u64;
            assert!(offset.is_multiple_of(SECTOR) && end.is_multiple_of(SECTOR));
            let broken = content.faults.write;
            let stop = if broken.is_some() {
                end.min(offset + SECTOR)
            } else {
                end
            };
            gather(from, 0, &mut content.bytes[offset as usize..stop as usize]);
            error(broken)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.with(|content| {
            content.flushes += 1;
            error(content.faults.flush)?;
            content.durable.clone_from(&content.bytes);
            Ok(())
        })
    }
}

/// The two directions of a wire.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// To the guest.
    pub(crate) inward: VecDeque<Vec<u8>>,
    /// From the guest.
    pub(crate) outward: Vec<Vec<u8>>,
    pub(crate) gone: bool,
}

/// One end of a wire; clones are the same wire.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) frames: Arc<Mutex<Frames>>,
    ready: Arc<OwnedFd>,
}

impl Wire {
    pub(crate) fn new() -> Wire {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        Wire {
            frames: Arc::default(),
            ready: Arc::new(rustix::event::eventfd(0, flags).unwrap()),
        }
    }

    pub(crate) fn arrive(&self, frame: &[u8]) {
        self.frames.lock().unwrap().inward.push_back(frame.to_vec());
    }

    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.frames.lock().unwrap().outward)
    }

    pub(crate) fn boxed(&self) -> Box<dyn NetBackend> {
        Box::new(self.clone())
    }
}

impl NetBackend for Wire {
    fn send(&mut self, frame: &[Buffer<'_>]) {
        let mut bytes = vec![0; total(frame)];
        assert!(
            (1..=LONGEST).contains(&bytes.len()),
            "frames of some length"
        );
        gather(frame, 0, &mut bytes);
        self.frames.lock().unwrap().outward.push(bytes);
    }

    fn receive(&mut self, into: &mut [u8]) -> Received {
        let mut frames = self.frames.lock().unwrap();
        if frames.gone {
            return Received::Gone;
        }
        match frames.inward.pop_front() {
            Some(frame) => {
                into[..frame.len()].copy_from_slice(&frame);
                Received::Frame(frame.len())
            }
            None => Received::Nothing,
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn gone(&self) -> bool {
        self.frames.lock().unwrap().gone
    }

    fn counts(&self) -> FrameCounts {
        FrameCounts::default()
    }
}
