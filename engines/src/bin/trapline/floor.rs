//! `trapline floor`: the host's own operations on order, over the console protocol.
//!
//! Stdin and stdout are the console, as in a run. Answers `run FLOOR SIZE ITERATIONS` with `begin`,
//! `end` and `done`, where the checksum is the number of operations that were found done. Measures
//! nothing: the clock is with whoever orders.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;

use abi::word;
use anyhow::Context;
use engines::floors::{EMPTY, FLOORS, Operation};

use crate::{say, status};

/// What the greeting says instead of a guest's flavour.
const FLAVOUR: &str = "host";

/// Obeys until the console ends or `quit` comes.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    if let Err(unavailable) = pv::probe() {
        say(&format!("floors are unavailable: {unavailable}"));
        return Ok(ExitCode::from(status::UNAVAILABLE));
    }
    let mut operations: HashMap<&str, Operation> = HashMap::new();
    for floor in FLOORS.iter().chain([&EMPTY]) {
        match (floor.start)() {
            Ok(operation) => drop(operations.insert(floor.name, operation)),
            Err(error) => {
                say(&format!("floor {} could not start: {error}", floor.name));
                return Ok(ExitCode::from(status::CRASHED));
            }
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} {} {FLAVOUR}", word::READY, abi::PROTOCOL_VERSION)?;
    for line in std::io::stdin().lock().lines() {
        let line = line.context("the console")?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words[..] {
            [] => {}
            [word::RUN, name, _size, iterations] => {
                let Some(operation) = operations.get_mut(name) else {
                    writeln!(out, "{} {name}", word::UNKNOWN)?;
                    continue;
                };
                match iterations.parse() {
                    Ok(iterations) => order(&mut out, operation, iterations)?,
                    Err(_) => writeln!(out, "{} ITERATIONS is a number", word::FAILED)?,
                }
            }
            [word::LIST] => {
                for floor in FLOORS {
                    writeln!(out, "{} {}", word::WORKLOAD, floor.name)?;
                }
                writeln!(out, "{}", word::LISTED)?;
            }
            [word::QUIT, code] => {
                let code = code.parse::<u8>().context("usage: quit CODE, 0 to 255")?;
                return Ok(ExitCode::from(if code == 0 {
                    status::SUCCESS
                } else {
                    status::FAILURE
                }));
            }
            _ => writeln!(
                out,
                "{} no such command; there are run, list and quit",
                word::FAILED
            )?,
        }
    }
    Ok(ExitCode::from(status::SUCCESS))
}

fn order(out: &mut impl Write, operation: &mut Operation, iterations: u64) -> std::io::Result<()> {
    // Standard output is buffered by lines: each is one write.
    writeln!(out, "{}", word::BEGIN)?;
    let start = cycles();
    let done = operation(iterations);
    let cycles = cycles().wrapping_sub(start);
    writeln!(out, "{}", word::END)?;
    match done {
        Ok(done) => writeln!(out, "{} {done:016x} {cycles}", word::DONE),
        Err(error) => writeln!(out, "{} {error}", word::FAILED),
    }
}

fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has rdtsc, and Linux leaves it to processes.
    unsafe { core::arch::x86_64::_rdtsc() }
}
