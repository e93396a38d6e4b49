//! Real-address mode and what only code of 16 and 32 bits can do.

use engine_core::testing::assemble;
use iced_x86::code_asm::*;

use crate::legacy::{RESULTS, protected, real, result, words};

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
