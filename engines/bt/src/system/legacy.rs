//! Instructions that 64-bit code has lost: decimal arithmetic, bound, arpl, salc (SDM 2A, 2B).

use iced_x86::{Code, Instruction, Mnemonic};

use super::Trap;
use crate::{
    core::Core,
    fault::{self, Fault},
};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;

/// SF, ZF and PF of a byte.
fn of_byte(value: u8) -> u64 {
    u64::from(value & 0x80)
        | if value == 0 { ZF } else { 0 }
        | if value.count_ones().is_multiple_of(2) {
            PF
        } else {
            0
        }
}

impl Core {
    pub(super) fn decimal(&mut self, instr: &Instruction) -> Result<(), Trap> {
        use Mnemonic::*;
        let flags = self.rflags();
        let (carry, adjust) = (flags & CF != 0, flags & AF != 0);
        let (al, ah) = (self.gpr(0) as u8, (self.gpr(0) >> 8) as u8);
        match instr.mnemonic() {
            Daa | Das => {
                let subtract = instr.mnemonic() == Das;
                let low = al & 0xf > 9 || adjust;
                let high = al > 0x99 || carry;
                let by = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
                let result = if subtract {
                    al.wrapping_sub(by)
                } else {
                    al.wrapping_add(by)
                };
                // das borrows from the low digit alone, too.
                let carry = high || subtract && low && al < 6;
                let flags = of_byte(result) | if low { AF } else { 0 } | if carry { CF } else { 0 };
                self.set_gpr_sized(0, result.into(), 1);
                self.set_arithmetic(SF | ZF | PF | AF | CF, flags);
            }
            Aaa | Aas => {
                let adjusts = al & 0xf > 9 || adjust;
                let ax = u16::from_le_bytes([al, ah]);
                let ax = match (adjusts, instr.mnemonic() == Aas) {
                    (false, _) => ax,
                    (true, false) => ax.wrapping_add(0x106),
                    (true, true) => ax.wrapping_sub(0x106),
                };
                self.set_gpr_sized(0, (ax & 0xff0f).into(), 2);
                self.set_arithmetic(AF | CF, if adjusts { AF | CF } else { 0 });
            }
            Aam => {
                let base = instr.immediate8();
                if base == 0 {
                    return Err(Fault::plain(fault::DE).into());
                }
                let (high, low) = (al / base, al % base);
                self.set_gpr_sized(0, u16::from_le_bytes([low, high]).into(), 2);
                self.set_arithmetic(SF | ZF | PF, of_byte(low));
            }
            Aad => {
                let low = al.wrapping_add(ah.wrapping_mul(instr.immediate8()));
                self.set_gpr_sized(0, low.into(), 2);
                self.set_arithmetic(SF | ZF | PF, of_byte(low));
            }
            _ => self.set_gpr_sized(0, if carry { 0xff } else { 0 }, 1),
        }
        Ok(())
    }

    /// #BR unless the register lies within both bounds.
    pub(super) fn bound(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let size = if instr.code() == Code::Bound_r16_m1616 {
            2
        } else {
            4
        };
        let address = self.operand(instr, 2 * size, false)?;
        let lower = self.load(address, size)?;
        let upper = self.load(address.wrapping_add(size.into()), size)?;
        let index = self.gpr(instr.op0_register().full_register().number());
        let signed = |value: u64| match size {
            2 => i64::from(value as i16),
            _ => i64::from(value as i32),
        };
        if signed(index) < signed(lower) || signed(index) > signed(upper) {
            return Err(Fault::plain(fault::BR).into());
        }
        Ok(())
    }

    pub(super) fn arpl(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let source = self.gpr(instr.op1_register().full_register().number()) & 3;
        let target = self.value(instr, 0)?;
        let raises = target & 3 < source;
        if raises {
            let value = target & !3 | source;
            if instr.op0_kind() == iced_x86::OpKind::Register {
                let number = instr.op0_register().full_register().number();
                self.set_gpr_sized(number, value, 2);
            } else {
                self.store_sized(instr, value, 2)?;
            }
        }
        self.set_arithmetic(ZF, if raises { ZF } else { 0 });
        Ok(())
    }
}
