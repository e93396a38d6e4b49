//! Accesses that share a lookup while others, and flags, want registers as well.

use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::rig::{End, FREE, Rig};

/// Where stores go, and where loads come from.
const STORED: u64 = FREE + 0x100;
const LOADED: u64 = FREE + 0x200;
/// What the words at [`LOADED`] hold.
const WORD: u64 = 0x1122_3344_5566_7788;

/// A machine whose registers hold what they are, RSI leads to what is written and RDI to what is read.
fn rig() -> Rig {
    let mut rig = Rig::long();
    for (number, register) in rig.state.gpr.iter_mut().enumerate() {
        if number != 4 {
            *register = value(number);
        }
    }
    (rig.state.gpr[6], rig.state.gpr[7]) = (STORED, LOADED);
    for word in 0..8 {
        rig.word(LOADED + 8 * word, WORD + word);
    }
    rig
}

/// What a register begins with.
fn value(number: usize) -> u64 {
    0x0101_0101_0101_0101 * number as u64 + 7
}

#[track_caller]
fn check(rig: &mut Rig, stored: &[u64], body: impl FnOnce(&mut Asm) -> Built) {
    assert_eq!(rig.try_code(body), End::Halt);
    for (index, &word) in stored.iter().enumerate() {
        let at = STORED + 8 * index as u64;
        assert_eq!(rig.read(at), word, "word {index}");
    }
}

#[test]
fn flags_that_come_alive_between_shared_accesses_leave_their_address_alone() {
    // Every register but RAX is used by the group, or wanted after it.
    let mut rig = rig();
    let stored = [8, 9, 10, 11, 12, 13, 3, 5].map(value);
    check(&mut rig, &stored, |asm| {
        let mut carry = asm.create_label();
        asm.mov(qword_ptr(rsi), r8)?;
        asm.mov(qword_ptr(rsi + 8), r9)?;
        asm.mov(qword_ptr(rsi + 16), r10)?;
        asm.mov(qword_ptr(rsi + 24), r11)?;
        asm.cmp(rdx, -1)?;
        asm.mov(rcx, qword_ptr(rdi))?;
        asm.mov(qword_ptr(rsi + 32), r12)?;
        asm.mov(qword_ptr(rsi + 40), r13)?;
        asm.mov(qword_ptr(rsi + 48), rbx)?;
        asm.mov(qword_ptr(rsi + 56), rbp)?;
        asm.lea(r14, qword_ptr(r14 + r15))?;
        asm.jc(carry)?;
        asm.mov(rdx, 0u64)?;
        asm.set_label(&mut carry)?;
        asm.nop()
    });
    let gpr = rig.after().gpr;
    assert_eq!([gpr[0], gpr[1], gpr[2]], [value(0), WORD, value(2)]);
    assert_eq!(gpr[14], value(14) + value(15));
}

#[test]
fn a_push_shares_its_lookup_across_what_sets_flags() {
    // A function's head as compilers write it: pushes, a new stack pointer, a load, a call.
    let mut rig = rig();
    // push rbx; pop rbx; ret: no leaf that runs in line.
    rig.put(FREE, &[0x53, 0x5b, 0xc3]);
    let top = rig.state.gpr[4];
    let end = rig.try_code(|asm| {
        asm.push(r15)?;
        asm.mov(r9, rdi)?;
        asm.mov(r10, rsi)?;
        asm.mov(rsi, rdx)?;
        asm.push(r14)?;
        asm.mov(rdx, rcx)?;
        asm.mov(r11, r8)?;
        asm.push(r13)?;
        asm.push(r12)?;
        asm.push(rbp)?;
        asm.push(rbx)?;
        asm.sub(rsp, 0x30)?;
        asm.mov(ebp, dword_ptr(rdi))?;
        asm.lea(rdi, qword_ptr(rsp + 8))?;
        asm.call(FREE)
    });
    assert_eq!(end, End::Halt);
    let gpr = rig.after().gpr;
    assert_eq!(
        [gpr[0], gpr[4], gpr[5]],
        [value(0), top - 0x60, 0x5566_7788]
    );
    for (index, number) in [15, 14, 13, 12, 5, 3].into_iter().enumerate() {
        assert_eq!(rig.read(top - 8 - 8 * index as u64), value(number));
    }
}

#[test]
fn two_groups_leave_enough_for_each_other() {
    // Twelve registers beside RAX, through which flags move, and RSP.
    let mut rig = rig();
    let stored = [8, 13].map(value);
    check(&mut rig, &stored, |asm| {
        let mut carry = asm.create_label();
        asm.cmp(rbx, -1)?;
        asm.mov(qword_ptr(rsi), r8)?;
        asm.mov(rcx, qword_ptr(rdi))?;
        asm.lea(rdx, qword_ptr(rbx + rbp))?;
        asm.lea(r9, qword_ptr(r10 + r11))?;
        asm.lea(r9, qword_ptr(r9 + r12))?;
        asm.mov(qword_ptr(rsi + 8), r13)?;
        asm.mov(r8, qword_ptr(rdi + 8))?;
        asm.jc(carry)?;
        asm.mov(rdx, 0u64)?;
        asm.set_label(&mut carry)?;
        asm.nop()
    });
    let gpr = rig.after().gpr;
    assert_eq!([gpr[1], gpr[8]], [WORD, WORD + 1]);
    assert_eq!(gpr[2], value(3) + value(5));
    assert_eq!(gpr[9], value(10) + value(11) + value(12));
}

#[test]
fn accesses_by_high_bytes_find_registers_between_shared_ones() {
    // Beside DH no register of the upper eight can be named.
    let mut rig = rig();
    let (number, at) = (STORED + 0x40, 0x10);
    (rig.state.gpr[8], rig.state.gpr[9]) = (STORED, LOADED);
    (rig.state.gpr[3], rig.state.gpr[1]) = (number - at, at);
    let stored = [10, 12].map(value);
    check(&mut rig, &stored, |asm| {
        let mut carry = asm.create_label();
        asm.mov(qword_ptr(r8), r10)?;
        asm.mov(r11, qword_ptr(r9))?;
        asm.lea(r14, qword_ptr(r14 + r15))?;
        asm.cmp(rdx, -1)?;
        asm.mov(byte_ptr(rbx + rcx), dh)?;
        asm.mov(qword_ptr(r8 + 8), r12)?;
        asm.mov(r13, qword_ptr(r9 + 8))?;
        asm.jc(carry)?;
        asm.mov(r14, 0u64)?;
        asm.set_label(&mut carry)?;
        asm.nop()
    });
    let gpr = rig.after().gpr;
    assert_eq!([gpr[11], gpr[13]], [WORD, WORD + 1]);
    assert_eq!(gpr[14], value(14) + value(15));
    assert_eq!(rig.byte(number), (value(2) >> 8) as u8);
}
