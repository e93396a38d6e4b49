//! Which flags mean anything where: forward, those that the manual leaves undefined; backward,
//! those that nobody reads any more.
//!
//! Undefined flags must not be read by a sequence, or its results would be undefined too. Dead
//! flags (overwritten on every path before anything reads them) may hold scratch in the frame of
//! a fault: the one imprecision that the engine documents (see its module `lower`).

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

const ALL: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Flags at each instruction of a sequence.
pub(crate) struct Flags {
    /// RFLAGS bits that are undefined before it.
    pub(crate) undefined: Vec<u64>,
    /// RFLAGS bits that are dead before it.
    pub(crate) dead: Vec<u64>,
    /// RFLAGS bits that are undefined after the last.
    pub(crate) undefined_at_end: u64,
}

/// RFLAGS bits of iced's numbering.
fn rflags(bits: u32) -> u64 {
    [
        (RflagsBits::OF, 11),
        (RflagsBits::SF, 7),
        (RflagsBits::ZF, 6),
        (RflagsBits::AF, 4),
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .map(|(_, position)| 1 << position)
    .sum()
}

/// True if a count that isn't known decides what happens to the flags.
fn conditional(instr: &Instruction) -> bool {
    use Mnemonic::*;
    match instr.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            !(1..instr.op_count()).any(|operand| instr.op_kind(operand) == OpKind::Immediate8)
        }
        _ => instr.is_string_instruction() && (instr.has_rep_prefix() || instr.has_repne_prefix()),
    }
}

/// Flags whose value after `instr` says nothing, given those before it.
fn undefined_after(instr: &Instruction, before: u32) -> u32 {
    use Mnemonic::*;
    let defined = instr.rflags_written() | instr.rflags_cleared() | instr.rflags_set();
    let mut undefined = instr.rflags_undefined() & ALL;
    match instr.mnemonic() {
        // OF is defined for counts of 1 alone, AF never, CF not for counts beyond the operand
        // (SDM 2B, SAL/SAR/SHL/SHR and RCL/RCR/ROL/ROR).
        Shl | Sal | Shr | Sar | Shld | Shrd => {
            let narrow = instr.op0_register().size() <= 2
                || instr.op0_kind() == OpKind::Memory && instr.memory_size().size() <= 2;
            undefined |= RflagsBits::OF | RflagsBits::AF;
            if narrow {
                undefined |= RflagsBits::CF;
            }
            if matches!(instr.mnemonic(), Shld | Shrd) && narrow {
                undefined |= ALL;
            }
        }
        Rol | Ror | Rcl | Rcr => undefined |= RflagsBits::OF,
        _ => {}
    }
    if conditional(instr) {
        before | undefined
    } else {
        before & !defined & !(instr.rflags_undefined() & ALL) | undefined
    }
}

/// Flags that `instr` certainly leaves in a new state.
fn overwritten(instr: &Instruction) -> u32 {
    if conditional(instr) {
        0
    } else {
        instr.rflags_modified() & ALL
    }
}

/// Numbers of the instructions that may follow number `at`; None if that is not known.
pub(crate) fn successors(code: &[Instruction], at: usize) -> Option<Vec<usize>> {
    let instr = &code[at];
    let find = |ip: u64| code.binary_search_by_key(&ip, Instruction::ip).ok();
    let next = find(instr.next_ip());
    match instr.flow_control() {
        FlowControl::Next => Some(next.into_iter().collect()),
        FlowControl::ConditionalBranch => {
            let target = find(instr.near_branch_target());
            Some(next.into_iter().chain(target).collect())
        }
        FlowControl::UnconditionalBranch | FlowControl::Call => {
            Some(find(instr.near_branch_target()).into_iter().collect())
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return => None,
        FlowControl::Interrupt | FlowControl::Exception | FlowControl::XbeginXabortXend => {
            Some(next.into_iter().collect())
        }
    }
}

/// Follows the flags through `code`; None if it reads or branches away with undefined ones.
pub(crate) fn follow(code: &[Instruction]) -> Option<Flags> {
    let next: Vec<_> = (0..code.len()).map(|at| successors(code, at)).collect();
    follow_along(code, &next).ok()
}

/// Likewise, where the successors of each instruction are known, or None: anywhere.
///
/// # Errors
/// The numbers of those that read undefined flags, or branch anywhere with some.
pub(crate) fn follow_along(
    code: &[Instruction],
    next: &[Option<Vec<usize>>],
) -> Result<Flags, Vec<usize>> {
    let mut undefined = vec![0; code.len()];
    loop {
        let mut changed = false;
        for (at, instr) in code.iter().enumerate() {
            let after = undefined_after(instr, undefined[at]);
            for &next in next[at].iter().flatten() {
                changed |= after & !undefined[next] != 0;
                undefined[next] |= after;
            }
        }
        if !changed {
            break;
        }
    }
    let reads = |instr: &Instruction| instr.rflags_read() & ALL;
    let wrong = |at: usize| {
        // Anywhere: only with every flag defined.
        let anywhere = next[at].is_none() && undefined_after(&code[at], undefined[at]) != 0;
        anywhere || reads(&code[at]) & undefined[at] != 0
    };
    let wrong: Vec<usize> = (0..code.len()).filter(|&at| wrong(at)).collect();
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let end = code.last().map_or(0, |instr| instr.next_ip());
    let undefined_at_end = code
        .iter()
        .zip(&undefined)
        .filter(|(instr, _)| instr.next_ip() == end || instr.near_branch_target() == end)
        .fold(0, |all, (instr, &undefined)| {
            all | undefined_after(instr, undefined)
        });
    // Backward: everything lives at the end and where nothing is known.
    let mut live = vec![0; code.len()];
    loop {
        let mut changed = false;
        for (at, instr) in code.iter().enumerate().rev() {
            let after = match &next[at] {
                // The engine may know the caller: dead is what is dead for one of them.
                Some(next) if instr.flow_control() == FlowControl::Return && !next.is_empty() => {
                    next.iter().fold(ALL, |all, &next| all & live[next])
                }
                Some(next) if !next.is_empty() => {
                    next.iter().fold(0, |all, &next| all | live[next])
                }
                Some(_) | None => ALL,
            };
            let before = after & !overwritten(instr) | reads(instr);
            changed |= before & !live[at] != 0;
            live[at] |= before;
        }
        if !changed {
            break;
        }
    }
    Ok(Flags {
        undefined: undefined.into_iter().map(rflags).collect(),
        undefined_at_end: rflags(undefined_at_end),
        dead: live.into_iter().map(|live| rflags(ALL & !live)).collect(),
    })
}
