//! Returns remember where they went: whatever becomes of that place, or of the code that returns there, they go
//! where the stack says and do what is there now.

use engine_core::testing::assemble;
use iced_x86::code_asm::*;

use crate::rig::{CODE, End, FREE, Rig, TABLES};

const RET: u8 = 0xc3;
/// No leaf, for those run in line with their callers: push rax; pop rax; ret.
const FUNCTION: [u8; 3] = [0x50, 0x58, RET];
/// A large page of its own, and what it can be mapped to instead.
const PLACE: u64 = 2 << 21;
const OTHER: u64 = 3 << 21;

/// Runs code that returns to a place that has been changed between two runs, and answers what it finds
/// there before and after.
fn changed_between_runs(keep: bool) -> [u64; 2] {
    let mut rig = Rig::long();
    if keep {
        rig.vcpu.keep_guesses();
    }
    rig.put(FREE, &FUNCTION);
    rig.code(|asm| {
        asm.call(FREE)?;
        asm.mov(eax, 1)
    });
    let mut found = || {
        // Once to remember, once to rely on it.
        assert_eq!([rig.run(), rig.run()], [End::Halt; 2]);
        rig.after().gpr[0]
    };
    let before = found();
    // Behind the opcode of mov.
    rig.put(CODE + 6, &[2]);
    assert_eq!(rig.run(), End::Halt);
    [before, rig.after().gpr[0]]
}

#[test]
fn code_that_was_returned_to_may_change() {
    assert_eq!(changed_between_runs(false), [1, 2]);
    // What was changed would not be seen if nothing were undone.
    assert_eq!(changed_between_runs(true), [1, 1]);
}

/// Returns to a page that is mapped elsewhere after two rounds, and answers what it finds there.
fn mapped_elsewhere(keep: bool) -> u64 {
    let mut rig = Rig::long();
    if keep {
        rig.vcpu.keep_guesses();
    }
    rig.put(FREE, &[RET]);
    for (at, value) in [(PLACE, 1), (OTHER, 2)] {
        // call rdi; mov eax, value; ret
        rig.put(at, &[0xff, 0xd7, 0xb8, value, 0, 0, 0, RET]);
    }
    let end = rig.try_code(|asm| {
        asm.mov(rdi, FREE)?;
        asm.call(PLACE)?;
        asm.call(PLACE)?;
        asm.mov(rcx, TABLES + 0x2000 + 8 * (PLACE >> 21))?;
        asm.mov(rdx, OTHER | 0xe3)?;
        asm.mov(qword_ptr(rcx), rdx)?;
        asm.mov(rcx, PLACE)?;
        asm.invlpg(ptr(rcx))?;
        asm.call(PLACE)
    });
    assert_eq!(end, End::Halt);
    rig.after().gpr[0]
}

#[test]
fn a_page_that_was_returned_to_may_be_mapped_elsewhere() {
    assert_eq!(mapped_elsewhere(false), 2);
    assert_eq!(mapped_elsewhere(true), 1);
}

#[test]
fn each_ring_returns_to_code_of_its_own() {
    let mut rig = Rig::long();
    let kernel = rig.state;
    rig = rig.in_ring_3();
    let user = rig.state;
    rig.put(FREE, &FUNCTION);
    // hlt behind it is for ring 0 alone.
    rig.code(|asm| {
        asm.call(FREE)?;
        asm.call(FREE)
    });
    for _ in 0..3 {
        rig.state = kernel;
        assert_eq!([rig.run(), rig.run()], [End::Halt; 2]);
        rig.state = user;
        assert_eq!([rig.run(), rig.run()], [End::Vector(13); 2]);
    }
}

/// Flags that a function is called with, or sets, reach the code that it returns to.
fn flags_come_back(mut rig: Rig) {
    // lea r9, [r9 + 1]; ret
    rig.put(FREE, &[0x4d, 0x8d, 0x49, 1, RET]);
    // cmp r8d, 30; ret
    rig.put(FREE + 0x100, &[0x41, 0x83, 0xf8, 30, RET]);
    // sub rsp, 8; add rsp, 8; ret
    rig.put(
        FREE + 0x200,
        &[0x48, 0x83, 0xec, 8, 0x48, 0x83, 0xc4, 8, RET],
    );
    // cmp r8d, 20; push rax; pop rax; ret
    rig.put(FREE + 0x300, &[0x41, 0x83, 0xf8, 20, 0x50, 0x58, RET]);
    let end = rig.try_code(|asm| {
        let mut again = asm.create_label();
        asm.xor(ebx, ebx)?;
        asm.xor(r8d, r8d)?;
        asm.xor(r9d, r9d)?;
        asm.set_label(&mut again)?;
        asm.cmp(r8d, 25)?;
        asm.call(FREE)?;
        asm.adc(rbx, rbx)?;
        asm.rol(rbx, 7)?;
        asm.call(FREE + 0x100)?;
        asm.adc(rbx, 0)?;
        asm.stc()?;
        asm.call(FREE + 0x200)?;
        asm.adc(rbx, rbx)?;
        asm.call(FREE + 0x300)?;
        asm.adc(rbx, 0)?;
        asm.inc(r8d)?;
        asm.cmp(r8d, 50)?;
        asm.jb(again)?;
        asm.ud2()
    });
    assert_eq!(end, End::Vector(6));
    let state = rig.after();
    let expected = (0..50u64).fold(0u64, |sum, round| {
        let below = |limit| u64::from(round < limit);
        let sum = sum.wrapping_mul(2).wrapping_add(below(25));
        let sum = sum.rotate_left(7).wrapping_add(below(30));
        sum.wrapping_mul(2).wrapping_add(below(20))
    });
    assert_eq!((state.gpr[3], state.gpr[9]), (expected, 50));
}

#[test]
fn flags_reach_the_caller_in_ring_0() {
    flags_come_back(Rig::long());
}

#[test]
fn flags_reach_the_caller_through_the_window() {
    let mut rig = Rig::long().in_ring_3();
    rig.vcpu.hold_window();
    flags_come_back(rig);
}

#[test]
fn a_return_knows_more_places_than_it_remembers() {
    let mut rig = Rig::long();
    rig.put(FREE, &FUNCTION);
    let end = rig.try_code(|asm| {
        let mut again = asm.create_label();
        asm.mov(ecx, 100)?;
        asm.xor(eax, eax)?;
        asm.set_label(&mut again)?;
        for value in 1..=5 {
            asm.call(FREE)?;
            asm.imul_3(rax, rax, 3)?;
            asm.add(rax, value)?;
        }
        asm.dec(ecx)?;
        asm.jnz(again)
    });
    assert_eq!(end, End::Halt);
    let expected = (0..100)
        .flat_map(|_| 1..=5u64)
        .fold(0u64, |sum, value| sum.wrapping_mul(3).wrapping_add(value));
    assert_eq!(rig.after().gpr[0], expected);
}

/// Calls and jumps through registers and memory arrive with every register, RCX among them, and the flags.
/// `base` is an alias of the address 0 that the code runs at.
fn registers_reach_the_target(mut rig: Rig, base: u64) {
    let table = FREE + 0x800;
    let function = FREE + 0x100;
    // adc r8, rcx; lea r9, [r9 + r8*2]; ret
    rig.put(function, &[0x49, 0x11, 0xc8, 0x4f, 0x8d, 0x0c, 0x41, RET]);
    rig.word(table, base + function);
    rig.state.rip = base + CODE;
    let code = assemble(64, base + CODE, |asm| {
        let mut again = asm.create_label();
        asm.xor(r8d, r8d)?;
        asm.xor(r9d, r9d)?;
        asm.mov(r10d, 20)?;
        asm.set_label(&mut again)?;
        // RCX as index, as base and as target, and in no way.
        asm.mov(ecx, 2)?;
        asm.stc()?;
        asm.call(qword_ptr(rcx * 8 + (table - 16)))?;
        asm.mov(ecx, table as u32)?;
        asm.clc()?;
        asm.call(qword_ptr(rcx))?;
        asm.mov(rcx, base + function)?;
        asm.stc()?;
        asm.call(rcx)?;
        asm.mov(ecx, 3)?;
        asm.mov(r15, base + function)?;
        asm.stc()?;
        asm.call(r15)?;
        asm.mov(ebx, table as u32)?;
        asm.clc()?;
        asm.call(qword_ptr(rbx))?;
        asm.dec(r10d)?;
        asm.jne(again)?;
        asm.ud2()
    });
    rig.put(CODE, &code);
    assert_eq!(rig.run(), End::Vector(6));
    let (mut sum, mut twice) = (0u64, 0u64);
    for _ in 0..20 {
        for add in [2 + 1, table, base + function + 1, 3 + 1, 3] {
            sum = sum.wrapping_add(add);
            twice = twice.wrapping_add(sum.wrapping_mul(2));
        }
    }
    let gpr = rig.after().gpr;
    assert_eq!((gpr[8], gpr[9], gpr[1]), (sum, twice, 3));
}

#[test]
fn registers_reach_the_target_of_an_indirect_branch() {
    for base in [0, 1 << 32] {
        for user in [false, true] {
            let mut rig = Rig::long();
            rig.word(TABLES + 0x1000 + 8 * 4, (TABLES + 0x2000) | 7);
            if user {
                rig = rig.in_ring_3();
                rig.vcpu.hold_window();
            }
            registers_reach_the_target(rig, base);
        }
    }
}

/// Functions whose addresses differ by 64 KiB share a place in the table of targets. Each is found where it is,
/// though the other has been there.
#[test]
fn targets_that_share_a_place_are_told_apart() {
    let [one, other] = [FREE + 0x100, FREE + 0x100 + (1 << 16)];
    let mut rig = Rig::long().in_ring_3();
    rig.vcpu.hold_window();
    // lea rax, [rax + 2*rax + 1]; ret, and with 2 instead.
    rig.put(one, &[0x48, 0x8d, 0x44, 0x40, 1, RET]);
    rig.put(other, &[0x48, 0x8d, 0x44, 0x40, 2, RET]);
    rig.code(|asm| {
        let mut again = asm.create_label();
        asm.xor(eax, eax)?;
        asm.mov(ebx, one as u32)?;
        asm.mov(esi, other as u32)?;
        asm.mov(r10d, 15)?;
        asm.set_label(&mut again)?;
        asm.call(rbx)?;
        asm.xchg(rbx, rsi)?;
        asm.dec(r10d)?;
        asm.jne(again)?;
        asm.ud2()
    });
    assert_eq!(rig.run(), End::Vector(6));
    let expected = (0..15u64).fold(0u64, |sum, turn| 3 * sum + 1 + turn % 2);
    assert_eq!(rig.after().gpr[0], expected);
}
