//! Differences between two ends of one sequence, and what of them is allowed.

use std::fmt::Write;

use iced_x86::{Code, CpuidFeature, Instruction, OpKind};

use crate::flags::Flags;
use crate::layout::{
    COMPARED_FLAGS, DATA_BYTES, DATA_PAGES, End, FX_AVX, GPR, NOTE_RIP, NOTE_VECTOR, Note,
    OUTCOME_ENDED, PAGE, avx, data_page, in_code,
};
use crate::sequence::Placed;

/// The end of user addresses under Linux: beyond it the kernel reports every page fault of ring 3
/// as one on a present page (arch/x86/mm/fault.c, set_signal_archinfo).
const USER_END: u64 = (1 << 47) - PAGE;

/// What processors are known to do differently from each other in an instruction that faults.
#[derive(Clone, Copy, Default)]
struct Latitude {
    /// Which byte of a long operand the fault names, and what of it was stored before.
    operand: bool,
    /// Whether the x87 stack has become MMX state.
    x87: bool,
    /// Which byte of the page a masked store's fault names.
    byte: bool,
    /// Whether a conversion has raised its flags before its store faults.
    raised: bool,
}

fn latitude(instr: &Instruction) -> Latitude {
    use iced_x86::Mnemonic::*;
    let long = instr.memory_size().size() > 16
        || matches!(
            instr.mnemonic(),
            Fxrstor | Fxrstor64 | Fldenv | Fbld | Fbstp
        )
        || matches!(instr.code(), Code::Fld_m80fp | Code::Fstp_m80fp);
    Latitude {
        operand: long,
        x87: long || mmx(instr),
        byte: matches!(
            instr.mnemonic(),
            Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq
        ),
        raised: instr.mnemonic() == Vcvtps2ph,
    }
}

fn mmx(instr: &Instruction) -> bool {
    (0..instr.op_count()).any(|operand| {
        instr.op_kind(operand) == OpKind::Register && instr.op_register(operand).is_mm()
    })
}

/// True for x87 and MMX instructions with a memory operand.
fn may_raise_x87(instr: &Instruction) -> bool {
    let features = instr.cpuid_features();
    let x87 = [
        CpuidFeature::FPU,
        CpuidFeature::FPU287,
        CpuidFeature::FPU387,
    ];
    (features.iter().any(|feature| x87.contains(feature)) || mmx(instr))
        && instr.memory_size().size() != 0
}

/// What differs, one line each; empty if nothing that matters does.
pub(crate) fn differences(
    placed: &Placed,
    flags: &Flags,
    native: &End,
    translated: &End,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, native: u64, translated: u64| {
        if native != translated {
            let _ = writeln!(
                text,
                "  {name:10} native {native:#018x}  translated {translated:#018x}"
            );
        }
    };
    assert_eq!(native.outcome, OUTCOME_ENDED);
    let find = |end: &End| placed.code.iter().position(|instr| instr.ip() == end.rip);
    // Pending and unmasked x87 exceptions come before faults of the operand, and a store that
    // raises one stores nothing; here the operand comes first.
    if (native.vector, native.rip) != (translated.vector, translated.rip)
        && matches!(translated.vector, 12..=14)
        && find(translated).is_some_and(|at| may_raise_x87(&placed.code[at]))
    {
        return text;
    }
    // Likewise a conversion's SIMD exception, which here comes after its store's page fault.
    if (native.vector, translated.vector) == (19, 14)
        && native.rip == translated.rip
        && find(native).is_some_and(|at| latitude(&placed.code[at]).raised)
    {
        return text;
    }
    let at = find(native);
    let mut free = at.map_or(Latitude::default(), |at| latitude(&placed.code[at]));
    for (number, (left, right)) in native.notes.iter().zip(&translated.notes).enumerate() {
        let instr = |note: &Note| {
            let mut code = placed.code.iter();
            code.find(|instr| note[NOTE_VECTOR] != 0 && instr.ip() == note[NOTE_RIP])
        };
        // Which exception an instruction raises first, and what it did before, lives on.
        let other = instr(left).map_or(Latitude::default(), latitude);
        if left != right && instr(right).is_some_and(may_raise_x87) {
            return text;
        }
        free.operand |= other.operand;
        free.x87 |= other.x87;
        free.raised |= other.raised;
        for (word, (left, right)) in left.iter().zip(right).enumerate() {
            line(&format!("fault {number}.{word}"), *left, *right);
        }
    }
    line("vector", native.vector, translated.vector);
    if native.vector == translated.vector {
        match native.vector {
            14 => {
                let part = if free.byte { !(PAGE - 1) } else { !0 };
                if !free.operand {
                    line("cr2", native.cr2 & part, translated.cr2 & part);
                }
                let mask = if native.cr2 >= USER_END { !1 } else { !0 };
                line("error", native.error & mask, translated.error & mask);
            }
            10..=13 => line("error", native.error, translated.error),
            _ => {}
        }
    }
    line("rip", native.rip, translated.rip);
    for (number, name) in GPR.into_iter().enumerate() {
        line(name, native.gpr[number], translated.gpr[number]);
    }
    let end = placed.code.last().map_or(0, |instr| instr.next_ip());
    let unknown = match at {
        Some(at) => {
            let fault = !matches!(native.vector, 1 | 3 | 4);
            flags.undefined[at] | if fault { flags.dead[at] } else { 0 }
        }
        None if native.rip == end => flags.undefined_at_end,
        // In the middle of an instruction or in another sequence, where a changed return address led: nobody
        // knows what comes from there on.
        None if in_code(native.rip) => COMPARED_FLAGS,
        None => 0,
    };
    let mask = COMPARED_FLAGS & !unknown;
    line("rflags", native.rflags & mask, translated.rflags & mask);
    if !free.x87 {
        x87(&native.fx, &translated.fx, &mut line);
    }
    sse(&native.fx, &translated.fx, !free.raised, &mut line);
    if free.operand {
        return text;
    }
    for word in 0..DATA_BYTES / 8 {
        let at = word * 8;
        let read =
            |end: &End| u64::from_le_bytes(end.memory[at..at + 8].try_into().expect("8 bytes"));
        let page = DATA_PAGES[at / PAGE as usize].0;
        let address = data_page(page) + (at as u64 & (PAGE - 1));
        if read(native) != read(translated) {
            line(&format!("{address:x}"), read(native), read(translated));
        }
    }
    text
}

fn field(image: &[u8], at: usize, bytes: usize) -> u64 {
    let mut word = [0; 8];
    word[..bytes].copy_from_slice(&image[at..at + bytes]);
    u64::from_le_bytes(word)
}

/// x87 and MMX, without the address and opcode of the last x87 instruction: those are the host's.
fn x87(native: &[u8], translated: &[u8], line: &mut impl FnMut(&str, u64, u64)) {
    let mut compare = |name: &str, at: usize, bytes: usize| {
        line(name, field(native, at, bytes), field(translated, at, bytes));
    };
    compare("fcw", 0, 2);
    compare("fsw", 2, 2);
    compare("ftw", 4, 1);
    for register in 0..8 {
        compare(&format!("st{register}"), 32 + 16 * register, 8);
        compare(&format!("st{register}.e"), 40 + 16 * register, 2);
    }
}

fn sse(native: &[u8], translated: &[u8], control: bool, line: &mut impl FnMut(&str, u64, u64)) {
    let mut compare = |name: &str, at: usize, bytes: usize| {
        line(name, field(native, at, bytes), field(translated, at, bytes));
    };
    if control {
        compare("mxcsr", 24, 4);
    }
    for register in 0..16 {
        compare(&format!("xmm{register}"), 160 + 16 * register, 8);
        compare(&format!("xmm{register}.h"), 168 + 16 * register, 8);
    }
    if avx() {
        for register in 0..16 {
            let at = FX_AVX + 16 * register;
            compare(&format!("ymm{register}.2"), at, 8);
            compare(&format!("ymm{register}.3"), at + 8, 8);
        }
    }
}
