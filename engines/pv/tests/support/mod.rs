//! One body that runs a scenario of the test guest and finds nothing left behind.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::Path;
use std::time::Duration;

use engine_core::machine::Source;
use engine_core::{Limits, Outcome};
use pv::{Defence, Guest, Options};

/// What became of a run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) outcome: Outcome,
    pub(crate) console: String,
}

/// Runs a scenario, within ten seconds.
pub(crate) fn run(scenario: &str) -> Run {
    run_with(scenario, None, None)
}

pub(crate) fn run_with(scenario: &str, timeout: Option<f64>, max_exits: Option<u64>) -> Run {
    finish(start(scenario, None, &[]), timeout, max_exits)
}

/// Runs a scenario without one defence.
pub(crate) fn run_without(scenario: &str, defence: Defence) -> Run {
    finish(start(scenario, Some(defence), &[]), None, None)
}

pub(crate) fn start(scenario: &str, without: Option<Defence>, input: &[u8]) -> Guest {
    start_with(
        scenario,
        Options {
            without,
            input: Source::Bytes(input.to_vec()),
            ..Options::default()
        },
    )
}

pub(crate) fn start_with(scenario: &str, options: Options) -> Guest {
    Guest::start(pv::TEST_GUEST, 64, scenario, options).unwrap()
}

pub(crate) fn finish(mut guest: Guest, timeout: Option<f64>, max_exits: Option<u64>) -> Run {
    let limits = Limits {
        timeout: Some(Duration::from_secs_f64(timeout.unwrap_or(20.0))),
        max_exits,
    };
    let outcome = guest.run(&limits);
    for pid in guest.processes() {
        assert!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} is left"
        );
    }
    Run {
        outcome,
        console: String::from_utf8_lossy(guest.console()).into_owned(),
    }
}

/// Runs a scenario that checks itself and says `ok`.
pub(crate) fn check(scenario: &str) {
    let run = run(scenario);
    assert!(
        matches!(run.outcome, Outcome::Success) && run.console.ends_with("ok\n"),
        "{scenario}: {:?}\n{}",
        run.outcome,
        run.console
    );
}
