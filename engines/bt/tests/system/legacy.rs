//! Guests of 16 and 32 bits: 32-bit code around a test, ways into real-address mode, descriptor tables.
//!
//! A test's code writes words to [`RESULTS`]; at the end they go to the console, so the same image
//! can be run by QEMU and the texts compared.

use engine_core::testing::{CODE, Guest, assemble};
use iced_x86::code_asm::*;

use crate::kernel::Built;
use crate::run::{Ended, run, run_as_qemu};

/// Where 16-bit code lies, and its data.
pub(crate) const REAL: u32 = 0x1_0000;
/// The way into real mode.
pub(crate) const STUB: u32 = 0x8000;
/// Where both are loaded, to be copied down: memory below 1 MiB belongs to firmware at boot.
pub(crate) const LOADED: u32 = 0x40_0000;
pub(crate) const RESULTS: u32 = 0x2_0000;
pub(crate) const WORDS: u32 = 32;
pub(crate) const TABLE: u32 = 0x30_0000;

pub(crate) fn push_descriptor(table: &mut Vec<u8>, entry: u64) {
    table.extend_from_slice(&entry.to_le_bytes());
}

/// Flat code and data, then 16-bit code and data of base 0 and 64 KiB.
pub(crate) fn table() -> Vec<u8> {
    let mut table = Vec::new();
    for entry in [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_9b00_0000_ffff,
        0x0000_9300_0000_ffff,
    ] {
        push_descriptor(&mut table, entry);
    }
    table
}

pub(crate) fn far_jump(asm: &mut CodeAssembler, selector: u16, target: u32) -> Built {
    let mut bytes = vec![0xea];
    bytes.extend_from_slice(&target.to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    asm.db(&bytes)
}

pub(crate) fn far_jump_16(asm: &mut CodeAssembler, selector: u16, target: u16) -> Built {
    let mut bytes = vec![0xea];
    bytes.extend_from_slice(&target.to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    asm.db(&bytes)
}

/// Prints the results, in 32-bit protected mode, and ends the guest.
pub(crate) fn print(asm: &mut CodeAssembler) -> Built {
    let mut next = asm.create_label();
    asm.mov(esi, RESULTS)?;
    asm.mov(ebp, WORDS)?;
    asm.mov(edx, 0x3f8)?;
    asm.set_label(&mut next)?;
    asm.lodsd()?;
    for digit in 0..9 {
        if digit == 8 {
            asm.mov(al, i32::from(b'\n'))?;
            asm.out(dx, al)?;
            continue;
        }
        asm.rol(eax, 4)?;
        asm.mov(ebx, eax)?;
        asm.and(eax, 15)?;
        asm.add(eax, i32::from(b'0'))?;
        asm.cmp(eax, i32::from(b'9'))?;
        let mut decimal = asm.create_label();
        asm.jbe(decimal)?;
        asm.add(eax, i32::from(b'a' - b'9' - 1))?;
        asm.set_label(&mut decimal)?;
        asm.out(dx, al)?;
        asm.mov(eax, ebx)?;
    }
    asm.dec(ebp)?;
    asm.jnz(next)?;
    asm.xor(eax, eax)?;
    asm.out(0xf4, al)
}

/// The GDT, flat segments and a stack.
pub(crate) fn flat(asm: &mut CodeAssembler) -> Built {
    asm.lgdt(fword_ptr(TABLE + 0x800))?;
    flat_segments(asm)
}

pub(crate) fn flat_segments(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, 0x10)?;
    for segment in [ds, es, ss] {
        asm.mov(segment, eax)?;
    }
    asm.mov(esp, 0x38_0000)
}

pub(crate) fn clear(asm: &mut CodeAssembler) -> Built {
    asm.mov(edi, RESULTS)?;
    asm.mov(ecx, WORDS)?;
    asm.xor(eax, eax)?;
    asm.rep().stosd()
}

/// 32-bit code that runs `body` and prints.
pub(crate) fn protected(extra: &[u64], body: impl FnOnce(&mut CodeAssembler) -> Built) -> Guest {
    let mut guest = Guest::protected(|asm| {
        flat(asm)?;
        clear(asm)?;
        body(asm)?;
        print(asm)
    });
    add_tables(&mut guest, extra);
    guest
}

pub(crate) fn add_tables(guest: &mut Guest, extra: &[u64]) {
    let mut table = table();
    for &entry in extra {
        push_descriptor(&mut table, entry);
    }
    let limit = table.len() as u16 - 1;
    table.resize(0x800, 0);
    table.extend_from_slice(&limit.to_le_bytes());
    table.extend_from_slice(&TABLE.to_le_bytes());
    let size = table.len() as u64;
    guest.segments.push((TABLE.into(), table, size));
}

/// Runs 16-bit code in real-address mode, with CS, DS, ES and SS of base REAL; the words that it
/// left at RESULTS, which FS reaches. `parts` are more code, by offset.
pub(crate) fn real(
    parts: &[(usize, Vec<u8>)],
    body: impl FnOnce(&mut CodeAssembler) -> Built,
) -> Vec<u32> {
    // Where the 32-bit code goes on; its length doesn't depend on it.
    let enter = |asm: &mut CodeAssembler| {
        flat(asm)?;
        clear(asm)?;
        for (at, to) in [(LOADED, STUB), (LOADED + 0x1000, REAL)] {
            asm.mov(esi, at)?;
            asm.mov(edi, to)?;
            asm.mov(ecx, 0x1000)?;
            asm.rep().movsb()?;
        }
        asm.mov(eax, 0x20)?;
        for segment in [ds, es, ss, fs, gs] {
            asm.mov(segment, eax)?;
        }
        // 16-bit protected mode.
        far_jump(asm, 0x18, STUB)
    };
    let length = assemble(32, CODE, enter).len() as u64;
    let back = CODE + length;
    let mut guest = Guest::protected(|asm| {
        enter(asm)?;
        flat_segments(asm)?;
        print(asm)
    });
    let stub = assemble(16, STUB.into(), |asm| {
        asm.mov(eax, cr0)?;
        asm.and(eax, !1)?;
        asm.mov(cr0, eax)?;
        far_jump_16(asm, (REAL >> 4) as u16, 0)
    });
    let mut code = assemble(16, 0, |asm| {
        asm.mov(ax, (REAL >> 4) as i32)?;
        for segment in [ds, es, ss] {
            asm.mov(segment, ax)?;
        }
        asm.mov(esp, 0xfff0)?;
        asm.mov(ax, (RESULTS >> 4) as i32)?;
        asm.mov(fs, ax)?;
        body(asm)?;
        // Back to 32 bits.
        asm.mov(eax, cr0)?;
        asm.or(eax, 1)?;
        asm.mov(cr0, eax)?;
        let mut jump = vec![0x66, 0xea];
        jump.extend_from_slice(&(back as u32).to_le_bytes());
        jump.extend_from_slice(&8u16.to_le_bytes());
        asm.db(&jump)
    });
    for (at, part) in parts {
        assert!(code.len() <= *at, "parts overlap");
        code.resize(*at, 0x90);
        code.extend(part);
    }
    for (at, bytes) in [(LOADED.into(), stub), (u64::from(LOADED) + 0x1000, code)] {
        let size = bytes.len() as u64;
        guest.segments.push((at, bytes, size));
    }
    add_tables(&mut guest, &[]);
    words(&guest)
}

/// Runs a guest; the words that it printed.
pub(crate) fn words_here(guest: &Guest) -> Vec<u32> {
    let ended = run(guest);
    ended.good();
    ended.words()
}

/// Runs a guest, here and under QEMU; the words that it printed.
pub(crate) fn words(guest: &Guest) -> Vec<u32> {
    let ended = run_as_qemu(guest);
    ended.good();
    ended.words()
}

impl Ended {
    fn good(&self) {
        let good = matches!(self.outcome, engine_core::Outcome::Success);
        assert!(good, "{:?}\n{}", self.outcome, self.console);
    }

    fn words(&self) -> Vec<u32> {
        let lines = self.console.lines();
        lines
            .map(|line| u32::from_str_radix(line, 16).expect("a word"))
            .collect()
    }
}

pub(crate) fn result(asm: &mut CodeAssembler, number: i32, value: AsmRegister32) -> Built {
    asm.mov(dword_ptr(number * 4).fs(), value)
}

pub(crate) const TSS: u32 = 0x30_2000;
pub(crate) const OTHER: u32 = 0x30_3000;
pub(crate) const IDT: u32 = 0x30_4000;

/// A TSS descriptor, or with another type an LDT's.
pub(crate) fn system_descriptor(kind: u64, base: u32, limit: u64) -> u64 {
    let base = u64::from(base);
    limit & 0xffff | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24) << 56
}

/// A call gate, a task gate or an interrupt gate.
pub(crate) fn gate(kind: u64, selector: u16, target: u32, parameters: u64) -> u64 {
    let target = u64::from(target);
    target & 0xffff
        | u64::from(selector) << 16
        | parameters << 32
        | kind << 40
        | (target >> 16) << 48
}

/// Code at a fixed place, put there by the loader.
pub(crate) fn with_code(
    mut guest: Guest,
    at: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Built,
) -> Guest {
    let code = assemble(32, at.into(), body);
    let size = code.len() as u64;
    guest.segments.push((at.into(), code, size));
    guest
}

pub(crate) fn with_words(mut guest: Guest, at: u32, words: &[(usize, u32)]) -> Guest {
    let mut bytes = vec![0; 0x1000];
    for &(offset, word) in words {
        bytes[offset..offset + 4].copy_from_slice(&word.to_le_bytes());
    }
    guest.segments.push((at.into(), bytes, 0x1000));
    guest
}

pub(crate) fn flat_result(asm: &mut CodeAssembler, number: u32, value: AsmRegister32) -> Built {
    asm.mov(dword_ptr(RESULTS + 4 * number), value)
}

/// The new task's image: where it starts, with which stack and selectors.
pub(crate) fn task(entry: u32, flags: u32) -> Vec<(usize, u32)> {
    let mut words = vec![
        (0x20, entry),
        (0x24, flags),
        (0x28, 0x1111),
        (0x38, 0x39_0000),
        (0x44, 0x2222),
        (0x4c, 8),
        (0x64, 0x68 << 16),
    ];
    for offset in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        words.push((offset, 0x10));
    }
    words
}
