//! virtio-blk (virtio 1.2, 5.2): a request is a header, a page of data and a status byte.
//!
//! Request N of a batch uses descriptor N, header N and status N. With indirect descriptors its three
//! are a table of its own, laid out once; else they are three of the queue's.

use super::{
    bus::{self, Transport},
    feature,
    queue::{Descriptor, INDIRECT, MOST, NEXT, Queue, WRITE},
};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use programs::{
    Refusal,
    io::{BLOCK_BYTES, Block, Direction, SLOT_WORDS, SLOTS, block, block::DEPTH},
};

/// Device ID.
const ID: u32 = 2;
/// The disk can't be written.
const READ_ONLY: u64 = 1 << 5;
/// The disk has a command to flush its cache.
const FLUSH: u64 = 1 << 9;

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_COMMAND: u32 = 4;

/// A status that no device writes.
const UNANSWERED: u8 = 0xff;

/// Sectors of a block.
const SECTORS: u64 = BLOCK_BYTES / 512;

#[repr(C, align(4096))]
struct Memory {
    queue: [AtomicU64; 512],
    tables: [[AtomicU64; 8]; DEPTH],
    headers: [Header; DEPTH],
    statuses: [AtomicU8; DEPTH],
}

#[repr(C)]
struct Header {
    kind: AtomicU32,
    reserved: AtomicU32,
    sector: AtomicU64,
}

static MEMORY: Memory = Memory {
    queue: [const { AtomicU64::new(0) }; 512],
    tables: [const { [const { AtomicU64::new(0) }; 8] }; DEPTH],
    headers: [const {
        Header {
            kind: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            sector: AtomicU64::new(0),
        }
    }; DEPTH],
    statuses: [const { AtomicU8::new(0) }; DEPTH],
};

/// The disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    transport: Transport,
    queue: Queue,
    indirect: bool,
    flush: bool,
}

impl Disk {
    /// Finds the disk and starts it.
    pub(crate) fn open(block: Block, span: u64) -> Result<Self, Refusal> {
        const REFUSES: Refusal = Refusal::Broken("the virtio disk refuses its driver");
        let transport = Transport::find(ID).ok_or(Refusal::Unsupported(block::NO_DISK))?;
        let wanted = READ_ONLY | FLUSH;
        let wanted = wanted | feature::INDIRECT | feature::EVENT_INDEX | feature::VERSION_1;
        let features = transport.begin(wanted).ok_or(REFUSES)?;
        let sectors =
            u64::from(transport.configuration(0)) | u64::from(transport.configuration(1)) << 32;
        if sectors / SECTORS < block.end(span) {
            return Err(Refusal::Broken(block::TOO_SMALL));
        }
        if block.direction == Direction::Write && features & READ_ONLY != 0 {
            return Err(Refusal::Unsupported(block::READ_ONLY));
        }
        let page = MEMORY.queue.as_ptr() as u64;
        let queue = transport.queue(0, page, features).ok_or(REFUSES)?;
        let indirect = features & feature::INDIRECT != 0;
        let needed = if indirect {
            block.depth
        } else {
            3 * block.depth
        };
        if usize::from(queue.size().min(MOST)) < needed {
            return Err(Refusal::Unsupported("the virtio disk's queue is too short"));
        }
        let disk = Disk {
            transport,
            queue,
            indirect,
            flush: features & FLUSH != 0,
        };
        disk.lay_out();
        if !transport.start() {
            return Err(REFUSES);
        }
        Ok(disk)
    }

    /// Stops the device.
    pub(crate) fn close(&self) {
        self.transport.stop();
    }

    /// The descriptors of a request.
    #[inline(always)]
    fn chain(&self, request: usize) -> [Descriptor; 3] {
        if self.indirect {
            let table = MEMORY.tables[request & (DEPTH - 1)].as_ptr() as u64;
            [table, table + 16, table + 32].map(Descriptor)
        } else {
            let first = 3 * request as u16;
            [0, 1, 2].map(|index| self.queue.descriptor(first + index))
        }
    }

    /// Index of a request's descriptor in the queue.
    #[inline(always)]
    fn head(&self, request: usize) -> u16 {
        if self.indirect {
            request as u16
        } else {
            3 * request as u16
        }
    }

    /// Lays out everything of all requests that stays the same.
    fn lay_out(&self) {
        let requests = if self.indirect {
            DEPTH
        } else {
            usize::from(self.queue.size()) / 3
        };
        for request in 0..requests.min(DEPTH) {
            let [header, _, status] = self.chain(request);
            let base = if self.indirect { 0 } else { 3 * request as u16 };
            let address = (&raw const MEMORY.headers[request]) as u64;
            header.set(address, 16, NEXT, base + 1);
            let address = (&raw const MEMORY.statuses[request]) as u64;
            status.set(address, 1, WRITE, 0);
            if self.indirect {
                let table = MEMORY.tables[request].as_ptr() as u64;
                let own = self.queue.descriptor(request as u16);
                own.set(table, 48, INDIRECT, 0);
            }
        }
    }

    /// Prepares a request for a block, and offers it.
    #[inline(always)]
    fn ask(&mut self, request: usize, direction: Direction, block: u64, slot: u64) {
        let [_, data, _] = self.chain(request);
        let (kind, flags) = match direction {
            Direction::Read => (IN, NEXT | WRITE),
            Direction::Write => (OUT, NEXT),
        };
        let header = &MEMORY.headers[request & (DEPTH - 1)];
        header.kind.store(kind, Relaxed);
        header.sector.store(block * SECTORS, Relaxed);
        MEMORY.statuses[request & (DEPTH - 1)].store(UNANSWERED, Relaxed);
        let address = bus::arena_word(slot % SLOTS * SLOT_WORDS);
        let next = if self.indirect {
            2
        } else {
            3 * request as u16 + 2
        };
        data.set(address, BLOCK_BYTES as u32, flags, next);
        self.queue.offer(self.head(request));
    }

    /// Takes `count` requests back; all of them are to have been done.
    #[inline(always)]
    fn finish(&mut self, count: usize) -> Result<(), Refusal> {
        self.queue.wait(count as u16, None);
        for _ in 0..count {
            self.queue.take();
        }
        for status in MEMORY.statuses.iter().take(count) {
            let status = status.load(Relaxed);
            if status != 0 {
                return Err(Refusal::Device {
                    what: "the virtio disk reports status",
                    code: status.into(),
                });
            }
        }
        Ok(())
    }

    /// See [`programs::Platform::transfer`].
    #[inline(always)]
    pub(crate) fn transfer(
        &mut self,
        direction: Direction,
        blocks: &[u64],
        slot: u64,
    ) -> Result<(), Refusal> {
        for (request, &block) in blocks.iter().enumerate() {
            self.ask(request, direction, block, slot + request as u64);
        }
        self.queue.publish(self.transport, 0);
        self.finish(blocks.len())
    }

    /// See [`programs::Platform::flush_disk`].
    pub(crate) fn flush(&mut self) -> Result<(), Refusal> {
        if !self.flush {
            // Then what is written is safe when it is done (5.2.6.2).
            return Ok(());
        }
        let [header, _, _] = self.chain(0);
        let address = (&raw const MEMORY.headers[0]) as u64;
        let status = if self.indirect { 2 } else { self.head(0) + 2 };
        // No data: the header is followed by the status.
        header.set(address, 16, NEXT, status);
        MEMORY.headers[0].kind.store(FLUSH_COMMAND, Relaxed);
        MEMORY.headers[0].sector.store(0, Relaxed);
        MEMORY.statuses[0].store(UNANSWERED, Relaxed);
        self.queue.offer(self.head(0));
        self.queue.publish(self.transport, 0);
        let result = self.finish(1);
        header.set(address, 16, NEXT, status - 1);
        result
    }
}
