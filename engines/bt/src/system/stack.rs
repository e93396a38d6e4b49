//! Pushes and pops, and the near branches of 16-bit code, which use the stack in ways that
//! translated code has no form for.
//!
//! The stack pointer is RSP, ESP or SP by the mode and the stack segment's size bit, whatever the
//! width of the code. It moves after the last access that can fault.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{Step, Trap, on_stack, segment_index};
use crate::{
    core::Core,
    cpu::{
        Bits, FLAG_AC, FLAG_ID, FLAG_IF, FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_TF, FLAG_VM, Seg,
        canonical,
    },
    fault::Fault,
};

impl Core {
    /// Bytes of the stack pointer.
    pub(super) fn stack_width(&self) -> u32 {
        match self.cpu.bits() {
            Bits::Bits64 => 8,
            Bits::Bits32 | Bits::Bits16 if self.cpu.segments[Seg::SS].db() => 4,
            Bits::Bits32 | Bits::Bits16 => 2,
        }
    }

    fn cut(&self, pointer: u64) -> u64 {
        match self.stack_width() {
            2 => pointer & 0xffff,
            4 => pointer & 0xffff_ffff,
            _ => pointer,
        }
    }

    /// Linear address of `size` bytes at the stack pointer plus `offset`.
    pub(super) fn stack_address(&self, offset: u64, size: u32, write: bool) -> Result<u64, Fault> {
        let pointer = self.cut(self.gpr(4).wrapping_add(offset));
        self.data(pointer, Register::SS, size, write)
    }

    /// Reads the stack at RSP plus `offset`.
    pub(super) fn peek(&self, offset: u64, size: u32) -> Result<u64, Fault> {
        self.stack_address(offset, size, false)
            .and_then(|address| self.load(address, size))
            .map_err(on_stack)
    }

    pub(super) fn pop_bytes(&mut self, bytes: u64) {
        let rsp = self.gpr(4).wrapping_add(bytes);
        self.set_gpr_sized(4, rsp, self.stack_width());
    }

    pub(super) fn push(&mut self, value: u64, size: u32) -> Result<(), Fault> {
        let down = 0u64.wrapping_sub(size.into());
        let user = self.user();
        self.stack_address(down, size, true)
            .and_then(|address| self.write(address, &value.to_le_bytes()[..size as usize], user))
            .map_err(on_stack)?;
        self.pop_bytes(down);
        Ok(())
    }

    pub(super) fn stack(&mut self, instr: &Instruction) -> Result<(), Trap> {
        use Mnemonic::*;
        match instr.mnemonic() {
            Push => {
                let size = -instr.stack_pointer_increment() as u32;
                let value = match instr.op0_kind() {
                    OpKind::Register if instr.op0_register().is_segment_register() => {
                        self.segment_of(instr.op0_register()).selector.into()
                    }
                    OpKind::Register | OpKind::Memory => self.value(instr, 0)?,
                    _ => instr.immediate(0),
                };
                self.push(value, size)?;
            }
            Pop => self.pop(instr)?,
            Pusha | Pushad => {
                let size = if instr.mnemonic() == Pushad { 4 } else { 2 };
                let before = self.gpr(4);
                for number in 0..8u64 {
                    let down = 0u64.wrapping_sub((number + 1) * u64::from(size));
                    let address = self.stack_address(down, size, true)?;
                    let user = self.user();
                    self.probe_write(address, size, user)?;
                }
                for number in 0..8 {
                    let value = if number == 4 {
                        before
                    } else {
                        self.gpr(number)
                    };
                    self.push(value, size)?;
                }
            }
            Popa | Popad => {
                let size = if instr.mnemonic() == Popad { 4 } else { 2 };
                let mut values = [0; 8];
                for (index, value) in values.iter_mut().enumerate() {
                    *value = self.peek(index as u64 * u64::from(size), size)?;
                }
                for (index, value) in values.into_iter().enumerate() {
                    let number = 7 - index;
                    if number != 4 {
                        self.set_gpr_sized(number, value, size);
                    }
                }
                self.pop_bytes(8 * u64::from(size));
            }
            Enter => self.enter(instr)?,
            _ => self.leave(instr)?,
        }
        Ok(())
    }

    fn pop(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let size = instr.stack_pointer_increment() as u32;
        let value = self.peek(0, size)?;
        let register = instr.op0_register();
        match instr.op0_kind() {
            OpKind::Register if register.is_segment_register() => {
                let index = segment_index(register);
                self.load_segment(index, value as u16)?;
                // With the stack that was there before.
                let width = self.stack_width();
                let rsp = self.gpr(4).wrapping_add(size.into());
                self.set_gpr_sized(4, rsp, width);
                self.cpu.shadow = index == Seg::SS;
                self.debug.blocked = index == Seg::SS;
            }
            OpKind::Register => {
                self.pop_bytes(size.into());
                let number = register.full_register().number();
                self.set_gpr_sized(number, value, size);
            }
            _ => {
                // The address is computed with the stack pointer past the value (SDM 2B, POP).
                let before = self.gpr(4);
                self.pop_bytes(size.into());
                self.store_sized(instr, value, size)
                    .inspect_err(|_| self.set_gpr(4, before))?;
            }
        }
        Ok(())
    }

    pub(super) fn pushf(&mut self, instr: &Instruction) -> Result<(), Fault> {
        if self.cpu.virtual_8086() && self.cpu.iopl() < 3 {
            return Err(Fault::gp());
        }
        let size = -instr.stack_pointer_increment() as u32;
        self.push(self.rflags() & !(FLAG_RF | FLAG_VM), size)
    }

    pub(super) fn popf(&mut self, instr: &Instruction) -> Result<(), Fault> {
        if self.cpu.virtual_8086() && self.cpu.iopl() < 3 {
            return Err(Fault::gp());
        }
        let size = instr.stack_pointer_increment() as u32;
        let value = self.peek(0, size)?;
        let cpl = self.cpu.cpl();
        let mut writable = crate::context::NATIVE_FLAGS | FLAG_NT | FLAG_AC | FLAG_ID | FLAG_TF;
        if cpl == 0 {
            writable |= FLAG_IOPL;
        }
        if cpl <= self.cpu.iopl() {
            writable |= FLAG_IF;
        }
        if size == 2 {
            writable &= 0xffff;
        }
        let old = self.rflags();
        self.pop_bytes(size.into());
        self.set_rflags(old & !writable & !FLAG_RF | value & writable);
        Ok(())
    }

    /// SDM 2A, ENTER. RSP and RBP change at the end alone, so a fault leaves them.
    fn enter(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let level = instr.immediate8_2nd() & 31;
        let size: u32 = match instr.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let step = u64::from(size);
        let user = self.user();
        let mut down = 0u64;
        let mut push = |core: &mut Core, value: u64| {
            down = down.wrapping_sub(step);
            core.stack_address(down, size, true)
                .and_then(|at| core.write(at, &value.to_le_bytes()[..size as usize], user))
                .map_err(on_stack)?;
            Ok::<u64, Fault>(down)
        };
        let pushed = push(self, self.gpr(5))?;
        // What ESP would be: of a 16-bit stack it is SP that moves.
        let (esp, width) = (self.gpr(4), self.stack_width());
        let frame = match width {
            2 => esp & !0xffff | esp.wrapping_add(pushed) & 0xffff,
            _ => esp.wrapping_add(pushed),
        };
        let mut outer = self.gpr(5);
        for _ in 1..level {
            outer = outer.wrapping_sub(step);
            let value = self
                .data(self.cut(outer), Register::SS, size, false)
                .and_then(|address| self.load(address, size))
                .map_err(on_stack)?;
            push(self, value)?;
        }
        if level > 0 {
            push(self, frame)?;
        }
        let down = down.wrapping_sub(instr.immediate16().into());
        // The new top of the stack has to be writable, whether anything goes there or not.
        self.stack_address(down, size, true)
            .and_then(|address| self.probe_write(address, size, user))
            .map_err(on_stack)?;
        self.set_gpr_sized(5, frame, size);
        self.pop_bytes(down);
        Ok(())
    }

    fn leave(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let size = match instr.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        let frame = self.cut(self.gpr(5));
        let value = self
            .data(frame, Register::SS, size, false)
            .and_then(|address| self.load(address, size))
            .map_err(on_stack)?;
        self.set_gpr_sized(4, frame.wrapping_add(size.into()), self.stack_width());
        self.set_gpr_sized(5, value, size);
        Ok(())
    }

    /// Near call and jmp.
    pub(super) fn near_branch(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        use Code::*;
        let narrow = matches!(
            instr.code(),
            Call_rel16 | Call_rm16 | Jmp_rel16 | Jmp_rel8_16 | Jmp_rm16
        );
        let wide = self.cpu.bits() == Bits::Bits64;
        let (size, mask) = match (narrow, wide) {
            (true, _) => (2, 0xffff),
            (false, false) => (4, 0xffff_ffff),
            (false, true) => (8, u64::MAX),
        };
        let target = match instr.op0_kind() {
            OpKind::Register | OpKind::Memory => self.value(instr, 0)? & mask,
            _ => instr.near_branch_target(),
        };
        self.check_target(target)?;
        if instr.mnemonic() == Mnemonic::Call {
            self.push(instr.next_ip(), size)?;
        }
        self.rip = target;
        Ok(Step::Jump)
    }

    pub(super) fn near_return(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        let size = match instr.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let extra = if instr.op_count() == 0 {
            0
        } else {
            instr.immediate16()
        };
        let target = self.peek(0, size)?;
        self.check_target(target)?;
        self.pop_bytes(u64::from(size) + u64::from(extra));
        self.rip = target;
        Ok(Step::Jump)
    }

    /// loop and jcxz that lead nowhere, or outside of 64-bit code.
    pub(super) fn count_down(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        use Code::*;
        use Mnemonic::*;
        const ZF: u64 = 1 << 6;
        let narrow = matches!(
            instr.code(),
            Loop_rel8_16_CX
                | Loop_rel8_32_CX
                | Loope_rel8_16_CX
                | Loope_rel8_32_CX
                | Loopne_rel8_16_CX
                | Loopne_rel8_32_CX
                | Jcxz_rel8_16
                | Jcxz_rel8_32
        );
        let wide = matches!(
            instr.code(),
            Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX | Jrcxz_rel8_64
        );
        let (size, mask) = match (narrow, wide) {
            (true, _) => (2, 0xffff),
            (false, false) => (4, 0xffff_ffff),
            (false, true) => (8, u64::MAX),
        };
        let zero = self.rflags() & ZF != 0;
        let counts = !matches!(instr.mnemonic(), Jcxz | Jecxz | Jrcxz);
        let count = self.gpr(1).wrapping_sub(counts.into()) & mask;
        let taken = match instr.mnemonic() {
            Loop => count != 0,
            Loope => count != 0 && zero,
            Loopne => count != 0 && !zero,
            _ => count == 0,
        };
        if taken {
            self.check_target(instr.near_branch_target())?;
        }
        if counts {
            self.set_gpr_sized(1, count, size);
        }
        Ok(self.branch_if(taken, instr))
    }

    /// jcc that leads nowhere.
    pub(super) fn conditional_branch(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        let flags = self.rflags();
        let flag = |bit: u32| flags >> bit & 1 == 1;
        let (carry, parity, zero, sign) = (flag(0), flag(2), flag(6), flag(7));
        let (overflow, less) = (flag(11), flag(7) != flag(11));
        use iced_x86::ConditionCode as Cc;
        let taken = match instr.condition_code() {
            Cc::o => overflow,
            Cc::no => !overflow,
            Cc::b => carry,
            Cc::ae => !carry,
            Cc::e => zero,
            Cc::ne => !zero,
            Cc::be => carry || zero,
            Cc::a => !carry && !zero,
            Cc::s => sign,
            Cc::ns => !sign,
            Cc::p => parity,
            Cc::np => !parity,
            Cc::l => less,
            Cc::ge => !less,
            Cc::le => zero || less,
            Cc::g => !zero && !less,
            Cc::None => return Err(Trap::Unsupported("no condition".into())),
        };
        if taken {
            self.check_target(instr.near_branch_target())?;
        }
        Ok(self.branch_if(taken, instr))
    }

    fn branch_if(&mut self, taken: bool, instr: &Instruction) -> Step {
        if !taken {
            return Step::Next;
        }
        self.rip = instr.near_branch_target();
        Step::Jump
    }

    /// Bytes of the code segment from RIP on, which lies in it.
    pub(crate) fn code_left(&self) -> usize {
        if self.cpu.bits() == Bits::Bits64 {
            return usize::MAX;
        }
        let limit = self.cpu.segments[Seg::CS].limit;
        if limit == u32::MAX {
            return usize::MAX;
        }
        let limit = u64::from(limit);
        (limit - self.rip.min(limit)) as usize + 1
    }

    /// A branch target beyond the code segment, or that isn't canonical, faults at the branch (SDM 2, JMP,
    /// CALL and RET).
    pub(crate) fn check_target(&self, target: u64) -> Result<(), Fault> {
        let good = match self.cpu.bits() {
            Bits::Bits64 => canonical(target),
            _ => target <= self.cpu.segments[Seg::CS].limit.into(),
        };
        if good { Ok(()) } else { Err(Fault::gp()) }
    }
}
