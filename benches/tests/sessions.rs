//! Whole sessions over fake guests: each way to misbehave ends in one row with the right status,
//! within its time limit, with nothing left running.

mod common;

use std::time::{Duration, Instant};

use benches::plan::Plan;
use benches::process::CommandLine;
use benches::verdict::Traits;
use common::{LIMIT, contender, measure, plan, script};
use reports_data::{Metric, Phase, Sample, Status};

fn warm_rows<'a>(samples: &'a [Sample], workload: &str) -> Vec<&'a Sample> {
    samples
        .iter()
        .filter(|s| s.workload == workload && s.phase == Phase::Warm)
        .filter(|s| s.metric == Metric::TIME)
        .collect()
}

/// A guest that does `on_alu` gets one `alu` row with `status` and a reason that contains
/// `reason`, and the next workload is measured by a fresh guest.
#[track_caller]
fn check(on_alu: &str, status: Status, reason: &str) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let guest = contender(&script(dir.path(), on_alu));
    let samples = measure(dir.path(), &plan(), vec![guest], &["alu", "sieve"]);
    let rows = warm_rows(&samples, "alu");
    assert_eq!(rows.len(), 1, "one row, not tried again: {rows:?}");
    assert_eq!(rows[0].status, status, "{}", rows[0].reason);
    assert!(rows[0].reason.contains(reason), "{}", rows[0].reason);
    let next = warm_rows(&samples, "sieve");
    assert_eq!(next[0].status, Status::Unsupported, "{}", next[0].reason);
    assert_eq!(next[0].reason, "not by this guest");
}

#[test]
fn wrong_checksum_is_failed_without_a_number() {
    check(
        "echo begin; echo end; echo done 0123456789abcdef 5",
        Status::Failed,
        "checksum 0123456789abcdef, expected",
    );
}

#[test]
fn death_in_mid_run_is_failed_with_status_and_last_words() {
    check(
        "echo begin; echo 'trapline: triple fault at rip 0x1000' >&2; exit 4",
        Status::Failed,
        "exit status 4: trapline: triple fault at rip 0x1000",
    );
    check("kill -9 $$", Status::Failed, "killed by signal 9");
}

#[test]
fn hang_is_failed_at_the_limit() {
    check(
        "echo begin; sleep 60",
        Status::Failed,
        "no `end` within 1.5s",
    );
    check("while :; do :; done", Status::Failed, "no `begin` within");
}

#[test]
fn closed_console_of_a_living_process_is_failed() {
    check(
        "exec >&- 2>&-; sleep 60",
        Status::Failed,
        "closed its console without ending",
    );
}

#[test]
fn floods_are_failed() {
    let line = "x".repeat(1000);
    check(
        &format!("while :; do echo {line}; done"),
        Status::Failed,
        "flooded the console",
    );
    check(
        &format!("while :; do echo {line} >&2; done"),
        Status::Failed,
        "no `begin` within",
    );
}

#[test]
fn garbage_in_the_window_is_failed() {
    check(
        "echo begin; echo lorem ipsum; echo end; echo done 0 0",
        Status::Failed,
        "guest sent \"lorem ipsum\" while the harness waited for end",
    );
    check(
        r"printf 'begin\n\377\376\n'",
        Status::Failed,
        "while the harness waited for end",
    );
    check(
        "echo begin; echo end; echo done cafe",
        Status::Failed,
        "waited for done",
    );
}

#[test]
fn the_guest_s_own_refusals_keep_their_words() {
    check("echo failed no such luck", Status::Failed, "no such luck");
    check("echo unknown alu", Status::Failed, "no workload \"alu\"");
    check(
        "echo unsupported by design",
        Status::Unsupported,
        "by design",
    );
}

#[test]
fn a_guest_that_never_greets_fails_every_workload() {
    for (script, status, reason) in [
        ("sleep 60", Status::Failed, "no `ready` within 1.5s"),
        (
            "echo ready 99 unaware; sleep 60",
            Status::Failed,
            "ready 99",
        ),
        (
            "echo oops >&2; exit 1",
            Status::Failed,
            "exit status 1: oops",
        ),
        (
            "echo 'trapline: open /dev/kvm: denied' >&2; exit 3",
            Status::Unavailable,
            "open /dev/kvm: denied",
        ),
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let script = format!(
            "echo $$ >> '{}'\n{script}",
            dir.path().join("pids").display()
        );
        let guest = contender(&script);
        let plan = Plan {
            boot_limit: LIMIT,
            ..plan()
        };
        let samples = measure(dir.path(), &plan, vec![guest], &["alu", "sieve"]);
        for workload in ["alu", "sieve"] {
            let rows = warm_rows(&samples, workload);
            assert_eq!(rows.len(), 1, "{rows:?}");
            assert_eq!(rows[0].status, status, "{}", rows[0].reason);
            assert!(rows[0].reason.contains(reason), "{}", rows[0].reason);
        }
    }
}

#[test]
fn what_is_not_installed_is_unavailable_with_the_package() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let mut peer = contender("");
    peer.launch.command.program = "no-such-emulator".to_owned();
    peer.traits.install = Some("not installed: apt-get install it".to_owned());
    let samples = measure(dir.path(), &plan(), vec![peer], &["alu"]);
    let rows = warm_rows(&samples, "alu");
    assert_eq!(rows[0].status, Status::Unavailable);
    assert_eq!(rows[0].reason, "not installed: apt-get install it");
}

#[test]
fn a_software_kvm_backend_is_named_and_makes_failures_unavailable() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let start = r#"{"event":"start","mode":"hardware","engine":"kvm","backend":"pvm"}"#;
    let mut guest = contender(&format!(
        "echo '{start}' > /proc/self/fd/$0\n{}",
        script(dir.path(), "echo begin; exit 4")
    ));
    guest.launch.command.args.push("{stats-fd}".to_owned());
    let samples = measure(dir.path(), &plan(), vec![guest], &["alu"]);
    let rows = warm_rows(&samples, "alu");
    assert_eq!(rows[0].status, Status::Unavailable);
    assert_eq!(rows[0].reason, "KVM (pvm): exit status 4");
}

#[test]
fn verified_runs_of_the_native_image_are_ok_in_every_round() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let image = dir.path().join("native");
    std::fs::write(&image, images::native()).expect("directory is writable");
    let mut native = contender("");
    native.launch.command = CommandLine {
        program: "/bin/sh".to_owned(),
        // A file that was just written can be busy for exec while another thread forks; chmod and
        // exec by a shell come after every such moment.
        args: ["-c", "chmod +x \"$0\" && exec \"$0\""]
            .into_iter()
            .map(str::to_owned)
            .chain([image.display().to_string()])
            .collect(),
    };
    native.traits = Traits {
        native: true,
        ..Traits::default()
    };
    let plan = plan();
    let samples = measure(dir.path(), &plan, vec![native], &["alu", "fib", "cr8wr"]);
    for workload in ["alu", "fib"] {
        let rows = warm_rows(&samples, workload);
        // A busy host keeps the harness from a window now and then, or from the ends of the empty one,
        // which then is too long to be subtracted; those are no figures.
        let (ok, late): (Vec<&Sample>, Vec<&Sample>) =
            rows.into_iter().partition(|row| row.status == Status::Ok);
        let lateness = [Status::Skipped, Status::Invalid];
        assert!(
            late.iter().all(|row| lateness.contains(&row.status)),
            "{late:?}"
        );
        assert!(!ok.is_empty() && ok.len() as u32 <= plan.rounds * plan.windows);
        for row in ok {
            assert!(row.value.is_some_and(|ns| ns > 0.0), "{row:?}");
            assert!(row.checksum.is_some());
        }
        let cold = |s: &&Sample| s.workload == workload && s.phase == Phase::Cold;
        assert!(samples.iter().any(|s| cold(&s)));
    }
    let refused = warm_rows(&samples, "cr8wr");
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].status, Status::Unsupported);
    assert_eq!(refused[0].reason, "ring-0 operation has no native figure");
    let orders: Vec<u32> = samples.iter().map(|sample| sample.order).collect();
    assert_eq!(orders, (0..samples.len() as u32).collect::<Vec<_>>());
}

#[test]
fn a_spent_budget_leaves_skipped_rows_and_ends_in_time() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let guest = contender(&script(dir.path(), "echo begin; sleep 60"));
    let plan = Plan {
        budget: Some(Duration::from_millis(500)),
        ..plan()
    };
    let started = Instant::now();
    let samples = measure(dir.path(), &plan, vec![guest], &["alu", "sieve", "sort"]);
    assert!(started.elapsed() < LIMIT, "the budget cuts limits short");
    let alu = warm_rows(&samples, "alu");
    assert_eq!(alu[0].status, Status::Skipped, "{}", alu[0].reason);
    assert!(alu[0].reason.contains("time budget"), "{}", alu[0].reason);
    for workload in ["sieve", "sort"] {
        assert!(!warm_rows(&samples, workload).is_empty(), "{workload}");
    }
}
