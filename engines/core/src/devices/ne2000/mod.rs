//! An NE2000 network card on the ISA bus: a DP8390 with 32 KiB of packet memory.
//!
//! | module | what |
//! |---|---|
//! | here | registers (DP8390D data sheet, 10.0) and interrupt |
//! | `memory` | station address PROM and packet memory, as the chip addresses them |
//! | `remote` | remote DMA: the guest's way to that memory |
//! | `receive` | the ring of received frames, and which frames are wanted |
//!
//! It behaves as QEMU's ne2k_isa where the data sheet leaves room: transmission is done when it is
//! ordered, and a frame for which the ring has no room waits outside instead of overflowing it.
//!
//! Invariant: no register content leads outside of the card's memory.

mod memory;
mod receive;
mod remote;

use std::os::fd::BorrowedFd;

use self::memory::Memory;
use super::{Action, Device, posted_items};
use crate::buffer::Buffer;
use crate::interrupt::Line;
use crate::net::{FrameCounts, LONGEST, MacAddress, NetBackend};

/// Ports of the card: first and their number.
pub const PORTS: (u16, u16) = (0x300, 32);
/// The first port of remote DMA.
pub const DATA_PORT: u16 = PORTS.0 + 0x10;
/// Interrupt line, as QEMU's ne2k_isa has it.
pub const IRQ: u8 = 9;

/// Offsets of what follows the sixteen registers.
#[allow(missing_docs, reason = "the names say it")]
pub mod port {
    pub const COMMAND: u64 = 0x00;
    pub const DATA: u64 = 0x10;
    pub const RESET: u64 = 0x18;
}

/// Command register.
#[allow(missing_docs, reason = "the names are the data sheet's")]
pub mod command {
    pub const STOP: u8 = 0x01;
    pub const START: u8 = 0x02;
    pub const TRANSMIT: u8 = 0x04;
    pub const REMOTE_READ: u8 = 0x08;
    pub const REMOTE_WRITE: u8 = 0x10;
    pub const ABORT_DMA: u8 = 0x20;
    pub const PAGE: u8 = 0xc0;
}

/// Interrupt status and mask.
#[allow(missing_docs, reason = "the names are the data sheet's")]
pub mod interrupt {
    pub const RECEIVED: u8 = 0x01;
    pub const TRANSMITTED: u8 = 0x02;
    pub const TRANSMIT_ERROR: u8 = 0x08;
    pub const REMOTE_DONE: u8 = 0x40;
    pub const RESET: u8 = 0x80;
}

/// Transmit status: without error.
const TRANSMIT_OK: u8 = 0x01;

/// The card.
pub struct Ne2000 {
    backend: Box<dyn NetBackend>,
    mac: MacAddress,
    line: Line,
    memory: Memory,
    command: u8,
    status: u8,
    mask: u8,
    /// PSTART, PSTOP, BNRY and CURR: the receive ring in pages of 256 bytes.
    start: u8,
    stop: u8,
    boundary: u8,
    current: u8,
    transmit_page: u8,
    transmit_count: u16,
    transmit_status: u8,
    remote_address: u16,
    remote_count: u16,
    receive_config: u8,
    receive_status: u8,
    transmit_config: u8,
    data_config: u8,
    physical: MacAddress,
    multicast: [u8; 8],
    dropped: FrameCounts,
    frame: Box<[u8; LONGEST + 1]>,
}

impl Ne2000 {
    /// A card with this address, whose interrupt is `line`.
    pub fn new(backend: Box<dyn NetBackend>, mac: MacAddress, line: Line) -> Self {
        let mut card = Ne2000 {
            backend,
            mac,
            line,
            memory: Memory::new(mac),
            command: 0,
            status: 0,
            mask: 0,
            start: 0,
            stop: 0,
            boundary: 0,
            current: 0,
            transmit_page: 0,
            transmit_count: 0,
            transmit_status: 0,
            remote_address: 0,
            remote_count: 0,
            receive_config: 0,
            receive_status: 0,
            transmit_config: 0,
            data_config: 0,
            physical: mac,
            multicast: [0; 8],
            dropped: FrameCounts::default(),
            frame: Box::new([0; LONGEST + 1]),
        };
        card.reset();
        card
    }

    /// What became of frames, the backend's and the card's together.
    pub fn counts(&self) -> FrameCounts {
        let mut counts = self.backend.counts();
        counts.send_dropped += self.dropped.send_dropped;
        counts.receive_dropped += self.dropped.receive_dropped;
        counts
    }

    fn reset(&mut self) {
        self.command = command::STOP | command::ABORT_DMA;
        self.status = interrupt::RESET;
        self.mask = 0;
        self.remote_count = 0;
        self.physical = self.mac;
        self.drive_line();
    }

    fn raise(&mut self, bits: u8) {
        self.status |= bits;
        self.drive_line();
    }

    fn drive_line(&mut self) {
        // RESET is a status and never a request.
        self.line
            .set(self.status & self.mask & !interrupt::RESET != 0);
    }

    fn running(&self) -> bool {
        self.command & command::STOP == 0
    }

    fn set_command(&mut self, value: u8) {
        self.command = value;
        if value & command::STOP != 0 {
            return;
        }
        self.status &= !interrupt::RESET;
        if value & (command::REMOTE_READ | command::REMOTE_WRITE) != 0 && self.remote_count == 0 {
            self.raise(interrupt::REMOTE_DONE);
        }
        if value & command::TRANSMIT != 0 {
            self.transmit();
        }
    }

    fn transmit(&mut self) {
        self.command &= !command::TRANSMIT;
        let start = u16::from(self.transmit_page) << 8;
        let count = usize::from(self.transmit_count);
        let frame = self.memory.frame(start, count);
        match frame.filter(|_| (1..=LONGEST).contains(&count)) {
            Some(frame) => {
                self.backend.send(&[Buffer::new(frame)]);
                self.transmit_status = TRANSMIT_OK;
                self.raise(interrupt::TRANSMITTED);
            }
            None => {
                self.dropped.send_dropped += 1;
                self.transmit_status = 0;
                self.raise(interrupt::TRANSMIT_ERROR);
            }
        }
    }

    fn page(&self) -> u8 {
        self.command >> 6
    }

    fn register(&mut self, offset: u64) -> u8 {
        if offset == port::COMMAND {
            return self.command;
        }
        let index = offset as usize;
        match (self.page(), index) {
            (0, 0x01) => self.remote_address as u8,
            (0, 0x02) => (self.remote_address >> 8) as u8,
            (0, 0x03) => self.boundary,
            (0, 0x04) => self.transmit_status,
            (0, 0x07) => self.status,
            (0, 0x08) => self.remote_address as u8,
            (0, 0x09) => (self.remote_address >> 8) as u8,
            // Realtek's clones show "Pp" here, which tells them from an NE1000.
            (0, 0x0a) => 0x50,
            (0, 0x0b) => 0x70,
            (0, 0x0c) => self.receive_status,
            // Collisions, FIFO and error counters: there are none.
            (0, _) => 0,
            (1, 0x01..=0x06) => self.physical[index - 1],
            (1, 0x07) => self.current,
            (1, _) => self.multicast[index - 8],
            (2, 0x01) => self.start,
            (2, 0x02) => self.stop,
            (2, 0x04) => self.transmit_page,
            (2, 0x0c) => self.receive_config | 0xc0,
            (2, 0x0d) => self.transmit_config | 0xe0,
            (2, 0x0e) => self.data_config | 0x80,
            (2, 0x0f) => self.mask | 0x80,
            (2, _) => 0,
            // Page 3 is for tests of the chip.
            (_, _) => 0xff,
        }
    }

    fn set_register(&mut self, offset: u64, value: u8) {
        if offset == port::COMMAND {
            return self.set_command(value);
        }
        let low = |word: u16| word & 0xff00 | u16::from(value);
        let high = |word: u16| word & 0x00ff | u16::from(value) << 8;
        let index = offset as usize;
        match (self.page(), index) {
            (0, 0x01) => self.start = value,
            (0, 0x02) => self.stop = value,
            (0, 0x03) => self.boundary = value,
            (0, 0x04) => self.transmit_page = value,
            (0, 0x05) => self.transmit_count = low(self.transmit_count),
            (0, 0x06) => self.transmit_count = high(self.transmit_count),
            (0, 0x07) => {
                // Ones clear; RESET clears itself with the start.
                self.status &= !(value & !interrupt::RESET);
                self.drive_line();
            }
            (0, 0x08) => self.remote_address = low(self.remote_address),
            (0, 0x09) => self.remote_address = high(self.remote_address),
            (0, 0x0a) => self.remote_count = low(self.remote_count),
            (0, 0x0b) => self.remote_count = high(self.remote_count),
            (0, 0x0c) => self.receive_config = value & 0x3f,
            (0, 0x0d) => self.transmit_config = value & 0x1f,
            (0, 0x0e) => self.data_config = value & 0x7f,
            (0, 0x0f) => {
                self.mask = value & 0x7f;
                self.drive_line();
            }
            (1, 0x01..=0x06) => self.physical[index - 1] = value,
            (1, 0x07) => self.current = value,
            (1, _) => self.multicast[index - 8] = value,
            (_, _) => {}
        }
    }
}

impl Device for Ne2000 {
    fn name(&self) -> &'static str {
        "ne2000"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        match offset {
            port::DATA..port::RESET => self.remote_read(data.len(), data),
            port::RESET.. => {
                self.reset();
                data.fill(0);
            }
            _ => {
                for (at, byte) in (offset..port::DATA).zip(data) {
                    *byte = self.register(at);
                }
            }
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match offset {
            port::DATA..port::RESET => self.remote_write(data.len(), data),
            // The reset ends with this write, and began with the read.
            port::RESET.. => {}
            _ => {
                for (at, &byte) in (offset..port::DATA).zip(data) {
                    self.set_register(at, byte);
                }
            }
        }
        Action::None
    }

    fn read_items(&mut self, offset: u64, size: usize, data: &mut [u8]) -> Action {
        if (port::DATA..port::RESET).contains(&offset) {
            self.remote_read(size, data);
        } else {
            for item in data.chunks_exact_mut(size) {
                self.read(offset, item);
            }
        }
        Action::None
    }

    fn write_items(&mut self, offset: u64, size: usize, data: &[u8]) -> Action {
        if (port::DATA..port::RESET).contains(&offset) {
            self.remote_write(size, data);
        } else {
            for item in data.chunks_exact(size) {
                self.write(offset, item);
            }
        }
        Action::None
    }

    fn postable(&self) -> u32 {
        match self.remote_count {
            0 => u32::MAX,
            count => posted_items(count.into()),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.backend.descriptor())
    }

    fn host_ready(&mut self) -> Action {
        self.receive_all()
    }
}
