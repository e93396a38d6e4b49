//! Disk and network from the command line to the guest and back.

mod support;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use engine_core::peripherals::Family;
use engine_core::testing::{Guest, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, on_every_mode};

const LONG: &str = "20";
const BUFFER: u64 = 0x40_0000;

/// Writes registers of the disk or the card.
fn put(asm: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    asm.mov(edx, port)?;
    asm.mov(eax, value)?;
    asm.out(dx, al)
}

/// Waits until the status is `wanted` under `mask`.
fn wait(asm: &mut CodeAssembler, port: u32, mask: i32, wanted: i32) -> Result<(), IcedError> {
    let mut again = asm.create_label();
    asm.mov(edx, port)?;
    asm.set_label(&mut again)?;
    asm.in_(al, dx)?;
    asm.and(eax, mask)?;
    asm.cmp(eax, wanted)?;
    asm.jne(again)
}

fn order(asm: &mut CodeAssembler, command: u32, sector: u32) -> Result<(), IcedError> {
    for (port, value) in [
        (0x1f6, 0xe0),
        (0x1f2, 1),
        (0x1f3, sector),
        (0x1f4, 0),
        (0x1f5, 0),
    ] {
        put(asm, port, value)?;
    }
    put(asm, 0x1f7, command)
}

/// Copies sector 1 to the console and to sector 2, its first byte one more.
fn disk_guest() -> Vec<u8> {
    Guest::long(|asm| {
        order(asm, 0x20, 1)?;
        wait(asm, 0x1f7, 0x89, 8)?;
        asm.mov(edx, 0x1f0)?;
        asm.mov(rdi, BUFFER)?;
        asm.mov(ecx, 256)?;
        asm.rep().insw()?;
        asm.mov(edx, 0x3f8)?;
        asm.mov(rsi, BUFFER)?;
        asm.mov(ecx, 512)?;
        asm.rep().outsb()?;
        asm.mov(rbx, BUFFER)?;
        asm.inc(byte_ptr(rbx))?;
        order(asm, 0x30, 2)?;
        // A write that fails ends with code 1.
        let mut failed = asm.create_label();
        asm.mov(edx, 0x1f7)?;
        asm.in_(al, dx)?;
        asm.test(al, 1)?;
        asm.jne(failed)?;
        wait(asm, 0x1f7, 0x88, 8)?;
        asm.mov(edx, 0x1f0)?;
        asm.mov(rsi, BUFFER)?;
        asm.mov(ecx, 128)?;
        asm.rep().outsd()?;
        wait(asm, 0x1f7, 0x89, 0)?;
        put(asm, 0x1f7, 0xe7)?;
        wait(asm, 0x1f7, 0x89, 0)?;
        end(asm, 0)?;
        asm.set_label(&mut failed)?;
        end(asm, 1)
    })
    .elf()
}

/// Modes whose guests find a PC's devices.
fn on_every_pc(body: impl Fn(&str)) {
    on_every_mode(|mode| {
        if mode.family() == Family::Emulated {
            body(mode.name);
        }
    });
}

fn image() -> Vec<u8> {
    (0..4 * 512u32).map(|at| (at / 3) as u8).collect()
}

#[test]
fn a_guest_reads_and_writes_its_disk() {
    let guest = disk_guest();
    on_every_pc(|mode| {
        for options in ["", ",readonly"] {
            let call = Call::new(mode).image(&guest);
            let path = call.path("disk.img");
            fs::write(&path, image()).unwrap();
            let disk = format!("{}{options}", path.display());
            let ended = call.args(&["--disk", &disk, "--timeout", LONG]).run();
            assert_eq!(ended.stdout, image()[512..1024]);
            if options.is_empty() {
                ended.check(0, "");
            } else {
                ended.check(1, "failed with code 1");
            }
        }
    });
}

#[test]
fn the_disk_keeps_what_the_guest_has_written() {
    let guest = disk_guest();
    on_every_pc(|mode| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, image()).unwrap();
        let disk = path.to_str().unwrap();
        let call = Call::new(mode).image(&guest);
        call.args(&["--disk", disk, "--timeout", LONG])
            .run()
            .check(0, "");
        let mut expected = image();
        expected.copy_within(512..1024, 1024);
        expected[1024] = expected[1024].wrapping_add(1);
        assert!(fs::read(&path).unwrap() == expected);
    });
}

/// Sends one frame of zeros, takes one, and writes it to the console.
fn net_guest() -> Vec<u8> {
    Guest::long(|asm| {
        for (port, value) in [
            (0x300, 0x21),
            (0x30e, 0x49),
            (0x30c, 0x10),
            (0x301, 0x46),
            (0x302, 0x60),
            (0x303, 0x46),
            (0x307, 0xff),
            (0x300, 0x61),
            (0x307, 0x46),
            (0x300, 0x22),
            (0x304, 0x40),
            (0x305, 64),
            (0x306, 0),
            (0x300, 0x26),
        ] {
            put(asm, port, value)?;
        }
        // Received.
        wait(asm, 0x307, 1, 1)?;
        for (port, value) in [
            (0x308, 4),
            (0x309, 0x46),
            (0x30a, 64),
            (0x30b, 0),
            (0x300, 0x0a),
        ] {
            put(asm, port, value)?;
        }
        asm.mov(edx, 0x310)?;
        asm.mov(rdi, BUFFER)?;
        asm.mov(ecx, 32)?;
        asm.rep().insw()?;
        asm.mov(edx, 0x3f8)?;
        asm.mov(rsi, BUFFER)?;
        asm.mov(ecx, 64)?;
        asm.rep().outsb()?;
        end(asm, 0)
    })
    .elf()
}

#[test]
fn a_guest_talks_to_a_peer() {
    let guest = net_guest();
    on_every_pc(|mode| {
        let call = Call::new(mode).image(&guest);
        let path = call.path("peer");
        let peer = UnixDatagram::bind(&path).unwrap();
        let answer: Vec<u8> = (100..164).collect();
        let expected = answer.clone();
        let echo = std::thread::spawn(move || {
            let mut frame = [0xff; 2048];
            let (count, from) = peer.recv_from(&mut frame).unwrap();
            peer.send_to_addr(&answer, &from).unwrap();
            frame[..count].to_vec()
        });
        let net = format!("unix:{}", path.display());
        let ended = call.args(&["--net", &net, "--timeout", LONG]).run();
        ended.check(0, "");
        assert_eq!(echo.join().unwrap(), [0; 64]);
        assert_eq!(ended.stdout, expected);
    });
}

#[test]
fn wrong_disks_and_networks_are_named_with_what_would_mend_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("odd"), [0; 700]).unwrap();
    fs::write(path("fine"), [0; 1024]).unwrap();
    let missing = path("missing");
    let cases = [
        ("--disk", missing.clone(), "No such file"),
        ("--disk", path(""), "is a directory"),
        ("--disk", path("odd"), "a multiple of 512"),
        (
            "--disk",
            "/dev/null".to_owned(),
            "a regular file or a block device",
        ),
        ("--net", format!("unix:{missing}"), "start the peer first"),
        (
            "--net",
            "tap:a/b".to_owned(),
            "no name of a network interface",
        ),
    ];
    for (option, value, text) in cases {
        let call = Call::new("full").args(&["--workload", "alu", option, &value]);
        call.run().check(2, text);
    }
    assert!(Path::new(&path("fine")).exists());
}
