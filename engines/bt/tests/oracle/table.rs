//! Every instruction form that the guest's CPUID announces, sorted into groups, without those
//! whose result depends on the machine around them.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Forms by how often they should come.
pub(crate) struct Table {
    pub(crate) integer: Vec<Code>,
    pub(crate) stack: Vec<Code>,
    pub(crate) string: Vec<Code>,
    pub(crate) sse: Vec<Code>,
    pub(crate) mmx: Vec<Code>,
    pub(crate) x87: Vec<Code>,
    pub(crate) avx: Vec<Code>,
    /// Forms of general registers that are encoded with VEX, and other late ones.
    pub(crate) late: Vec<Code>,
    /// Forms that always fault in ring 3.
    pub(crate) forbidden: Vec<Code>,
}

impl Table {
    pub(crate) fn new() -> Table {
        let mut table = Table {
            integer: Vec::new(),
            stack: Vec::new(),
            string: Vec::new(),
            sse: Vec::new(),
            mmx: Vec::new(),
            x87: Vec::new(),
            avx: Vec::new(),
            late: Vec::new(),
            forbidden: Vec::new(),
        };
        for code in Code::values() {
            let info = code.op_code();
            let usable = info.is_instruction()
                && info.mode64()
                && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && !info.fwait()
                && announced(code)
                && comparable(code.mnemonic())
                // Without its operand, as few processors decode it.
                && code != Code::Ud0;
            if !usable {
                continue;
            }
            use Mnemonic::*;
            let features = code.cpuid_features();
            let has = |wanted: &[CpuidFeature]| features.iter().any(|f| wanted.contains(f));
            let string = {
                let mut instr = Instruction::default();
                instr.set_code(code);
                instr.is_string_instruction()
            };
            let group = match code.mnemonic() {
                // Branches are put together by hand, and so is what loads control registers of the
                // FPU and flags.
                Jmp | Call | Ret | Loop | Loope | Loopne | Jrcxz | Jecxz | Jcxz => continue,
                Popf | Popfd | Popfq => continue,
                _ if code.is_jcc_short_or_near() => continue,
                In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd | Cli | Sti | Ud0 | Ud1
                | Ud2 | Into => &mut table.forbidden,
                _ if info.is_privileged() || info.must_be_cpl0() => &mut table.forbidden,
                _ if has(&[
                    CpuidFeature::BMI1,
                    CpuidFeature::BMI2,
                    CpuidFeature::ADX,
                    CpuidFeature::MOVBE,
                    CpuidFeature::LZCNT,
                    CpuidFeature::CLWB,
                    CpuidFeature::CLFLUSHOPT,
                ]) =>
                {
                    &mut table.late
                }
                _ if info.encoding() == EncodingKind::VEX => &mut table.avx,
                _ if string => &mut table.string,
                Push | Pop | Enter | Leave | Pushf | Pushfd | Pushfq => &mut table.stack,
                _ if has(&[
                    CpuidFeature::FPU,
                    CpuidFeature::FPU287,
                    CpuidFeature::FPU387,
                ]) =>
                {
                    &mut table.x87
                }
                _ if has(&[CpuidFeature::MMX]) => &mut table.mmx,
                _ if has(&[
                    CpuidFeature::SSE,
                    CpuidFeature::SSE2,
                    CpuidFeature::SSE3,
                    CpuidFeature::SSSE3,
                    CpuidFeature::SSE4_1,
                    CpuidFeature::SSE4_2,
                    CpuidFeature::AES,
                    CpuidFeature::PCLMULQDQ,
                    CpuidFeature::SHA,
                    CpuidFeature::GFNI,
                    CpuidFeature::FXSR,
                ]) =>
                {
                    &mut table.sse
                }
                _ => &mut table.integer,
            };
            group.push(code);
        }
        table
    }
}

/// True if the pinned CPUID (engine_core::cpuid) has what `code` needs.
pub(crate) fn announced(code: Code) -> bool {
    use CpuidFeature::*;
    code.cpuid_features().iter().all(|feature| {
        let (leaf, register, bit) = match feature {
            INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CMOV | FPU | FPU287
            | FPU387 | MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | POPCNT | CX8
            | CMPXCHG16B | CLFSH | FXSR | MSR | PAUSE | MULTIBYTENOP | PREFETCHW => return true,
            PCLMULQDQ => (1, 2, 1),
            FMA => (1, 2, 12),
            MOVBE => (1, 2, 22),
            AES => (1, 2, 25),
            AVX => (1, 2, 28),
            F16C => (1, 2, 29),
            BMI1 => (7, 1, 3),
            AVX2 => (7, 1, 5),
            BMI2 => (7, 1, 8),
            ADX => (7, 1, 19),
            CLFLUSHOPT => (7, 1, 23),
            CLWB => (7, 1, 24),
            SHA => (7, 1, 29),
            GFNI => (7, 2, 8),
            VAES => (7, 2, 9),
            VPCLMULQDQ => (7, 2, 10),
            LZCNT => (0x8000_0001, 2, 5),
            _ => return false,
        };
        engine_core::cpuid::pinned(leaf, 0)[register] >> bit & 1 == 1
    })
}

/// False for what reads descriptor tables, counters, CPUID or the address of the last x87
/// instruction, changes segments, or asks the operating system. maskmovq and maskmovdqu are a
/// family of their own: which of their bytes a fault names differs between processors.
fn comparable(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    !matches!(
        mnemonic,
        Cpuid
            | Rdtsc
            | Rdtscp
            | Rdpmc
            | Syscall
            | Sysret
            | Sysretq
            | Sysenter
            | Sysexit
            | Sysexitq
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lar
            | Lsl
            | Verr
            | Verw
            | Lss
            | Lfs
            | Lgs
            | Fnsave
            | Fnstenv
            | Fxsave
            | Fxsave64
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Int
            | Int1
            | Int3
            | Xgetbv
            | Xsetbv
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Rsm
            | Swapgs
    )
}

/// True if a decoded instruction may stand in a sequence.
pub(crate) fn acceptable(instr: &Instruction) -> bool {
    let code = instr.code();
    let info = code.op_code();
    let loads_segment = (0..instr.op_count()).any(|operand| {
        instr.op_kind(operand) == OpKind::Register
            && instr.op_register(operand).is_segment_register()
    }) && !matches!(
        code,
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
    ) && !matches!(instr.mnemonic(), Mnemonic::Push);
    !instr.is_invalid()
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && announced(code)
        && comparable(instr.mnemonic())
        && !matches!(
            instr.mnemonic(),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
        )
        && !loads_segment
        // The host's FS is its thread pointer.
        && instr.segment_prefix() != Register::FS
        && !instr.is_ip_rel_memory_operand()
        && !(0..instr.op_count()).any(|operand| {
            matches!(
                instr.op_kind(operand),
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
            )
        })
        && !matches!(
            instr.code(),
            Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Call_m1616
                | Code::Call_m1632 | Code::Call_m1664
        )
}
