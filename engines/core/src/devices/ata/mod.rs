//! An ATA disk on the primary channel of a PC, by programmed I/O (ATA/ATAPI-6, T13/1410D).
//!
//! | module | what |
//! |---|---|
//! | here | registers, interrupt, reset |
//! | `command` | what each command does |
//! | `transfer` | data between the disk and the data register, DRQ block by DRQ block |
//! | `identify` | what the disk says of itself |
//!
//! There is one device, as device 0; device 1 is absent, and its status reads as zero. Commands
//! are done when they are given, so BSY is only ever seen in a software reset. Data is read ahead
//! and written behind within one command, in pieces of many sectors; what a command reports when
//! it ends holds for all of it.
//!
//! Invariant: a command never touches a sector beyond the capacity, and its last status comes after
//! all of its data has reached the backing.

pub mod command;
mod identify;
mod transfer;

use self::transfer::Transfer;
use crate::devices::{Action, Device, posted_items as items};
use crate::interrupt::Line;
use crate::storage::Storage;

/// Command block registers of the primary channel: first port and their number.
pub const COMMAND_PORTS: (u16, u16) = (0x1f0, 8);
/// Device control and alternate status.
pub const CONTROL_PORTS: (u16, u16) = (0x3f6, 1);
/// Interrupt line of the primary channel.
pub const IRQ: u8 = 14;

/// Register offsets; the control port follows the command block.
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod register {
    pub const DATA: u64 = 0;
    pub const ERROR: u64 = 1;
    pub const FEATURES: u64 = 1;
    pub const SECTOR_COUNT: u64 = 2;
    pub const LBA_LOW: u64 = 3;
    pub const LBA_MID: u64 = 4;
    pub const LBA_HIGH: u64 = 5;
    pub const DEVICE: u64 = 6;
    pub const STATUS: u64 = 7;
    pub const COMMAND: u64 = 7;
    pub const CONTROL: u64 = 8;
}

/// Status bits.
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod status {
    pub const BSY: u8 = 0x80;
    pub const DRDY: u8 = 0x40;
    pub const DF: u8 = 0x20;
    pub const DSC: u8 = 0x10;
    pub const DRQ: u8 = 0x08;
    pub const ERR: u8 = 0x01;
}

/// Error bits.
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod error {
    pub const UNC: u8 = 0x40;
    pub const IDNF: u8 = 0x10;
    pub const ABRT: u8 = 0x04;
}

/// Device register: LBA instead of cylinder, head and sector.
const LBA: u8 = 0x40;
/// Device register: device 1.
const DEV: u8 = 0x10;
/// Device control: read the previous content of the command block.
const HOB: u8 = 0x80;
/// Device control: software reset.
const SRST: u8 = 0x04;
/// Device control: no interrupts.
const NIEN: u8 = 0x02;

/// A register that remembers one write before the last, for 48-bit commands.
#[derive(Clone, Copy, Debug, Default)]
struct Deep {
    now: u8,
    before: u8,
}

impl Deep {
    fn set(&mut self, value: u8) {
        self.before = self.now;
        self.now = value;
    }

    fn wide(self) -> u64 {
        u64::from(self.before) << 8 | u64::from(self.now)
    }
}

/// Cylinders, heads and sectors per track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    cylinders: u16,
    heads: u8,
    sectors: u8,
}

impl Geometry {
    /// What disks beyond 8 GB use, cut to the capacity.
    fn of(sectors: u64) -> Self {
        Geometry {
            cylinders: (sectors / (16 * 63)).clamp(1, 16383) as u16,
            heads: 16,
            sectors: 63,
        }
    }
}

/// The disk.
pub struct Ata {
    storage: Box<dyn Storage>,
    line: Line,
    /// An interrupt that the status register has not been read for.
    interrupt: bool,
    status: u8,
    error: u8,
    features: Deep,
    count: Deep,
    /// Low, mid and high.
    lba: [Deep; 3],
    device: u8,
    control: u8,
    geometry: Geometry,
    /// Sectors of a DRQ block in READ and WRITE MULTIPLE; 0 while they are not set up.
    multiple: u8,
    write_cache: bool,
    /// The last command was a 48-bit one, and its registers are to be read so.
    wide: bool,
    transfer: Transfer,
}

impl Ata {
    /// A disk with this content, whose interrupt is `line`.
    pub fn new(storage: Box<dyn Storage>, line: Line) -> Self {
        let mut ata = Ata {
            geometry: Geometry::of(storage.sectors()),
            storage,
            line,
            interrupt: false,
            status: 0,
            error: 0,
            features: Deep::default(),
            count: Deep::default(),
            lba: [Deep::default(); 3],
            device: 0,
            control: 0,
            multiple: 0,
            write_cache: true,
            wide: false,
            transfer: Transfer::default(),
        };
        ata.reset();
        ata
    }

    /// The signature of a device without packets (9.12).
    fn reset(&mut self) {
        self.transfer.stop();
        self.multiple = 0;
        self.write_cache = true;
        self.geometry = Geometry::of(self.storage.sectors());
        self.status = status::DRDY | status::DSC;
        self.error = 1;
        self.device = 0;
        self.count = Deep { now: 1, before: 0 };
        self.lba = [Deep::default(); 3];
        self.lba[0].now = 1;
        self.set_interrupt(false);
    }

    fn set_interrupt(&mut self, wanted: bool) {
        self.interrupt = wanted;
        self.line.set(wanted && self.control & NIEN == 0);
    }

    /// Device 1 is selected, and there is none.
    fn absent(&self) -> bool {
        self.device & DEV != 0
    }

    fn set_control(&mut self, value: u8) {
        let before = std::mem::replace(&mut self.control, value);
        if value & SRST != 0 {
            self.transfer.stop();
            self.status = status::BSY;
            self.set_interrupt(false);
        } else if before & SRST != 0 {
            self.reset();
        }
        // Masked, a pending interrupt waits.
        self.line.set(self.interrupt && value & NIEN == 0);
    }

    fn register(&mut self, offset: u64) -> u8 {
        let deep = |register: Deep| {
            if self.control & HOB != 0 {
                register.before
            } else {
                register.now
            }
        };
        match offset {
            register::ERROR if self.absent() => 0,
            register::ERROR => self.error,
            register::SECTOR_COUNT => deep(self.count),
            register::LBA_LOW => deep(self.lba[0]),
            register::LBA_MID => deep(self.lba[1]),
            register::LBA_HIGH => deep(self.lba[2]),
            // Bits 5 and 7 are obsolete and read as ones.
            register::DEVICE => self.device | 0xa0,
            register::STATUS | register::CONTROL if self.absent() => 0,
            register::STATUS => {
                self.set_interrupt(false);
                self.status
            }
            register::CONTROL => self.status,
            _ => 0xff,
        }
    }

    fn set_register(&mut self, offset: u64, value: u8) {
        if offset == register::CONTROL {
            return self.set_control(value);
        }
        self.control &= !HOB;
        if self.status & status::BSY != 0 {
            return;
        }
        match offset {
            register::FEATURES => self.features.set(value),
            register::SECTOR_COUNT => self.count.set(value),
            register::LBA_LOW => self.lba[0].set(value),
            register::LBA_MID => self.lba[1].set(value),
            register::LBA_HIGH => self.lba[2].set(value),
            register::DEVICE => self.device = value & !0xa0,
            register::COMMAND => self.command(value),
            _ => {}
        }
    }
}

impl Device for Ata {
    fn name(&self) -> &'static str {
        "ata"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if offset == register::DATA {
            return self.read_items(offset, data.len(), data);
        }
        for (at, byte) in (offset..=register::CONTROL).zip(data) {
            *byte = self.register(at);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if offset == register::DATA {
            return self.write_items(offset, data.len(), data);
        }
        for (at, &byte) in (offset..=register::CONTROL).zip(data) {
            self.set_register(at, byte);
        }
        Action::None
    }

    fn read_items(&mut self, offset: u64, size: usize, data: &mut [u8]) -> Action {
        if offset != register::DATA {
            for item in data.chunks_exact_mut(size) {
                self.read(offset, item);
            }
        } else if !self.absent() {
            self.data_out(data);
        }
        Action::None
    }

    fn postable(&self) -> u32 {
        self.unnoticed().map_or(u32::MAX, items)
    }

    fn write_items(&mut self, offset: u64, size: usize, data: &[u8]) -> Action {
        if offset != register::DATA {
            for item in data.chunks_exact(size) {
                self.write(offset, item);
            }
        } else if !self.absent() {
            self.data_in(data);
        }
        Action::None
    }
}
