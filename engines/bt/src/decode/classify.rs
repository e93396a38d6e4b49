//! How each instruction is lowered: its [`Class`].

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};

use super::{Class, Fpu, Mode, Raised};
use crate::{
    cpu::{Bits, canonical},
    features::{announced, fpu_fault, uses_vectors},
    lower::inline,
};

/// What a code's class is in 64-bit code, as far as no more than the code decides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    class: Option<Class>,
    /// One bit for each [`Fpu`]: it doesn't fault there.
    quiet: u32,
    vectors: bool,
}

impl Ready {
    /// The class in `mode`, None if that has to be found out for each instruction.
    pub(super) fn class(&self, mode: &Mode) -> Option<Class> {
        let usable = mode.bits == Bits::Bits64
            && self.quiet >> mode.fpu.index() & 1 == 1
            && (mode.vectors || !self.vectors);
        if usable { self.class } else { None }
    }

    /// No control register makes it fault.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet == u32::MAX
    }
}

/// Finds out about the code of `instr`. What is done for the runtime's or the mode's sake is left to
/// [`classify`]: there operands and prefixes matter.
pub(super) fn ready(instr: &Instruction) -> Ready {
    let user = Mode {
        user: true,
        ring_0: false,
        interrupts: false,
        tsc: false,
        ..Mode::LONG
    };
    let single = Mode {
        single: true,
        ..Mode::LONG
    };
    let class = classify(instr, Mode::LONG);
    let same = [user, single]
        .into_iter()
        .all(|mode| classify(instr, mode) == class);
    let ordinary = match class {
        Class::Plain
        | Class::Memory
        | Class::Nop
        | Class::Lea
        | Class::BitString
        | Class::MaskedMove
        | Class::Push
        | Class::Pop
        | Class::Leave
        | Class::Jump
        | Class::JumpIndirect
        | Class::Branch
        | Class::Loop
        | Class::Call
        | Class::CallIndirect
        | Class::Return => true,
        Class::Cli
        | Class::Sti
        | Class::CallInline
        | Class::ReturnInline
        | Class::Privileged
        | Class::System
        | Class::Fault(_) => false,
    };
    let quiet = Fpu::all().filter(|&fpu| fpu_fault(instr, fpu).is_none());
    Ready {
        class: (same && ordinary).then_some(class),
        quiet: quiet.fold(0, |quiet, fpu| quiet | 1 << fpu.index()),
        vectors: uses_vectors(instr),
    }
}

pub(super) fn classify(instr: &Instruction, mode: Mode) -> Class {
    use Mnemonic::*;
    if instr.mnemonic() == Reservednop {
        return Class::Nop;
    }
    if instr.is_invalid() || !announced(instr) {
        return Class::Fault(Raised::Undefined);
    }
    if let Some(fault) = fpu_fault(instr, mode.fpu) {
        return Class::Fault(fault);
    }
    if !mode.vectors && uses_vectors(instr) {
        return Class::System;
    }
    if odd_stack(instr, mode) || leads_nowhere(instr, mode) {
        return Class::System;
    }
    let near = |class| {
        let far = matches!(instr.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
            || instr.op0_kind() == OpKind::Memory
                && matches!(
                    instr.code(),
                    Code::Jmp_m1616
                        | Code::Jmp_m1632
                        | Code::Jmp_m1664
                        | Code::Call_m1616
                        | Code::Call_m1632
                        | Code::Call_m1664
                );
        if far { Class::System } else { class }
    };
    match instr.flow_control() {
        FlowControl::UnconditionalBranch => near(Class::Jump),
        FlowControl::IndirectBranch => near(Class::JumpIndirect),
        FlowControl::ConditionalBranch => match instr.mnemonic() {
            Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz if counts_cx(instr) => Class::System,
            Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => Class::Loop,
            _ => Class::Branch,
        },
        FlowControl::Return if instr.mnemonic() == Ret => Class::Return,
        FlowControl::Call if instr.mnemonic() == Call => near(Class::Call),
        FlowControl::IndirectCall => near(Class::CallIndirect),
        FlowControl::Return | FlowControl::Call | FlowControl::Interrupt => Class::System,
        FlowControl::Exception | FlowControl::XbeginXabortXend => Class::Fault(Raised::Undefined),
        FlowControl::Next => classify_next(instr, mode),
    }
}

/// True if `instr` uses the stack, or branches through memory or a register, in a way that isn't
/// worth code of its own: in 16-bit code, with a stack pointer of the other width, or with a
/// 16-bit instruction pointer in 32-bit code.
fn odd_stack(instr: &Instruction, mode: Mode) -> bool {
    if mode.bits == Bits::Bits64 {
        return false;
    }
    use Mnemonic::*;
    let narrow = mode.bits == Bits::Bits16;
    match instr.mnemonic() {
        Push | Pop | Leave => narrow || mode.narrow_stack,
        Call | Ret => {
            narrow
                || mode.narrow_stack
                || matches!(
                    instr.code(),
                    Code::Call_rel16 | Code::Call_rm16 | Code::Retnw | Code::Retnw_imm16
                )
        }
        Jmp => {
            let indirect = matches!(instr.op0_kind(), OpKind::Register | OpKind::Memory);
            indirect && (narrow || instr.code() == Code::Jmp_rm16)
        }
        _ => false,
    }
}

/// True for a branch to what lies beyond the code segment, or to no canonical address: it faults if it
/// is taken.
pub(super) fn leads_nowhere(instr: &Instruction, mode: Mode) -> bool {
    match instr.op0_kind() {
        OpKind::NearBranch64 => !canonical(instr.near_branch_target()),
        OpKind::NearBranch16 | OpKind::NearBranch32 => {
            mode.bits != Bits::Bits64
                && instr.near_branch_target() & 0xffff_ffff > mode.code_limit.into()
        }
        _ => false,
    }
}

/// True for loop and jcxz with CX as their count, which 64-bit code has no form of.
fn counts_cx(instr: &Instruction) -> bool {
    use Code::*;
    matches!(
        instr.code(),
        Loop_rel8_16_CX
            | Loop_rel8_32_CX
            | Loope_rel8_16_CX
            | Loope_rel8_32_CX
            | Loopne_rel8_16_CX
            | Loopne_rel8_32_CX
            | Jcxz_rel8_16
            | Jcxz_rel8_32
    )
}

fn classify_next(instr: &Instruction, mode: Mode) -> Class {
    use Mnemonic::*;
    if inline(instr, mode) {
        return Class::Privileged;
    }
    let system_register = (0..instr.op_count()).any(|operand| {
        let register = instr.op_register(operand);
        instr.op_kind(operand) == OpKind::Register
            && (register.is_segment_register() || register.is_cr() || register.is_dr())
    });
    let flag = matches!(instr.mnemonic(), Cli | Sti);
    if system_register || instr.is_privileged() && !flag || instr.is_string_instruction() {
        return Class::System;
    }
    let has_memory = (0..instr.op_count()).any(|operand| instr.op_kind(operand) == OpKind::Memory);
    match instr.mnemonic() {
        Cli if mode.interrupts => Class::Cli,
        Sti if mode.interrupts && !mode.single => Class::Sti,
        Cli | Sti | Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq | Cpuid | Rdtscp | Rdpmc
        | Rdpkru | Wrpkru | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Rdpid | Xgetbv | Xsave
        | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 | Fxsave
        | Fxsave64 | Fnsave | Fnstenv | Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd
        | Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq | Vmaskmovps | Vmaskmovpd
        | Vpmaskmovd | Vpmaskmovq | Vmaskmovdqu | Sgdt | Sidt | Sldt | Str | Smsw | Verr | Verw
        | Lar | Lsl | Lds | Les | Lss | Lfs | Lgs | Enter | Xlatb | In | Out | Pusha | Pushad
        | Popa | Popad | Daa | Das | Aaa | Aas | Aam | Aad | Bound | Arpl | Into | Salc => {
            Class::System
        }
        Rdtsc if !mode.tsc => Class::System,
        Maskmovq | Maskmovdqu => Class::MaskedMove,
        Push => Class::Push,
        Pop => Class::Pop,
        Leave if instr.code() == Code::Leavew => Class::System,
        Leave => Class::Leave,
        Lea => Class::Lea,
        Bt | Bts | Btr | Btc if has_memory && instr.op1_kind() == OpKind::Register => {
            Class::BitString
        }
        _ if has_memory => Class::Memory,
        _ => Class::Plain,
    }
}
