//! push, pop, leave, and the stack halves of call and ret.
//!
//! RSP moves after the access that can fault, so a faulting push or pop can be run again. Pushes and pops through
//! the window let it wait for those that follow, and move it once: each would wait for the one before.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{OpKind, Register};

use super::{
    Lower, RSP,
    memory::{Address, Open},
    memory_operand,
};
use crate::{
    cpu::Bits,
    decode::{Class, Insn, gpr_bit},
};

/// What is pushed.
pub(super) enum Source {
    Register(u8),
    Immediate(i64),
}

impl Lower<'_> {
    pub(super) fn push(&mut self, insn: &Insn) -> Result<(), String> {
        let size = -insn.instr.stack_pointer_increment();
        if memory_operand(&insn.instr).is_some() {
            let value = self.load_operand(insn, size, 0, None)?;
            self.store_push(insn, Source::Register(value), size, 1 << value)?;
        } else if insn.instr.op0_kind() == OpKind::Register {
            let register = insn.instr.op0_register().full_register().number() as u8;
            self.store_push(insn, Source::Register(register), size, 0)?;
        } else {
            let value = insn.instr.immediate(0) as i64;
            self.store_push(insn, Source::Immediate(value), size, 0)?;
        }
        self.move_rsp(-size);
        Ok(())
    }

    /// Stores below the stack; RSP stays.
    pub(super) fn store_push(
        &mut self,
        insn: &Insn,
        source: Source,
        size: i32,
        avoid: u16,
    ) -> Result<(), String> {
        let needed = insn.reads & !avoid;
        self.need(needed);
        let open = self.open(insn, Address::Stack(-size), size as u32, true, avoid)?;
        self.need(needed);
        let (at, off) = (open.register, open.offset);
        match (source, size) {
            (Source::Register(value), 8) => {
                dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rq(value));
            }
            (Source::Register(value), 4) => {
                dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rd(value));
            }
            (Source::Register(value), _) => {
                dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rw(value));
            }
            (Source::Immediate(value), 8) if i64::from(value as i32) == value => {
                dynasm!(self.asm ; .arch x64 ; mov QWORD [Rq(at) + off], value as i32);
            }
            (Source::Immediate(value), 8) => {
                dynasm!(self.asm
                    ; .arch x64
                    ; mov DWORD [Rq(at) + off], value as i32
                    ; mov DWORD [Rq(at) + off + 4], (value >> 32) as i32
                );
            }
            (Source::Immediate(value), 4) => {
                dynasm!(self.asm ; .arch x64 ; mov DWORD [Rq(at) + off], value as i32);
            }
            (Source::Immediate(value), _) => {
                dynasm!(self.asm ; .arch x64 ; mov WORD [Rq(at) + off], value as i16);
            }
        }
        let next_ip = match insn.class {
            Class::Push | Class::Privileged => Some(insn.instr.next_ip()),
            Class::Call | Class::CallInline => Some(insn.instr.near_branch_target()),
            // CallIndirect: the target is in its slot, and only the code that follows knows.
            Class::CallIndirect
            | Class::Plain
            | Class::Memory
            | Class::Nop
            | Class::Lea
            | Class::BitString
            | Class::MaskedMove
            | Class::Pop
            | Class::Leave
            | Class::Cli
            | Class::Sti
            | Class::Jump
            | Class::JumpIndirect
            | Class::Branch
            | Class::Loop
            | Class::Return
            | Class::ReturnInline
            | Class::System
            | Class::Fault(_) => None,
        };
        self.close(&open, next_ip, -size)
    }

    pub(super) fn pop(&mut self, insn: &Insn) -> Result<(), String> {
        let size = insn.instr.stack_pointer_increment();
        if memory_operand(&insn.instr).is_some() {
            let value = self.load_stack(insn, Address::Stack(0), size, 0)?;
            // The address is computed with RSP already past the popped value (SDM 2B, POP).
            let by = if insn.instr.memory_base().full_register() == Register::RSP {
                i64::from(size)
            } else {
                0
            };
            let avoid = 1 << value;
            self.need(insn.reads & !avoid);
            let address = Address::Operand(&insn.instr, by);
            let open = self.open(insn, address, size as u32, true, avoid)?;
            let (at, off) = (open.register, open.offset);
            match size {
                8 => dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rq(value)),
                4 => dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rd(value)),
                _ => dynasm!(self.asm ; .arch x64 ; mov [Rq(at) + off], Rw(value)),
            }
            self.close(&open, Some(insn.instr.next_ip()), size)?;
            self.move_rsp(size);
            return Ok(());
        }
        let target = insn.instr.op0_register().full_register();
        let number = target.number() as u8;
        if target == Register::RSP {
            let value = self.load_stack(insn, Address::Stack(0), size, 0)?;
            match size {
                8 => dynasm!(self.asm ; .arch x64 ; mov rsp, Rq(value)),
                4 => dynasm!(self.asm ; .arch x64 ; mov esp, Rd(value)),
                _ => dynasm!(self.asm ; .arch x64 ; lea rsp, [rsp + 2] ; mov sp, Rw(value)),
            }
            return Ok(());
        }
        self.need(insn.reads);
        let open = self.open(insn, Address::Stack(0), size as u32, false, gpr_bit(target))?;
        self.need(insn.reads);
        let (at, off) = (open.register, open.offset);
        match size {
            8 => dynasm!(self.asm ; .arch x64 ; mov Rq(number), [Rq(at) + off]),
            4 => dynasm!(self.asm ; .arch x64 ; mov Rd(number), [Rq(at) + off]),
            _ => dynasm!(self.asm ; .arch x64 ; mov Rw(number), [Rq(at) + off]),
        }
        self.homes.spilled &= !(1 << number);
        self.close(&open, None, 0)?;
        self.move_rsp(size);
        Ok(())
    }

    pub(super) fn leave_frame(&mut self, insn: &Insn) -> Result<(), String> {
        let size = if self.mode.bits == Bits::Bits64 { 8 } else { 4 };
        if insn.memory.is_some_and(|memory| memory.size != size as u32) {
            return Err("unusual operand size".into());
        }
        let value = self.load_stack(insn, Address::Frame, size, 0)?;
        self.need(1 << 5);
        if size == 8 {
            dynasm!(self.asm ; .arch x64 ; lea rsp, [rbp + 8] ; mov rbp, Rq(value));
        } else {
            dynasm!(self.asm ; .arch x64 ; lea esp, [rbp + 4] ; mov ebp, Rd(value));
        }
        Ok(())
    }

    /// Loads from the stack into a borrowed register, which it returns.
    pub(super) fn load_stack(
        &mut self,
        insn: &Insn,
        address: Address<'_>,
        size: i32,
        avoid: u16,
    ) -> Result<u8, String> {
        self.need(insn.reads);
        let open = self.open(insn, address, size as u32, false, avoid)?;
        // The address has served: the value takes its place.
        let value = open.register;
        self.load_body(value, &open, size);
        self.close(&open, None, 0)?;
        debug_assert!(
            self.pinned >> value & 1 == 0,
            "a group outlives this instruction"
        );
        Ok(value)
    }

    fn load_body(&mut self, value: u8, open: &Open, size: i32) {
        let (at, off) = (open.register, open.offset);
        match size {
            8 => dynasm!(self.asm ; .arch x64 ; mov Rq(value), [Rq(at) + off]),
            4 => dynasm!(self.asm ; .arch x64 ; mov Rd(value), [Rq(at) + off]),
            _ => dynasm!(self.asm ; .arch x64 ; movzx Rd(value), WORD [Rq(at) + off]),
        }
    }

    /// Loads the memory operand into a borrowed register, and to the slot if one is given.
    fn load_operand(
        &mut self,
        insn: &Insn,
        size: i32,
        avoid: u16,
        slot: Option<i32>,
    ) -> Result<u8, String> {
        self.need(insn.reads);
        let value = self.take(avoid, insn);
        let address = Address::Operand(&insn.instr, 0);
        let open = self.open(insn, address, size as u32, false, avoid | 1 << value)?;
        self.load_body(value, &open, size);
        if let Some(slot) = slot {
            dynasm!(self.asm ; .arch x64 ; mov [slot], Rq(value));
        }
        self.close(&open, None, 0)?;
        Ok(value)
    }

    /// Puts the target of an indirect branch into `Context::target`. Returns the register that holds it as
    /// well, if one does: what looks the target up then need not wait for the store.
    pub(super) fn load_target(&mut self, insn: &Insn) -> Result<Option<u8>, String> {
        let slot = self.layout.target();
        if self.loads_target_in_window(insn) {
            let value = self.target_in_window(insn)?;
            dynasm!(self.asm ; .arch x64 ; mov [slot], Rq(value));
            return Ok(Some(value));
        }
        let size = if self.mode.bits == Bits::Bits64 { 8 } else { 4 };
        if memory_operand(&insn.instr).is_some() {
            self.load_operand(insn, size, 0, Some(slot))?;
            return Ok(None);
        }
        let register = insn.instr.op0_register().full_register();
        let number = register.number() as u8;
        self.need(gpr_bit(register));
        if size == 4 {
            let value = self.take(0, insn);
            dynasm!(self.asm ; .arch x64 ; mov Rd(value), Rd(number) ; mov [slot], Rq(value));
        } else {
            dynasm!(self.asm ; .arch x64 ; mov [slot], Rq(number));
        }
        // A call moves RSP.
        Ok((register != Register::RSP).then_some(number))
    }

    /// Pushes the return address of a call.
    pub(super) fn push_return(&mut self, insn: &Insn) -> Result<(), String> {
        if self.windowed() {
            return self.push_return_in_window(insn);
        }
        let size = -self.return_size();
        let next = insn.instr.next_ip() as i64;
        self.store_push(insn, Source::Immediate(next), -size, 0)?;
        self.move_rsp(size);
        Ok(())
    }

    /// Pops the return address into `Context::target` and a borrowed register, and `extra` bytes
    /// more.
    pub(super) fn pop_return(&mut self, insn: &Insn, extra: i32) -> Result<u8, String> {
        let size = self.return_size();
        let value = self.load_stack(insn, Address::Stack(0), size, 0)?;
        dynasm!(self.asm ; .arch x64 ; mov [self.layout.target()], Rq(value));
        self.move_rsp(size + extra);
        Ok(value)
    }

    pub(super) fn return_size(&self) -> i32 {
        if self.mode.bits == Bits::Bits64 { 8 } else { 4 }
    }

    /// Moves RSP without touching the flags.
    pub(super) fn move_rsp(&mut self, by: i32) {
        debug_assert!(self.homes.spilled & RSP == 0);
        if self.mode.bits == Bits::Bits64 {
            dynasm!(self.asm ; .arch x64 ; lea rsp, [rsp + by]);
        } else {
            dynasm!(self.asm ; .arch x64 ; lea esp, [rsp + by]);
        }
    }
}
