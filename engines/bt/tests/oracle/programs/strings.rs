//! String instructions, repeated or not, upwards or downwards: each sets the direction or takes what there is,
//! and has room on both sides.

use iced_x86::{Code, Instruction, Mnemonic};

use super::writer::{RCX, Scope, Writer};
use crate::layout::{DATA, EDGE, PAGE};

impl Writer<'_> {
    /// A repeated string instruction: each of its ends stays inside in either direction, or doesn't.
    pub(super) fn string(&mut self, scope: &Scope) {
        const RSI: u8 = 6;
        const RDI: u8 = 7;
        let used = [0, RCX, RSI, RDI];
        if used.iter().any(|&register| !self.is_free(scope, register)) {
            return;
        }
        let codes = [
            Code::Movsb_m8_m8,
            Code::Movsq_m64_m64,
            Code::Movsd_m32_m32,
            Code::Stosb_m8_AL,
            Code::Stosq_m64_RAX,
            Code::Stosw_m16_AX,
            Code::Lodsb_AL_m8,
            Code::Lodsq_RAX_m64,
            Code::Scasb_AL_m8,
            Code::Scasd_EAX_m32,
            Code::Cmpsb_m8_m8,
            Code::Cmpsq_m64_m64,
        ];
        let code = self.pick(&codes);
        let ends = self.chance(4);
        self.unit(|writer| {
            match writer.below(4) {
                0 => writer.put(Ok(Instruction::with(Code::Std))),
                1 => writer.put(Ok(Instruction::with(Code::Cld))),
                _ => true,
            };
            for register in [RSI, RDI] {
                let at = if ends {
                    writer.pick(&[DATA + 0x10, DATA + 4 * PAGE - 0x20, DATA + 0x1ff0])
                } else if writer.chance(10) {
                    EDGE + PAGE - writer.below(0x40)
                } else {
                    DATA + PAGE + writer.below(2 * PAGE)
                };
                writer.set(register, at);
            }
            let count = writer.pick(&[0, 1, 2, 3, 8, 33, 100]);
            writer.set(RCX, count);
            if writer.chance(30) {
                writer.flags(&scope.pin(RSI).pin(RDI).pin(RCX));
            }
            let Some(mut instr) = writer.builder.form(code) else {
                return;
            };
            let compares = matches!(
                code.mnemonic(),
                Mnemonic::Scasb | Mnemonic::Scasd | Mnemonic::Cmpsb | Mnemonic::Cmpsq
            );
            match writer.below(3) {
                0 => {}
                1 if compares => instr.set_has_repne_prefix(true),
                _ => instr.set_has_rep_prefix(true),
            }
            writer.cost += count;
            writer.put(Ok(instr));
        });
    }
}
