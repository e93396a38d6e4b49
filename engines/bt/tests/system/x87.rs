//! Pointers of x87 exceptions: the guest's, wherever translated code had the operand.

use engine_core::CpuState;
use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::rig::{CODE, DEVICE, End, FREE, Rig};

/// Where the control word, the operand and the saved state are.
const CONTROL: u64 = FREE + 0x100;
const OPERAND: u64 = FREE + 0x208;
const SAVED: u64 = FREE + 0x400;
/// All but division by zero masked.
const UNMASKED: u64 = 0x37b;

/// Divides by zero at RBX, saves the state as fxsave64 does, and clears the exception.
fn divide(asm: &mut Asm) -> Built {
    asm.fninit()?;
    asm.fldcw(word_ptr(rcx))?;
    asm.fld1()?;
    asm.fdiv(qword_ptr(rbx + 8))?;
    asm.mov(rbx, 0u64)?;
    asm.fxsave64(ptr(rdi))?;
    asm.fnclex()
}

/// Instruction and data pointer after [`divide`].
fn pointers(rig: &mut Rig, operand: u64, control: u64) -> [u64; 2] {
    rig.word(CONTROL, control);
    rig.state.gpr[1] = CONTROL;
    rig.state.gpr[3] = operand - 8;
    rig.state.gpr[7] = SAVED;
    // In ring 3 hlt is #GP.
    let user = rig.state.segments[CpuState::CS].selector & 3 == 3;
    let end = if user { End::Vector(13) } else { End::Halt };
    assert_eq!(rig.try_code(divide), end);
    [rig.read(SAVED + 8), rig.read(SAVED + 16)]
}

/// Address of the division.
const DIVISION: u64 = CODE + 6;

#[test]
fn an_unmasked_exception_shows_where_its_operand_was() {
    assert_eq!(
        pointers(&mut Rig::long(), OPERAND, UNMASKED),
        [DIVISION, OPERAND]
    );
    assert_eq!(
        pointers(&mut Rig::long().in_ring_3(), OPERAND, UNMASKED),
        [DIVISION, OPERAND]
    );
}

#[test]
fn a_masked_exception_leaves_the_data_pointer_alone() {
    let [_, data] = pointers(&mut Rig::long(), OPERAND, 0x37f);
    assert_eq!(data, 0);
}

#[test]
fn no_address_of_the_hosts_is_shown_for_an_operand_in_a_device() {
    let mut rig = Rig::long();
    rig.device = 0;
    let [instruction, data] = pointers(&mut rig, DEVICE + 0x40, UNMASKED);
    assert_eq!(instruction, DIVISION);
    assert!([0, DEVICE + 0x40].contains(&data), "{data:#x}");
}

#[test]
fn the_instruction_pointer_outlives_where_an_operand_across_pages_was_stored_from() {
    /// More stores than there are places for bodies that write across pages.
    const STORES: usize = 200;
    // In pages that lie apart, so that the store goes through a buffer, and in neighbours.
    for apart in [true, false] {
        let mut rig = Rig::long();
        let edge = FREE + 0x1000;
        if apart {
            let table = rig.small_pages();
            rig.word(table + (edge >> 12) * 8, (FREE + 0x8000) | 3);
        }
        rig.state.gpr[3] = edge;
        rig.state.gpr[7] = SAVED;
        let end = rig.try_code(|asm| {
            asm.fninit()?;
            asm.fld1()?;
            asm.fst(dword_ptr(rbx - 2))?;
            for _ in 0..STORES {
                asm.mov(dword_ptr(rbx - 2), eax)?;
            }
            asm.fxsave64(ptr(rdi))
        });
        assert_eq!(end, End::Halt);
        // Behind fninit and fld1.
        assert_eq!(rig.read(SAVED + 8), CODE + 4, "apart: {apart}");
    }
}
