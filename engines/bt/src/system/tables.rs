//! The registers of descriptor tables and of the task: GDTR, IDTR, LDTR, TR.
//!
//! Whether an instruction may run here is judged before; task switches are in `task`.
//!
//! Invariant: a register changes when nothing can fail any more.

use engine_core::{DescriptorTable, Segment};
use iced_x86::{Code, Instruction, Mnemonic};

use crate::{
    core::Core,
    cpu::{Bits, canonical},
    fault::Fault,
};

impl Core {
    /// lgdt and lidt.
    pub(super) fn load_table_register(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let wide = self.cpu.bits() == Bits::Bits64;
        let bytes = if wide { 8 } else { 4 };
        let address = self.operand(instr, 2 + bytes, false)?;
        let limit = self.load_part(instr, address, 2)? as u16;
        let mut base = self.load_part(instr, address.wrapping_add(2), bytes)?;
        if matches!(instr.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
            base &= 0xff_ffff;
        }
        if wide && !canonical(base) {
            return Err(Fault::gp());
        }
        let table = DescriptorTable { base, limit };
        if instr.mnemonic() == Mnemonic::Lgdt {
            self.cpu.gdtr = table;
        } else {
            self.cpu.idtr = table;
        }
        Ok(())
    }

    /// sgdt and sidt.
    pub(super) fn store_table_register(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let table = if instr.mnemonic() == Mnemonic::Sgdt {
            self.cpu.gdtr
        } else {
            self.cpu.idtr
        };
        let wide = self.cpu.bits() == Bits::Bits64;
        let bytes = if wide { 10 } else { 6 };
        let address = self.operand(instr, bytes, true)?;
        let mut image = [0u8; 10];
        image[..2].copy_from_slice(&table.limit.to_le_bytes());
        image[2..].copy_from_slice(&table.base.to_le_bytes());
        let user = self.user();
        self.write(address, &image[..bytes as usize], user)
            .map_err(|fault| self.on_operand(instr, fault))
    }

    /// lldt.
    pub(super) fn load_ldt(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let selector = self.value(instr, 0)? as u16;
        self.cpu.ldtr = if selector & !3 == 0 {
            Segment {
                selector,
                ..Default::default()
            }
        } else {
            self.system_descriptor(selector, &[2])?
        };
        Ok(())
    }

    /// ltr.
    pub(super) fn load_task(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let selector = self.value(instr, 0)? as u16;
        if selector & !3 == 0 {
            return Err(Fault::gp());
        }
        // Available, of 32 or 64 bits, or of 16 outside IA-32e mode.
        let types: &[u16] = if self.cpu.long() { &[9] } else { &[1, 9] };
        let mut segment = self.system_descriptor(selector, types)?;
        segment.attributes |= 2;
        let at = self
            .cpu
            .gdtr
            .base
            .wrapping_add(u64::from(selector & !7) + 5);
        let busy = self.mmu.read_int::<1>(&self.cpu, at, false)? as u8 | 2;
        self.write(at, &[busy], false)?;
        self.cpu.tr = segment;
        Ok(())
    }
}
