//! Where a memory operand is: its guest-virtual address in a register, by an `lea` of the operand in most cases.
//!
//! What is looked up there, or whether it may be accessed, is the parent module's.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, OpKind, Register};
use std::mem::offset_of;

use super::super::{
    Lower, gpr64,
    recode::{self, Parts},
};
use crate::{context::Context, cpu::Bits, decode::data_segment, groups::Group};

/// Where an operand is.
#[derive(Clone, Copy)]
pub(in crate::lower) enum Address<'a> {
    /// The instruction's memory operand, its displacement changed by this much.
    Operand(&'a Instruction, i64),
    /// As `Operand`, further displaced by a bit offset in this register.
    Bits(&'a Instruction, Register),
    /// RSP plus this, in the stack segment.
    Stack(i32),
    /// RBP, in the stack segment.
    Frame,
    /// The lowest byte of a group.
    Group(&'a Group),
}

impl<'a> Lower<'a> {
    /// The instruction being lowered, taken apart, if its operand can be replaced.
    pub(super) fn parts(&self) -> Option<Parts<'a>> {
        if self.mode.bits == Bits::Bits64 {
            Parts::of(self.raw)
        } else {
            None
        }
    }
}

impl Lower<'_> {
    /// The guest-virtual address of an operand of `size` bytes that no register is part of, if an instruction
    /// can compare its page and all of it lies there.
    pub(super) fn known_address(&self, address: Address<'_>, size: u32) -> Option<u64> {
        let Address::Operand(instr, by) = address else {
            return None;
        };
        let based = matches!(
            data_segment(instr, self.mode.bits),
            Register::FS | Register::GS
        );
        let based = based || self.mode.bits != Bits::Bits64 && !self.mode.flat;
        let checked = self.mode.limited != 0;
        if based || checked || !lacks_registers(instr) {
            return None;
        }
        let offset = instr.memory_displacement64().wrapping_add(by as u64);
        let narrow = address_bits(instr, self.mode.bits) <= 32;
        let address = if narrow { offset & 0xffff_ffff } else { offset };
        let page = address & !0xfff;
        let whole = (address & 0xfff) + u64::from(size) <= 4096;
        (whole && i64::from(page as i32) == page as i64).then_some(address)
    }

    /// Emits the guest-virtual address into `register`, with `scratch` at its disposal. Returns the
    /// segment's number.
    pub(in crate::lower) fn address_into(
        &mut self,
        address: Address<'_>,
        register: u8,
        scratch: u8,
        size: u32,
    ) -> Result<u8, String> {
        let narrow = self.mode.bits != Bits::Bits64;
        let (segment, truncate) = match address {
            Address::Stack(offset) => {
                dynasm!(self.asm ; .arch x64 ; lea Rq(register), [rsp + offset]);
                (Register::SS, narrow)
            }
            Address::Frame => {
                dynasm!(self.asm ; .arch x64 ; mov Rq(register), rbp);
                (Register::SS, narrow)
            }
            Address::Group(group) => {
                let index = (group.index != Register::None)
                    .then(|| (group.index.number() as u8, group.scale));
                let base = group.base.number() as u8;
                // Far from the ends of what a displacement holds.
                recode::lea(register, base, index, group.low as i32, self.asm);
                (Register::DS, false)
            }
            Address::Operand(instr, by) => {
                self.operand_address(instr, by, register)?;
                (data_segment(instr, self.mode.bits), false)
            }
            Address::Bits(instr, offset) => {
                self.operand_address(instr, 0, register)?;
                let number = offset.full_register().number() as u8;
                match size {
                    2 => dynasm!(self.asm
                        ; .arch x64
                        ; movsx Rq(scratch), Rw(number)
                        ; sar Rq(scratch), 4
                        ; lea Rq(register), [Rq(register) + 2 * Rq(scratch)]
                    ),
                    4 => dynasm!(self.asm
                        ; .arch x64
                        ; movsxd Rq(scratch), Rd(number)
                        ; sar Rq(scratch), 5
                        ; lea Rq(register), [Rq(register) + 4 * Rq(scratch)]
                    ),
                    _ => dynasm!(self.asm
                        ; .arch x64
                        ; mov Rq(scratch), Rq(number)
                        ; sar Rq(scratch), 6
                        ; lea Rq(register), [Rq(register) + 8 * Rq(scratch)]
                    ),
                }
                match address_bits(instr, self.mode.bits) {
                    16 => {
                        dynasm!(self.asm ; .arch x64 ; movzx Rd(register), Rw(register));
                        (data_segment(instr, self.mode.bits), false)
                    }
                    bits => (data_segment(instr, self.mode.bits), bits == 32),
                }
            }
        };
        let index: u8 = match segment {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::DS => 3,
            Register::FS => 4,
            _ => 5,
        };
        if truncate {
            dynasm!(self.asm ; .arch x64 ; mov Rd(register), Rd(register));
        }
        if index >= 4 || !self.mode.flat && narrow {
            let base = self.layout.slot(offset_of!(Context, segment_base)) + 8 * i32::from(index);
            dynasm!(self.asm ; .arch x64 ; add Rq(register), [base]);
            if narrow {
                dynasm!(self.asm ; .arch x64 ; mov Rd(register), Rd(register));
            }
        }
        Ok(index)
    }

    /// Emits the offset part of a memory operand, cut to 32 bits if it has no more.
    fn operand_address(
        &mut self,
        instr: &Instruction,
        by: i64,
        register: u8,
    ) -> Result<(), String> {
        let bits = address_bits(instr, self.mode.bits);
        let narrow = bits <= 32;
        if lacks_registers(instr) {
            let offset = instr.memory_displacement64().wrapping_add(by as u64);
            self.load_constant(register, if narrow { offset & 0xffff_ffff } else { offset });
            return Ok(());
        }
        if let Some(parts) = self.parts().filter(|_| by == 0) {
            parts.lea(register, narrow, self.asm);
            return Ok(());
        }
        let code = if narrow {
            Code::Lea_r32_m
        } else {
            Code::Lea_r64_m
        };
        let target = if narrow {
            Register::EAX + u32::from(register)
        } else {
            gpr64(register)
        };
        let mut lea = plain_address(instr, code, target);
        if by != 0 {
            lea.set_memory_displacement64(lea.memory_displacement64().wrapping_add(by as u64));
            if lea.memory_displ_size() == 0 {
                lea.set_memory_displ_size(1);
            }
        }
        self.encode(&lea)?;
        if bits == 16 {
            dynasm!(self.asm ; .arch x64 ; movzx Rd(register), Rw(register));
        }
        Ok(())
    }
}

pub(in crate::lower) fn address_bits(instr: &Instruction, bits: Bits) -> u32 {
    let register = if instr.memory_base() != Register::None {
        instr.memory_base()
    } else {
        instr.memory_index()
    };
    match register {
        // iced tells of a 16-bit address without registers by its displacement alone.
        Register::None if instr.memory_displ_size() == 2 => 16,
        Register::None if bits != Bits::Bits64 => 32,
        // An address-size prefix and nothing else: iced says so by the displacement's size.
        Register::None if instr.memory_displ_size() == 4 => 32,
        Register::None => 64,
        Register::EIP => 32,
        register => register.size() as u32 * 8,
    }
}

/// `lea` of `instr`'s memory operand, spelled with 64-bit registers: the low 32 bits of a sum don't
/// depend on how wide it was added.
pub(in crate::lower) fn plain_address(
    instr: &Instruction,
    code: Code,
    target: Register,
) -> Instruction {
    let wide = |register: Register| {
        if register == Register::None {
            register
        } else {
            register.full_register()
        }
    };
    let narrow = address_bits(instr, Bits::Bits64) <= 32;
    let mut lea = Instruction::new();
    // A 32-bit address in a 64-bit destination is zero-extended: the narrow form does that.
    let code = if narrow && code == Code::Lea_r64_m {
        Code::Lea_r32_m
    } else {
        code
    };
    let target = if code == Code::Lea_r32_m && target.size() == 8 {
        Register::EAX + target.number() as u32
    } else {
        target
    };
    lea.set_code(code);
    lea.set_op0_kind(OpKind::Register);
    lea.set_op0_register(target);
    lea.set_op1_kind(OpKind::Memory);
    lea.set_memory_base(wide(instr.memory_base()));
    lea.set_memory_index(wide(instr.memory_index()));
    lea.set_memory_index_scale(instr.memory_index_scale());
    let displacement = instr.memory_displacement64();
    let displacement = if narrow {
        displacement as i32 as i64 as u64
    } else {
        displacement
    };
    lea.set_memory_displacement64(displacement);
    // Without a base the displacement is there always, and whole.
    lea.set_memory_displ_size(match (instr.memory_base(), displacement) {
        (Register::None, _) => 8,
        (_, 0) => 0,
        (_, _) => 1,
    });
    lea
}

/// True if the operand's address is the displacement alone: in 64-bit code, the one of an RIP-relative operand
/// has RIP in it.
fn lacks_registers(instr: &Instruction) -> bool {
    instr.memory_base() == Register::None && instr.memory_index() == Register::None
        || instr.is_ip_rel_memory_operand()
}
