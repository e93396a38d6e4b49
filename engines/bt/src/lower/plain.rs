//! Instructions that access no memory: copied, or encoded anew where their bytes mean something else in 64-bit
//! code.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, EncodingKind, Mnemonic};
use std::mem::offset_of;

use super::{Cold, Lower, memory};
use crate::{
    context::Context,
    cpu::{Bits, FLAG_DF},
    decode::Insn,
    fault::{self, Fault},
    site::Ip,
};

impl Lower<'_> {
    /// A divisor of zero is common enough as an operation (it is how kernels and benchmarks raise
    /// #DE) to be worth a test: a host fault costs some 3 µs.
    fn check_divisor(&mut self, insn: &Insn) {
        if insn.live_out != 0 && !self.homes.lazy {
            self.save_flags(0);
        }
        let divisor = insn.instr.op0_register();
        let number = divisor.full_register().number() as u8;
        self.need(insn.reads);
        match divisor.size() {
            8 => dynasm!(self.asm ; .arch x64 ; test Rq(number), Rq(number)),
            4 => dynasm!(self.asm ; .arch x64 ; test Rd(number), Rd(number)),
            2 => dynasm!(self.asm ; .arch x64 ; test Rw(number), Rw(number)),
            // Byte registers come in two kinds; those go the long way.
            _ => return,
        }
        self.asm.extend([0x0f, 0x84]);
        let patch = self.position();
        self.asm.push_i32(0);
        self.cold.push(Cold::Raise {
            patch,
            homes: self.homes,
            ip: insn.instr.ip(),
            fault: Fault::plain(fault::DE),
        });
    }

    pub(super) fn plain(&mut self, insn: &Insn, raw: &[u8]) -> Result<(), String> {
        if matches!(insn.instr.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
            self.check_divisor(insn);
        }
        let carry = self.keeps_carry(insn);
        if !carry {
            self.flags_for(insn);
        }
        self.need(insn.reads);
        if insn.faults {
            self.mark(Ip::At(insn.instr.ip()));
        }
        let code = insn.instr.code();
        let lasting = match self.mode.bits {
            Bits::Bits64 => None,
            // Outside of 64-bit code VEX.B, VEX.vvvv's highest bit and most often VEX.W mean nothing
            // (SDM 2A 2.3.5).
            Bits::Bits32 if code.encoding() == EncodingKind::VEX => Some(code),
            Bits::Bits32 => lasting(code),
            // Operand-size prefixes are the other way round.
            Bits::Bits16 => lasting(code).or(Some(code)),
        };
        match lasting {
            Some(code) => {
                let mut instr = insn.instr;
                instr.set_code(code);
                self.encode(&instr)?;
            }
            None => self.asm.slice(raw),
        }
        self.note_direction(insn);
        self.done(insn);
        self.homes.carry = carry;
        Ok(())
    }

    /// Writes DF's slot where `insn` has changed it.
    fn note_direction(&mut self, insn: &Insn) {
        let value = match insn.instr.code() {
            Code::Std => FLAG_DF as i32,
            Code::Cld => 0,
            _ => return,
        };
        let direction = self.layout.slot(offset_of!(Context, direction));
        dynasm!(self.asm ; .arch x64 ; mov DWORD [direction], value);
    }

    pub(super) fn lea(&mut self, insn: &Insn) -> Result<(), String> {
        self.need(insn.reads);
        let instr = &insn.instr;
        if instr.is_ip_rel_memory_operand() && instr.op0_register().size() >= 4 {
            let mut address = instr.ip_rel_memory_address();
            if instr.op0_register().size() == 4 {
                address &= 0xffff_ffff;
            }
            self.load_constant(instr.op0_register().full_register().number() as u8, address);
        } else if instr.is_ip_rel_memory_operand() {
            let value = instr.ip_rel_memory_address() as u16;
            let number = instr.op0_register().full_register().number() as u8;
            dynasm!(self.asm ; .arch x64 ; mov Rw(number), value as i16);
        } else if self.mode.bits == Bits::Bits64 {
            // It has no segment, and the host's processor computes as the guest's does.
            self.asm.slice(self.raw);
        } else {
            let target = instr.op0_register();
            let lea = memory::plain_address(instr, instr.code(), target);
            self.encode(&lea)?;
            if memory::address_bits(instr, self.mode.bits) == 16 && target.size() > 2 {
                let number = target.full_register().number() as u8;
                dynasm!(self.asm ; .arch x64 ; movzx Rd(number), Rw(number));
            }
        }
        self.done(insn);
        Ok(())
    }
}

/// The form that 64-bit code has of an instruction whose encoding means something else there.
pub(super) fn lasting(code: Code) -> Option<Code> {
    use Code::*;
    Some(match code {
        // One-byte inc and dec are REX prefixes in 64-bit code.
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        // Opcode 82 is 80's twin, and undefined in 64-bit code.
        Add_rm8_imm8_82 => Add_rm8_imm8,
        Or_rm8_imm8_82 => Or_rm8_imm8,
        Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
        And_rm8_imm8_82 => And_rm8_imm8,
        Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8,
        Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        _ => return None,
    })
}
