//! The whole aware image on this engine: every workload's checksum agrees with its oracle, whether
//! ordered on the command line or over the console.

use std::time::Duration;

use engine_core::{Limits, Outcome, machine::Source};
use programs::{CATALOGUE, Group, Workload, find, oracle};
use pv::{Guest, Options};

const NO_PC: &str = "unsupported an aware guest has none of a PC's timers";

/// What has no meaning without privilege, and devices that the guests here do not have. A name that ends
/// with `_` is the beginning of several.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("in", "unsupported an aware guest has no ports to read"),
    ("cr8wr", "unsupported an aware guest has no task priority"),
    ("blk_", "unsupported this machine has no disk"),
    ("net_", "unsupported this machine has no network card"),
    ("timer_pit", NO_PC),
    ("timer_lapic", NO_PC),
    ("timer_tscdl", NO_PC),
];

fn unsupported(workload: &Workload) -> Option<&'static str> {
    let row = UNSUPPORTED.iter().find(|(name, _)| {
        *name == workload.name || name.ends_with('_') && workload.name.starts_with(name)
    });
    row.map(|(_, answer)| *answer)
}

fn guest(mib: u64, command_line: &str, input: &[u8]) -> (Outcome, String) {
    let options = Options {
        input: Source::Bytes(input.to_vec()),
        ..Options::default()
    };
    let mut guest = Guest::start(images::aware(), mib, command_line, options).expect("starts");
    let limits = Limits {
        timeout: Some(Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = guest.run(&limits);
    let console = String::from_utf8_lossy(guest.console()).into_owned();
    (outcome, console)
}

/// The answer to a run, without what can't be foreseen: the cycles.
fn expected(workload: &Workload, size: u64, iterations: u64) -> String {
    match unsupported(workload) {
        Some(answer) => answer.to_owned(),
        None => {
            let sum = oracle(workload, size, iterations).expect("an oracle");
            format!("begin end done {sum:016x}")
        }
    }
}

/// The answers of a session, one for each line of input that has one.
fn answers(console: &str) -> Vec<String> {
    let mut answers = vec![String::new()];
    let said = |line: &str| {
        line.starts_with(':') || line.starts_with("latency ") || line.starts_with("bucket ")
    };
    for line in console.lines().filter(|line| !said(line)) {
        let words: Vec<&str> = line.split(' ').collect();
        // The cycles.
        let kept = if words[0] == "done" { 2 } else { words.len() };
        let answer = answers.last_mut().expect("never empty");
        answer.push_str(&words[..kept].join(" "));
        if ["begin", "end", "workload"].contains(&words[0]) {
            answer.push(' ');
        } else {
            answers.push(String::new());
        }
    }
    answers.pop();
    answers
}

/// Iterations of a test: as many, but for workloads of which one is much.
fn few(workload: &Workload, iterations: u64) -> u64 {
    match workload.group {
        Group::Empty | Group::Compute => workload.iterations.min(iterations),
        Group::Nano | Group::Micro | Group::Io => iterations,
    }
}

#[test]
fn every_workload_agrees_with_its_oracle() {
    for workload in CATALOGUE {
        // One, and more than two batches of 64 but no whole number of them.
        for iterations in [1, 150] {
            let iterations = few(workload, iterations);
            let command = format!("run {} {} {iterations}", workload.name, workload.size);
            let (outcome, console) = guest(128, &command, b"");
            let answer = expected(workload, workload.size, iterations);
            assert_eq!(
                answers(&console),
                ["ready 1 aware", &answer],
                "{command}: {outcome:?}"
            );
            match unsupported(workload) {
                None => assert!(matches!(outcome, Outcome::Success), "{outcome:?}"),
                Some(_) => assert!(matches!(outcome, Outcome::Failure(1)), "{outcome:?}"),
            }
        }
    }
}

/// A run leaves nothing behind that changes the next.
#[test]
fn every_workload_agrees_within_one_session() {
    let mut input = String::new();
    let mut expectations = vec!["ready 1 aware".to_owned()];
    let mut order = |workload: &Workload, size, iterations| {
        input.push_str(&format!("run {} {size} {iterations}\n", workload.name));
        expectations.push(expected(workload, size, iterations));
    };
    for round in 0..2 {
        for workload in CATALOGUE {
            for iterations in [1, 2, 7 + round] {
                order(workload, 0, few(workload, iterations));
            }
        }
    }
    // Right after one that leaves no space current.
    let spaces = find("aspace").expect("it is listed");
    for workload in CATALOGUE {
        order(spaces, 0, 1);
        order(workload, 0, few(workload, 2));
    }
    // Sizes that are not the defaults, up to the largest.
    for (name, size) in [
        ("sort", 100_000),
        ("chase", 8 << 20),
        ("sieve", 3),
        ("fib", 24),
        ("pfstorm", 1),
        ("pfstorm", 100),
        ("pfstorm", 256),
        ("aspace", 1),
        ("aspace", 64),
    ] {
        order(find(name).expect("it is listed"), size, 3);
    }
    input.push_str("quit 7\n");
    let (outcome, console) = guest(128, "", input.as_bytes());
    assert_eq!(answers(&console), expectations);
    assert!(matches!(outcome, Outcome::Failure(7)), "{outcome:?}");
}

#[test]
fn bad_lines_are_answered_and_survived() {
    let long = "x".repeat(3000);
    let unfit = format!("run sort {} 1", (8 << 20) + 1);
    let mut input = Vec::new();
    for line in [
        "",
        "run nothing 0 0",
        "run alu zero 0",
        "run pfstorm 257 1",
        "run aspace 65 1",
        "run ctxsw2 2 1",
        &unfit,
        &long,
        "\u{0}\u{1}ü",
        "list",
        "run empty 0 0",
    ] {
        input.extend_from_slice(line.as_bytes());
        input.push(b'\n');
    }
    let (outcome, console) = guest(128, "", &input);
    let mut list: String = CATALOGUE
        .iter()
        .map(|workload| format!("workload {} ", workload.name))
        .collect();
    list.push_str("listed");
    assert_eq!(
        answers(&console),
        [
            "ready 1 aware",
            "unknown nothing",
            "failed SIZE and ITERATIONS are decimal numbers below 2^64",
            "failed size 257 is beyond 256",
            "failed size 65 is beyond 64",
            "failed size 2 of a workload that takes no size",
            "failed size 8388609 needs 8388609 words of memory, there are 8388608",
            "failed a line is longer than 256 bytes",
            "failed no such command; there are run, list and quit",
            &list,
            "begin end done 656d707479000000",
        ]
    );
    // It ends with its input.
    assert!(matches!(outcome, Outcome::Success), "{outcome:?}");
}

#[test]
fn it_runs_in_64_mib_and_says_so_in_less() {
    let (outcome, console) = guest(64, "run chase 0 1", b"");
    let answer = expected(find("chase").expect("it is listed"), 0, 1);
    assert_eq!(answers(&console), ["ready 1 aware", &answer]);
    assert!(matches!(outcome, Outcome::Success), "{outcome:?}");
    for mib in [4, 8, 32] {
        let (outcome, console) = guest(mib, "", b"");
        assert_eq!(console, "failed less than 64 MiB of memory\n", "{mib} MiB");
        assert!(matches!(outcome, Outcome::Failure(1)), "{outcome:?}");
    }
}

#[test]
fn a_command_line_that_can_not_be_obeyed_fails() {
    for (command_line, answer) in [
        ("quiet run nothing 0 0", "unknown nothing"),
        (
            "run alu",
            "failed usage on the command line: run WORKLOAD SIZE ITERATIONS",
        ),
    ] {
        let (outcome, console) = guest(128, command_line, b"");
        assert_eq!(answers(&console), ["ready 1 aware", answer]);
        assert!(matches!(outcome, Outcome::Failure(1)), "{outcome:?}");
    }
}
