//! Writes to a disk's data port, of every width and in parts: an engine that keeps some of them back
//! shows the guest and the disk nothing of it, neither in what was written nor in when.

mod support;

use engine_core::peripherals::Family;
use engine_core::testing::{Guest, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::interrupts::{end_at_pic, handler, out, prepare, unmask};
use support::{Call, on_every_mode};

const BUFFER: u64 = 0x40_0000;
const SECTOR: usize = 512;
const SECTORS: usize = 3;
const IRQ: u8 = 14;
/// By the second 8259.
const VECTOR: u64 = 0x2e;

/// Writes `count` items of `size` bytes from where rsi points on.
fn write(asm: &mut CodeAssembler, size: usize, count: u32) -> Result<(), IcedError> {
    asm.mov(edx, 0x1f0)?;
    asm.mov(ecx, count)?;
    match size {
        1 => asm.rep().outsb(),
        2 => asm.rep().outsw(),
        _ => asm.rep().outsd(),
    }
}

/// Ends with `code` unless the disk asks for more data, as the alternate status shows.
fn still_asks(asm: &mut CodeAssembler, code: u32) -> Result<(), IcedError> {
    let mut fine = asm.create_label();
    asm.mov(edx, 0x3f6)?;
    asm.in_(al, dx)?;
    asm.test(al, 8)?;
    asm.jne(fine)?;
    end(asm, code)?;
    asm.set_label(&mut fine)
}

/// Spins without any exit until the handler has counted to `count`.
fn spin(asm: &mut CodeAssembler, count: i32) -> Result<(), IcedError> {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.pause()?;
    asm.cmp(r12d, count)?;
    asm.jb(again)
}

fn guest() -> Guest {
    let mut guest = Guest::long(|asm| {
        prepare(asm)?;
        unmask(asm, IRQ)?;
        handler(asm, VECTOR, |asm| {
            asm.mov(edx, 0x1f7)?;
            asm.in_(al, dx)?;
            end_at_pic(asm, IRQ)
        })?;
        for (port, value) in [(0x1f6, 0xe0), (0x1f2, SECTORS as u8), (0x1f3, 1)] {
            out(asm, port, value)?;
        }
        out(asm, 0x1f4, 0)?;
        out(asm, 0x1f5, 0)?;
        out(asm, 0x1f7, 0x30)?;
        asm.mov(rsi, BUFFER)?;
        asm.sti()?;
        // One sector in parts, with other accesses in between.
        write(asm, 2, 100)?;
        still_asks(asm, 2)?;
        write(asm, 4, 30)?;
        out(asm, 0x80, 0)?;
        write(asm, 1, 40)?;
        write(asm, 2, 75)?;
        still_asks(asm, 3)?;
        asm.mov(edx, 0x1f0)?;
        asm.lodsw()?;
        asm.out(dx, ax)?;
        // Its last word alone makes the disk ask for the next one.
        spin(asm, 1)?;
        write(asm, 2, 256)?;
        spin(asm, 2)?;
        write(asm, 4, 128)?;
        spin(asm, 3)?;
        end(asm, 0)
    });
    let size = (SECTOR * SECTORS) as u64;
    guest.segments.push((BUFFER, data(), size));
    guest
}

fn data() -> Vec<u8> {
    (0..(SECTOR * SECTORS) as u32)
        .map(|at| (at * 7 / 3) as u8)
        .collect()
}

#[test]
fn every_width_arrives_and_the_last_word_is_noticed_at_once() {
    let image = guest().elf();
    on_every_mode(|mode| {
        if mode.family() != Family::Emulated {
            return;
        }
        for irqchip in ["user", "kernel"] {
            if irqchip == "kernel" && mode.kernel_irqchip.is_none_or(|probe| probe().is_err()) {
                continue;
            }
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.img");
            std::fs::write(&path, [0; 8 * SECTOR]).unwrap();
            Call::new(mode.name)
                .image(&image)
                .args(&["--disk", path.to_str().unwrap()])
                .args(&["--irqchip", irqchip, "--timeout", "10"])
                .run()
                .check(0, "");
            let mut expected = vec![0; 8 * SECTOR];
            expected[SECTOR..(1 + SECTORS) * SECTOR].copy_from_slice(&data());
            let found = std::fs::read(&path).unwrap();
            assert!(found == expected, "{} {irqchip}", mode.name);
        }
    });
}
