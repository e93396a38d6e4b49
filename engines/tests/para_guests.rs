//! Aware guests that misbehave, and parties that die: each ends `trapline` with the status that says
//! so and one clear line, and leaves no process and no memory behind.
//!
//! The guests are scenarios of `pv`'s test guest, named on its command line.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::Child;
use std::time::{Duration, Instant};

use support::parties::Parties;
use support::{Call, Ended, finish};

/// Time limit of a guest that is to end by itself: only a defect reaches it.
const LONG: &str = "20";
/// Programs of the kernel's process, and of zygote and user processes.
const MONITOR: &str = "trapline-monitor";
const STUB: &str = "trapline-stub";
/// Kernel, zygote.
const KERNEL: usize = 2;
/// Kernel, zygote and a user process.
const USER: usize = 3;

fn call(scenario: &str, args: &[&str]) -> Call {
    Call::with_memory("para", "64")
        .image(pv::TEST_GUEST)
        .args(&["--cmdline", scenario])
        .args(args)
}

fn run(scenario: &str, args: &[&str]) -> Ended {
    call(scenario, args).run()
}

/// Whether this host runs aware guests; says why not.
fn available() -> bool {
    match pv::probe() {
        Ok(()) => true,
        Err(unavailable) => {
            eprintln!("skipped: {unavailable}");
            false
        }
    }
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: plain numbers; the process is a child of a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// A running guest with that many children.
fn started(scenario: &str, children: usize) -> (Call, Child, Parties, Instant) {
    let started = Instant::now();
    let mut call = call(scenario, &["--timeout", LONG]);
    let child = call.start();
    let parties = Parties::of(child.id(), children);
    (call, child, parties, started)
}

#[test]
fn a_kernel_that_ends_at_once_is_a_result() {
    if !available() {
        return;
    }
    run("exit", &["--timeout", LONG]).check(0, "");
    run("exit-code", &["--timeout", LONG]).check(1, "the guest failed with code 7");
    // A host call is not its to make.
    let ended = run("host-exit", &["--timeout", LONG]);
    ended.check(0, "");
    assert_eq!(ended.stdout, b"alive\n");
}

#[test]
fn a_kernel_that_faults_shows_its_instruction_and_its_registers() {
    if !available() {
        return;
    }
    for (scenario, text) in [
        ("crash", "exception 14 (error 0x6, address 0x1234000)"),
        ("halt", "exception 13"),
    ] {
        let ended = run(scenario, &["--timeout", LONG]);
        ended.check(4, text);
        let line = ended.stderr.lines().last().unwrap();
        let rip = line.rsplit("rip 0x").next().unwrap();
        let rip = u64::from_str_radix(rip, 16).unwrap();
        assert!((0x10_0000..0x20_0000).contains(&rip), "{line}");
        let register = format!("rip={rip:016x}");
        assert!(ended.stderr.contains(&register), "{ended:?}");
        if scenario == "halt" {
            assert!(ended.stderr.contains("rax=0000000000001234"), "{ended:?}");
        }
    }
}

#[test]
fn guests_that_never_end_meet_their_time_limit() {
    if !available() {
        return;
    }
    // Calls that stay in the kernel's own process are no exits: only time ends a flood of those.
    for scenario in ["spin-kernel", "spin-user", "flood-syscalls", "flood-errors"] {
        let ended = run(scenario, &["--timeout", "0.5"]);
        ended.check(5, "time limit reached (0.5 s)");
        assert!(ended.elapsed < Duration::from_secs(4), "{ended:?}");
    }
}

#[test]
fn floods_meet_the_limit_of_exits() {
    if !available() {
        return;
    }
    for scenario in [
        "flood",
        "flood-doorbell",
        "flood-faults",
        "flood-marks",
        "flood-spaces",
        "flood-syscalls",
        "flood-timer",
    ] {
        eprintln!("{scenario}");
        let limits = ["--max-exits", "500", "--timeout", LONG];
        run(scenario, &limits).check(5, "exit limit reached (500)");
    }
}

/// A flood costs the guest its own time: the VMM sleeps meanwhile, if only while the guest asks on,
/// neither it nor its parties grow, and it still listens.
#[test]
fn floods_cost_the_vmm_no_memory_and_keep_no_signal_out() {
    if !available() {
        return;
    }
    const GROWTH_KIB: u64 = 512;
    for (scenario, children) in [
        ("flood", KERNEL),
        ("flood-doorbell", KERNEL),
        ("flood-errors", KERNEL),
        ("flood-faults", USER),
        ("flood-marks", KERNEL),
        ("flood-spaces", KERNEL),
        ("flood-syscalls", USER),
        ("flood-timer", KERNEL),
    ] {
        eprintln!("{scenario}");
        let (_call, child, parties, started) = started(scenario, children);
        // Its working set is there once it has run for a while.
        std::thread::sleep(Duration::from_millis(300));
        let before = parties.resident_kib();
        let (busy, since) = (parties.vmm_time(), Instant::now());
        std::thread::sleep(Duration::from_millis(700));
        let after = parties.resident_kib();
        let (busy, passed) = (parties.vmm_time() - busy, since.elapsed());
        assert!(busy < passed * 9 / 10, "{scenario}: {busy:?} of {passed:?}");
        for (before, after) in before.iter().zip(&after) {
            assert!(
                *after < before + GROWTH_KIB,
                "{scenario}: {before:?} KiB, then {after:?} KiB"
            );
        }
        let asked = Instant::now();
        kill(child.id(), libc::SIGTERM);
        finish(child, started).check(128 + libc::SIGTERM, "ended by signal 15");
        assert!(asked.elapsed() < Duration::from_secs(2), "{scenario}");
        parties.assert_gone();
    }
}

#[test]
fn a_console_flood_reaches_a_slow_reader_whole_and_costs_no_memory() {
    if !available() {
        return;
    }
    let (_call, mut child, parties, started) = started("flood-console", KERNEL);
    let mut lines = BufReader::with_capacity(512, child.stdout.take().unwrap()).lines();
    let mut before = Vec::new();
    for expected in 0..20_000 {
        let line = lines.next().unwrap().unwrap();
        assert_eq!(line, format!("line {expected}"));
        if expected % 1000 == 0 {
            // The guest fills every buffer meanwhile.
            std::thread::sleep(Duration::from_millis(20));
        }
        if expected == 10_000 {
            before = parties.resident_kib();
        }
    }
    let after = parties.resident_kib();
    for (before, after) in before.iter().zip(&after) {
        assert!(*after < before + 512, "{before} KiB, then {after} KiB");
    }
    // The reader leaves.
    drop(lines);
    finish(child, started).check(128 + libc::SIGPIPE, "ended by signal 13");
    parties.assert_gone();
}

/// It sleeps until there is room, which is not sleeping for ever.
#[test]
fn a_guest_that_waits_for_a_slow_reader_is_not_given_up() {
    if !available() {
        return;
    }
    let started = Instant::now();
    let mut call = Call::with_memory("para", "64").args(&[
        "--workload",
        "console",
        "--iterations",
        "5000",
        "--timeout",
        LONG,
    ]);
    let mut child = call.start();
    drop(child.stdin.take());
    let mut stdout = child.stdout.take().unwrap();
    let (mut text, mut buffer) = (Vec::new(), [0; 32 << 10]);
    loop {
        let count = stdout.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        text.extend_from_slice(&buffer[..count]);
        std::thread::sleep(Duration::from_millis(50));
    }
    finish(child, started).check(0, "");
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().last().unwrap().starts_with("done "), "{text}");
}

#[test]
fn a_console_flood_that_nobody_reads_meets_the_time_limit() {
    if !available() {
        return;
    }
    let started = Instant::now();
    let mut call = call("flood-console", &["--timeout", "1"]);
    let mut child = call.start();
    // Held open, never read.
    let stdout = child.stdout.take();
    let ended = finish(child, started);
    ended.check(5, "time limit reached");
    assert!(ended.elapsed < Duration::from_secs(6), "{ended:?}");
    drop(stdout);
}

#[test]
fn a_party_that_is_killed_takes_the_others_down() {
    if !available() {
        return;
    }
    for (scenario, children, party, text) in [
        (
            "spin-kernel",
            KERNEL,
            MONITOR,
            "the kernel's process ended by signal 9",
        ),
        (
            "spin-user",
            USER,
            MONITOR,
            "the kernel's process ended by signal 9",
        ),
        (
            "spin-kernel",
            KERNEL,
            STUB,
            "the zygote of the user processes ended by signal 9",
        ),
    ] {
        let (_call, child, parties, started) = started(scenario, children);
        kill(parties.named(party), libc::SIGKILL);
        finish(child, started).check(4, text);
        parties.assert_gone();
    }
    let (_call, child, parties, started) = started("spin-user", USER);
    kill(*parties.children.last().unwrap(), libc::SIGKILL);
    let text = "the user process in slot 0 ended by signal 9";
    finish(child, started).check(4, text);
    parties.assert_gone();
}

#[test]
fn a_killed_vmm_takes_its_parties_with_it() {
    if !available() {
        return;
    }
    for (scenario, children) in [
        ("spin-kernel", KERNEL),
        ("spin-user", USER),
        ("flood-syscalls", USER),
        ("flood-console", KERNEL),
    ] {
        let (_call, mut child, parties, _) = started(scenario, children);
        child.kill().unwrap();
        child.wait().unwrap();
        parties.assert_gone();
    }
}

#[test]
fn host_signals_end_the_guest_with_their_status() {
    if !available() {
        return;
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        for (scenario, children) in [("spin-kernel", KERNEL), ("spin-user", USER)] {
            let (_call, child, parties, started) = started(scenario, children);
            // It listens once the guest runs.
            std::thread::sleep(Duration::from_millis(200));
            kill(child.id(), signal);
            let text = format!("ended by signal {signal}");
            finish(child, started).check(128 + signal, &text);
            parties.assert_gone();
        }
    }
}

#[test]
fn a_run_that_ends_well_leaves_nothing_either() {
    if !available() {
        return;
    }
    let (_call, mut child, parties, started) = started("echo-console", KERNEL);
    drop(child.stdin.take());
    let mut text = String::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_string(&mut text).unwrap();
    finish(child, started).check(0, "");
    parties.assert_gone();
}
