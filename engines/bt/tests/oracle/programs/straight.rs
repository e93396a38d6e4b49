//! Instructions between branches: any form on registers, and more of those that flags live through.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::writer::{RSP, Scope, Writer};
use crate::layout::avx;
use crate::operands::gpr64;

/// Forms that make, keep or read some of the flags.
#[rustfmt::skip]
const FLAGS: &[Code] = &[
    Code::Inc_rm64, Code::Dec_rm64, Code::Inc_rm32, Code::Dec_rm32, Code::Inc_rm8, Code::Dec_rm16,
    Code::Neg_rm64, Code::Neg_rm32, Code::Not_rm64,
    Code::Adc_r64_rm64, Code::Adc_r32_rm32, Code::Adc_rm64_imm8, Code::Adc_rm8_imm8,
    Code::Sbb_r64_rm64, Code::Sbb_r32_rm32, Code::Sbb_rm64_imm8, Code::Sbb_r8_rm8,
    Code::Add_r64_rm64, Code::Add_rm32_imm8, Code::Add_r16_rm16, Code::Add_RAX_imm32,
    Code::Sub_r64_rm64, Code::Sub_rm32_imm32, Code::Sub_r8_rm8,
    Code::Cmp_r64_rm64, Code::Cmp_r32_rm32, Code::Cmp_rm64_imm8, Code::Cmp_rm16_imm16, Code::Cmp_r8_rm8,
    Code::Test_rm64_r64, Code::Test_rm32_r32, Code::Test_rm8_imm8,
    Code::And_r64_rm64, Code::And_rm32_imm8, Code::Or_r64_rm64, Code::Xor_r32_rm32, Code::Xor_r64_rm64,
    Code::Rol_rm64_1, Code::Ror_rm32_1, Code::Rol_rm64_imm8, Code::Ror_rm16_imm8, Code::Rcl_rm64_1,
    Code::Rcr_rm64_1, Code::Rcl_rm32_imm8, Code::Rcr_rm8_1, Code::Rol_rm64_CL, Code::Rcr_rm32_CL,
    Code::Shl_rm64_1, Code::Shr_rm64_1, Code::Sar_rm32_1, Code::Shl_rm64_imm8, Code::Shr_rm64_CL,
    Code::Sar_rm64_imm8, Code::Shld_rm64_r64_imm8, Code::Shrd_rm32_r32_CL,
    Code::Clc, Code::Stc, Code::Cmc, Code::Lahf, Code::Sahf,
    Code::Bt_rm64_imm8, Code::Bts_rm64_r64, Code::Btr_rm32_imm8, Code::Btc_rm64_r64,
    Code::Sete_rm8, Code::Setb_rm8, Code::Setl_rm8, Code::Setbe_rm8, Code::Sets_rm8, Code::Setp_rm8,
    Code::Seto_rm8, Code::Setg_rm8, Code::Setne_rm8, Code::Setae_rm8,
    Code::Cmove_r64_rm64, Code::Cmovb_r64_rm64, Code::Cmova_r32_rm32, Code::Cmovl_r64_rm64,
    Code::Cmovno_r64_rm64, Code::Cmovp_r64_rm64, Code::Cmovs_r32_rm32, Code::Cmovle_r64_rm64,
    Code::Adcx_r64_rm64, Code::Adox_r64_rm64,
    Code::Imul_r64_rm64, Code::Imul_r64_rm64_imm8, Code::Mul_rm64, Code::Popcnt_r64_rm64,
    Code::Comisd_xmm_xmmm64, Code::Ucomiss_xmm_xmmm32, Code::Ptest_xmm_xmmm128,
];
/// Forms that leave flags alone, so that these live on.
#[rustfmt::skip]
const NEUTRAL: &[Code] = &[
    Code::Mov_r64_rm64, Code::Mov_r32_rm32, Code::Mov_rm64_r64, Code::Mov_r8_rm8, Code::Mov_r32_imm32,
    Code::Mov_rm64_imm32, Code::Mov_r64_imm64, Code::Movzx_r32_rm8, Code::Movzx_r64_rm16,
    Code::Movsx_r64_rm8, Code::Movsxd_r64_rm32, Code::Xchg_rm64_r64, Code::Bswap_r64, Code::Cqo, Code::Cwde,
    Code::Not_rm32, Code::Nopw, Code::Nop_rm32, Code::Pause,
    Code::Movq_xmm_rm64, Code::Paddd_xmm_xmmm128, Code::Pxor_xmm_xmmm128, Code::Mulsd_xmm_xmmm64,
    Code::Cvtsi2sd_xmm_rm64, Code::Movd_rm32_xmm,
];

/// True for forms that a program may hold anywhere: they don't fault, or seldom, and don't move RSP.
pub(super) fn common(code: Code) -> bool {
    use Mnemonic::*;
    let bad = matches!(
        code.mnemonic(),
        Div | Idiv
            | Xlatb
            | Cmpxchg16b
            | Cmpxchg8b
            | Wrfsbase
            | Wrgsbase
            | Rdfsbase
            | Rdgsbase
            | Fldcw
            | Fldenv
            | Frstor
            | Fxrstor
            | Fxrstor64
            | Ldmxcsr
            | Vldmxcsr
            | Bsf
            | Bsr
            | Clflush
            | Clflushopt
            | Clwb
            | Maskmovq
            | Bound
            | Leave
            | Enter
            | Emms
    );
    // Counts beyond 16 bits leave anything.
    let shift = matches!(code.mnemonic(), Shld | Shrd) && code.op_code().operand_size() == 16;
    !bad && !shift
}

impl Writer<'_> {
    /// A form of general or vector registers.
    pub(super) fn any_form(&mut self) -> Code {
        let table = self.table;
        let group = match self.below(100) {
            0..30 if !table.late.is_empty() => &table.late,
            0..60 => &table.integer,
            60..75 if avx() => &table.avx,
            60..90 => &table.sse,
            90..96 => &table.x87,
            _ => &table.mmx,
        };
        self.pick(group)
    }

    /// One of `codes`, on registers, that changes none that is pinned.
    fn on_registers(&mut self, scope: &Scope, choose: impl Fn(&mut Self) -> Code) {
        const TRIES: usize = 12;
        for _ in 0..TRIES {
            let code = choose(self);
            if !common(code) {
                continue;
            }
            let Some(instr) = self.builder.form(code) else {
                continue;
            };
            let memory = (0..instr.op_count()).any(|operand| {
                !matches!(
                    instr.op_kind(operand),
                    OpKind::Register
                        | OpKind::Immediate8
                        | OpKind::Immediate8_2nd
                        | OpKind::Immediate16
                        | OpKind::Immediate32
                        | OpKind::Immediate64
                        | OpKind::Immediate8to16
                        | OpKind::Immediate8to32
                        | OpKind::Immediate8to64
                        | OpKind::Immediate32to64
                )
            });
            let uses_memory = instr.memory_size().size() != 0 && memory;
            if uses_memory || memory || self.changes(&instr) & (scope.pinned | 1 << RSP) != 0 {
                continue;
            }
            self.unit(|writer| {
                writer.put(Ok(instr));
            });
            return;
        }
    }

    /// An instruction on registers.
    pub(super) fn straight(&mut self, scope: &Scope) {
        match self.below(100) {
            0..50 => self.flags(scope),
            50..75 => self.neutral(scope),
            75..83 => self.lea(scope),
            _ => self.on_registers(scope, |writer| writer.any_form()),
        }
    }

    /// One that has to do with flags.
    pub(super) fn flags(&mut self, scope: &Scope) {
        self.on_registers(scope, |writer| writer.pick(FLAGS));
    }

    /// One that leaves flags alone.
    pub(super) fn neutral(&mut self, scope: &Scope) {
        self.on_registers(scope, |writer| writer.pick(NEUTRAL));
    }

    fn lea(&mut self, scope: &Scope) {
        let Some(target) = self.free(scope) else {
            return;
        };
        let (base, index) = (self.below(16), self.below(16));
        let register = |number: u64| gpr64(number as usize);
        let index = if index == u64::from(RSP) || self.chance(40) {
            Register::None
        } else {
            register(index)
        };
        let scale = self.pick(&[1, 2, 4, 8]);
        let displacement = self.pick(&[0, 1, -1, 8, 0x7f, -0x80, 0x1234, -0x7fff_ffff]);
        let memory = iced_x86::MemoryOperand::new(
            register(base),
            index,
            scale,
            displacement,
            if displacement == 0 { 0 } else { 8 },
            false,
            Register::None,
        );
        let (code, target) = if self.chance(75) {
            (Code::Lea_r64_m, gpr64(target.into()))
        } else {
            (Code::Lea_r32_m, crate::operands::gpr32(target.into()))
        };
        self.unit(|writer| {
            writer.put(Instruction::with2(code, target, memory));
        });
    }
}
