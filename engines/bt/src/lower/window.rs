//! Accesses through the window ([`crate::window`]): comparisons, and operands that need nothing else.
//!
//! The operand stays as it is and gets the segment prefix GS:
//!
//! ```text
//! cmp  base, [limit]          ; where the plan of `checks` says
//! jae  outside
//! body gs:[guest operand]
//! ```
//!
//! A page that isn't there is a fault of the host's, by which the runtime fills it and has the body
//! run again: nothing of an instruction is committed before the one host instruction that touches
//! guest memory for it.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register};
use std::mem::offset_of;

use super::{Cold, Lower, RSP, gpr64, memory::Address, memory::whole_operand, memory_operand};
use crate::{
    checks::{Outside, Route, constant},
    context::Context,
    cpu::Bits,
    decode::{Class, Insn},
    site::{Ip, Kind, number},
};

const RCX: u8 = 1;

impl Lower<'_> {
    /// The instruction's accesses go through the window.
    pub(super) fn windowed(&self) -> bool {
        self.checks.route(self.at) != Route::Tlb
    }

    /// Emits the comparisons that belong before `insn`.
    pub(super) fn compare(&mut self, insn: &Insn) {
        for check in self.checks.take_before(self.at) {
            if insn.live_in != 0 && !self.homes.lazy {
                self.save_flags(0);
            }
            self.need(1 << check.register);
            let kind = Kind::Outside {
                steps: check.steps,
                missed: Outside {
                    sum: check.users,
                    ..Outside::default()
                },
            };
            self.limit(insn, check.register, check.index, kind);
        }
    }

    /// Emits the comparisons at the block's head, and room up to where a loop starts.
    pub(super) fn compare_head(&mut self, first: &Insn) {
        let checks = std::mem::take(&mut self.checks.head);
        let keep_flags = first.live_in != 0 && !checks.is_empty();
        if keep_flags {
            self.save_flags(0);
        }
        for check in checks {
            self.need(1 << check.register);
            let kind = Kind::Outside {
                steps: check.steps,
                missed: Outside {
                    head: check.users,
                    ..Outside::default()
                },
            };
            self.limit(first, check.register, check.index, kind);
        }
        if keep_flags {
            self.restore_flags(0);
            self.settle_registers();
        }
        if self.checks.repeats {
            self.align();
        }
    }

    /// Fills up to an address at which the host's processor likes to start: it fetches and keeps decoded
    /// instructions by lines.
    fn align(&mut self) {
        const LINE: u64 = 32;
        const NOPS: [&[u8]; 9] = [
            b"\x90",
            b"\x66\x90",
            b"\x0f\x1f\x00",
            b"\x0f\x1f\x40\x00",
            b"\x0f\x1f\x44\x00\x00",
            b"\x66\x0f\x1f\x44\x00\x00",
            b"\x0f\x1f\x80\x00\x00\x00\x00",
            b"\x0f\x1f\x84\x00\x00\x00\x00\x00",
            b"\x66\x0f\x1f\x84\x00\x00\x00\x00\x00",
        ];
        let here = self.address(self.position());
        let mut missing = (here.next_multiple_of(LINE) - here) as usize;
        while missing != 0 {
            let nop = NOPS[missing.min(NOPS.len()) - 1];
            self.asm.slice(nop);
            missing -= nop.len();
        }
    }

    /// Leaves if `register` is too large.
    fn limit(&mut self, insn: &Insn, register: u8, index: bool, kind: Kind) {
        self.settle_rsp();
        let limit = self.layout.slot(if index {
            offset_of!(Context, index_limit)
        } else {
            offset_of!(Context, window_limit)
        });
        dynasm!(self.asm ; .arch x64 ; cmp Rq(register), [limit]);
        self.asm.extend([0x0f, 0x83]);
        let patch = self.position();
        self.asm.push_i32(0);
        let site = self.add_site(insn.instr.ip(), kind);
        self.cold.push(Cold::Exit { site, patch });
    }

    /// `instr` with its operand in the window. A `Sum` is added up and compared first.
    fn operand_in_window(
        &mut self,
        insn: &Insn,
        mut instr: Instruction,
    ) -> Result<Instruction, String> {
        instr.set_segment_prefix(Register::GS);
        if self.checks.route(self.at) == Route::Sum {
            if insn.live_in != 0 && !self.homes.lazy {
                self.save_flags(0);
                self.need(insn.reads);
            }
            let register = self.take(0, insn);
            self.busy = 1 << register;
            self.address_into(Address::Operand(&insn.instr, 0), register, register, 0)?;
            let kind = Kind::Outside {
                steps: 1,
                missed: Outside {
                    sum: 1 << self.at,
                    ..Outside::default()
                },
            };
            self.limit(insn, register, false, kind);
            instr.set_memory_base(gpr64(register));
            instr.set_memory_index(Register::None);
            instr.set_memory_index_scale(1);
            instr.set_memory_displacement64(0);
            instr.set_memory_displ_size(0);
        } else if let Some(address) = constant(&insn.instr) {
            instr.set_memory_base(Register::None);
            instr.set_memory_index(Register::None);
            instr.set_memory_index_scale(1);
            instr.set_memory_displacement64(address);
            instr.set_memory_displ_size(8);
        }
        Ok(instr)
    }

    /// An instruction with one memory operand and nothing else to it.
    pub(super) fn memory_in_window(&mut self, insn: &Insn, raw: &[u8]) -> Result<(), String> {
        const GS: u8 = 0x65;
        self.need(insn.reads);
        if self.prefixable(insn) {
            self.flags_for(insn);
            self.need(insn.reads);
            self.mark(Ip::At(insn.instr.ip()));
            self.asm.push(GS);
            self.asm.slice(raw);
            self.done(insn);
            return Ok(());
        }
        let body = self.operand_in_window(insn, whole_operand(&insn.instr))?;
        self.flags_for(insn);
        self.need(insn.reads);
        self.mark(Ip::At(insn.instr.ip()));
        self.encode(&body)?;
        self.busy = 0;
        self.done(insn);
        Ok(())
    }

    /// All that `insn` takes to access the window is a prefix.
    fn prefixable(&self, insn: &Insn) -> bool {
        let instr = &insn.instr;
        self.mode.bits == Bits::Bits64
            && self.checks.route(self.at) == Route::Direct
            && constant(instr).is_none()
            && instr.segment_prefix() == Register::None
    }

    /// True if `insn`, before `next`, can do with RSP that has yet to move: it neither names RSP nor leaves in the
    /// middle, or is one of those that move it.
    pub(super) fn may_wait(&self, insn: &Insn, next: Option<&Insn>) -> bool {
        /// Within a byte, whatever the instruction adds.
        const FAR: i8 = 100;
        if self.homes.rsp == 0 {
            return true;
        }
        let near = self.homes.rsp.unsigned_abs() < FAR as u8;
        match insn.class {
            Class::Plain | Class::Lea | Class::Nop => {
                // A comparison stays with its branch.
                let before_branch = next.is_some_and(|next| next.class == Class::Branch);
                !insn.faults && (insn.reads | insn.modifies) & RSP == 0 && !before_branch
            }
            Class::Push | Class::Pop => near && self.moves_rsp_late(insn),
            Class::Call | Class::Return => near && self.windowed(),
            _ => false,
        }
    }

    /// A push or pop through the window of another register than RSP.
    fn moves_rsp_late(&self, insn: &Insn) -> bool {
        let instr = &insn.instr;
        self.mode.bits == Bits::Bits64
            && self.windowed()
            && !(instr.op0_kind() == OpKind::Register
                && instr.op0_register().full_register() == Register::RSP)
    }

    /// Moves RSP by what it has to move.
    pub(super) fn settle_rsp(&mut self) {
        let by = std::mem::take(&mut self.homes.rsp);
        if by != 0 {
            self.move_rsp(by.into());
        }
    }

    /// Has RSP move by `by`, later.
    fn move_rsp_late(&mut self, insn: &Insn, by: i32) {
        if self.moves_rsp_late(insn) {
            self.homes.rsp += by as i8;
        } else {
            self.move_rsp(by);
        }
    }

    pub(super) fn stack_operand(&self, displacement: i32) -> MemoryOperand {
        let displacement = displacement + i32::from(self.homes.rsp);
        let base = match self.mode.bits {
            Bits::Bits64 => Register::RSP,
            Bits::Bits32 | Bits::Bits16 => Register::ESP,
        };
        based(base, displacement)
    }

    /// Stores `value` at RSP - `size`; RSP stays.
    fn store_in_window(&mut self, insn: &Insn, value: u8, size: i32) -> Result<(), String> {
        let (code, base) = match size {
            8 => (Code::Mov_rm64_r64, Register::RAX),
            4 => (Code::Mov_rm32_r32, Register::EAX),
            _ => (Code::Mov_rm16_r16, Register::AX),
        };
        let register = base + u32::from(value);
        let operand = self.stack_operand(-size);
        self.mark(Ip::At(insn.instr.ip()));
        self.encode_made(Instruction::with2(code, operand, register))
    }

    fn store_constant_in_window(
        &mut self,
        insn: &Insn,
        value: i64,
        size: i32,
    ) -> Result<(), String> {
        if size == 8 && i64::from(value as i32) != value {
            let register = self.take(0, insn);
            self.load_constant(register, value as u64);
            return self.store_in_window(insn, register, size);
        }
        let code = match size {
            8 => Code::Mov_rm64_imm32,
            4 => Code::Mov_rm32_imm32,
            _ => Code::Mov_rm16_imm16,
        };
        let operand = self.stack_operand(-size);
        self.mark(Ip::At(insn.instr.ip()));
        let value = match size {
            2 => i32::from(value as i16),
            _ => value as i32,
        };
        self.encode_made(Instruction::with2(code, operand, value))
    }

    pub(super) fn push_in_window(&mut self, insn: &Insn) -> Result<(), String> {
        let size = -insn.instr.stack_pointer_increment();
        self.need(insn.reads);
        if insn.instr.op0_kind() == OpKind::Register {
            let register = insn.instr.op0_register().full_register().number() as u8;
            self.store_in_window(insn, register, size)?;
        } else {
            self.store_constant_in_window(insn, insn.instr.immediate(0) as i64, size)?;
        }
        self.move_rsp_late(insn, -size);
        Ok(())
    }

    pub(super) fn push_return_in_window(&mut self, insn: &Insn) -> Result<(), String> {
        let size = self.return_size();
        self.store_constant_in_window(insn, insn.instr.next_ip() as i64, size)?;
        let waiting = std::mem::take(&mut self.homes.rsp);
        self.move_rsp(i32::from(waiting) - size);
        Ok(())
    }

    /// Loads into a register; nothing else.
    pub(super) fn load_in_window(
        &mut self,
        insn: &Insn,
        value: u8,
        operand: MemoryOperand,
        size: i32,
    ) -> Result<(), String> {
        let (code, base) = match size {
            8 => (Code::Mov_r64_rm64, Register::RAX),
            4 => (Code::Mov_r32_rm32, Register::EAX),
            _ => (Code::Mov_r16_rm16, Register::AX),
        };
        self.mark(Ip::At(insn.instr.ip()));
        self.encode_made(Instruction::with2(code, base + u32::from(value), operand))
    }

    pub(super) fn pop_in_window(&mut self, insn: &Insn) -> Result<(), String> {
        let size = insn.instr.stack_pointer_increment();
        self.need(insn.reads);
        let target = insn.instr.op0_register().full_register().number() as u8;
        let operand = self.stack_operand(0);
        self.load_in_window(insn, target, operand, size)?;
        self.homes.spilled &= !(1 << target);
        self.move_rsp_late(insn, size);
        Ok(())
    }

    pub(super) fn leave_in_window(&mut self, insn: &Insn) -> Result<(), String> {
        self.need(insn.reads | 1 << 5);
        let value = self.take(0, insn);
        if self.mode.bits == Bits::Bits64 {
            self.load_in_window(insn, value, based(Register::RBP, 0), 8)?;
            dynasm!(self.asm ; .arch x64 ; lea rsp, [rbp + 8] ; mov rbp, Rq(value));
        } else {
            self.load_in_window(insn, value, based(Register::EBP, 0), 4)?;
            dynasm!(self.asm ; .arch x64 ; lea esp, [rbp + 4] ; mov ebp, Rd(value));
        }
        Ok(())
    }

    /// Goes to `Context::target`, which register `held` holds as well, with RSP moved by `rsp` already.
    pub(super) fn dispatch(&mut self, insn: &Insn, held: Option<u8>, rsp: i32) {
        if self.homes.lazy {
            self.restore_flags(0);
        }
        // RCX may hold the target by now.
        self.need(!self.pinned);
        self.doorbell(Ip::Target);
        self.spill(RCX);
        self.pinned = 0;
        match held {
            Some(held) => dynasm!(self.asm ; .arch x64 ; movzx ecx, Rw(held)),
            None => dynasm!(self.asm ; .arch x64 ; movzx ecx, WORD [self.layout.target()]),
        }
        self.through_table(insn, rsp);
    }

    pub(super) fn through_table(&mut self, insn: &Insn, rsp: i32) {
        // Who misses there has saved the flags.
        self.homes.lazy = true;
        let site = self.add_site(insn.instr.ip(), Kind::Indirect { rsp, gate: None });
        let number = number(self.first_site + site, 0);
        let targets = self.layout.targets[usize::from(self.mode.bank)];
        dynasm!(self.asm
            ; .arch x64
            ; mov QWORD [self.layout.site()], number
            ; mov ecx, [rcx * 4 + targets]
            ; jmp rcx
        );
    }

    /// The entry for indirect branches, which falls into the one for others. None for blocks far up:
    /// their branches go by the jump cache.
    pub(super) fn checked_entry(&mut self, ip: u64) {
        let Some(own) = i32::try_from(ip)
            .ok()
            .filter(|_| self.mode.window && !self.mode.single)
        else {
            return;
        };
        dynasm!(self.asm
            ; .arch x64
            ; mov rcx, [self.layout.target()]
            ; lea rcx, [rcx - own]
        );
        // Over the jump.
        self.asm.extend([0xe3, 5]);
        let miss = self.layout.miss[usize::from(self.mode.bank)];
        self.jump_to(0xe9, miss);
        dynasm!(self.asm ; .arch x64 ; mov rcx, [self.layout.spill(RCX)]);
    }

    /// Loads the target of an indirect branch from memory into RCX, which stays borrowed for it.
    pub(super) fn target_in_window(&mut self, insn: &Insn) -> Result<u8, String> {
        let (code, base) = match self.mode.bits {
            Bits::Bits64 => (Code::Mov_r64_rm64, Register::RAX),
            Bits::Bits32 | Bits::Bits16 => (Code::Mov_r32_rm32, Register::EAX),
        };
        self.need(insn.reads);
        let mut load = insn.instr;
        load.set_code(code);
        load.set_op0_kind(OpKind::Register);
        load.set_op0_register(base + u32::from(RCX));
        load.set_op1_kind(OpKind::Memory);
        let load = self.operand_in_window(insn, load)?;
        // The operand may need what it holds: that is read as it is written.
        self.need(insn.reads);
        self.spill(RCX);
        self.mark(Ip::At(insn.instr.ip()));
        self.encode(&load)?;
        self.busy = 0;
        self.pinned |= 1 << RCX;
        Ok(RCX)
    }

    pub(super) fn encode_made(
        &mut self,
        instr: Result<Instruction, iced_x86::IcedError>,
    ) -> Result<(), String> {
        let instr = instr.map_err(|error| error.to_string())?;
        self.encode(&instr)
    }

    /// The whole of `insn`, if it is one that needs nothing but its access.
    pub(super) fn in_window(&mut self, insn: &Insn, raw: &[u8]) -> Option<Result<(), String>> {
        if !self.windowed() {
            return None;
        }
        match insn.class {
            Class::Memory => Some(self.memory_in_window(insn, raw)),
            Class::Push => Some(self.push_in_window(insn)),
            Class::Pop => Some(self.pop_in_window(insn)),
            Class::Leave => Some(self.leave_in_window(insn)),
            // Half of these is the branch: `push_return` and its kin ask for themselves.
            Class::Call
            | Class::CallIndirect
            | Class::CallInline
            | Class::ReturnInline
            | Class::JumpIndirect
            | Class::Return
            | Class::Plain
            | Class::Nop
            | Class::Lea
            | Class::BitString
            | Class::MaskedMove
            | Class::Cli
            | Class::Sti
            | Class::Jump
            | Class::Branch
            | Class::Loop
            | Class::Privileged
            | Class::System
            | Class::Fault(_) => None,
        }
    }

    /// True if `insn` has a target in memory that is loaded through the window.
    pub(super) fn loads_target_in_window(&self, insn: &Insn) -> bool {
        self.windowed() && memory_operand(&insn.instr).is_some()
    }
}

fn based(base: Register, displacement: i32) -> MemoryOperand {
    MemoryOperand::new(
        base,
        Register::None,
        1,
        displacement.into(),
        u32::from(displacement != 0),
        false,
        Register::GS,
    )
}
