//! Guests that ask for more work with one doorbell than anybody has time for: time limits and signals
//! end their runs all the same, and what is left of a batch is served without another doorbell.

mod support;

use std::fs::File;
use std::time::{Duration, Instant};

use engine_core::peripherals::Family;
use engine_core::testing::{Guest, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, finish, on_every_mode};

/// The first transport's registers, and offsets in them (virtio 4.2.2).
const TRANSPORT: u64 = 0xfeb0_0000;
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SELECT: u32 = 0x24;
const QUEUE_SIZE: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const NOTIFY: u32 = 0x50;
const STATUS: u32 = 0x70;
const DESCRIPTORS: u32 = 0x80;
const DRIVER_AREA: u32 = 0x90;
const DEVICE_AREA: u32 = 0xa0;

const TABLE: u64 = 0x40_0000;
const AVAILABLE: u64 = 0x41_0000;
const USED: u64 = 0x42_0000;
const HEADER: u64 = 0x43_0000;
const STATUS_BYTE: u64 = 0x43_1000;
const DATA: u64 = 0x60_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const ENTRIES: u16 = 256;
const PART: u32 = 8 << 20;
const PARTS: u16 = 30;
/// Bytes of one request, and so of the disk: the same memory over and over.
const REQUEST: u64 = PART as u64 * PARTS as u64;

fn set(asm: &mut CodeAssembler, register: u32, value: u32) -> Result<(), IcedError> {
    asm.mov(dword_ptr(rbx + register), value)
}

/// A driver that offers a full queue of the same request with one doorbell, `parts` descriptors of
/// `part` bytes each, and then does what `after` says.
fn driver(
    parts: u16,
    part: u32,
    after: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut guest = Guest::long(|asm| {
        asm.mov(rbx, TRANSPORT)?;
        set(asm, STATUS, 3)?;
        set(asm, DRIVER_FEATURES_SELECT, 1)?;
        // VIRTIO_F_VERSION_1 and nothing else.
        set(asm, DRIVER_FEATURES, 1)?;
        set(asm, STATUS, 11)?;
        set(asm, QUEUE_SIZE, ENTRIES.into())?;
        for (register, address) in [
            (DESCRIPTORS, TABLE),
            (DRIVER_AREA, AVAILABLE),
            (DEVICE_AREA, USED),
        ] {
            set(asm, register, address as u32)?;
        }
        set(asm, QUEUE_READY, 1)?;
        set(asm, STATUS, 15)?;
        set(asm, NOTIFY, 0)?;
        after(asm)
    });
    let mut table = Vec::new();
    let mut descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        table.extend_from_slice(&address.to_le_bytes());
        table.extend_from_slice(&length.to_le_bytes());
        table.extend_from_slice(&flags.to_le_bytes());
        table.extend_from_slice(&next.to_le_bytes());
    };
    descriptor(HEADER, 16, NEXT, 1);
    for number in 1..=parts {
        descriptor(DATA, part, NEXT | WRITE, number + 1);
    }
    descriptor(STATUS_BYTE, 1, WRITE, 0);
    // Flags, index, and a ring of requests that are all the first descriptor's.
    let mut available = vec![0, 0];
    available.extend_from_slice(&ENTRIES.to_le_bytes());
    available.resize(4 + 2 * usize::from(ENTRIES), 0);
    for (address, bytes) in [(TABLE, table), (AVAILABLE, available)] {
        let size = bytes.len() as u64;
        guest.segments.push((address, bytes, size));
    }
    guest.elf()
}

/// Spins for ever.
fn spin(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.pause()?;
    asm.jmp(again)
}

/// Every way in which a virtio disk can be asked here.
fn on_every_doorbell(body: impl Fn(&str, &[&str])) {
    on_every_mode(|mode| {
        if mode.family() != Family::Virtio {
            return;
        }
        body(mode.name, &[]);
        let Some(probe) = mode.eventfd_doorbells else {
            return;
        };
        for (irqchip, name) in [
            (engine_core::Irqchip::User, "user"),
            (engine_core::Irqchip::Kernel, "kernel"),
        ] {
            match probe(irqchip) {
                Ok(()) => body(mode.name, &["--doorbell", "eventfd", "--irqchip", name]),
                Err(unavailable) => eprintln!("skipped: {}: {unavailable}", mode.name),
            }
        }
    });
}

/// Sparse: nothing of it is ever on a disk.
fn greedy(mode: &str, options: &[&str]) -> Call {
    let call = Call::new(mode).image(&driver(PARTS, PART, spin));
    let disk = call.path("disk.img");
    File::create(&disk).unwrap().set_len(REQUEST).unwrap();
    call.args(&["--disk", disk.to_str().unwrap()]).args(options)
}

#[test]
fn a_time_limit_does_not_wait_for_gibibytes() {
    on_every_doorbell(|mode, options| {
        let ended = greedy(mode, options).args(&["--timeout", "0.5"]).run();
        ended.check(5, "time limit reached (0.5 s)");
        assert!(ended.elapsed < Duration::from_secs(4), "{ended:?}");
    });
}

#[test]
fn a_signal_does_not_wait_for_gibibytes() {
    on_every_doorbell(|mode, options| {
        let mut call = greedy(mode, options).args(&["--timeout", "20"]);
        let started = Instant::now();
        let child = call.start();
        std::thread::sleep(Duration::from_millis(500));
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        let ended = finish(child, started);
        ended.check(128 + libc::SIGTERM, "ended by signal 15");
        assert!(ended.elapsed < Duration::from_secs(4), "{ended:?}");
    });
}

/// The last one of a full queue was read as right as the first: its status is 0, and the used index
/// counts all of them.
#[test]
fn what_is_large_but_not_too_large_is_served_whole() {
    const LARGE: u32 = 3 << 20;
    let guest = driver(1, LARGE, |asm| {
        let mut again = asm.create_label();
        let mut wrong = asm.create_label();
        asm.set_label(&mut again)?;
        asm.pause()?;
        asm.movzx(eax, word_ptr(USED + 2))?;
        asm.cmp(eax, u32::from(ENTRIES))?;
        asm.jne(again)?;
        asm.cmp(byte_ptr(STATUS_BYTE), 0)?;
        asm.jne(wrong)?;
        // The last byte of each of the pieces in which it was read.
        for megabyte in 1..=3u64 {
            asm.movzx(eax, byte_ptr(DATA + (megabyte << 20) - 1))?;
            asm.cmp(eax, megabyte as u32)?;
            asm.jne(wrong)?;
        }
        end(asm, 0)?;
        asm.set_label(&mut wrong)?;
        end(asm, 1)
    });
    on_every_doorbell(|mode, options| {
        let call = Call::new(mode).image(&guest);
        let disk = call.path("disk.img");
        let content: Vec<u8> = (0..LARGE).map(|at| (at >> 20) as u8 + 1).collect();
        std::fs::write(&disk, content).unwrap();
        let call = call.args(&["--disk", disk.to_str().unwrap()]).args(options);
        call.args(&["--timeout", "20"]).run().check(0, "");
    });
}
