//! Differences between two ends of one sequence, and what of them is allowed.

use std::fmt::Write;

use crate::flags::Flags;
use crate::layout::{
    COMPARED_FLAGS, DATA, DATA_BYTES, DATA_PAGES, End, GPR, OUTCOME_ENDED, PAGE,
};
use crate::sequence::Placed;

/// The end of user addresses under Linux: beyond it the kernel reports every page fault of ring 3
/// as one on a present page (arch/x86/mm/fault.c, set_signal_archinfo).
const USER_END: u64 = (1 << 47) - PAGE;

/// What differs, one line each; empty if nothing that matters does.
pub(crate) fn differences(placed: &Placed, flags: &Flags, native: &End, translated: &End) -> String {
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
    line("vector", native.vector, translated.vector);
    if native.vector == translated.vector {
        match native.vector {
            14 => {
                line("cr2", native.cr2, translated.cr2);
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
    let at = placed
        .code
        .iter()
        .position(|instr| instr.ip() == native.rip);
    let unknown = at.map_or(0, |at| {
        let fault = !matches!(native.vector, 1 | 3 | 4);
        flags.undefined[at] | if fault { flags.dead[at] } else { 0 }
    });
    let mask = COMPARED_FLAGS & !unknown;
    line("rflags", native.rflags & mask, translated.rflags & mask);
    fx(&native.fx, &translated.fx, &mut line);
    let pages = DATA_BYTES / 8;
    for word in 0..pages {
        let read = |end: &End| {
            u64::from_le_bytes(end.memory[word * 8..word * 8 + 8].try_into().expect("8 bytes"))
        };
        let page = DATA_PAGES[word * 8 / PAGE as usize].0;
        let address = DATA + page * PAGE + (word as u64 * 8 & (PAGE - 1));
        line(&format!("{address:x}"), read(native), read(translated));
    }
    text
}

/// FPU images, without the address and opcode of the last x87 instruction: those are the host's.
fn fx(native: &[u8; 512], translated: &[u8; 512], line: &mut impl FnMut(&str, u64, u64)) {
    let field = |image: &[u8; 512], at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&image[at..at + bytes]);
        u64::from_le_bytes(word)
    };
    let mut compare = |name: &str, at: usize, bytes: usize| {
        line(name, field(native, at, bytes), field(translated, at, bytes));
    };
    compare("fcw", 0, 2);
    compare("fsw", 2, 2);
    compare("ftw", 4, 1);
    compare("mxcsr", 24, 4);
    for register in 0..8 {
        compare(&format!("st{register}"), 32 + 16 * register, 8);
        compare(&format!("st{register}.e"), 40 + 16 * register, 2);
    }
    for register in 0..16 {
        compare(&format!("xmm{register}"), 160 + 16 * register, 8);
        compare(&format!("xmm{register}.h"), 168 + 16 * register, 8);
    }
}
