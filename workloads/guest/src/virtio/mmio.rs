//! The bus of the `hybrid` flavour: virtio-mmio (virtio 1.2, 4.2), at the addresses and lines of QEMU's
//! microvm machine: [`PLACES`] of them, a page apart in eighths, found by looking at each.

use crate::{
    clock,
    interrupts::{self, Trigger},
    memory::{register, set_register},
};
use core::ops::Range;

use super::{MOST, Queue, feature};

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

/// Takes a device's interrupt back. Called by the interrupt handler.
pub(crate) fn acknowledge(line: u8) {
    let base = FIRST + STRIDE * u64::from(line - LINES.start);
    let causes = register(base + INTERRUPT_STATUS);
    set_register(base + INTERRUPT_ACKNOWLEDGE, causes);
}

/// A device behind its registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transport {
    base: u64,
    line: u8,
}

impl Transport {
    /// The first device with that ID.
    pub(super) fn find(id: u32) -> Option<Self> {
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
    pub(super) fn configuration(self, word: u64) -> u32 {
        self.read(CONFIGURATION + 4 * word)
    }

    /// Resets the device and negotiates: what it offers of `wanted`, which includes VERSION_1.
    /// `None` if it refuses.
    pub(super) fn begin(self, wanted: u64) -> Option<u64> {
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
    pub(super) fn queue(self, index: u32, page: u64, features: u64) -> Option<Queue> {
        self.write(QUEUE_SELECT, index);
        let size = self.read(QUEUE_SIZE_MOST).min(u32::from(MOST));
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

    /// Lets the device work, and its line through; false if the device does not take its queues, which
    /// this bus does not tell.
    pub(super) fn start(self) -> bool {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(STATUS, all);
        interrupts::set_up();
        interrupts::unmask(self.line, Trigger::Level);
        true
    }

    /// Stops the device.
    pub(super) fn stop(self) {
        interrupts::mask(self.line);
        self.write(STATUS, 0);
    }

    #[inline(always)]
    pub(super) fn notify(self, queue: u32) {
        self.write(NOTIFY, queue);
    }
}

pub(super) use crate::{
    memory::arena_word,
    timers::{start_watch, stop_watch},
};

/// Sleeps until `done`.
#[inline(always)]
pub(super) fn wait(done: impl FnMut() -> bool) {
    interrupts::wait(None, done);
}

/// Ticks that a frame may take.
pub(super) fn patience() -> u64 {
    clock::scale().map_or(1 << 33, |scale| scale.ticks(2_000_000_000))
}
