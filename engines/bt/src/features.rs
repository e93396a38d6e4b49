//! What CPUID, CR0 and CR4 say about an instruction: whether it exists, whether it may be used now,
//! and which alignment it insists on.

use std::sync::OnceLock;

use engine_core::cpuid;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::decode::{Fpu, Raised};

/// What the address of a memory operand has to be a multiple of: 16 for legacy SSE instructions,
/// with exceptions, and the operand's size for AVX moves that say so (SDM 1 12.10.4, 14.9 and the
/// instructions' own pages).
pub(crate) fn alignment(instr: &Instruction) -> u8 {
    use Mnemonic::*;
    let size = instr.memory_size().size();
    match instr.mnemonic() {
        Cmpxchg16b | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => 16,
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => size as u8,
        Movups | Movupd | Movdqu | Lddqu | Maskmovdqu => 1,
        Pcmpestri | Pcmpestrm | Pcmpistri | Pcmpistrm => 1,
        Pcmpestri64 | Pcmpestrm64 => 1,
        _ => {
            let strict = size == 16
                && instr.code().encoding() == EncodingKind::Legacy
                && instr.cpuid_features().iter().any(|feature| {
                    use CpuidFeature::*;
                    matches!(
                        feature,
                        SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA | GFNI
                    )
                });
            if strict { 16 } else { 1 }
        }
    }
}

/// Where the pinned CPUID says that `feature` is there; None if no bit of ours does.
fn bit(feature: CpuidFeature) -> Option<(u32, usize, u32)> {
    use CpuidFeature::*;
    const EBX: usize = 1;
    const ECX: usize = 2;
    Some(match feature {
        PCLMULQDQ => (1, ECX, 1),
        FMA => (1, ECX, 12),
        MOVBE => (1, ECX, 22),
        AES => (1, ECX, 25),
        XSAVE | XSAVEOPT | XSAVEC => (1, ECX, 26),
        AVX => (1, ECX, 28),
        F16C => (1, ECX, 29),
        RDRAND => (1, ECX, 30),
        FSGSBASE => (7, EBX, 0),
        BMI1 => (7, EBX, 3),
        AVX2 => (7, EBX, 5),
        BMI2 => (7, EBX, 8),
        RDSEED => (7, EBX, 18),
        ADX => (7, EBX, 19),
        SMAP => (7, EBX, 20),
        INVPCID => (7, EBX, 10),
        CLFLUSHOPT => (7, EBX, 23),
        CLWB => (7, EBX, 24),
        SHA => (7, EBX, 29),
        GFNI => (7, ECX, 8),
        VAES => (7, ECX, 9),
        VPCLMULQDQ => (7, ECX, 10),
        PKU => (7, ECX, 3),
        RDPID => (7, ECX, 22),
        LZCNT => (0x8000_0001, ECX, 5),
        PREFETCHW => (0x8000_0001, ECX, 8),
        _ => return None,
    })
}

fn always(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        INTEL8086
            | INTEL8086_ONLY
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | CMOV
            | FPU
            | FPU287
            | FPU387
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | POPCNT
            | CX8
            | CMPXCHG16B
            | CLFSH
            | FXSR
            | TSC
            | RDPMC
            | RDTSCP
            | MSR
            | CPUID
            | SYSCALL
            | SEP
            | PAUSE
            | MULTIBYTENOP
    )
}

/// True if `instr` needs the guest's XMM and YMM registers or its MXCSR in the host's: conversions
/// from memory to a general register round by MXCSR and name no vector register.
pub(crate) fn uses_vectors(instr: &Instruction) -> bool {
    use CpuidFeature::*;
    use Mnemonic::*;
    match instr.mnemonic() {
        Mfence | Lfence | Sfence | Movnti | Clflush | Crc32 | Prefetchnta | Prefetcht0
        | Prefetcht1 | Prefetcht2 => return false,
        Fxrstor | Fxrstor64 => return true,
        _ => {}
    }
    instr.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            SSE | SSE2
                | SSE3
                | SSSE3
                | SSE4_1
                | SSE4_2
                | AES
                | PCLMULQDQ
                | SHA
                | GFNI
                | AVX
                | AVX2
                | FMA
                | F16C
                | VAES
                | VPCLMULQDQ
        )
    }) || (0..instr.op_count()).any(|operand| {
        instr.op_kind(operand) == OpKind::Register
            && instr.op_register(operand).is_vector_register()
    })
}

/// True if the guest's CPUID announces everything that `instr` needs.
pub(crate) fn announced(instr: &Instruction) -> bool {
    static ANNOUNCED: OnceLock<Vec<bool>> = OnceLock::new();
    let announced = ANNOUNCED.get_or_init(|| {
        CpuidFeature::values()
            .map(|feature| {
                always(feature)
                    || bit(feature).is_some_and(|(leaf, register, bit)| {
                        cpuid::pinned(leaf, 0)[register] >> bit & 1 == 1
                    })
            })
            .collect()
    });
    // rep bsf and rep bsr execute as their older selves on processors without the feature, which
    // compilers rely on.
    matches!(instr.mnemonic(), Mnemonic::Tzcnt | Mnemonic::Lzcnt)
        || instr
            .cpuid_features()
            .iter()
            .all(|&feature| announced[feature as usize])
}

/// The exception that `instr` raises because of CR0.EM, CR0.TS or CR4.OSFXSR (SDM 3A 2.5 and
/// table 13-1, SDM 2 on each).
pub(crate) fn fpu_fault(instr: &Instruction, fpu: Fpu) -> Option<Raised> {
    use CpuidFeature::*;
    use Mnemonic::*;
    let away = Some(Raised::Unavailable);
    let undefined = Some(Raised::Undefined);
    match instr.mnemonic() {
        Mfence | Lfence | Sfence | Movnti | Clflush | Crc32 => return None,
        Wait => return away.filter(|_| fpu.switched && fpu.monitored),
        // The runtime knows about CR4.OSXSAVE, which comes first.
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
            return None;
        }
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => {
            return away.filter(|_| fpu.switched || fpu.emulated);
        }
        _ => {}
    }
    let has = |wanted: &[CpuidFeature]| {
        let features = instr.cpuid_features();
        features.iter().any(|feature| wanted.contains(feature))
    };
    let legacy = instr.code().encoding() == EncodingKind::Legacy;
    if !legacy && has(&[AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ]) {
        if fpu.avx {
            away.filter(|_| fpu.switched)
        } else {
            undefined
        }
    } else if has(&[FPU, FPU287, FPU387]) {
        away.filter(|_| fpu.switched || fpu.emulated)
    } else if has(&[
        SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2, AES, PCLMULQDQ, SHA, GFNI,
    ]) {
        if fpu.emulated || !fpu.sse {
            undefined
        } else {
            away.filter(|_| fpu.switched)
        }
    } else if has(&[MMX]) {
        if fpu.emulated {
            undefined
        } else {
            away.filter(|_| fpu.switched)
        }
    } else {
        None
    }
}
