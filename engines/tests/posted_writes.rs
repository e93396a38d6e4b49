//! Writes to a disk's data port, of every width and in parts: an engine that keeps some of them back
//! shows the guest and the disk nothing of it, neither in what was written nor in when.

mod support;

use engine_core::peripherals::Family;
use engine_core::testing::{Guest, assemble, end, selector};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, on_every_mode};

const BUFFER: u64 = 0x40_0000;
const IDT: u64 = 0x28_0000;
const HANDLER: u64 = 0x29_0000;
const SECTOR: usize = 512;
const SECTORS: usize = 3;
/// Line 14 by the second 8259.
const VECTOR: u64 = 0x2e;

fn out(asm: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    asm.mov(edx, port)?;
    asm.mov(eax, value)?;
    asm.out(dx, al)
}

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
        asm.xor(r12d, r12d)?;
        asm.mov(rax, IDT)?;
        asm.push(rax)?;
        asm.mov(rax, 0x0fff_0000_0000_0000u64)?;
        asm.push(rax)?;
        asm.lidt(ptr(rsp + 6))?;
        for (port, words) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
            out(asm, port, words[0])?;
            for word in &words[1..] {
                out(asm, port + 1, *word)?;
            }
        }
        out(asm, 0x21, 0xfb)?;
        out(asm, 0xa1, 0xbf)?;
        for (port, value) in [(0x1f6, 0xe0), (0x1f2, SECTORS as u32), (0x1f3, 1)] {
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
    let handler = assemble(64, HANDLER, |asm| {
        asm.push(rax)?;
        asm.push(rdx)?;
        asm.inc(r12)?;
        asm.mov(edx, 0x1f7)?;
        asm.in_(al, dx)?;
        out(asm, 0xa0, 0x20)?;
        out(asm, 0x20, 0x20)?;
        asm.pop(rdx)?;
        asm.pop(rax)?;
        asm.iretq()
    });
    let mut gate = vec![0; 16];
    gate[..2].copy_from_slice(&(HANDLER as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&selector::CODE.to_le_bytes());
    gate[5] = 0x8e;
    gate[6..8].copy_from_slice(&((HANDLER >> 16) as u16).to_le_bytes());
    for (address, bytes) in [
        (IDT + 16 * VECTOR, gate),
        (HANDLER, handler),
        (BUFFER, data()),
    ] {
        let size = bytes.len() as u64;
        guest.segments.push((address, bytes, size));
    }
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
