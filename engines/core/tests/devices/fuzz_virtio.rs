//! Random drivers of virtio devices.
//!
//! The memory of a case is small, and lies at addresses that random choices hit: rings, tables and
//! buffers overlap each other, the rings included, and half of the chains point out of memory.

use std::cell::RefCell;
use std::sync::Arc;

use engine_core::GuestRam;
use engine_core::devices::virtio::core::status;
use engine_core::devices::virtio::mmio::register::*;
use engine_core::devices::virtio::{Block, Console, Core, Mmio, Net, VirtioDevice, feature};
use engine_core::devices::{Action, Device};
use engine_core::dma::DeviceMemory;
use engine_core::host::console::{Output, Sink};
use engine_core::host::events::Events;
use engine_core::host::input::Input;
use engine_core::interrupt::Line;
use engine_core::net::DEFAULT_MAC;
use vm_memory::{Bytes, GuestAddress};

use crate::backing::{Disk, Faults, Wire};
use crate::fuzz::Choices;

/// Bytes at the start of memory that a case plays in, and where memory ends.
const ARENA: u64 = 0x1_0000;
const END: u64 = 1 << 20;
/// Where a driver puts its rings.
const RINGS: u64 = 0x8000;
const SECTORS: u64 = 16;

thread_local! {
    /// One memory for all cases of a thread: it is cleared where they have played.
    static MEMORY: RefCell<Option<(Arc<GuestRam>, DeviceMemory)>> = const { RefCell::new(None) };
}

fn memory() -> (Arc<GuestRam>, DeviceMemory) {
    MEMORY.with(|slot| {
        slot.borrow_mut()
            .get_or_insert_with(|| {
                let ram = engine_core::memory::create(END >> 20).unwrap();
                let memory = DeviceMemory::new(&ram, true).unwrap();
                (ram, memory)
            })
            .clone()
    })
}

struct Case<'a, 'b> {
    choices: &'a mut Choices<'b>,
    device: Mmio,
    ram: Arc<GuestRam>,
    memory: DeviceMemory,
    pages: Vec<u64>,
}

/// What an honest driver asks in the end: a queue, and the parts of a request in it.
struct Honest {
    queue: u64,
    /// Bytes at the start of memory.
    text: [u8; 16],
    /// Length, written by the device.
    parts: &'static [(u32, bool)],
}

/// Plays a case: each operation is one access or one piece of memory. `event` is what may happen
/// on the host's side.
fn play(
    choices: &mut Choices<'_>,
    device: Box<dyn VirtioDevice>,
    honest: &Honest,
    mut event: impl FnMut(&mut Choices<'_>),
) -> String {
    let (ram, memory) = memory();
    ram.write_slice(&[0; ARENA as usize], GuestAddress(0))
        .unwrap();
    let mut case = Case {
        choices,
        device: Mmio::new(Core::new(device, &memory), Line::disconnected()),
        ram,
        memory,
        pages: Vec::new(),
    };
    if case.choices.byte() & 7 != 0 {
        case.initialise();
    }
    while !case.choices.done() {
        match case.choices.byte() % 16 {
            0 => case.noise(),
            1 => case.read(),
            2 => case.initialise(),
            3 => event(case.choices),
            4 | 5 => {
                case.device.host_ready();
            }
            6 => case.scribble(),
            7..=11 => case.chain(),
            12 => case.indirect(),
            _ => case.notify(),
        }
    }
    case.conclude(honest)
}

impl Case<'_, '_> {
    fn set(&mut self, offset: u64, value: u32) -> Action {
        self.device.write(offset, &value.to_le_bytes())
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        // What does not fit is not written: the guest's own writes are no concern here.
        let _ = self.ram.write_slice(bytes, GuestAddress(address));
    }

    fn queue(&mut self) -> u64 {
        u64::from(self.choices.byte() & 1)
    }

    /// As a driver does it, with a feature or a ring address wrong now and then.
    fn initialise(&mut self) {
        let size = 1 << self.choices.below(6);
        self.initialise_with(size);
    }

    fn initialise_with(&mut self, size: u32) {
        self.set(STATUS, 0);
        self.set(STATUS, 3);
        let features = match self.choices.byte() & 3 {
            0 => feature::VERSION_1,
            1 => feature::COMMON,
            _ => feature::COMMON | u64::from(self.choices.half()),
        };
        let offered = self.device.core().unwrap().offered();
        for (half, bits) in [(0, features & offered), (1, features >> 32)] {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, bits as u32);
        }
        self.set(STATUS, (3 | status::FEATURES_OK).into());
        for queue in 0..2 {
            self.set(QUEUE_SEL, queue as u32);
            self.set(QUEUE_SIZE, size);
            let rings = RINGS + queue * 0x3000;
            for (low, address) in [
                (QUEUE_DESC_LOW, rings),
                (QUEUE_DRIVER_LOW, rings + 0x1000),
                (QUEUE_DEVICE_LOW, rings + 0x2000),
            ] {
                let address = match self.choices.byte() {
                    1..=3 => u64::from(self.choices.half()),
                    4 => END - u64::from(self.choices.byte() & 0xf0),
                    5 => u64::from(self.choices.word()) << 32 | address,
                    _ => address,
                };
                self.set(low, address as u32);
                self.set(low + 4, (address >> 32) as u32);
            }
            self.set(QUEUE_READY, 1);
        }
        let ok = 3 | status::FEATURES_OK | status::DRIVER_OK;
        self.set(STATUS, ok.into());
    }

    /// Any access to any register.
    fn noise(&mut self) {
        let offset = self.choices.below(0x200).into();
        let length = self.choices.of(&[1, 2, 4, 4, 4, 8]);
        let data = self.choices.take(length);
        self.device.write(offset, &data);
    }

    fn read(&mut self) {
        let offset = self.choices.below(0x200).into();
        let length = self.choices.of(&[1, 2, 4, 8]);
        let mut data = vec![0xff; length];
        self.device.read(offset, &mut data);
    }

    /// Any bytes anywhere.
    fn scribble(&mut self) {
        let address = self.choices.below(ARENA as u32).into();
        let count = self.choices.below(64) as usize;
        let bytes = self.choices.take(count);
        self.put(address, &bytes);
    }

    fn address(&mut self) -> u64 {
        match self.choices.byte() % 16 {
            0 => u64::from(self.choices.half()) << 4 | 0xf_0000,
            1 => END - u64::from(self.choices.half() & 0x7ff),
            2 => u64::MAX - u64::from(self.choices.byte()),
            3 => u64::from(self.choices.word()) << 20,
            // Into the rings.
            4 => RINGS + u64::from(self.choices.half() & 0x3fff),
            _ => u64::from(self.choices.half() & 0x7fff),
        }
    }

    fn length(&mut self) -> u32 {
        match self.choices.byte() % 16 {
            0 => u32::MAX - u32::from(self.choices.byte()),
            1 => 0,
            2 => self.choices.word(),
            3 => self.choices.half().into(),
            4..=6 => 512 * self.choices.below(9),
            7 | 8 => 16,
            9 | 10 => 1,
            _ => self.choices.below(2048),
        }
    }

    /// A table entry.
    fn descriptor(&mut self, address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&address.to_le_bytes());
        entry[8..12].copy_from_slice(&length.to_le_bytes());
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&next.to_le_bytes());
        entry
    }

    /// Makes a chain and offers it: readable parts, then writable ones, most of the time.
    fn chain(&mut self) {
        let queue = self.queue();
        let table = RINGS + queue * 0x3000;
        let first = self.choices.below(32) as u16;
        let parts = self.choices.below(5) as u16 + 1;
        let readable = self.choices.below(u32::from(parts) + 1) as u16;
        self.header();
        for part in 0..parts {
            let mut flags = if part < readable { 0 } else { 2 };
            if part + 1 < parts {
                flags |= 1;
            }
            let mut next = (first + part + 1) % 32;
            match self.choices.byte() {
                0 => flags = self.choices.half(),
                1 => next = self.choices.half(),
                2 => next = first,
                _ => {}
            }
            let (address, length) = if part == 0 && self.choices.byte() & 3 != 0 {
                (0, 16)
            } else {
                (self.address(), self.length())
            };
            let entry = self.descriptor(address, length, flags, next);
            self.put(table + u64::from((first + part) % 32) * 16, &entry);
        }
        self.offer(table, first);
    }

    /// A block request's header, at the place that first descriptors point to.
    fn header(&mut self) {
        let kind = self.choices.of(&[0u32, 0, 1, 1, 4, 8, 3, 77]);
        let sector = match self.choices.byte() & 7 {
            0 => u64::MAX - u64::from(self.choices.byte()),
            1 => SECTORS - u64::from(self.choices.byte() & 3),
            _ => self.choices.below(SECTORS as u32).into(),
        };
        self.put(0, &kind.to_le_bytes());
        self.put(8, &sector.to_le_bytes());
    }

    fn indirect(&mut self) {
        let queue = self.queue();
        let table = RINGS + queue * 0x3000;
        let first = self.choices.below(32) as u16;
        let address = self.address();
        let length = self.choices.of(&[16, 32, 48, 48, 0, 8, 1 << 20, u32::MAX]);
        let entry = self.descriptor(address, length, 4, 0);
        self.put(table + u64::from(first) * 16, &entry);
        for part in 0..3 {
            let (place, length) = (self.address(), self.length());
            let flags = self.choices.of(&[1, 1, 3, 2, 0, 4]);
            let entry = self.descriptor(place, length, flags, part + 1);
            self.put(address.wrapping_add(u64::from(part) * 16), &entry);
        }
        self.offer(table, first);
    }

    fn offer(&mut self, table: u64, head: u16) {
        let at = GuestAddress(table + 0x1002);
        let index: u16 = self.ram.read_obj(at).unwrap();
        let head = if self.choices.byte() == 0 {
            self.choices.half()
        } else {
            head
        };
        // The queue's size is not known here: the entry goes to every place it may have.
        for size in [1, 2, 4, 8, 16, 32] {
            let slot = u64::from(index % size);
            self.put(table + 0x1004 + slot * 2, &head.to_le_bytes());
        }
        let next = match self.choices.byte() {
            0 => self.choices.half(),
            1 => index.wrapping_add(32),
            _ => index.wrapping_add(1),
        };
        self.put(table + 0x1002, &next.to_le_bytes());
    }

    fn notify(&mut self) {
        let queue = match self.choices.byte() {
            0 => self.choices.word(),
            other => u32::from(other & 1),
        };
        self.set(QUEUE_NOTIFY, queue);
    }

    /// Whatever has happened: the log knows only pages that are, and after a reset the device serves
    /// an honest driver.
    fn conclude(mut self, honest: &Honest) -> String {
        let broken = self.device.core().unwrap().broken();
        if let Some(log) = self.memory.log()
            && log.take(&mut self.pages)
        {
            assert!(self.pages.iter().all(|page| page << 12 < END));
        }
        self.set(STATUS, 0);
        assert_eq!(self.get(STATUS), 0);
        assert_eq!(self.get(INTERRUPT_STATUS), 0);
        assert_eq!(self.device.core().unwrap().broken(), None);
        self.put(0, &[0; ARENA as usize]);
        self.put(0, &honest.text);
        // Every choice is zero from here on, and so is right.
        self.choices.end();
        self.initialise_with(32);
        let table = RINGS + honest.queue * 0x3000;
        for (index, &(length, write)) in honest.parts.iter().enumerate() {
            let more = index + 1 < honest.parts.len();
            let flags = u16::from(more) | if write { 2 } else { 0 };
            let address = index as u64 * 0x100;
            let entry = self.descriptor(address, length, flags, index as u16 + 1);
            self.put(table + index as u64 * 16, &entry);
        }
        self.put(table + 0x1002, &1u16.to_le_bytes());
        self.set(QUEUE_NOTIFY, honest.queue as u32);
        let used: u16 = self.ram.read_obj(GuestAddress(table + 0x2002)).unwrap();
        assert_eq!(used, 1, "{:?}", self.device.core());
        broken.map_or("sound".to_owned(), |broken| format!("{broken:?}"))
    }
}

/// The block device, on a disk with faults. An honest request is served in the end.
pub(crate) fn block(choices: &mut Choices<'_>) -> String {
    let disk = Disk::new(SECTORS);
    let faulty = disk.clone();
    if choices.byte() & 7 == 0 {
        disk.fail(Faults {
            read_only: true,
            ..Faults::default()
        });
    }
    let identify = Honest {
        queue: 0,
        text: [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        parts: &[(16, false), (20, true), (1, true)],
    };
    let device = Box::new(Block::new(disk.boxed()));
    let state = play(choices, device, &identify, |choices| {
        let code = |choice: u8| (choice & 1 != 0).then_some(libc::EIO);
        let (read, write, flush) = (choices.byte(), choices.byte(), choices.byte());
        let end = u64::from(choices.byte()) * 512;
        faulty.with(|content| {
            content.faults = Faults {
                end: (read & 2 != 0).then_some(end),
                read: code(read),
                write: code(write),
                flush: code(flush),
                read_only: content.faults.read_only,
            };
        });
    });
    assert_eq!(
        disk.with(|content| content.bytes.len() as u64),
        SECTORS * 512
    );
    state
}

/// For devices with a queue of what goes out.
const SEND: Honest = Honest {
    queue: 1,
    text: [0; 16],
    parts: &[(72, false)],
};

/// The network device: frames of all lengths come in, frames of allowed lengths go out.
pub(crate) fn net(choices: &mut Choices<'_>) -> String {
    let wire = Wire::new();
    let other = wire.clone();
    let card = Net::new(wire.boxed(), DEFAULT_MAC);
    play(choices, Box::new(card), &SEND, |choices| {
        let length = choices.below(1518) as usize + 1;
        let byte = choices.byte();
        for _ in 0..=choices.byte() & 3 {
            other.arrive(&vec![byte; length]);
        }
        if choices.byte() == 0 {
            other.frames.lock().unwrap().gone = true;
        }
    })
}

/// The console: what goes out is never more than was offered, what comes in is taken once.
pub(crate) fn console(choices: &mut Choices<'_>) -> String {
    thread_local! {
        static EVENTS: Arc<Events> = Arc::new(Events::new().unwrap());
    }
    let input = Arc::new(Input::default());
    let more = Arc::clone(&input);
    let output = Output::new(Sink::Memory(Vec::new()), EVENTS.with(Arc::clone));
    let console = Console::new(output, input, Box::new(|| ()));
    play(choices, Box::new(console), &SEND, |choices| {
        let count = choices.byte().into();
        more.push(&choices.take(count));
    })
}
