//! The `hybrid` flavour's drivers: virtio 1.x devices over memory-mapped registers.
//!
//! The transport is virtio-mmio (virtio 1.2, 4.2), at the addresses and lines of QEMU's microvm
//! machine: [`PLACES`] of them, a page apart in eighths, found by looking at each. A driver polls the
//! used ring right after a notification and keeps the device from interrupting meanwhile; only where
//! that is in vain it asks for an interrupt and halts.

mod block;
mod console;
mod net;
mod queue;

use crate::{
    interrupts::{self, Trigger},
    memory::{register, set_register},
};
use core::ops::Range;

pub(crate) use block::Disk;
pub(crate) use console::Terminal;
pub(crate) use net::Card;
use queue::Queue;

/// Where the first device's registers lie.
const FIRST: u64 = 0xfeb0_0000;
/// From one device to the next.
const STRIDE: u64 = 0x200;
/// Places where a device may be.
const PLACES: u8 = 8;
/// The lines of the devices.
pub(crate) const LINES: Range<u8> = 5..5 + PLACES;

/// Offsets of registers (4.2.2).
const MAGIC: u64 = 0;
const VERSION: u64 = 4;
const DEVICE_ID: u64 = 8;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MOST: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIGURATION: u64 = 0x100;

/// "virt".
const MAGIC_VALUE: u32 = 0x7472_6976;

/// Device status bits (2.1).
mod status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
}

/// Features that are not one device's alone (clause 6).
mod feature {
    pub(super) const INDIRECT: u64 = 1 << 28;
    pub(super) const EVENT_INDEX: u64 = 1 << 29;
    pub(super) const VERSION_1: u64 = 1 << 32;
}

/// Takes a device's interrupt back. Called by the interrupt handler.
pub(crate) fn acknowledge(line: u8) {
    let base = FIRST + STRIDE * u64::from(line - LINES.start);
    let causes = register(base + INTERRUPT_STATUS);
    set_register(base + INTERRUPT_ACKNOWLEDGE, causes);
}

/// A device behind its registers.
#[derive(Clone, Copy, Debug)]
struct Transport {
    base: u64,
    line: u8,
}

impl Transport {
    /// The first device with that ID.
    fn find(id: u32) -> Option<Self> {
        (0..PLACES)
            .map(|place| Transport {
                base: FIRST + STRIDE * u64::from(place),
                line: LINES.start + place,
            })
            .find(|transport| {
                transport.read(MAGIC) == MAGIC_VALUE
                    && transport.read(VERSION) == 2
                    && transport.read(DEVICE_ID) == id
            })
    }

    #[inline(always)]
    fn read(self, offset: u64) -> u32 {
        register(self.base + offset)
    }

    #[inline(always)]
    fn write(self, offset: u64, value: u32) {
        set_register(self.base + offset, value);
    }

    /// A byte or word of the device's own configuration, read as aligned 32 bits.
    fn configuration(self, word: u64) -> u32 {
        self.read(CONFIGURATION + 4 * word)
    }

    /// Resets the device and negotiates: what it offers of `wanted`, which includes VERSION_1.
    /// `None` if it refuses.
    fn begin(self, wanted: u64) -> Option<u64> {
        self.write(STATUS, 0);
        // A reset may take its time (2.4.1).
        while self.read(STATUS) != 0 {}
        self.write(STATUS, status::ACKNOWLEDGE);
        self.write(STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let mut features = 0;
        for half in [0, 1] {
            self.write(DEVICE_FEATURES_SELECT, half);
            features |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        features &= wanted;
        for half in [0, 1] {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        let chosen = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(STATUS, chosen);
        let agreed = self.read(STATUS) & status::FEATURES_OK != 0;
        (agreed && features & feature::VERSION_1 != 0).then_some(features)
    }

    /// Makes a queue in `page`, which is this queue's for good; `None` if the device has none.
    fn queue(self, index: u32, page: u64, features: u64) -> Option<Queue> {
        self.write(QUEUE_SELECT, index);
        let size = self.read(QUEUE_SIZE_MOST).min(u32::from(queue::MOST));
        // A power of two (2.7).
        let size = 1 << size.checked_ilog2()?;
        let queue = Queue::new(page, size as u16, features & feature::EVENT_INDEX != 0);
        self.write(QUEUE_SIZE, size);
        for (register, address) in [
            (QUEUE_DESCRIPTORS, queue.descriptors()),
            (QUEUE_DRIVER, queue.driver_area()),
            (QUEUE_DEVICE, queue.device_area()),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Some(queue)
    }

    /// Lets the device work, and its line through.
    fn start(self) {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(STATUS, all);
        interrupts::set_up();
        interrupts::unmask(self.line, Trigger::Level);
    }

    /// Stops the device.
    fn stop(self) {
        interrupts::mask(self.line);
        self.write(STATUS, 0);
    }

    #[inline(always)]
    fn notify(self, queue: u32) {
        self.write(NOTIFY, queue);
    }
}
