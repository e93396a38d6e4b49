//! Accesses to memory: by induction variables, by indices that are masked or compared first, by pointers,
//! absolute, and around RSP. Most stay inside; some leave their pages in one of the turns.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::straight::common;
use super::writer::{Known, RSP, Scope, Writer};
use crate::layout::{DATA, EDGE, FAR, GS_BASE, PAGE};
use crate::operands::{alignment, gpr32, gpr64};

/// Where accesses go.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) low: i64,
    pub(super) high: i64,
}

pub(super) const WRITABLE: Region = region(DATA, 4);
/// The last page isn't writable.
const READABLE: Region = region(DATA, 5);
pub(super) const ACROSS: Region = region(EDGE, 2);
pub(super) const DISTANT: Region = region(FAR, 1);

const fn region(at: u64, pages: u64) -> Region {
    Region {
        low: at as i64,
        high: (at + pages * PAGE) as i64,
    }
}

/// Forms that programs access memory with most.
#[rustfmt::skip]
const COMMON: &[Code] = &[
    Code::Mov_r64_rm64, Code::Mov_rm64_r64, Code::Mov_r32_rm32, Code::Mov_rm32_r32, Code::Mov_rm8_r8,
    Code::Mov_r8_rm8, Code::Mov_rm16_r16, Code::Mov_rm32_imm32, Code::Mov_rm8_imm8, Code::Movzx_r32_rm8,
    Code::Movzx_r32_rm16, Code::Movsxd_r64_rm32, Code::Movsx_r64_rm8,
    Code::Add_r64_rm64, Code::Add_rm64_r64, Code::Adc_rm64_r64, Code::Adc_r64_rm64, Code::Sbb_rm32_r32,
    Code::Sub_rm8_r8, Code::Xor_rm64_r64, Code::Or_rm8_imm8, Code::Cmp_rm64_r64, Code::Cmp_r8_rm8,
    Code::Cmp_rm8_imm8, Code::Test_rm32_r32, Code::Inc_rm64, Code::Dec_rm8, Code::Inc_rm32, Code::Neg_rm64,
    Code::Rol_rm32_1, Code::Rcr_rm64_1, Code::Shl_rm8_imm8, Code::Xchg_rm64_r64, Code::Xadd_rm32_r32,
    Code::Cmpxchg_rm64_r64, Code::Imul_r64_rm64, Code::Cmovb_r64_rm64, Code::Setne_rm8, Code::Bt_rm64_imm8,
    Code::Movups_xmm_xmmm128, Code::Movups_xmmm128_xmm, Code::Movdqu_xmm_xmmm128, Code::Movsd_xmm_xmmm64,
    Code::Movss_xmmm32_xmm, Code::Addsd_xmm_xmmm64, Code::Movq_xmm_xmmm64, Code::Fld_m64fp, Code::Fstp_m64fp,
    Code::Prefetcht0_m8,
];

impl Writer<'_> {
    /// A form with an operand in memory that changes no pinned register.
    fn with_memory(&mut self, scope: &Scope) -> Option<(Instruction, u32)> {
        use Mnemonic::*;
        const TRIES: usize = 20;
        for _ in 0..TRIES {
            let code = if self.chance(75) {
                self.pick(COMMON)
            } else {
                self.any_form()
            };
            if !common(code) || code.op_code().is_stack_instruction() {
                continue;
            }
            let Some(mut instr) = self.builder.form(code) else {
                continue;
            };
            let mut operands =
                (0..instr.op_count()).filter(|&at| instr.op_kind(at) == OpKind::Memory);
            let Some(operand) = operands.next() else {
                continue;
            };
            let size = instr.memory_size().size();
            // Bits far from the operand, and vectors of indices.
            let far = matches!(instr.mnemonic(), Bt | Bts | Btr | Btc)
                && instr.op1_kind() == OpKind::Register;
            if far
                || size == 0
                || size > 32
                || alignment(&instr) > 1
                || instr.memory_index().is_vector_register()
                || matches!(
                    instr.mnemonic(),
                    Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Fbld | Fbstp | Vcvtps2ph
                )
                || instr.mnemonic() == Lea
            {
                continue;
            }
            instr.set_segment_prefix(Register::None);
            instr.set_memory_base(Register::None);
            instr.set_memory_index(Register::None);
            if self.changes(&instr) & (scope.pinned | 1 << RSP) == 0 {
                return Some((instr, operand));
            }
        }
        None
    }

    fn operand(instr: &mut Instruction, memory: MemoryOperand) {
        instr.set_segment_prefix(memory.segment_prefix);
        instr.set_memory_base(memory.base);
        instr.set_memory_index(memory.index);
        instr.set_memory_index_scale(memory.scale);
        instr.set_memory_displacement64(memory.displacement as u64);
        instr.set_memory_displ_size(memory.displ_size);
    }

    /// Somewhere to go for an access of this kind.
    fn somewhere(&mut self, store: bool) -> Region {
        match self.below(20) {
            0..2 => ACROSS,
            2..4 => DISTANT,
            4..9 if !store => READABLE,
            _ => WRITABLE,
        }
    }

    /// An access, with what has to come before it.
    pub(super) fn access(&mut self, scope: &Scope) {
        let Some((instr, _)) = self.with_memory(scope) else {
            return;
        };
        let size = instr.memory_size().size() as i64;
        let store = self.stores(&instr);
        // Operands may be anything but what the address is made of, so that is chosen last.
        let known = scope.known.clone();
        self.unit(|writer| {
            let choice = writer.below(100);
            let found = match choice {
                0..50 if !known.is_empty() => writer.by_known(scope, &known, size, store),
                50..60 => writer.masked(scope, size, store),
                60..72 => {
                    writer.guarded(scope, instr, size, store);
                    return;
                }
                72..82 => Some(writer.around_rsp(size)),
                82..90 => Some(writer.absolute(size, store)),
                _ => writer.pointer(scope, size, store),
            };
            if let Some(memory) = found {
                let mut instr = instr;
                Self::operand(&mut instr, memory);
                writer.put(Ok(instr));
            }
        });
    }

    /// By registers whose range is known.
    fn by_known(
        &mut self,
        scope: &Scope,
        known: &[Known],
        size: i64,
        store: bool,
    ) -> Option<MemoryOperand> {
        let first = self.pick(known);
        if first.behind > 0 {
            let displacement = self.below((first.behind - size) as u64) as i64;
            return Some(Self::at(gpr64(first.register.into()), displacement));
        }
        // The address by this register and others, without displacement: from where to where, without wrap.
        let mut base = gpr64(first.register.into());
        let (mut index, mut scale) = (Register::None, 1);
        let (mut low, mut high) = (i128::from(first.low), i128::from(first.high));
        if self.chance(40) && first.register != RSP {
            // As an index, whose base is made up.
            (index, base, scale) = (base, Register::None, self.pick(&[1u32, 1, 2, 4, 8]));
            (low, high) = (low * i128::from(scale), high * i128::from(scale));
            let made = if self.chance(85) {
                self.free(scope)
            } else {
                None
            };
            let other = known
                .iter()
                .find(|other| other.register != first.register && other.behind == 0);
            if let (Some(other), true) = (other, self.chance(40)) {
                base = gpr64(other.register.into());
                low += i128::from(other.low);
                high += i128::from(other.high);
            } else if let Some(made) = made {
                let region = self.somewhere(store);
                if high - low + i128::from(size) > i128::from(region.high - region.low) {
                    return None;
                }
                let room = i128::from(region.high - size) - high - (i128::from(region.low) - low);
                let at = i128::from(region.low) - low + i128::from(self.below(room as u64 + 1));
                self.set(made, at as u64);
                base = gpr64(made.into());
                low += at;
                high += at;
            }
        }
        let regions = [self.somewhere(store), WRITABLE, ACROSS, DISTANT];
        for region in regions {
            let least = i128::from(region.low) - low;
            let most = i128::from(region.high - size) - high;
            let off = self.chance(3);
            if most < least && !off {
                continue;
            }
            let mut displacement = match self.below(4) {
                0 => least,
                1 => most,
                _ if most >= least => least + i128::from(self.below((most - least) as u64 + 1)),
                _ => most,
            };
            if off {
                // Beyond one end, not farther than what faults.
                let by = 1 + i128::from(self.below(((high - low) as u64).min(PAGE - 64) + 8));
                displacement = if self.chance(60) {
                    most + by
                } else {
                    least - by
                };
                let (from, to) = (low + displacement, high + displacement);
                let wall = i128::from(region.high as u64 + PAGE);
                if to >= wall || from < i128::from(region.low) - i128::from(PAGE) {
                    continue;
                }
            }
            if let Ok(displacement) = i32::try_from(displacement) {
                let short = i8::try_from(displacement).is_ok() && base != Register::None;
                let bytes = match displacement {
                    0 if base != Register::None => 0,
                    _ if short => 1,
                    _ => 8,
                };
                return Some(MemoryOperand::new(
                    base,
                    index,
                    scale,
                    displacement.into(),
                    bytes,
                    false,
                    Register::None,
                ));
            }
        }
        None
    }

    /// By a new pointer.
    fn pointer(&mut self, scope: &Scope, size: i64, store: bool) -> Option<MemoryOperand> {
        let register = self.free(scope)?;
        let region = self.somewhere(store);
        let target = region.low + self.below((region.high - region.low - size) as u64 + 1) as i64;
        let displacement = self.pick(&[0, 0, 8, -8, 0x40, -0x80, 0x1000, -0x12345]);
        let mut value = (target - displacement) as u64;
        let bytes = if displacement == 0 { 0 } else { 8 };
        let mut base = gpr64(register.into());
        match self.below(40) {
            // Faults where it isn't mapped, or can't be.
            0 => {
                value = self.pick(&[
                    0,
                    0x1234_5678,
                    1 << 47,
                    !0 << 47,
                    1 << 63,
                    0x7fff_0000_0000,
                    !7,
                ])
            }
            1..4 if value >> 32 == 0 && displacement >= 0 => {
                base = gpr32(register.into());
            }
            _ => {}
        }
        self.make(scope, register, value);
        let none = Register::None;
        Some(MemoryOperand::new(
            base,
            none,
            1,
            displacement,
            bytes,
            false,
            none,
        ))
    }

    /// Brings `value` into a register in a way that hides it; an access may have shown another just before.
    fn make(&mut self, scope: &Scope, register: u8, value: u64) {
        let target = gpr64(register.into());
        let other = self.free(&scope.pin(register));
        let way = self.below(12);
        if way < 8 && self.chance(50) {
            let near = WRITABLE.low + 8 + self.below(0x3000) as i64;
            self.set(register, near as u64);
            let displacement = self.pick(&[0, 8, -8, 0x80]);
            let byte = Self::at(target, displacement);
            self.put(Instruction::with2(Code::Cmp_rm8_imm8, byte, 1));
        }
        match (way, other) {
            (0, Some(other)) => {
                let from = gpr64(other.into());
                self.set(other, value);
                self.put(Instruction::with2(Code::Xchg_rm64_r64, target, from));
            }
            (1, Some(other)) => {
                self.set(other, value);
                self.push(other);
                self.put(Instruction::with1(Code::Pop_r64, target));
            }
            (2, Some(other)) => {
                let from = gpr64(other.into());
                self.set(other, value.wrapping_sub(0x1234));
                self.set(register, 0x1234);
                self.put(Instruction::with2(Code::Xadd_rm64_r64, target, from));
            }
            (3, Some(other)) => {
                let from = gpr64(other.into());
                self.set(other, value);
                let slot = Self::at(Register::RSP, -0x10);
                self.put(Instruction::with2(Code::Mov_rm64_r64, slot, from));
                self.put(Instruction::with2(Code::Mov_r64_rm64, target, slot));
            }
            (4, _) => {
                self.set(register, !value);
                self.put(Instruction::with1(Code::Not_rm64, target));
            }
            (5, _) => {
                self.set(register, value.swap_bytes());
                self.put(Instruction::with1(Code::Bswap_r64, target));
            }
            (6, _) => {
                self.set(register, value.rotate_right(13));
                self.put(Instruction::with2(Code::Rol_rm64_imm8, target, 13));
            }
            (7, Some(other)) => {
                let from = gpr64(other.into());
                self.set(other, value);
                self.put(Instruction::with2(Code::Cmp_r64_rm64, from, from));
                self.put(Instruction::with2(Code::Cmove_r64_rm64, target, from));
            }
            _ => self.set(register, value),
        }
    }

    /// By an index of which an `and` leaves some bits.
    fn masked(&mut self, scope: &Scope, size: i64, store: bool) -> Option<MemoryOperand> {
        let (base, index) = self.two_free(scope)?;
        let region = self.somewhere(store);
        let mask = self.pick(&[7i32, 0x3f, 0x1f8, 0x7f0]);
        let room = region.high - region.low - size - i64::from(mask);
        if room < 0 {
            return None;
        }
        let at = region.low + self.below(room as u64 + 1) as i64;
        let scale = if room > 8 * i64::from(mask) && at + 8 * i64::from(mask) + size <= region.high
        {
            self.pick(&[1, 2, 4, 8])
        } else {
            1
        };
        self.set(base, at as u64);
        let from = self.below(16) as usize;
        self.put(Instruction::with2(
            Code::Mov_r64_rm64,
            gpr64(index.into()),
            gpr64(from),
        ));
        if self.chance(50) {
            self.put(Instruction::with2(
                Code::And_rm64_imm32,
                gpr64(index.into()),
                mask,
            ));
        } else {
            self.put(Instruction::with2(
                Code::And_rm32_imm32,
                gpr32(index.into()),
                mask,
            ));
        }
        let (base, index) = (gpr64(base.into()), gpr64(index.into()));
        Some(MemoryOperand::with_base_index_scale(base, index, scale))
    }

    /// By an index that is compared with a length first, as compilers check bounds.
    fn guarded(&mut self, scope: &Scope, mut instr: Instruction, size: i64, store: bool) {
        let Some((base, index)) = self.two_free(scope) else {
            return;
        };
        let Some(limit) = self.free(&scope.pin(base).pin(index)) else {
            return;
        };
        let region = self.somewhere(store);
        let scale = self.pick(&[1u32, 2, 4, 8]);
        let most = (region.high - region.low - size) / i64::from(scale);
        let length = self.pick(&[1, 16, most / 2, most]);
        let inclusive = self.chance(25);
        let by_register = self.chance(50);
        if self.chance(60) {
            let from = self.below(16) as usize;
            self.put(Instruction::with2(
                Code::Mov_r64_rm64,
                gpr64(index.into()),
                gpr64(from),
            ));
        } else {
            let near = [
                0,
                length - 1,
                length,
                length + 1,
                -1,
                i64::MIN,
                1 << 40,
                1 << 32,
                1 << 60,
            ];
            let value = self.pick(&near);
            self.set(index, value as u64);
        }
        self.set(base, region.low as u64);
        let index64 = gpr64(index.into());
        let skip = self.label();
        if by_register {
            self.set(limit, length as u64);
            let swapped = self.chance(30);
            let limit = gpr64(limit.into());
            let (left, right) = if swapped {
                (limit, index64)
            } else {
                (index64, limit)
            };
            self.put(Instruction::with2(Code::Cmp_r64_rm64, left, right));
            self.branch(
                match (swapped, inclusive) {
                    (false, false) => Code::Jae_rel32_64,
                    (false, true) => Code::Ja_rel32_64,
                    (true, false) => Code::Jbe_rel32_64,
                    (true, true) => Code::Jb_rel32_64,
                },
                skip,
            );
        } else {
            self.put(Instruction::with2(
                Code::Cmp_rm64_imm32,
                index64,
                length as i32,
            ));
            let code = if inclusive {
                Code::Ja_rel32_64
            } else {
                Code::Jae_rel32_64
            };
            self.branch(code, skip);
        }
        let memory = MemoryOperand::with_base_index_scale(gpr64(base.into()), index64, scale);
        Self::operand(&mut instr, memory);
        // Nobody but the access itself may change what it is reached by.
        self.put(Ok(instr));
        self.bind(skip);
    }

    /// Below RSP, where nobody minds; what is above it may be a return address.
    fn around_rsp(&mut self, size: i64) -> MemoryOperand {
        let displacement = -(0x100 - self.below(0x100 - 2 * size as u64) as i64);
        let base = Register::RSP;
        if i8::try_from(displacement).is_ok() {
            MemoryOperand::with_base_displ_size(base, displacement, 1)
        } else {
            Self::at(base, displacement)
        }
    }

    /// Without any register.
    fn absolute(&mut self, size: i64, store: bool) -> MemoryOperand {
        let region = if store || self.chance(50) {
            WRITABLE
        } else {
            READABLE
        };
        let at = region.low + self.below((region.high - region.low - size) as u64 + 1) as i64;
        if at >> 31 == 0 && self.chance(30) {
            return MemoryOperand::with_base_displ(Register::RIP, at);
        }
        if self.chance(20) {
            let by = at.wrapping_sub(GS_BASE as i64);
            let (none, gs) = (Register::None, Register::GS);
            return MemoryOperand::with_base_displ_size_bcst_seg(none, by, 8, false, gs);
        }
        crate::layout::operand(at as u64)
    }
}
