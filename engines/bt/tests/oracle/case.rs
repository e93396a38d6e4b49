//! One case for both sides: run through [`bt::insn`] and by the host's CPU, and compared.
//!
//! Not compared: undefined flags, RF and IF, the present bit of page faults beyond user addresses
//! (the kernel sets it), and what the kernel emulates (sgdt and its kin under UMIP).

use std::time::Duration;

use bt::insn::{Bench, Case, End, Outcome};
use bt::{Extended, UserStop};
use iced_x86::{Code, Decoder, Instruction, Mnemonic, RflagsBits};

use crate::SHOWN;
use crate::layout::{FX_AVX, PAGE};
use crate::process::{Ended, MEMORY, Pages, Process};

/// Where a case's code lies.
pub(crate) const CODE: u64 = 0x1_0000;
const USER_END: u64 = (1 << 47) - PAGE;
/// The last page of 4 GiB.
const LAST_32: u64 = u32::MAX as u64 >> 12;
const RDI: usize = 7;

/// What of a difference doesn't matter.
#[derive(Clone, Copy, Default)]
pub(crate) struct Liberty {
    pub(crate) flags: u64,
    /// The address of a page fault, and memory: long operands.
    pub(crate) operand: bool,
    /// Which byte of a page a page fault names.
    pub(crate) byte: bool,
    pub(crate) extended: bool,
    /// Accesses across 4 GiB may raise a limit's exception or not (SDM 3A 5.3).
    pub(crate) wraps: bool,
}

fn stop(ended: &Ended, code: &[u8], load: u64) -> UserStop {
    let at = ended.rip.wrapping_sub(load) as usize;
    let halts = code
        .get(at..)
        .is_some_and(|code| Decoder::new(64, code, 0).decode().mnemonic() == Mnemonic::Hlt);
    if ended.vector == 13 && halts {
        return UserStop::Halt;
    }
    let vector = ended.vector as u8;
    UserStop::Exception {
        vector,
        error: matches!(vector, 8 | 10..=14 | 17 | 21).then_some(ended.error as u32),
        address: (vector == 14).then_some(ended.cr2),
    }
}

/// Both sides of cases, and what differed.
pub(crate) struct Comparison {
    pub(crate) bench: Bench,
    process: Process,
    pub(crate) cases: u64,
    pub(crate) failures: Vec<String>,
}

impl Comparison {
    pub(crate) fn new() -> Comparison {
        Comparison::lasting(Duration::from_secs(2))
    }

    /// As [`new`](Comparison::new), with so much time for each translated case.
    pub(crate) fn lasting(limit: Duration) -> Comparison {
        Comparison {
            bench: Bench::new(limit).expect("a bench"),
            process: Process::new(),
            cases: 0,
            failures: Vec::new(),
        }
    }

    /// Compares a case, which is called `name` should it differ.
    pub(crate) fn compare(&mut self, case: &Case, liberty: Liberty, name: impl FnOnce() -> String) {
        self.cases += 1;
        match self.differences(case, liberty) {
            Ok(text) if text.is_empty() => {}
            Ok(text) | Err(text) => self.failures.push(format!("{}:\n{text}", name())),
        }
    }

    /// True until `wanted` cases were compared, or many differed.
    pub(crate) fn goes_on(&self, wanted: u64) -> bool {
        self.cases < wanted && self.failures.len() < SHOWN
    }

    /// Fails if any case differed, or if fewer than `least` were compared.
    pub(crate) fn end(self, least: u64) {
        eprintln!("{} cases, {} differ", self.cases, self.failures.len());
        assert!(self.cases >= least, "{} cases", self.cases);
        let shown = &self.failures[..self.failures.len().min(SHOWN)];
        assert!(shown.is_empty(), "\n{}", shown.join("\n"));
    }

    /// What differs in one case.
    ///
    /// # Errors
    /// What there was instead of two ends.
    pub(crate) fn differences(&mut self, case: &Case, liberty: Liberty) -> Result<String, String> {
        let whole = |(at, bytes): (u64, u64)| {
            let first = at & !(PAGE - 1);
            (first, (at + bytes).next_multiple_of(PAGE) - first)
        };
        let code_range = whole((case.load, case.code.len() as u64));
        let ranges: Vec<(u64, usize)> = [code_range]
            .into_iter()
            .chain(case.map.iter().copied().map(whole))
            .map(|(at, bytes)| (at, bytes as usize))
            .collect();
        let contents = case.mem.iter().cloned();
        let pages = Pages {
            ranges,
            contents: contents.chain([(case.load, case.code.clone())]).collect(),
        };
        let native = self.process.run(&pages, case.load);
        let outcome = self.bench.run(case).map_err(|error| error.to_string())?;
        let Some(native) = native else {
            return match outcome.end {
                End::Limit => Ok(String::new()),
                End::Stop(stop) => Err(format!("natively no end, translated {stop:?}")),
            };
        };
        Ok(compare(
            &self.bench,
            case,
            &pages,
            &native,
            &outcome,
            liberty,
        ))
    }
}

fn compare(
    bench: &Bench,
    case: &Case,
    pages: &Pages,
    native: &Ended,
    outcome: &Outcome,
    liberty: Liberty,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, native: u64, translated: u64| {
        if native != translated {
            text += &format!("  {name:8} native {native:#x}  translated {translated:#x}\n");
        }
    };
    let expected = stop(native, &case.code, case.load);
    let page = |address| address & !(PAGE - 1);
    let same = match (End::Stop(expected), outcome.end) {
        (
            End::Stop(UserStop::Exception {
                vector: 14,
                error: Some(mut error),
                address,
            }),
            End::Stop(UserStop::Exception {
                vector: 14,
                error: Some(found),
                address: at,
            }),
        ) => {
            if address >= Some(USER_END) {
                error = error & !1 | found & 1;
            }
            error == found
                && (address == at
                    || liberty.operand
                    || liberty.byte && address.map(page) == at.map(page))
        }
        (
            End::Stop(UserStop::Exception {
                vector: 14,
                address: Some(address),
                ..
            }),
            End::Stop(UserStop::Exception {
                vector: 12 | 13, ..
            }),
        ) if liberty.wraps
            && [address, native.gpr[RDI]]
                .map(|at| at >> 12)
                .contains(&LAST_32) =>
        {
            // A copy's destination is looked at before its source faults.
            return text;
        }
        (expected, found) => expected == found,
    };
    if !same {
        return format!("  native {expected:?}  translated {:?}\n", outcome.end);
    }
    line("rip", native.rip, outcome.rip);
    for number in 0..16 {
        let name = crate::layout::GPR[number];
        line(name, native.gpr[number], outcome.gpr[number]);
    }
    // All but RF, IF and the fixed ones.
    let mask = 0x24_4dd5 & !liberty.flags;
    line("rflags", native.rflags & mask, outcome.rflags & mask);
    if !liberty.extended {
        extended(native, &outcome.extended, &mut line);
    }
    if liberty.operand {
        return text;
    }
    let mut from = 0;
    for &(at, bytes) in &pages.ranges {
        let bytes = bytes.min(MEMORY - from);
        let mut found = vec![0; bytes];
        bench.read(at, &mut found).expect("mapped");
        let native = &native.memory[from..from + bytes];
        let pairs = native.chunks_exact(8).zip(found.chunks_exact(8));
        for (index, (left, right)) in pairs.enumerate().filter(|(_, (a, b))| a != b) {
            let word = |bytes: &[u8]| u64::from_le_bytes(std::array::from_fn(|byte| bytes[byte]));
            let name = format!("{:x}", at + 8 * index as u64);
            line(&name, word(left), word(right));
        }
        from += bytes;
    }
    text
}

fn extended(native: &Ended, found: &Extended, line: &mut impl FnMut(&str, u64, u64)) {
    let word = |at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&native.fx[at..at + bytes]);
        u64::from_le_bytes(word)
    };
    line("fcw", word(0, 2), found.fcw.into());
    line("fsw", word(2, 2), found.fsw.into());
    // The frame has the abridged tags.
    let tags = (0..8).filter(|tag| found.ftw >> (2 * tag) & 3 != 3);
    line("ftw", word(4, 1), tags.map(|tag| 1 << tag).sum());
    line("mxcsr", word(24, 4), found.mxcsr.into());
    for register in 0..8 {
        let at = 32 + 16 * register;
        let st = &found.st[register];
        let low = u64::from_le_bytes(std::array::from_fn(|byte| st[byte]));
        let high = u16::from_le_bytes([st[8], st[9]]);
        line(&format!("st{register}"), word(at, 8), low);
        line(&format!("st{register}.e"), word(at + 8, 2), high.into());
    }
    for (register, ymm) in found.ymm.iter().enumerate() {
        let places = [160, 168, FX_AVX, FX_AVX + 8];
        for (part, (place, value)) in places.into_iter().zip(ymm).enumerate() {
            let name = format!("ymm{register}.{part}");
            line(&name, word(place + 16 * register, 8), *value);
        }
    }
}

/// What doesn't matter of `instr`'s result.
pub(crate) fn liberty(instr: &Instruction) -> Liberty {
    use Mnemonic::*;
    let undefined = instr.rflags_undefined();
    let bits = [
        (RflagsBits::OF, 11),
        (RflagsBits::SF, 7),
        (RflagsBits::ZF, 6),
        (RflagsBits::AF, 4),
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
    ];
    let mut liberty = Liberty {
        flags: bits
            .into_iter()
            .filter(|(bit, _)| undefined & bit != 0)
            .map(|(_, at)| 1 << at)
            .sum(),
        // Which byte of a long operand a fault names differs between processors.
        operand: instr.memory_size().size() > 16
            || matches!(
                instr.mnemonic(),
                Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Fldenv | Fbld | Fbstp
            )
            || matches!(instr.code(), Code::Fld_m80fp | Code::Fstp_m80fp),
        ..Liberty::default()
    };
    match instr.mnemonic() {
        // Counts beyond one leave OF undefined, and those beyond the operand all.
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => liberty.flags = 0x8d5,
        // Faulting conversions and MMX accesses may have raised flags or entered MMX mode before.
        Vcvtps2ph => liberty.extended = true,
        _ => {}
    }
    let mmx = (0..instr.op_count()).any(|operand| instr.op_register(operand).is_mm());
    let features = instr.cpuid_features();
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    let x87 = features
        .iter()
        .any(|feature| matches!(feature, FPU | FPU287 | FPU387));
    liberty.extended |= mmx || x87 && liberty.operand;
    liberty
}
