//! A small virtio driver: initialisation as 3.1.1 has it, split rings, polling.

use std::sync::{Arc, Mutex};

use engine_core::GuestRam;
use engine_core::devices::Device;
use engine_core::devices::virtio::core::status;
use engine_core::devices::virtio::mmio::register::*;
use engine_core::devices::virtio::{Core, Mmio, VirtioDevice, feature};
use engine_core::dma::DeviceMemory;
use engine_core::interrupt::{Interrupts, Line};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where queue n lies: a page each for descriptors, available and used ring.
const RINGS: u64 = 0x10_0000;
/// Memory for requests.
pub(crate) const DATA: u64 = 0x20_0000;

/// Counts rising edges of its one line.
#[derive(Debug, Default)]
pub(crate) struct Wire(pub(crate) Mutex<(bool, usize)>);

impl Interrupts for Wire {
    fn set_line(&self, _number: u8, level: bool) {
        let mut state = self.0.lock().unwrap();
        state.0 = level;
        state.1 += usize::from(level);
    }
}

/// A descriptor: address, length, flags, next.
pub(crate) type Descriptor = (u64, u32, u16, u16);

/// One of the driver's queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) next: u16,
    pub(crate) seen: u16,
}

impl Queue {
    pub(crate) fn descriptors(&self) -> u64 {
        RINGS + u64::from(self.index) * 0x4000
    }

    pub(crate) fn available(&self) -> u64 {
        self.descriptors() + 0x1000
    }

    pub(crate) fn used(&self) -> u64 {
        self.descriptors() + 0x2000
    }
}

/// A driver and its device.
pub(crate) struct Driver {
    pub(crate) device: Mmio,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) memory: DeviceMemory,
    pub(crate) wire: Arc<Wire>,
    pub(crate) queues: Vec<Queue>,
}

impl Driver {
    /// A driver that has done nothing yet.
    pub(crate) fn cold(device: Box<dyn VirtioDevice>) -> Driver {
        let ram = engine_core::memory::create(4).unwrap();
        let memory = DeviceMemory::new(&ram, true).unwrap();
        let wire = Arc::new(Wire::default());
        let line = Line::new(wire.clone(), 5);
        Driver {
            device: Mmio::new(Core::new(device, &memory), line),
            ram,
            memory,
            wire,
            queues: Vec::new(),
        }
    }

    /// A driver that accepts `wanted` of what is offered, with queues of `size`.
    pub(crate) fn new(device: Box<dyn VirtioDevice>, wanted: u64, size: u16) -> Driver {
        let mut driver = Driver::cold(device);
        driver.initialise(wanted, size);
        driver
    }

    pub(crate) fn initialise(&mut self, wanted: u64, size: u16) {
        assert_eq!(self.get(MAGIC_VALUE), 0x7472_6976);
        assert_eq!(self.get(VERSION), 2);
        self.set(STATUS, 0);
        assert_eq!(self.get(STATUS), 0);
        self.set(STATUS, status::ACKNOWLEDGE.into());
        self.set(STATUS, (status::ACKNOWLEDGE | status::DRIVER).into());
        let offered = self.offered();
        self.accept(offered & (wanted | feature::VERSION_1));
        let agreed = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set(STATUS, agreed.into());
        assert_eq!(self.status(), agreed);
        self.queues.clear();
        for index in 0.. {
            self.set(QUEUE_SEL, index);
            if self.get(QUEUE_SIZE_MAX) == 0 {
                break;
            }
            self.add_queue(index, size);
        }
        self.set(STATUS, (agreed | status::DRIVER_OK).into());
        assert_eq!(self.status(), agreed | status::DRIVER_OK);
    }

    fn add_queue(&mut self, index: u32, size: u16) {
        let queue = Queue {
            index,
            size,
            next: 0,
            seen: 0,
        };
        let zeros = vec![0; 0x4000];
        self.ram
            .write_slice(&zeros, GuestAddress(queue.descriptors()))
            .unwrap();
        self.set(QUEUE_SIZE, size.into());
        for (low, high, address) in [
            (QUEUE_DESC_LOW, QUEUE_DESC_HIGH, queue.descriptors()),
            (QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH, queue.available()),
            (QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH, queue.used()),
        ] {
            self.set(low, address as u32);
            self.set(high, (address >> 32) as u32);
        }
        self.set(QUEUE_READY, 1);
        assert_eq!(self.get(QUEUE_READY), 1);
        self.queues.push(queue);
    }

    pub(crate) fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0xff; 4];
        self.device.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u8 {
        self.get(STATUS) as u8
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub(crate) fn config(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.device.read(CONFIG + offset, data);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.set(DEVICE_FEATURES_SEL, 0);
        let low = self.get(DEVICE_FEATURES);
        self.set(DEVICE_FEATURES_SEL, 1);
        u64::from(low) | u64::from(self.get(DEVICE_FEATURES)) << 32
    }

    pub(crate) fn accept(&mut self, features: u64) {
        for (half, bits) in [(0, features), (1, features >> 32)] {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, bits as u32);
        }
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn bytes(&self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub(crate) fn put_half(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }

    pub(crate) fn half(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.bytes(address, 2).try_into().unwrap())
    }

    /// Writes one entry of a descriptor table.
    pub(crate) fn describe(&self, table: u64, index: u16, descriptor: Descriptor) {
        let (address, length, flags, next) = descriptor;
        let at = table + u64::from(index) * 16;
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put_half(at + 12, flags);
        self.put_half(at + 14, next);
    }

    /// Makes the chain that starts at `head` available, without a notification.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let entry = self.queues[queue];
        let slot = u64::from(entry.next % entry.size);
        self.put_half(entry.available() + 4 + slot * 2, head);
        self.queues[queue].next = entry.next.wrapping_add(1);
        self.put_half(entry.available() + 2, self.queues[queue].next);
    }

    /// Puts `parts` (address, length, written by the device) into the table from `first` on, and
    /// makes them available as one chain.
    pub(crate) fn offer_chain(&mut self, queue: usize, first: u16, parts: &[(u64, u32, bool)]) {
        let table = self.queues[queue].descriptors();
        for (at, &(address, length, write)) in parts.iter().enumerate() {
            let index = first + at as u16;
            let more = at + 1 < parts.len();
            let flags = if write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.describe(table, index, (address, length, flags, index + 1));
        }
        self.offer(queue, first);
    }

    pub(crate) fn notify(&mut self, queue: usize) {
        self.set(QUEUE_NOTIFY, self.queues[queue].index);
    }

    /// The next used element, if there is one: (head, length).
    pub(crate) fn reap(&mut self, queue: usize) -> Option<(u32, u32)> {
        let entry = self.queues[queue];
        if self.half(entry.used() + 2) == entry.seen {
            return None;
        }
        let slot = u64::from(entry.seen % entry.size);
        self.queues[queue].seen = entry.seen.wrapping_add(1);
        let element = self.bytes(entry.used() + 4 + slot * 8, 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Interrupts so far; the line is taken down by acknowledging.
    pub(crate) fn interrupts(&mut self) -> usize {
        let pending = self.get(INTERRUPT_STATUS);
        assert_eq!(self.wire.0.lock().unwrap().0, pending != 0);
        self.set(INTERRUPT_ACK, pending);
        assert!(!self.wire.0.lock().unwrap().0);
        self.wire.0.lock().unwrap().1
    }
}
