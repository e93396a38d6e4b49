//! The host's CPU as the oracle: random ring-3 sequences run natively and translated, and end in
//! the same registers, flags, FPU and SSE state, memory and exception.
//!
//! | module | what |
//! |---|---|
//! | `table`, `operands`, `families`, `generate` | sequences from seeds |
//! | `sequence`, `flags` | their encoding, and what their flags are worth |
//! | `layout`, `prologue` | the pages and states that both sides share |
//! | `native`, `translated`, `sides` | the two sides, and both |
//! | `case`, `process` | one case through `bt::insn` and in a process of its own |
//! | `snippets`, `snippets_of_state`, `forms`, `raw` | cases: by hand, one of every form, any bytes |
//! | `compatible` | any bytes as 32-bit code |
//! | `programs` | loops, calls and branches of every kind |
//! | `changing` | programs that write over their own code, in both modes |
//! | `elements` | gathers, masked moves and stores that fault |
//! | `compare` | differences |
//!
//! `TRAPLINE_ORACLE_INSTRUCTIONS` says how many instructions to compare (default 1,000,000),
//! `TRAPLINE_ORACLE_SEED` where to start. A failure names the seed of its sequence, which is
//! shrunk before it is shown: instructions go as long as a difference stays. Tests that are built with
//! `TRAPLINE_ORACLE_DATA` (hexadecimal, a page) have their data there: above 2 GiB, across the end of the
//! window, near the end of what is canonical.
//!
//! Not compared: flags that the manual leaves undefined; flags that are dead at a fault; the last
//! x87 instruction's address; sequences that make system calls.

mod case;
mod changing;
mod compare;
mod compatible;
mod elements;
mod families;
mod flags;
mod forms;
mod generate;
mod layout;
mod native;
mod operands;
mod process;
mod programs;
mod prologue;
mod random;
mod raw;
mod sequence;
mod sides;
mod snippets;
mod snippets_of_state;
mod stack;
mod table;
mod translated;

use std::fmt::Write;
use std::time::Instant;

use flags::Flags;
use iced_x86::{Formatter, NasmFormatter};
use layout::{DATA_BYTES, End, GPR, SLOTS};
use native::Lost;
use random::Random;
use sequence::{Placed, Sequence};
use sides::Sides;

const DEFAULT_INSTRUCTIONS: u64 = 1_000_000;
const DEFAULT_SEED: u64 = 1;
/// Differences shown before the test gives up.
const SHOWN: usize = 12;

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_sequences_end_as_on_the_host() {
    let wanted = environment("TRAPLINE_ORACLE_INSTRUCTIONS", DEFAULT_INSTRUCTIONS);
    let mut bench = Bench::new();
    let mut seed = environment("TRAPLINE_ORACLE_SEED", DEFAULT_SEED) * 1_000_000_000;
    let begun = Instant::now();
    let mut failures: Vec<String> = Vec::new();
    let mut told = 0;
    while bench.instructions < wanted && failures.len() < SHOWN {
        failures.extend(bench.batch(&mut seed));
        if bench.instructions - told >= 1_000_000 {
            told = bench.instructions;
            eprintln!("{}", bench.summary(begun));
        }
    }
    eprintln!("{}", bench.summary(begun));
    // Fewer operands reach what lies beyond displacements.
    assert!(
        bench.sides.rejected < bench.sequences || layout::DATA >> 31 != 0,
        "most sequences were thrown away: the generator is broken"
    );
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// Both sides and what was counted.
struct Bench {
    sides: Sides,
    sequences: u64,
    instructions: u64,
}

struct Job {
    seed: u64,
    sequence: Sequence,
    placed: Placed,
    flags: Flags,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            sides: Sides::new(),
            sequences: 0,
            instructions: 0,
        }
    }

    fn summary(&self, begun: Instant) -> String {
        let seconds = begun.elapsed().as_secs_f64();
        format!(
            "{} instructions in {} sequences compared in {seconds:.1} s ({:.2} million a minute); {}",
            self.instructions,
            self.sequences,
            self.instructions as f64 / seconds * 60.0 / 1e6,
            self.sides.ends(),
        )
    }

    /// Generates, runs and compares one batch from `seed` on.
    fn batch(&mut self, seed: &mut u64) -> Vec<String> {
        let template = template(*seed);
        let mut jobs = Vec::with_capacity(SLOTS);
        while jobs.len() < SLOTS {
            *seed += 1;
            let sequence = generate::sequence(&self.sides.table, *seed);
            match prepare(&sequence, jobs.len()) {
                Some((placed, flags)) => jobs.push(Job {
                    seed: *seed,
                    sequence,
                    placed,
                    flags,
                }),
                None => self.sides.rejected += 1,
            }
        }
        let inputs: Vec<_> = jobs
            .iter()
            .map(|job| (job.placed.bytes.clone(), job.placed.start.clone()))
            .collect();
        self.sides.native.start(&template, &inputs);
        self.sides.batches += 1;
        self.sides.reset();
        // All at once, as on the other side: code may read its neighbours.
        for (index, job) in jobs.iter().enumerate() {
            self.sides.translated.load_code(index, &job.placed.bytes);
        }
        let mut ends = Vec::with_capacity(jobs.len());
        for job in &jobs {
            ends.push(self.both_runs(&job.placed, &template));
        }
        let lost = self.sides.native.finish().err();
        let mut failures = Vec::new();
        for (index, (job, end)) in jobs.iter().zip(&ends).enumerate() {
            let Some(native) = self.sides.native_end(index, lost.as_ref()) else {
                continue;
            };
            self.count(job, &native);
            let found = verdict(&job.placed, &job.flags, &native, end);
            if !found.is_empty() {
                failures.push((job.seed, job.sequence.clone(), found));
            }
        }
        match lost {
            Some(Lost::Died(at)) => {
                panic!(
                    "the native side died at seed {}: {}",
                    jobs[at].seed,
                    list(&jobs[at].placed)
                )
            }
            // The rest of the batch is skipped: a loop without an end compares nothing.
            Some(Lost::Endless(at)) => {
                eprintln!("seed {} does not end on the host", jobs[at].seed);
            }
            None => {}
        }
        failures
            .into_iter()
            .take(SHOWN)
            .map(|(seed, sequence, found)| self.report(seed, sequence, &found, &template))
            .collect()
    }

    fn count(&mut self, job: &Job, native: &End) {
        let code = &job.placed.code;
        let reached = code
            .iter()
            .position(|instr| instr.ip() == native.rip)
            .map_or(code.len(), |at| at + 1);
        self.sequences += 1;
        self.instructions += reached as u64;
    }

    /// Cold, then with the blocks of the first run in place: the ends must not differ.
    fn both_runs(
        &mut self,
        placed: &Placed,
        template: &[u8; DATA_BYTES],
    ) -> [Result<End, String>; 2] {
        let Sides {
            watch, translated, ..
        } = &mut self.sides;
        watch.start(translated.kick_handle());
        let cold = translated.run(&placed.start, template);
        let warm = translated.run(&placed.start, template);
        watch.stop();
        [cold, warm]
    }

    /// Differences of one sequence, run alone.
    fn alone(&mut self, sequence: &Sequence, template: &[u8; DATA_BYTES]) -> Option<Alone> {
        let (placed, flags) = prepare(sequence, 0)?;
        let input = (placed.bytes.clone(), placed.start.clone());
        self.sides.native.start(template, &[input]);
        let native = self.sides.finish_alone(0)?;
        self.sides.reset();
        self.sides.translated.load_code(0, &placed.bytes);
        let ends = self.both_runs(&placed, template);
        let text = verdict(&placed, &flags, &native, &ends);
        Some(Alone {
            placed,
            native,
            text,
        })
    }

    /// Shrinks a failing sequence and describes it; `found` is how it failed in its batch.
    fn report(
        &mut self,
        seed: u64,
        sequence: Sequence,
        found: &str,
        template: &[u8; DATA_BYTES],
    ) -> String {
        let fails = |bench: &mut Bench, sequence: &Sequence| {
            bench
                .alone(sequence, template)
                .is_some_and(|alone| !alone.text.is_empty())
        };
        let mut sequence = sequence;
        if !fails(self, &sequence) {
            let code = prepare(&sequence, 0).map_or(String::new(), |(placed, _)| list(&placed));
            return format!("seed {seed}: differs in its batch, not alone\n{code}{found}");
        }
        let mut changed = true;
        while changed {
            changed = false;
            let mut at = sequence.items.len();
            while at > 0 {
                at -= 1;
                let shorter = sequence.without(at);
                if fails(self, &shorter) {
                    sequence = shorter;
                    changed = true;
                }
            }
        }
        let Some(Alone {
            placed,
            native,
            text,
        }) = self.alone(&sequence, template)
        else {
            return format!("seed {seed}: no longer runs\n");
        };
        let mut report = format!("seed {seed}:\n{}", list(&placed));
        let _ = writeln!(
            report,
            "  ends natively in vector {} error {:#x} cr2 {:#x} rip {:#x}",
            native.vector, native.error, native.cr2, native.rip
        );
        for (name, value) in GPR.iter().zip(placed.start.gpr) {
            let _ = write!(report, "  {name}={value:x}");
        }
        let _ = writeln!(report, "  rflags={:x}", placed.start.rflags);
        report.push_str(&text);
        report
    }
}

struct Alone {
    placed: Placed,
    native: End,
    text: String,
}

fn prepare(sequence: &Sequence, index: usize) -> Option<(Placed, Flags)> {
    let placed = sequence.place(index)?;
    let flags = flags::follow(&placed.code)?;
    Some((placed, flags))
}

/// Runs of the same code, one after the other.
const RUNS: [&str; 3] = ["cold", "warm", "hot"];

fn verdict(placed: &Placed, flags: &Flags, native: &End, ends: &[Result<End, String>]) -> String {
    let mut text = String::new();
    for (name, end) in RUNS.into_iter().zip(ends) {
        match end {
            Ok(end) => {
                let found = compare::differences(placed, flags, native, end);
                if !found.is_empty() {
                    let _ = write!(text, "  {name}:\n{found}");
                }
            }
            Err(what) => {
                let _ = writeln!(text, "  {name}: {what}");
            }
        }
    }
    text
}

fn list(placed: &Placed) -> String {
    let mut formatter = NasmFormatter::new();
    let mut text = String::new();
    let base = placed.code.first().map_or(0, |instr| instr.ip()) & !0xfff;
    for instr in &placed.code {
        let mut line = String::new();
        formatter.format(instr, &mut line);
        let at = (instr.ip() & 0xfff | instr.ip().wrapping_sub(base) & 0x1000) as usize;
        let slot_offset = (instr.ip() - layout::CODE) as usize % layout::SLOT_STRIDE as usize;
        let bytes: String = placed.bytes[slot_offset..slot_offset + instr.len()]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let _ = at;
        let _ = writeln!(text, "  {:x}  {bytes:24} {line}", instr.ip());
    }
    text
}

fn template(seed: u64) -> [u8; DATA_BYTES] {
    let mut random = Random::new(seed ^ 0xda7a);
    let mut data = [0; DATA_BYTES];
    random.fill(&mut data);
    data
}
