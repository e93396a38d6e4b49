//! Memory operands of the instructions that the runtime executes: addresses, limits, loads, stores.
//!
//! Outside of 64-bit mode every access is held against its segment first (SDM 3A 5.3, 5.5 and
//! 17.1): that comes before any page fault.

use iced_x86::{Instruction, OpKind, Register};

use super::{on_stack, segment_index};
use crate::{
    core::Core,
    cpu::{Bits, Seg},
    decode::data_segment,
    fault::{self, Fault},
    mmu::Access,
};

impl Core {
    pub(super) fn segment_of(&self, register: Register) -> engine_core::Segment {
        self.cpu.segments[segment_index(register)]
    }

    /// Checks an access of `size` bytes at `offset` against segment `index`.
    ///
    /// # Errors
    /// #SS for the stack segment and #GP for any other.
    pub(crate) fn check_segment(
        &self,
        index: usize,
        offset: u64,
        size: u32,
        write: bool,
    ) -> Result<(), Fault> {
        if self.cpu.bits() == Bits::Bits64 {
            return Ok(());
        }
        let segment = &self.cpu.segments[index];
        let bad = Err(if index == Seg::SS {
            Fault::selector(fault::SS, 0)
        } else {
            Fault::gp()
        });
        let kind = segment.attributes;
        let code = kind & 8 != 0;
        if !self.cpu.real_addressing() {
            let usable = kind & 0x90 == 0x90;
            let readable = !code || kind & 2 != 0;
            let writable = !code && kind & 2 != 0;
            if !usable || write && !writable || !write && !readable {
                return bad;
            }
        }
        let offset = offset & 0xffff_ffff;
        let last = offset + u64::from(size.max(1)) - 1;
        let limit = u64::from(segment.limit);
        let inside = if !code && kind & 4 != 0 {
            // Expand-down: what lies above the limit.
            let top = if segment.db() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if inside { Ok(()) } else { bad }
    }

    /// Linear address of `size` bytes at `offset` in a segment, checked.
    pub(super) fn data(
        &self,
        offset: u64,
        segment: Register,
        size: u32,
        write: bool,
    ) -> Result<u64, Fault> {
        self.check_segment(segment_index(segment), offset, size, write)?;
        let address = self.linear(offset, segment);
        self.check_alignment(address, size)?;
        Ok(address)
    }

    /// Adds the segment's base, as the current mode does.
    pub(super) fn linear(&self, offset: u64, segment: Register) -> u64 {
        let base = self.segment_of(segment).base;
        match self.cpu.bits() {
            Bits::Bits64 if matches!(segment, Register::FS | Register::GS) => {
                offset.wrapping_add(base)
            }
            Bits::Bits64 => offset,
            Bits::Bits32 | Bits::Bits16 => offset.wrapping_add(base) & 0xffff_ffff,
        }
    }

    /// Offset of the memory operand in its segment.
    fn operand_offset(&self, instr: &Instruction) -> u64 {
        let value = |register: Register| match register {
            Register::None => 0,
            register => {
                let value = self.gpr(register.full_register().number());
                match register.size() {
                    2 => value & 0xffff,
                    4 => value & 0xffff_ffff,
                    _ => value,
                }
            }
        };
        if instr.is_ip_rel_memory_operand() {
            return instr.ip_rel_memory_address();
        }
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let offset = value(base)
            .wrapping_add(value(index).wrapping_mul(instr.memory_index_scale().into()))
            .wrapping_add(instr.memory_displacement64());
        let width = if base != Register::None {
            base.size()
        } else {
            index.size()
        };
        match width {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ if self.cpu.bits() != Bits::Bits64 => offset & 0xffff_ffff,
            _ => offset,
        }
    }

    /// Linear address of the memory operand, unchecked: for invlpg, which accesses nothing.
    pub(super) fn operand_address(&self, instr: &Instruction) -> u64 {
        self.linear(self.operand_offset(instr), instr.memory_segment())
    }

    /// Linear address of a memory operand of `size` bytes.
    ///
    /// # Errors
    /// #GP or #SS if the segment doesn't hold it.
    pub(super) fn operand(
        &self,
        instr: &Instruction,
        size: u32,
        write: bool,
    ) -> Result<u64, Fault> {
        let offset = self.operand_offset(instr);
        self.data(offset, instr.memory_segment(), size, write)
    }

    pub(super) fn load(&self, address: u64, size: u32) -> Result<u64, Fault> {
        self.watch(address, size.into(), false);
        let mut bytes = [0; 8];
        self.mmu
            .read(&self.cpu, address, &mut bytes[..size as usize], self.user())?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a general register or memory operand.
    pub(super) fn value(&self, instr: &Instruction, operand: u32) -> Result<u64, Fault> {
        if instr.op_kind(operand) == OpKind::Register {
            Ok(self.gpr(instr.op_register(operand).full_register().number()))
        } else {
            let size = instr.memory_size().size().min(8) as u32;
            self.operand(instr, size, false)
                .and_then(|address| self.load(address, size))
                .map_err(|fault| self.on_operand(instr, fault))
        }
    }

    /// Writes operand 0: a register in its size, memory as 16 bits (sldt, str, smsw).
    pub(super) fn store(&mut self, instr: &Instruction, value: u64) -> Result<(), Fault> {
        if instr.op0_kind() == OpKind::Register {
            let register = instr.op0_register();
            let number = register.full_register().number();
            self.set_gpr_sized(number, value, register.size() as u32);
            Ok(())
        } else {
            self.store_sized(instr, value, 2)
        }
    }

    /// Writes `size` bytes to the memory operand.
    pub(super) fn store_sized(
        &mut self,
        instr: &Instruction,
        value: u64,
        size: u32,
    ) -> Result<(), Fault> {
        let user = self.user();
        self.operand(instr, size, true)
            .and_then(|address| self.write(address, &value.to_le_bytes()[..size as usize], user))
            .map_err(|fault| self.on_operand(instr, fault))
    }

    /// Reads a part of the memory operand.
    pub(super) fn load_part(
        &self,
        instr: &Instruction,
        address: u64,
        size: u32,
    ) -> Result<u64, Fault> {
        self.load(address, size)
            .map_err(|fault| self.on_operand(instr, fault))
    }

    /// What a fault becomes in the segment of the memory operand.
    pub(super) fn on_operand(&self, instr: &Instruction, fault: Fault) -> Fault {
        let long = self.cpu.bits() == Bits::Bits64;
        if long && data_segment(instr, self.cpu.bits()) == Register::SS {
            on_stack(fault)
        } else {
            fault
        }
    }

    /// Checks that `size` bytes at `address` could be written.
    pub(crate) fn probe_write(&self, address: u64, size: u32, user: bool) -> Result<(), Fault> {
        self.mmu.walk(&self.cpu, address, Access::Write, user)?;
        let last = address.wrapping_add(u64::from(size) - 1);
        if last & !0xfff != address & !0xfff {
            self.mmu
                .walk(&self.cpu, last & !0xfff, Access::Write, user)?;
        }
        Ok(())
    }
}
