//! Real-address, 16-bit protected and virtual-8086 mode, and what 32-bit code has beside 64-bit code:
//! segments with limits, gates of every kind, tasks.
//!
//! A test's code writes words to [`RESULTS`]; at the end they go to the console, so the same image
//! can be run by QEMU and the texts compared.

use engine_core::testing::{CODE, Guest, assemble};
use iced_x86::code_asm::*;

use crate::kernel::Built;
use crate::run::{Ended, qemu, run};

/// Where 16-bit code lies, and its data.
const REAL: u32 = 0x1_0000;
/// The way into real mode.
const STUB: u32 = 0x8000;
/// Where both are loaded, to be copied down: memory below 1 MiB belongs to firmware at boot.
const LOADED: u32 = 0x40_0000;
const RESULTS: u32 = 0x2_0000;
const WORDS: u32 = 32;
const TABLE: u32 = 0x30_0000;

fn push_descriptor(table: &mut Vec<u8>, entry: u64) {
    table.extend_from_slice(&entry.to_le_bytes());
}

/// Flat code and data, then 16-bit code and data of base 0 and 64 KiB.
fn table() -> Vec<u8> {
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

fn far_jump(asm: &mut CodeAssembler, selector: u16, target: u32) -> Built {
    let mut bytes = vec![0xea];
    bytes.extend_from_slice(&target.to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    asm.db(&bytes)
}

fn far_jump_16(asm: &mut CodeAssembler, selector: u16, target: u16) -> Built {
    let mut bytes = vec![0xea];
    bytes.extend_from_slice(&target.to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    asm.db(&bytes)
}

/// Prints the results, in 32-bit protected mode, and ends the guest.
fn print(asm: &mut CodeAssembler) -> Built {
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
fn flat(asm: &mut CodeAssembler) -> Built {
    asm.lgdt(fword_ptr(TABLE + 0x800))?;
    flat_segments(asm)
}

fn flat_segments(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, 0x10)?;
    for segment in [ds, es, ss] {
        asm.mov(segment, eax)?;
    }
    asm.mov(esp, 0x38_0000)
}

fn clear(asm: &mut CodeAssembler) -> Built {
    asm.mov(edi, RESULTS)?;
    asm.mov(ecx, WORDS)?;
    asm.xor(eax, eax)?;
    asm.rep().stosd()
}

/// 32-bit code that runs `body` and prints.
fn protected(extra: &[u64], body: impl FnOnce(&mut CodeAssembler) -> Built) -> Guest {
    let mut guest = Guest::protected(|asm| {
        flat(asm)?;
        clear(asm)?;
        body(asm)?;
        print(asm)
    });
    add_tables(&mut guest, extra);
    guest
}

fn add_tables(guest: &mut Guest, extra: &[u64]) {
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
fn real(parts: &[(usize, Vec<u8>)], body: impl FnOnce(&mut CodeAssembler) -> Built) -> Vec<u32> {
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
fn words_here(guest: &Guest) -> Vec<u32> {
    let ended = run(guest);
    ended.good();
    ended.words()
}

/// Runs a guest, here and under QEMU; the words that it printed.
fn words(guest: &Guest) -> Vec<u32> {
    let ended = run(guest);
    ended.good();
    if let Some(text) = qemu(guest) {
        let differences: Vec<_> = ended
            .console
            .lines()
            .zip(text.lines())
            .enumerate()
            .filter(|(_, (here, there))| here != there)
            .collect();
        assert!(
            ended.console == text,
            "lines that differ (translated, QEMU): {differences:?}"
        );
    }
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

fn result(asm: &mut CodeAssembler, number: i32, value: AsmRegister32) -> Built {
    asm.mov(dword_ptr(number * 4).fs(), value)
}

#[test]
fn real_mode_computes_addresses_and_operands_of_both_sizes() {
    let found = real(&[], |asm| {
        asm.mov(eax, 0x1234_5678)?;
        asm.mov(bx, 0x4000)?;
        asm.mov(si, 0x10)?;
        asm.mov(dword_ptr(bx + si + 4), eax)?;
        asm.mov(cx, word_ptr(bx + si + 6))?;
        asm.movzx(ecx, cx)?;
        result(asm, 0, ecx)?;
        // 16-bit addresses wrap, 32-bit operands go with them.
        asm.mov(bx, 0xfff8)?;
        asm.mov(si, 0x4020)?;
        asm.add(dword_ptr(bx + si - 4), 0x1111)?;
        asm.mov(edx, dword_ptr(0x4014))?;
        result(asm, 1, edx)?;
        asm.mov(edi, 0x4014)?;
        asm.inc(byte_ptr(edi + 1))?;
        asm.mov(edx, dword_ptr(edi))?;
        result(asm, 2, edx)?;
        asm.lea(eax, ptr(bx + si + 0x7000))?;
        result(asm, 3, eax)?;
        asm.mov(bp, 0x4014)?;
        asm.mov(eax, dword_ptr(bp))?;
        result(asm, 4, eax)?;
        // Registers keep their upper halves.
        asm.mov(eax, 0xaaaa_bbbbu32)?;
        asm.mov(ax, 1)?;
        asm.inc(ax)?;
        asm.sub(ax, 5)?;
        asm.shl(ax, 3)?;
        result(asm, 5, eax)?;
        asm.cwde()?;
        result(asm, 6, eax)?;
        asm.mov(dx, 7)?;
        asm.mov(ax, 0x1235)?;
        asm.mov(cx, 0x35)?;
        asm.div(cx)?;
        asm.shl(edx, 16)?;
        asm.mov(dx, ax)?;
        result(asm, 7, edx)?;
        // Strings.
        asm.cld()?;
        asm.mov(esi, 0x77_4014)?;
        asm.mov(edi, 0x88_5000u32)?;
        asm.mov(ecx, 0x99_0003u32)?;
        asm.rep().movsb()?;
        asm.mov(eax, dword_ptr(0x5000))?;
        result(asm, 8, eax)?;
        result(asm, 9, esi)?;
        result(asm, 10, edi)?;
        result(asm, 11, ecx)?;
        asm.fld1()?;
        asm.fadd_2(st0, st0)?;
        asm.fstp(dword_ptr(0x5010))?;
        asm.mov(eax, dword_ptr(0x5010))?;
        result(asm, 12, eax)
    });
    assert_eq!(found[0], 0x1234);
    assert_eq!(found[1], 0x1234_6789);
    assert_eq!(found[2], 0x1234_6889);
    assert_eq!(found[3], 0xb018);
    assert_eq!(found[5], 0xaaaa_ffe8);
    assert_eq!(found[12], 0x4000_0000);
}

#[test]
fn real_mode_calls_loops_and_handles_interrupts() {
    const FAR: u16 = 0x800;
    const HANDLER: u16 = 0x840;
    const DIVIDE: u16 = 0x880;
    let far = assemble(16, FAR.into(), |asm| {
        asm.mov(ebx, 0x77)?;
        asm.retf()
    });
    let handler = assemble(16, HANDLER.into(), |asm| {
        asm.mov(bp, sp)?;
        asm.mov(ecx, dword_ptr(bp + 2))?;
        asm.iret()
    });
    let divide = assemble(16, DIVIDE.into(), |asm| {
        asm.mov(bp, sp)?;
        // The divide's own address: go on after it.
        asm.add(word_ptr(bp), 2)?;
        asm.mov(edx, 0xd1d1)?;
        asm.iret()
    });
    let parts = [
        (usize::from(FAR), far),
        (usize::from(HANDLER), handler),
        (usize::from(DIVIDE), divide),
    ];
    let found = real(&parts, |asm| {
        let mut function = asm.create_label();
        let mut over = asm.create_label();
        asm.jmp(over)?;
        asm.set_label(&mut function)?;
        asm.mov(bp, sp)?;
        asm.mov(eax, dword_ptr(bp + 2))?;
        asm.ret_1(4)?;
        asm.set_label(&mut over)?;
        asm.mov(eax, 0x1122_3344)?;
        asm.push(eax)?;
        asm.xor(eax, eax)?;
        asm.call(function)?;
        result(asm, 0, eax)?;
        asm.movzx(eax, sp)?;
        result(asm, 1, eax)?;
        // A far call through memory.
        asm.mov(word_ptr(0x4000), i32::from(FAR))?;
        asm.mov(ax, cs)?;
        asm.mov(word_ptr(0x4002), ax)?;
        asm.db(&[0xff, 0x1e, 0x00, 0x40])?;
        result(asm, 2, ebx)?;
        // Vectors 0 and 0x40.
        asm.xor(ax, ax)?;
        asm.mov(gs, ax)?;
        asm.mov(ax, cs)?;
        asm.mov(word_ptr(0x100).gs(), i32::from(HANDLER))?;
        asm.mov(word_ptr(0x102).gs(), ax)?;
        asm.mov(word_ptr(0).gs(), i32::from(DIVIDE))?;
        asm.mov(word_ptr(2).gs(), ax)?;
        // A table of its own: whoever booted left none.
        asm.mov(word_ptr(0x4010), 0x3ff)?;
        asm.mov(dword_ptr(0x4012), 0)?;
        asm.lidt(fword_ptr(0x4010))?;
        asm.stc()?;
        asm.int(0x40)?;
        asm.and(ecx, 0xffff_0fff_u32 as i32)?;
        result(asm, 3, ecx)?;
        asm.xor(cx, cx)?;
        asm.xor(edx, edx)?;
        asm.div(cx)?;
        result(asm, 4, edx)?;
        asm.movzx(eax, sp)?;
        result(asm, 5, eax)?;
        // loop counts CX and leaves the rest of ECX alone.
        asm.mov(ecx, 0x5_0004)?;
        asm.xor(eax, eax)?;
        asm.inc(ax)?;
        // loop to the inc, by CX.
        asm.db(&[0xe2, 0xfd])?;
        asm.shl(eax, 16)?;
        asm.mov(ax, cx)?;
        result(asm, 6, eax)?;
        result(asm, 7, ecx)?;
        // pusha and popa, of both sizes.
        asm.mov(esi, 0x1234_5678)?;
        asm.pusha()?;
        asm.xor(si, si)?;
        asm.popa()?;
        asm.pushad()?;
        asm.mov(esi, 0)?;
        asm.popad()?;
        result(asm, 8, esi)?;
        asm.movzx(eax, sp)?;
        result(asm, 9, eax)?;
        asm.enter(8, 1)?;
        asm.movzx(eax, sp)?;
        result(asm, 10, eax)?;
        asm.leave()?;
        asm.movzx(eax, sp)?;
        result(asm, 11, eax)
    });
    assert_eq!(found[0], 0x1122_3344);
    assert_eq!((found[1], found[2], found[4]), (0xfff0, 0x77, 0xd1d1));
    assert_eq!(found[5], 0xfff0);
    assert_eq!((found[6], found[7]), (0x4_0000, 0x5_0000));
    assert_eq!(found[8], 0x1234_5678);
    assert_eq!(found[9], 0xfff0);
    assert_eq!((found[10], found[11]), (0xfff0 - 12, 0xfff0));
}

#[test]
fn decimal_arithmetic_is_as_it_was() {
    let found = protected(&[], |asm| {
        asm.xor(edi, edi)?;
        let mut outer = asm.create_label();
        asm.set_label(&mut outer)?;
        // Every AL with every CF and AF, results and flags summed up.
        for (number, opcode) in [
            &[0x27u8][..],
            &[0x2f],
            &[0x37],
            &[0x3f],
            &[0xd4, 10],
            &[0xd5, 10],
            &[0xd6],
        ]
        .into_iter()
        .enumerate()
        {
            for (flags, mask) in [(0x02u32, 0xd5), (0x03, 0xd5), (0x12, 0xd5), (0x13, 0xd5)] {
                // What each defines of the flags.
                let mask = match number {
                    0 | 1 => mask,
                    2 | 3 => 0x11,
                    4 | 5 => 0xc4,
                    _ => 0,
                };
                asm.push(flags as i32)?;
                asm.popfd()?;
                asm.mov(eax, edi)?;
                asm.mov(ah, 0x25)?;
                asm.db(opcode)?;
                asm.pushfd()?;
                asm.pop(ebx)?;
                asm.and(ebx, mask)?;
                asm.shl(ebx, 16)?;
                asm.add(eax, ebx)?;
                asm.mov(edx, dword_ptr(RESULTS + 4 * number as u32))?;
                asm.rol(edx, 1)?;
                asm.add(edx, eax)?;
                asm.mov(dword_ptr(RESULTS + 4 * number as u32), edx)?;
            }
        }
        asm.inc(edi)?;
        asm.cmp(edi, 256)?;
        asm.jne(outer)
    });
    words(&found);
}

const TSS: u32 = 0x30_2000;
const OTHER: u32 = 0x30_3000;
const IDT: u32 = 0x30_4000;

/// A TSS descriptor, or with another type an LDT's.
fn system_descriptor(kind: u64, base: u32, limit: u64) -> u64 {
    let base = u64::from(base);
    limit & 0xffff | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24) << 56
}

/// A call gate, a task gate or an interrupt gate.
fn gate(kind: u64, selector: u16, target: u32, parameters: u64) -> u64 {
    let target = u64::from(target);
    target & 0xffff
        | u64::from(selector) << 16
        | parameters << 32
        | kind << 40
        | (target >> 16) << 48
}

/// Code at a fixed place, put there by the loader.
fn with_code(mut guest: Guest, at: u32, body: impl FnOnce(&mut CodeAssembler) -> Built) -> Guest {
    let code = assemble(32, at.into(), body);
    let size = code.len() as u64;
    guest.segments.push((at.into(), code, size));
    guest
}

fn with_words(mut guest: Guest, at: u32, words: &[(usize, u32)]) -> Guest {
    let mut bytes = vec![0; 0x1000];
    for &(offset, word) in words {
        bytes[offset..offset + 4].copy_from_slice(&word.to_le_bytes());
    }
    guest.segments.push((at.into(), bytes, 0x1000));
    guest
}

fn flat_result(asm: &mut CodeAssembler, number: u32, value: AsmRegister32) -> Built {
    asm.mov(dword_ptr(RESULTS + 4 * number), value)
}

/// The new task's image: where it starts, with which stack and selectors.
fn task(entry: u32, flags: u32) -> Vec<(usize, u32)> {
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

#[test]
fn tasks_are_switched_by_calls_jumps_gates_and_returns() {
    const HANDLER: u32 = 0x31_0000;
    // 0x28: this task, 0x30: the other, 0x38: a gate to it, 0x40: a call gate.
    const CALLED: u32 = 0x31_1000;
    let extra = [
        system_descriptor(0x89, TSS, 0x67),
        system_descriptor(0x89, OTHER, 0x67),
        gate(0x85, 0x30, 0, 0),
        gate(0x8c, 8, CALLED, 2),
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.mov(ebx, 0x55)?;
        // call 0x30:0; the other task adds to its own counter and returns with iret.
        for selector in [0x30u16, 0x38] {
            let mut bytes = vec![0x9a, 0, 0, 0, 0];
            bytes.extend_from_slice(&selector.to_le_bytes());
            asm.db(&bytes)?;
        }
        flat_result(asm, 0, ebx)?;
        asm.mov(eax, cr0)?;
        asm.and(eax, 8)?;
        flat_result(asm, 1, eax)?;
        asm.clts()?;
        asm.pushfd()?;
        asm.pop(eax)?;
        asm.and(eax, 0x4000)?;
        flat_result(asm, 2, eax)?;
        asm.mov(eax, dword_ptr(OTHER + 0x28))?;
        flat_result(asm, 3, eax)?;
        asm.movzx(eax, word_ptr(OTHER))?;
        flat_result(asm, 4, eax)?;
        asm.mov(eax, dword_ptr(OTHER + 0x24))?;
        asm.and(eax, 0x4000)?;
        flat_result(asm, 5, eax)?;
        asm.movzx(eax, byte_ptr(TABLE + 0x2d))?;
        flat_result(asm, 6, eax)?;
        asm.movzx(eax, byte_ptr(TABLE + 0x35))?;
        flat_result(asm, 7, eax)?;
        // A call gate of the same privilege copies nothing.
        asm.db(&[0x9a, 0, 0, 0, 0, 0x40, 0])?;
        flat_result(asm, 8, ecx)?;
        // The same task by an exception: a divide error through a task gate.
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.xor(ecx, ecx)?;
        asm.mov(dword_ptr(OTHER + 0x20), HANDLER)?;
        asm.div(ecx)?;
        asm.inc(ebx)?;
        flat_result(asm, 9, ebx)
    });
    let guest = with_words(guest, TSS, &[(0x64, 0x68 << 16)]);
    let guest = with_words(guest, OTHER, &task(HANDLER, 2));
    let low = gate(0x85, 0x30, 0, 0);
    let guest = with_words(guest, IDT, &[(0, low as u32), (4, (low >> 32) as u32)]);
    let guest = with_code(guest, HANDLER, |asm| {
        asm.add(eax, 1)?;
        // Skip the divide, if that is where the caller stands.
        let mut not = asm.create_label();
        asm.mov(edx, dword_ptr(TSS + 0x20))?;
        asm.cmp(word_ptr(edx), 0xf1f7u32 as i32)?;
        asm.jne(not)?;
        asm.add(dword_ptr(TSS + 0x20), 2)?;
        asm.set_label(&mut not)?;
        asm.iretd()?;
        // Called again, the task goes on here.
        asm.mov(edx, HANDLER)?;
        asm.jmp(edx)
    });
    let guest = with_code(guest, CALLED, |asm| {
        asm.mov(ecx, dword_ptr(esp + 4))?;
        asm.retf()
    });
    let found = words(&guest);
    assert_eq!(found[..3], [0x55, 8, 0]);
    assert_eq!(found[3], 0x1113);
    assert_eq!((found[4], found[8], found[9]), (0x28, 8, 0x56));
}

#[test]
fn ring_3_calls_through_a_gate_onto_the_inner_stack_and_returns() {
    const USER: u32 = 0x31_0000;
    const INNER: u32 = 0x31_1000;
    // 0x28: TSS, 0x30: user code, 0x38: user data, 0x40: a call gate for ring 3.
    let extra = [
        system_descriptor(0x89, TSS, 0x67),
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        gate(0xec, 8, INNER, 2),
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.push(0x3b)?;
        asm.push(0x38_8000)?;
        asm.push(0x33)?;
        asm.push(USER as i32)?;
        asm.retf()
    });
    let guest = with_words(guest, TSS, &[(4, 0x37_0000), (8, 0x10), (0x64, 0x68 << 16)]);
    let guest = with_code(guest, USER, |asm| {
        asm.push(0x1111)?;
        asm.push(0x2222)?;
        asm.db(&[0x9a, 0, 0, 0, 0, 0x43, 0])?;
        // The inner code took the parameters off both stacks.
        asm.mov(edi, esp)?;
        asm.push(0x3333)?;
        asm.push(0)?;
        asm.db(&[0x9a, 0, 0, 0, 0, 0x43, 0])
    });
    let guest = with_code(guest, INNER, |asm| {
        let mut second = asm.create_label();
        // Ring 0 uses flat data.
        asm.mov(eax, 0x10)?;
        asm.mov(ds, eax)?;
        asm.mov(eax, dword_ptr(esp + 12))?;
        asm.cmp(eax, 0x3333)?;
        asm.je(second)?;
        flat_result(asm, 0, eax)?;
        asm.mov(eax, dword_ptr(esp + 8))?;
        flat_result(asm, 1, eax)?;
        asm.mov(eax, dword_ptr(esp + 4))?;
        flat_result(asm, 2, eax)?;
        asm.mov(eax, dword_ptr(esp + 16))?;
        flat_result(asm, 3, eax)?;
        asm.mov(eax, dword_ptr(esp + 20))?;
        flat_result(asm, 4, eax)?;
        flat_result(asm, 5, esp)?;
        asm.retf_1(8)?;
        asm.set_label(&mut second)?;
        flat_result(asm, 6, edi)?;
        asm.mov(eax, 0x10)?;
        asm.mov(es, eax)?;
        print(asm)
    });
    let found = words(&guest);
    assert_eq!(found[..5], [0x1111, 0x2222, 0x33, 0x38_7ff8, 0x3b]);
    assert_eq!(found[5], 0x37_0000 - 24);
    assert_eq!(found[6], 0x38_8000);
}

#[test]
fn virtual_8086_mode_runs_16_bit_code_and_faults_into_ring_0() {
    const HANDLER: u32 = 0x31_1000;
    let extra = [system_descriptor(0x89, TSS, 0x67)];
    let code = assemble(16, 0, |asm| {
        asm.mov(ax, 0x2000)?;
        asm.mov(ds, ax)?;
        asm.mov(eax, 0x1234_5678)?;
        asm.mov(dword_ptr(0), eax)?;
        asm.push(ax)?;
        asm.pop(bx)?;
        asm.mov(word_ptr(4), bx)?;
        asm.mov(word_ptr(8), cs)?;
        // Sensitive without IOPL 3.
        asm.cli()
    });
    let mut guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.mov(esi, LOADED)?;
        asm.mov(edi, REAL)?;
        asm.mov(ecx, 0x100)?;
        asm.rep().movsb()?;
        for value in [0x4444, 0x3333, 0x2222, 0x1111, 0x1800, 0xfff0] {
            asm.push(value)?;
        }
        asm.push(0x2_0002)?;
        asm.push((REAL >> 4) as i32)?;
        asm.push(0)?;
        asm.iretd()
    });
    let size = code.len() as u64;
    guest.segments.push((LOADED.into(), code, size));
    let guest = with_words(guest, TSS, &[(4, 0x37_0000), (8, 0x10), (0x64, 0x68 << 16)]);
    let low = gate(0x8e, 8, HANDLER, 0);
    let at = 13 * 8;
    let guest = with_words(
        guest,
        IDT,
        &[(at, low as u32), (at + 4, (low >> 32) as u32)],
    );
    let guest = with_code(guest, HANDLER, |asm| {
        asm.mov(ebp, esp)?;
        asm.mov(ecx, ds)?;
        asm.mov(eax, 0x10)?;
        asm.mov(ds, eax)?;
        asm.mov(es, eax)?;
        flat_result(asm, 3, ecx)?;
        for slot in 0..10 {
            asm.mov(eax, dword_ptr(ebp + 4 * slot))?;
            if slot == 3 {
                // RF: a fault sets it, QEMU doesn't.
                asm.and(eax, !0x1_0000)?;
            }
            flat_result(asm, 4 + slot as u32, eax)?;
        }
        print(asm)
    });
    let found = words(&guest);
    assert_eq!((found[0], found[1] & 0xffff), (0x1234_5678, 0x5678));
    assert_eq!((found[2] & 0xffff, found[3]), (REAL >> 4, 0));
    // Error code, EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
    assert_eq!((found[4], found[6]), (0, REAL >> 4));
    assert_eq!(found[7] & 0x2_0000, 0x2_0000);
    assert_eq!(
        found[8..14],
        [0xfff0, 0x1800, 0x1111, 0x2000, 0x3333, 0x4444]
    );
}

#[test]
fn accesses_beyond_a_limit_fault() {
    const HANDLER: u32 = 0x31_1000;
    // 0x28: 4 KiB of data, 0x30: expand-down above 4 KiB, 0x38: read-only, 0x40: code alone.
    let extra = [
        0x0040_9300_0000_0fff,
        0x00c0_9700_0000_0000,
        0x00cf_9100_0000_ffff,
        0x00cf_9900_0000_ffff,
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.xor(esi, esi)?;
        // EBX counts faults, EDX sums their places; the handler goes on at EDI.
        asm.xor(ebx, ebx)?;
        asm.xor(edx, edx)?;
        let mut number = 1;
        let mut attempt = |asm: &mut CodeAssembler, bytes: &[u8]| -> Built {
            let mut here = asm.create_label();
            let mut after = asm.create_label();
            asm.call(here)?;
            asm.set_label(&mut here)?;
            asm.pop(edi)?;
            // Where this attempt ends: pop, add, the bytes.
            asm.add(edi, 1 + 3 + 5 + bytes.len() as i32)?;
            asm.mov(ecx, number)?;
            asm.db(bytes)?;
            asm.set_label(&mut after)?;
            number *= 2;
            asm.nop()
        };
        asm.mov(eax, 0x28)?;
        asm.mov(fs, eax)?;
        // mov eax, fs:[0xffc], then [0xffd], then a store to [0x1000].
        attempt(asm, &[0x64, 0xa1, 0xfc, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa1, 0xfd, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa2, 0x00, 0x10, 0, 0])?;
        asm.mov(eax, 0x30)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0xfc, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        asm.mov(eax, 0x38)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        attempt(asm, &[0x64, 0xa2, 0x00, 0x10, 0x30, 0])?;
        // Execute-only code can't be loaded as data; a null selector can, but not used.
        asm.mov(eax, 0x40)?;
        attempt(asm, &[0x8e, 0xe0])?;
        asm.xor(eax, eax)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        // Code is readable here and never writable.
        attempt(asm, &[0x2e, 0xa1, 0x00, 0x10, 0x30, 0])?;
        attempt(asm, &[0x2e, 0xa2, 0x00, 0x10, 0x30, 0])?;
        flat_result(asm, 0, ebx)?;
        flat_result(asm, 1, edx)
    });
    let low = gate(0x8e, 8, HANDLER, 0);
    let at = 13 * 8;
    let guest = with_words(
        guest,
        IDT,
        &[(at, low as u32), (at + 4, (low >> 32) as u32)],
    );
    let guest = with_code(guest, HANDLER, |asm| {
        asm.inc(ebx)?;
        asm.add(edx, ecx)?;
        asm.add(edx, dword_ptr(esp))?;
        asm.add(esp, 4)?;
        asm.mov(dword_ptr(esp), edi)?;
        asm.iretd()
    });
    // QEMU's own translator checks no limits.
    let found = words_here(&guest);
    // Attempts 1, 2, 3, 6, 7, 8, 10 fault; the load of 0x40 names its selector.
    assert_eq!(found[0], 7);
    assert_eq!(found[1], 2 + 4 + 8 + 64 + 128 + 256 + 1024 + 0x40);
}
