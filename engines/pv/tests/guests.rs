//! Guests that do what a guest does, and one body that runs them.

mod support;

use engine_core::{Limit, Outcome};
use support::{Run, check, run, run_with};

#[test]
fn a_kernel_prints_and_shuts_down() {
    let Run {
        outcome, console, ..
    } = run("hello");
    assert!(matches!(outcome, Outcome::Success), "{outcome:?} {console}");
    assert_eq!(console, "hello\n");
}

/// Scenarios that check themselves.
#[test]
fn scenarios_find_what_the_interface_promises() {
    for scenario in [
        "syscalls",
        "faults",
        "rights",
        "unmap",
        "follow",
        "spaces",
        "divide",
        "kernel-divide",
        "timer-user",
        "timer-block",
        "registers",
        "bases",
        "large",
        "fork-storm",
    ] {
        check(scenario);
    }
}

#[test]
fn bad_arguments_give_the_documented_error_and_change_nothing() {
    for scenario in [
        "errors-tables",
        "errors-pointers",
        "errors-values",
        "errors-spaces",
    ] {
        check(scenario);
    }
}

#[test]
fn console_input_reaches_the_guest_and_its_end_is_told() {
    let input: Vec<u8> = (0..5000u32).map(|byte| b'a' + (byte % 26) as u8).collect();
    let run = support::finish(support::start("echo-console", None, &input), None, None);
    assert!(matches!(run.outcome, Outcome::Success), "{run:?}");
    assert_eq!(run.console.as_bytes(), input);
}

#[test]
fn seventy_thousand_separate_mappings_stay_below_the_hosts_limit() {
    check("many-mappings");
}

#[test]
fn limits_hold_whoever_spins() {
    for scenario in ["spin-kernel", "spin-user"] {
        let run = run_with(scenario, Some(0.3), None);
        assert!(
            matches!(run.outcome, Outcome::Limit(Limit::Timeout)),
            "{scenario}: {run:?}"
        );
    }
    let run = run_with("flood", None, Some(1000));
    assert!(
        matches!(run.outcome, Outcome::Limit(Limit::Exits)),
        "{run:?}"
    );
}

#[test]
fn a_crash_of_the_kernel_names_rip_and_state() {
    let run = run("crash");
    let Outcome::Crashed {
        state: Some(state),
        message,
    } = &run.outcome
    else {
        panic!("{run:?}");
    };
    assert!(
        message.contains("exception 14") && message.contains("0x1234000"),
        "{message}"
    );
    assert!(
        message.contains(&format!("rip {:#x}", state.rip)),
        "{message}"
    );
    assert!((0x10_0000..0x20_0000).contains(&state.rip));
}

#[test]
fn a_guest_that_sleeps_for_ever_is_given_up() {
    let run = run("sleep");
    assert!(
        matches!(run.outcome, Outcome::Limit(Limit::Input)),
        "{run:?}"
    );
}

/// What operations cost beside their floors. Not a benchmark: for a look while working.
#[test]
#[ignore = "prints costs; run it with --ignored --nocapture, in release"]
fn costs() {
    use pv::floor;
    // The best of 20 rounds, as the guest's own figures are the best of many.
    let time = |name: &str, count: u64, work: &mut dyn FnMut(u64) -> u64| {
        let rounds = (0..20).map(|_| {
            let start = std::time::Instant::now();
            assert_eq!(work(count / 20), count / 20, "{name}");
            start.elapsed().as_nanos() as u64 / (count / 20)
        });
        println!("floor: {name} {}", rounds.min().unwrap_or(0));
    };
    time("syscall", 1_000_000, &mut floor::syscalls);
    let mut notifications = floor::Notifications::start(true).unwrap();
    time("notification", 100_000, &mut |count| {
        notifications.round_trips(count).unwrap()
    });
    drop(notifications);
    let mut maps = floor::Maps::start().unwrap();
    time("mmap", 100_000, &mut |count| maps.map(count));
    let mut faults = floor::Faults::start().unwrap();
    time("SIGSEGV", 100_000, &mut |count| {
        faults.round_trips(count).unwrap()
    });
    let run = run("cost");
    println!("{}", run.console);
    assert!(matches!(run.outcome, Outcome::Success), "{run:?}");
}
