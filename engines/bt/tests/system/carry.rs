//! CF in loops that count down, while lookups ruin the flags.

use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::rig::{End, FREE, Rig};

/// `mov eax, 3; ret`.
const LEAF: [u8; 6] = [0xb8, 3, 0, 0, 0, 0xc3];

/// CF, in and out of a loop that counts down while lookups ruin the flags.
fn carry_survives(carry: bool, body: impl Fn(&mut Asm) -> Built) {
    let mut rig = Rig::long();
    rig.put(FREE, &LEAF);
    let end = rig.try_code(|asm| {
        let mut again = asm.create_label();
        asm.mov(rdi, FREE + 0x800)?;
        asm.mov(ecx, 10)?;
        asm.xor(ebx, ebx)?;
        if carry {
            asm.stc()?;
        }
        asm.set_label(&mut again)?;
        body(asm)?;
        asm.dec(ecx)?;
        asm.jne(again)?;
        asm.pushfq()?;
        asm.pop(rdx)
    });
    assert_eq!(end, End::Halt);
    // ZF and PF of the last dec, AF of it, and CF.
    assert_eq!(rig.after().gpr[2] & 0x8d5, 0x44 | u64::from(carry));
}

#[test]
fn carry_lives_through_a_loop_that_counts_down() {
    for carry in [false, true] {
        carry_survives(carry, |asm| asm.call(FREE));
        carry_survives(carry, |asm| asm.mov(qword_ptr(rdi), rcx));
        carry_survives(carry, |asm| {
            asm.mov(rax, qword_ptr(rdi))?;
            asm.push(rax)?;
            asm.pop(rsi)
        });
        // What the way around reads.
        carry_survives(false, |asm| {
            asm.mov(rax, qword_ptr(rdi))?;
            asm.adc(ebx, ebx)?;
            asm.push(rax)?;
            asm.pop(rsi)
        });
    }
}

#[test]
fn carry_is_right_where_a_loop_faults() {
    for carry in [0, 1] {
        let mut rig = Rig::long();
        let table = rig.small_pages();
        rig.word(table + 8 * ((FREE >> 12) + 3), 0);
        let store = |rounds: i32| {
            move |asm: &mut CodeAssembler| {
                let mut again = asm.create_label();
                asm.mov(rdi, FREE)?;
                asm.mov(ecx, rounds)?;
                asm.bt(ebp, 0)?;
                asm.set_label(&mut again)?;
                asm.mov(dword_ptr(rdi), ecx)?;
                asm.lea(rdi, qword_ptr(rdi + 0x400))?;
                asm.dec(ecx)?;
                asm.jne(again)?;
                asm.ud2()
            }
        };
        let end = rig.try_code(store(10));
        // Ten rounds stay within the pages that are there.
        assert_eq!(end, End::Vector(6));
        rig.state.gpr[5] = carry;
        let end = rig.try_code(store(100));
        assert_eq!(end, End::Vector(14));
        let state = rig.after();
        assert_eq!(state.cr2, FREE + 0x3000);
        assert_eq!(rig.read(state.gpr[4] + 24) & 1, carry);
    }
}
