//! Single virtual machines: what must hold below the level of a session.

mod common;

use std::time::{Duration, Instant};

use benches::vm::{Answer, Fault, Launch, Request, Vm};
use common::{assert_nothing_runs, contender, script};

const LIMIT: Duration = Duration::from_secs(5);
const ALU: Request<'_> = Request {
    workload: "alu",
    size: 0,
    iterations: 1,
};

fn boot(launch: &Launch) -> Vm {
    match Vm::boot(launch, LIMIT) {
        Ok(vm) => vm,
        Err((fault, _)) => panic!("{fault}"),
    }
}

/// A guest whose counters go to the pipe by name, as `$0`.
fn counting(dir: &std::path::Path, on_alu: &str) -> Launch {
    let mut launch = contender(&script(dir, on_alu)).launch;
    launch
        .command
        .args
        .push("/proc/self/fd/{stats-fd}".to_owned());
    launch.counts_windows = true;
    launch
}

#[test]
fn counters_of_the_window_come_with_the_answer() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let window = concat!(
        r#"{"event":"window","seq":0,"counts":["#,
        r#"{"source":"vmm","kind":"pio","reason":"out","count":7}]}"#
    );
    let on_alu =
        format!("echo begin; echo '{window}' > $0; echo end; echo done 00000000000000aa 9");
    let mut vm = boot(&counting(dir.path(), &on_alu));
    let Ok(Answer::Done(done, Some(counts))) = vm.run(ALU, LIMIT) else {
        panic!("no counted answer");
    };
    assert_eq!((done.checksum, done.cycles), (0xaa, 9));
    assert_eq!((counts.len(), counts[0].count), (1, 7));
}

#[test]
fn full_side_channels_never_block_the_guest() {
    let dir = tempfile::tempdir().expect("temporary directory");
    // Four times what a pipe holds, on both side channels, before the answer.
    let on_alu = "i=0; while [ $i -lt 4000 ]; do \
        echo '{\"event\":\"window\",\"seq\":1,\"counts\":[]}                    ' > $0; \
        echo 'nothing of interest, but sixty-four bytes of it in every line ..' >&2; \
        i=$((i+1)); done; echo begin; echo end; echo done 00000000000000aa 9";
    let mut vm = boot(&counting(dir.path(), on_alu));
    assert!(matches!(vm.run(ALU, LIMIT), Ok(Answer::Done(..))));
}

#[test]
fn counters_that_are_none_are_a_fault() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let on_alu = "echo nonsense > $0; echo begin; echo end; echo done 00000000000000aa 9";
    let mut vm = boot(&counting(dir.path(), on_alu));
    assert!(matches!(vm.run(ALU, LIMIT), Err(Fault::Counters(_))));
}

/// State letter of a process: field 3 of proc_pid_stat(5).
fn state_of(process: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("not reaped");
    let (_, rest) = stat.rsplit_once(')').expect("a stat line");
    rest.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn a_paused_machine_does_nothing_and_goes_on_when_resumed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let answer = "echo begin; echo end; echo done 00000000000000aa 9";
    let mut vm = boot(&contender(&script(dir.path(), answer)).launch);
    vm.pause();
    let deadline = Instant::now() + LIMIT;
    while state_of(vm.id()) != "T" {
        assert!(Instant::now() < deadline, "not stopped");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.resume();
    assert!(matches!(vm.run(ALU, LIMIT), Ok(Answer::Done(..))));
}

#[test]
fn a_dropped_machine_leaves_no_process_even_when_paused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    // The child of the guest's process ignores hang-ups, as daemons do.
    let script = format!("(trap '' HUP; sleep 60) &\n{}", script(dir.path(), ":"));
    let vm = boot(&contender(&script).launch);
    vm.pause();
    drop(vm);
    assert_nothing_runs(dir.path());
}
