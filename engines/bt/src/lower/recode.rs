//! Instructions of 64-bit code with another memory operand, made from their own bytes.
//!
//! An encoder finds the encoding of an operation among all that there are. Here the encoding is at hand: it
//! takes no more than another ModRM byte, with what hangs on it, and the bits of the prefix that extend it.
//!
//! ```text
//! prefixes  REX or VEX  opcode  ModRM  SIB  displacement  immediate
//!                               '------- operand -------'
//! ```
//!
//! Invariant: what comes out decodes as the instruction with its operand replaced, or nothing comes out.

use super::buffer::Buffer;
use dynasmrt::DynasmApi;

/// Where the parts of an instruction are.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    raw: &'a [u8],
    /// Legacy prefixes in front.
    prefixes: usize,
    extension: Extension,
    /// Of the first byte of the opcode.
    opcode: usize,
    modrm: usize,
    /// Behind the operand.
    rest: usize,
}

/// What extends register numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extension {
    None,
    Rex(u8),
    /// The byte behind C5.
    Short(u8),
    /// The bytes behind C4.
    Long(u8, u8),
}

const W: u8 = 8;
const R: u8 = 4;
const X: u8 = 2;
const B: u8 = 1;

fn is_segment(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65)
}

fn is_prefix(byte: u8) -> bool {
    is_segment(byte) || matches!(byte, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)
}

impl<'a> Parts<'a> {
    /// Takes apart a valid instruction with a memory operand. None for those whose operand isn't in a ModRM
    /// byte, or that are written in an odd way.
    pub(super) fn of(raw: &'a [u8]) -> Option<Parts<'a>> {
        let prefixes = raw.iter().position(|&byte| !is_prefix(byte))?;
        let mut opcode = prefixes;
        let extension = match *raw.get(prefixes)? {
            rex @ 0x40..=0x4f => {
                opcode += 1;
                Extension::Rex(rex)
            }
            0xc5 => {
                opcode += 2;
                Extension::Short(*raw.get(prefixes + 1)?)
            }
            0xc4 => {
                opcode += 3;
                Extension::Long(*raw.get(prefixes + 1)?, *raw.get(prefixes + 2)?)
            }
            _ => Extension::None,
        };
        let first = *raw.get(opcode)?;
        let vex = matches!(extension, Extension::Short(_) | Extension::Long(..));
        let length = if vex {
            1
        } else {
            match (first, raw.get(opcode + 1)) {
                (0x0f, Some(0x38 | 0x3a)) => 3,
                (0x0f, _) => 2,
                // mov with an address and no ModRM byte; prefixes behind REX; EVEX and XOP.
                (0xa0..=0xa3 | 0x62 | 0x8f, _) => return None,
                (byte, _) if is_prefix(byte) || byte & 0xf0 == 0x40 => return None,
                _ => 1,
            }
        };
        let modrm = opcode + length;
        let byte = *raw.get(modrm)?;
        let (mode, low) = (byte >> 6, byte & 7);
        let mut rest = modrm + 1;
        let mut based = true;
        if low == 4 {
            based = raw.get(rest)? & 7 != 5;
            rest += 1;
        } else if low == 5 {
            based = false;
        }
        rest += match mode {
            0 if based => 0,
            1 => 1,
            0 | 2 => 4,
            _ => return None,
        };
        (rest <= raw.len()).then_some(Parts {
            raw,
            prefixes,
            extension,
            opcode,
            modrm,
            rest,
        })
    }

    /// Extends the index, and the base.
    fn address_bits(&self) -> u8 {
        match self.extension {
            Extension::None | Extension::Short(_) => 0,
            Extension::Rex(rex) => rex & (X | B),
            Extension::Long(first, _) => !first >> 5 & (X | B),
        }
    }

    /// `lea` of the operand into a register, cut to 32 bits if `narrow`. It isn't relative to RIP.
    pub(super) fn lea(&self, register: u8, narrow: bool, out: &mut Buffer) {
        let mut rex = 0x40 | self.address_bits() | ((register >> 3) * R);
        if !narrow {
            rex |= W;
        }
        if rex != 0x40 {
            out.push(rex);
        }
        out.push(0x8d);
        out.push(self.raw[self.modrm] & 0xc7 | (register & 7) << 3);
        out.slice(&self.raw[self.modrm + 1..self.rest]);
    }

    /// The instruction with \[`base` + `displacement`\] for its operand. `plain` says that it names one of
    /// ah, ch, dh, bh, beside which no prefix may extend anything. False if that can't be.
    pub(super) fn based(&self, base: u8, displacement: i32, plain: bool, out: &mut Buffer) -> bool {
        let high = base >> 3;
        for &prefix in &self.raw[..self.prefixes] {
            if prefix != 0x67 && !is_segment(prefix) {
                out.push(prefix);
            }
        }
        match self.extension {
            Extension::None if high == 0 => {}
            Extension::None if plain => return false,
            Extension::None => out.push(0x40 | B),
            Extension::Rex(rex) => out.push(rex & !(X | B) | (high * B)),
            Extension::Short(byte) if high == 0 => out.extend([0xc5, byte]),
            // R and X as they were, B, and the map that the short form stands for; W clear.
            Extension::Short(byte) => out.extend([0xc4, byte & 0x80 | 0x41, byte & 0x7f]),
            Extension::Long(first, second) => {
                let first = first & !(B << 5) | X << 5 | (high ^ 1) << 5;
                out.extend([0xc4, first, second]);
            }
        }
        out.slice(&self.raw[self.opcode..self.modrm]);
        let register = self.raw[self.modrm] & 0x38;
        operand(register, base & 7, displacement, out);
        out.slice(&self.raw[self.rest..]);
        true
    }
}

/// ModRM byte and what hangs on it, for a base alone. `register` is in its place.
fn operand(register: u8, base: u8, displacement: i32, out: &mut Buffer) {
    let mode = match i8::try_from(displacement) {
        Ok(0) if base != 5 => 0,
        Ok(_) => 1,
        Err(_) => 2,
    };
    out.push(mode << 6 | register | base);
    if base == 4 {
        out.push(0x24);
    }
    match mode {
        0 => {}
        1 => out.push(displacement as u8),
        _ => out.push_i32(displacement),
    }
}

/// `lea register, [base + index * scale + displacement]`, all of 64 bits. RSP is no index.
pub(super) fn lea(
    register: u8,
    base: u8,
    index: Option<(u8, u32)>,
    displacement: i32,
    out: &mut Buffer,
) {
    let extended = index.map_or(0, |(index, _)| index >> 3);
    out.push(0x40 | W | ((register >> 3) * R) | (extended * X) | base >> 3);
    out.push(0x8d);
    let field = (register & 7) << 3;
    let Some((index, scale)) = index else {
        return operand(field, base & 7, displacement, out);
    };
    let sib = (scale.trailing_zeros() as u8) << 6 | (index & 7) << 3 | base & 7;
    match i8::try_from(displacement) {
        Ok(0) if base & 7 != 5 => out.extend([field | 4, sib]),
        Ok(short) => out.extend([0x40 | field | 4, sib, short as u8]),
        Err(_) => {
            out.extend([0x80 | field | 4, sib]);
            out.push_i32(displacement);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::encodings;
    use iced_x86::{Code, Decoder, Instruction, MemoryOperand, OpKind, Register};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0x1000, 0).decode()
    }

    fn gpr64(number: u8) -> Register {
        Register::RAX + u32::from(number)
    }

    /// `instr` as it shall be.
    fn replaced(instr: &Instruction, base: u8, displacement: i32) -> Instruction {
        let mut body = *instr;
        body.set_segment_prefix(Register::None);
        body.set_memory_base(gpr64(base));
        body.set_memory_index(Register::None);
        body.set_memory_index_scale(1);
        body.set_memory_displacement64(displacement as i64 as u64);
        body.set_memory_displ_size(match displacement {
            0 if base & 7 != 5 => 0,
            -128..=127 => 1,
            _ => 8,
        });
        body
    }

    #[test]
    fn every_instruction_gets_its_operand_replaced_as_an_encoder_would() {
        const DISPLACEMENTS: [i32; 5] = [0, 8, -128, 128, -0x1234_5678];
        let mut out = Buffer::default();
        let (mut met, mut taken) = (0u32, 0u32);
        encodings::every(|bytes| {
            let instr = decode(bytes);
            let operand = (0..instr.op_count()).any(|at| instr.op_kind(at) == OpKind::Memory);
            let high = (0..instr.op_count()).any(|at| {
                instr.op_kind(at) == OpKind::Register
                    && (Register::AH..=Register::BH).contains(&instr.op_register(at))
            });
            if instr.is_invalid() || !operand || instr.is_vsib() {
                return;
            }
            met += 1;
            let Some(parts) = Parts::of(&bytes[..instr.len()]) else {
                return;
            };
            taken += 1;
            // In turn: every register meets every form, and every displacement.
            let base = (taken % 16) as u8;
            let displacement = DISPLACEMENTS[taken as usize % DISPLACEMENTS.len()];
            out.clear();
            if !parts.based(base, displacement, high, &mut out) {
                assert!(high && base >= 8, "{instr} with {base}");
                return;
            }
            let found = decode(out.code());
            assert_eq!(found.len(), out.code().len(), "{instr}: {bytes:02x?}");
            let wanted = replaced(&instr, base, displacement);
            assert_eq!(
                found,
                wanted,
                "{instr}: {bytes:02x?} to {:02x?}",
                out.code()
            );
            if instr.is_ip_rel_memory_operand() {
                return;
            }
            for narrow in [false, true] {
                out.clear();
                parts.lea(base, narrow, &mut out);
                let lea = decode(out.code());
                let code = if narrow {
                    Code::Lea_r32_m
                } else {
                    Code::Lea_r64_m
                };
                assert_eq!(lea.code(), code, "{instr}");
                assert_eq!(lea.op0_register().full_register(), gpr64(base), "{instr}");
                let wide = |register: Register| register.full_register();
                assert_eq!(lea.memory_base(), wide(instr.memory_base()), "{instr}");
                assert_eq!(lea.memory_index(), wide(instr.memory_index()), "{instr}");
                assert_eq!(lea.memory_index_scale(), instr.memory_index_scale());
                let [found, wanted] = [lea, instr].map(|it| it.memory_displacement64() as u32);
                assert_eq!(found, wanted, "{instr}");
            }
        });
        assert!(
            taken > 100_000 && taken * 100 > met * 95,
            "{taken} of {met}"
        );
    }

    #[test]
    fn sums_are_encoded_as_they_are_meant() {
        let mut out = Buffer::default();
        for register in 0..16 {
            for base in 0..16 {
                for index in (0..16).filter(|&index| index != 4).map(Some).chain([None]) {
                    for displacement in [0, 1, -128, 128, i32::MIN] {
                        let scale = 1 << (register & 3);
                        out.clear();
                        lea(
                            register,
                            base,
                            index.map(|index| (index, scale)),
                            displacement,
                            &mut out,
                        );
                        let operand = MemoryOperand::new(
                            gpr64(base),
                            index.map_or(Register::None, gpr64),
                            if index.is_some() { scale } else { 1 },
                            displacement.into(),
                            match displacement {
                                0 if base & 7 != 5 => 0,
                                -128..=127 => 1,
                                _ => 8,
                            },
                            false,
                            Register::None,
                        );
                        let wanted = Instruction::with2(Code::Lea_r64_m, gpr64(register), operand);
                        assert_eq!(decode(out.code()), wanted.expect("lea"));
                    }
                }
            }
        }
    }
}
