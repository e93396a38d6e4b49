//! Random programs that change their own code, in 64-bit and in 32-bit mode.
//!
//! A program has sites of a few instructions: in the middle of its loop, in inner loops, as functions. It
//! writes other instructions over them, by every kind of store, or changes operands in place, just before they are
//! run, while they are hot, or from another page, and counts in words between its functions. The host's CPU
//! runs it natively from pages that are writable and executable; through the software TLB and through
//! the window it has to end with the same registers and the same memory, code included.
//!
//! All of them end: what counts a loop is out of reach of the sites, and functions call those with higher
//! numbers alone.
//!
//! | module | what |
//! |---|---|
//! | `emit` | machine code with labels |
//! | `sites`, `patch` | what is written over, and how |
//! | `flow` | a program around them |
//!
//! `TRAPLINE_ORACLE_CHANGING` says how many programs of each mode to compare (default 100), `TRAPLINE_ORACLE_SEED`
//! where to start.

mod emit;
mod flow;
mod patch;
mod sites;

use std::{fmt::Write, time::Duration};

use bt::insn::Case;
use emit::{EBP, Emitter};
use iced_x86::{Decoder, DecoderOptions};

use crate::case::{CODE, Comparison, Liberty};
use crate::layout::PAGE;

const PROGRAMS: u64 = 100;
/// Alternatives of a site.
const ALTERNATIVES: usize = 4;

/// Data: where EBP points to the middle of a page; tables of alternatives; pointers to functions; the stack.
const DATA: u64 = 0x2000_0000;
const DATA_BYTES: u64 = 3 * PAGE;
const FRAME: u64 = DATA + 0x800;
const TABLES: u64 = DATA + 0x1000;
const POINTERS: u64 = DATA + 0x1f00;
const STACK: u64 = DATA + 0x2f00;
/// Where 64-bit code jumps through to 32-bit code.
const FAR: u64 = DATA + 0xff0;
/// From EBP: the values that sites compute with, the loop's counter, and registers while they are used otherwise.
const VALUES: u8 = 0;
const COUNTED: i8 = 0x40;
const KEPT: i8 = 0x50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Long,
    /// 32-bit code in compatibility mode.
    Compatible,
}

/// Where the turns of the outer loop that are left are.
#[derive(Clone, Copy, Debug)]
enum Counter {
    Memory,
    R15,
}

impl Counter {
    fn load(self, emitter: &mut Emitter, register: u8) {
        match self {
            Counter::Memory => emitter.memory(&[0x8b], register, EBP, COUNTED),
            Counter::R15 => emitter.bytes(&[0x44, 0x89, 0xf8 | register]),
        }
    }
}

/// A locked access across cache lines has Linux put the thread to sleep (`split_lock_mitigate`): for 10 ms, or
/// for seconds where others want the processor.
const LIMIT: Duration = Duration::from_secs(120);

/// Both ways of translated accesses, beside the host.
type Ways = Vec<(&'static str, Comparison)>;

fn ways() -> Ways {
    let mut table = Comparison::lasting(LIMIT);
    table.bench.vcpu_for_tests().refuse_window();
    let mut window = Comparison::lasting(LIMIT);
    let held = window.bench.vcpu_for_tests().hold_window().is_some();
    let both = [("software TLB", table), ("window", window)];
    both.into_iter().take(1 + usize::from(held)).collect()
}

/// What differs.
fn differences(ways: &mut Ways, case: &Case) -> String {
    // AF is undefined after logic.
    let liberty = Liberty {
        flags: 1 << 4,
        ..Liberty::default()
    };
    let mut text = String::new();
    for (name, comparison) in ways {
        match comparison.differences(case, liberty) {
            Ok(found) if found.is_empty() => {}
            Ok(found) | Err(found) => {
                let _ = writeln!(text, "  {name}:\n{found}");
            }
        }
    }
    text
}

fn compare(mode: Mode) {
    let wanted = crate::environment("TRAPLINE_ORACLE_CHANGING", PROGRAMS);
    let first = crate::environment("TRAPLINE_ORACLE_SEED", 1) * 1_000_000_000;
    let mut ways = ways();
    let mut failures = Vec::new();
    let mut ended = 0;
    for seed in first..first + wanted {
        let program = flow::program(mode, seed);
        let case = program.case(&[]);
        let found = differences(&mut ways, &case);
        let (_, Comparison { bench, .. }) = &mut ways[0];
        ended += u64::from(
            bench
                .run(&case)
                .is_ok_and(|outcome| outcome.end == bt::insn::End::Stop(bt::UserStop::Halt)),
        );
        if !found.is_empty() {
            // What is left of it may not show it again, if it came by chance.
            failures.push(format!("{found}{}", report(&mut ways, &program, seed)));
            if failures.len() == 6 {
                break;
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    assert!(
        ended > wanted * 3 / 4,
        "{ended} of {wanted} get to their ends"
    );
}

/// A failing program without the statements that it fails without.
fn report(ways: &mut Ways, program: &flow::Program, seed: u64) -> String {
    let mut removed = Vec::new();
    let mut changed = true;
    while changed {
        changed = false;
        for number in 0..program.statements() {
            if removed.contains(&number) {
                continue;
            }
            removed.push(number);
            if differences(ways, &program.case(&removed)).is_empty() {
                removed.pop();
            } else {
                changed = true;
            }
        }
    }
    let case = program.case(&removed);
    let found = differences(ways, &case);
    let mut text = format!("seed {seed}:\n");
    let bits = if program.mode == Mode::Long { 64 } else { 32 };
    let begin = program.begin() as usize;
    let code = &case.code[begin..];
    for instr in &mut Decoder::with_ip(bits, code, CODE + begin as u64, DecoderOptions::NONE) {
        let _ = writeln!(text, "  {:x}  {instr}", instr.ip());
    }
    text + &found
}

#[test]
fn programs_that_change_themselves() {
    compare(Mode::Long);
}

#[test]
fn programs_that_change_themselves_in_32_bit_mode() {
    compare(Mode::Compatible);
}
