//! What the accesses of an instruction ask of its registers, and what they show.

use iced_x86::{Instruction, OpKind, Register};

use super::{facts::RSP, levels::Level};
use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode, data_segment},
    window::{LONGEST, SLACK},
};

/// Registers that an access relies on, and for what.
pub(super) type Needs = [Option<(u8, Level)>; 3];

/// What an access through the window needs; None if it can't be one.
pub(super) fn needs(insn: &Insn, mode: Mode) -> Option<Needs> {
    const STACK: (u8, Level) = (RSP as u8, Level::Base);
    const FRAME: (u8, Level) = (5, Level::Base);
    let instr = &insn.instr;
    let wide = mode.bits == Bits::Bits64;
    let stack_open = if wide {
        mode.stack
    } else {
        mode.flat && mode.limited >> 2 & 1 == 0 && !mode.narrow_stack
    };
    let stack = |more: Needs| {
        let [first, second, _] = more;
        let own = wide.then_some(STACK);
        stack_open.then_some([first, second, own])
    };
    let has_memory = (0..instr.op_count()).any(|operand| instr.op_kind(operand) == OpKind::Memory);
    match insn.class {
        Class::Memory => {
            let memory = insn.memory?;
            if memory.size == 0 || memory.size > LONGEST || instr.len() > 14 {
                return None;
            }
            operand(instr, mode)
        }
        Class::Push if !has_memory => stack([None; 3]),
        Class::Pop if !has_memory && instr.op0_register().full_register() != Register::RSP => {
            stack([None; 3])
        }
        Class::Call | Class::Return => stack([None; 3]),
        Class::CallIndirect if has_memory => stack(operand(instr, mode)?),
        Class::CallIndirect => stack([None; 3]),
        Class::JumpIndirect if has_memory => operand(instr, mode),
        Class::Leave => stack_open.then_some([wide.then_some(FRAME), None, None]),
        Class::Plain
        | Class::Nop
        | Class::Lea
        | Class::BitString
        | Class::MaskedMove
        | Class::Push
        | Class::Pop
        | Class::Cli
        | Class::Sti
        | Class::Jump
        | Class::JumpIndirect
        | Class::Branch
        | Class::Loop
        | Class::CallInline
        | Class::ReturnInline
        | Class::Privileged
        | Class::System
        | Class::Fault(_) => None,
    }
}

/// The address of an operand without registers.
pub(crate) fn constant(instr: &Instruction) -> Option<u64> {
    if instr.is_ip_rel_memory_operand() {
        return Some(instr.ip_rel_memory_address());
    }
    (instr.memory_base() == Register::None && instr.memory_index() == Register::None)
        .then(|| instr.memory_displacement64())
}

fn operand(instr: &Instruction, mode: Mode) -> Option<Needs> {
    let segment = match data_segment(instr, mode.bits) {
        Register::ES => 0,
        Register::SS => 2,
        Register::DS => 3,
        // Their bases have to be added, and code segments are for reading only.
        _ => return None,
    };
    if mode.bits != Bits::Bits64 && (!mode.flat || mode.limited >> segment & 1 == 1) {
        return None;
    }
    if let Some(address) = constant(instr) {
        // What a displacement can say without a sign.
        return (address < 1 << 31).then_some([None; 3]);
    }
    let (base, index) = (instr.memory_base(), instr.memory_index());
    let all = |test: fn(Register) -> bool| {
        [base, index]
            .into_iter()
            .all(|register| register == Register::None || test(register))
    };
    if all(Register::is_gpr32) {
        return Some([None; 3]);
    }
    if !all(Register::is_gpr64) || mode.bits != Bits::Bits64 {
        return None;
    }
    if base == Register::RSP && !mode.stack {
        return None;
    }
    let need = |register: Register, level: Level| {
        (register != Register::None).then(|| (register.number() as u8, level))
    };
    // At scale 1 either is as far from the sum as the other may be: if the base is inside, the index
    // is not far beyond.
    let (base_level, index_level) = if index != Register::None && instr.memory_index_scale() == 1 {
        (Level::Inside, Level::Base)
    } else {
        (Level::Base, Level::Index)
    };
    Some([need(base, base_level), need(index, index_level), None])
}

/// How far RSP is from an address that a successful `insn` has touched, before it moves.
pub(super) fn touches(insn: &Insn) -> Option<i64> {
    let instr = &insn.instr;
    match insn.class {
        Class::Push | Class::Call | Class::CallIndirect => {
            Some(-i64::from(instr.stack_pointer_increment()))
        }
        Class::Pop | Class::Return => Some(0),
        Class::Memory
            if insn.memory.is_some_and(|memory| memory.certain)
                && instr.memory_base() == Register::RSP
                && instr.memory_index() == Register::None =>
        {
            let by = (instr.memory_displacement64() as i64).wrapping_neg();
            (by.unsigned_abs() <= SLACK).then_some(by)
        }
        _ => None,
    }
}
