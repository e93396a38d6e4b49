//! Random programs: what optimisations that span blocks may get wrong, and sequences hardly reach.
//!
//! Functions in any order over four pages, with loops, diamonds, switches, calls and returns of every kind,
//! strings and flags words, all of which end by construction: counters are out of reach of the code that they
//! count, stores stay in the data, and calls lead to functions made before, or so deep. Each runs natively
//! once, and several times translated, through the software TLB and through the window, in a large cache of
//! code and in a tight one: cold, and with links and guesses made. Some have parts, and go on with the next one
//! after a fault, whose handler, the kernel's in the guest, notes the registers first.
//!
//! | module | what |
//! |---|---|
//! | `generate`, `plan` | programs from seeds, and their places |
//! | `writer` | what statements keep track of |
//! | `straight`, `access`, `strings` | instructions, on registers and in memory |
//! | `control`, `loops`, `calls` | statements of others |
//!
//! `TRAPLINE_ORACLE_PROGRAMS` says how many programs to compare (default 2,000), `TRAPLINE_ORACLE_SEED` where
//! to start. A failure names its seed and shows the program without the statements that it fails without.

mod access;
mod calls;
mod control;
mod generate;
mod loops;
mod plan;
mod straight;
mod strings;
mod writer;

use std::fmt::Write;
use std::time::Instant;

use plan::{Plan, Prepared};

use crate::layout::{DATA_BYTES, End, GPR, NOTE_RIP, SLOT_BYTES, SLOTS, slot};
use crate::native::Lost;
use crate::sides::Sides;
use crate::{RUNS, SHOWN, environment, list, template, verdict};

const DEFAULT_PROGRAMS: u64 = 2_000;
/// Programs compared at once.
const BATCH: usize = if SLOTS < 128 { SLOTS } else { 128 };

#[test]
fn random_programs_end_as_on_the_host() {
    let wanted = environment("TRAPLINE_ORACLE_PROGRAMS", DEFAULT_PROGRAMS);
    let mut seed = environment("TRAPLINE_ORACLE_SEED", 1) * 1_000_000_000;
    let mut bench = Bench::new();
    let begun = Instant::now();
    let mut failures: Vec<String> = Vec::new();
    let mut told = 0;
    while bench.programs < wanted && failures.len() < SHOWN {
        let count = (wanted - bench.programs).min(BATCH as u64) as usize;
        failures.extend(bench.batch(&mut seed, count));
        if bench.programs - told >= 10_000 {
            told = bench.programs;
            eprintln!("{}", bench.summary(begun));
        }
    }
    eprintln!("{}", bench.summary(begun));
    assert!(
        bench.sides.rejected < bench.programs / 10,
        "many programs were thrown away: the generator is broken"
    );
    // Most get to their ends, past every branch; some fault in the middle.
    let [ended, faulted] = [6, 14].map(|vector| bench.sides.vectors[vector]);
    assert!(
        !failures.is_empty()
            || bench.programs < DEFAULT_PROGRAMS
            || ended > bench.programs / 2
                && faulted > bench.programs / 100
                && bench.resumed > bench.programs / 5,
        "the generator is broken"
    );
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// How a program's accesses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Tlb,
    Window,
}

const WAYS: [Memory; 2] = [Memory::Tlb, Memory::Window];

/// The ends of one program's runs, in each way.
type Ends = Vec<(Memory, Runs)>;
type Runs = Vec<Result<End, String>>;

struct Job {
    seed: u64,
    plan: Plan,
    prepared: Prepared,
}

/// Both sides and what was counted.
struct Bench {
    sides: Sides,
    programs: u64,
    /// Faults that programs went on after.
    resumed: u64,
    most: u64,
    instructions: u64,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            sides: Sides::new(),
            programs: 0,
            resumed: 0,
            most: 0,
            instructions: 0,
        }
    }

    fn summary(&self, begun: Instant) -> String {
        format!(
            "{} programs of {} instructions, which execute {} at most and go on after {} faults, \
             compared in {:.1} s; {}",
            self.programs,
            self.instructions,
            self.most,
            self.resumed,
            begun.elapsed().as_secs_f64(),
            self.sides.ends(),
        )
    }

    /// Generates, runs and compares `count` programs from `seed` on.
    fn batch(&mut self, seed: &mut u64, count: usize) -> Vec<String> {
        let template = template(*seed);
        let mut jobs: Vec<Job> = Vec::with_capacity(count);
        let mut refused = false;
        while jobs.len() < count {
            // Some twice, at addresses that differ in high bits alone: tables of branches go by low ones.
            let from = if jobs.len() % 8 > 5 && !refused {
                jobs[jobs.len() - 2].seed
            } else {
                *seed += 1;
                *seed
            };
            let mut plan = generate::plan(&self.sides.table, from);
            let prepared = plan.prepare(jobs.len());
            refused = prepared.is_none();
            match prepared {
                Some(prepared) => jobs.push(Job {
                    seed: from,
                    plan,
                    prepared,
                }),
                None => self.sides.rejected += 1,
            }
        }
        self.sides.batches += 1;
        let prepared: Vec<&Prepared> = jobs.iter().map(|job| &job.prepared).collect();
        self.start(0, &prepared, &template);
        let ends = self.translated(0, &prepared, &template);
        let lost = self.sides.native.finish().err();
        let mut failures = Vec::new();
        for (index, (job, ends)) in jobs.iter().zip(ends).enumerate() {
            let Some(native) = self.sides.native_end(index, lost.as_ref()) else {
                continue;
            };
            self.programs += 1;
            let notes = native.notes.iter();
            self.resumed += notes.filter(|note| note[NOTE_RIP] != 0).count() as u64;
            self.instructions += job.prepared.placed.code.len() as u64;
            self.most += job.plan.cost;
            let found = differences(&job.prepared, &native, &ends);
            if !found.is_empty() {
                failures.push((index, found));
            }
        }
        if let Some(Lost::Died(at) | Lost::Endless(at)) = lost {
            let Job { seed, prepared, .. } = &jobs[at];
            panic!(
                "seed {seed} has no end on the host:\n{}",
                list(&prepared.placed)
            );
        }
        failures
            .into_iter()
            .take(SHOWN)
            .map(|(index, found)| self.report(&jobs[index], index, &found, &template))
            .collect()
    }

    /// Starts them natively, in slots from number `first` on.
    fn start(&mut self, first: usize, programs: &[&Prepared], template: &[u8; DATA_BYTES]) {
        let inputs = programs
            .iter()
            .map(|program| (program.placed.bytes.clone(), program.placed.start.clone()));
        // Nothing lies in those before.
        let nothing = (0..first).map(|index| {
            let mut start = programs[0].placed.start.clone();
            start.rip = slot(index);
            (vec![0xcc; SLOT_BYTES], start)
        });
        let inputs: Vec<_> = nothing.chain(inputs).collect();
        self.sides.native.start(template, &inputs);
    }

    /// The ends of each program, in each way.
    fn translated(
        &mut self,
        first: usize,
        programs: &[&Prepared],
        template: &[u8; DATA_BYTES],
    ) -> Vec<Ends> {
        let mut ends: Vec<_> = programs.iter().map(|_| Vec::new()).collect();
        for way in WAYS {
            self.sides.reset();
            let Sides {
                watch, translated, ..
            } = &mut self.sides;
            match way {
                Memory::Tlb => translated.refuse_window(),
                Memory::Window if translated.hold_window() => {}
                Memory::Window => continue,
            }
            for (index, program) in programs.iter().enumerate() {
                translated.load_code(first + index, &program.placed.bytes);
            }
            for (program, ends) in programs.iter().zip(&mut ends) {
                watch.start(translated.kick_handle());
                let start = &program.placed.start;
                let runs = RUNS.iter().map(|_| translated.run(start, template));
                ends.push((way, runs.collect()));
                watch.stop();
            }
        }
        ends
    }

    /// One program run alone: how it ends natively, and the differences.
    fn alone(
        &mut self,
        plan: &mut Plan,
        index: usize,
        template: &[u8; DATA_BYTES],
    ) -> Option<(Prepared, End, String)> {
        let prepared = plan.prepare(index)?;
        self.start(index, &[&prepared], template);
        let native = self.sides.finish_alone(index)?;
        let ends = self.translated(index, &[&prepared], template).remove(0);
        let found = differences(&prepared, &native, &ends);
        Some((prepared, native, found))
    }

    /// Shrinks a failing program and describes it; `found` is how it failed in its batch.
    fn report(
        &mut self,
        job: &Job,
        index: usize,
        found: &str,
        template: &[u8; DATA_BYTES],
    ) -> String {
        let seed = job.seed;
        let whole = &job.plan;
        let mut removed = vec![false; whole.units.len()];
        let fails = |bench: &mut Bench, removed: &[bool]| {
            let alone = bench.alone(&mut whole.without(removed), index, template);
            alone.is_some_and(|(_, _, found)| !found.is_empty())
        };
        if !fails(self, &removed) {
            let code = list(&job.prepared.placed);
            let end = describe(&self.sides.native.end(index).clone());
            return format!("seed {seed}: differs in its batch, not alone\n{code}{end}{found}");
        }
        let mut order: Vec<usize> = (0..removed.len()).collect();
        order.sort_by_key(|&unit| std::cmp::Reverse(whole.units[unit].len()));
        let mut changed = true;
        while changed {
            changed = false;
            for &unit in &order {
                let of = &whole.units[unit];
                let outer =
                    whole.units.iter().zip(&removed).any(|(other, gone)| {
                        *gone && other.start <= of.start && of.end <= other.end
                    });
                if outer {
                    continue;
                }
                removed[unit] = true;
                if fails(self, &removed) {
                    changed = true;
                } else {
                    removed[unit] = false;
                }
            }
        }
        let Some((prepared, native, found)) =
            self.alone(&mut whole.without(&removed), index, template)
        else {
            return format!("seed {seed}: no longer runs\n");
        };
        let mut report = format!("seed {seed}:\n{}", list(&prepared.placed));
        report += &describe(&native);
        for (name, value) in GPR.iter().zip(prepared.placed.start.gpr) {
            let _ = write!(report, "  {name}={value:x}");
        }
        let _ = writeln!(report, "  rflags={:x}", prepared.placed.start.rflags);
        report.push_str(&found);
        report
    }
}

fn differences(prepared: &Prepared, native: &End, ends: &[(Memory, Runs)]) -> String {
    let mut text = String::new();
    for (way, ends) in ends {
        let found = verdict(&prepared.placed, &prepared.flags, native, ends);
        if !found.is_empty() {
            let _ = write!(text, "  {way:?}:\n{found}");
        }
    }
    text
}

fn describe(native: &End) -> String {
    format!(
        "  ends natively in vector {} error {:#x} cr2 {:#x} rip {:#x} rflags {:#x}\n",
        native.vector, native.error, native.cr2, native.rip, native.rflags
    )
}
