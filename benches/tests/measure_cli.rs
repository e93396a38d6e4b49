//! The binary `measure`: exit status, files and what is left when it is cut short.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{assert_nothing_runs, script};
use reports_data::{
    BOOT, FLOOR, MANIFEST, Manifest, SAMPLES, SUMMARY, Sample, Status, Summary, read_table,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// A `trapline` that runs a fake guest in every mode.
fn fake_trapline(dir: &Path, on_alu: &str) -> PathBuf {
    let path = dir.join("trapline");
    std::fs::write(&path, format!("#!/bin/sh\n{}", script(dir, on_alu))).expect("writable");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&path, executable).expect("ours");
    path
}

fn measure(dir: &Path, trapline: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_measure"));
    command
        .args(["--quick", "--peers", "none", "--out"])
        .arg(dir.join("out"))
        .arg("--trapline")
        .arg(trapline)
        .args(if more.contains(&"--modes") {
            &[][..]
        } else {
            &["--modes", "hardware"]
        })
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn samples(dir: &Path) -> Vec<Sample> {
    read_table(&dir.join("out").join(SAMPLES)).unwrap_or_default()
}

/// Waits until the guest has booted, which is when it starts to hang.
fn wait_for_boot(dir: &Path, child: &mut Child) {
    let deadline = Instant::now() + PATIENCE;
    while !samples(dir).iter().any(|sample| sample.workload == BOOT) {
        assert!(Instant::now() < deadline, "no boot row");
        assert_eq!(child.try_wait().expect("ours"), None, "ended by itself");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn finish(mut child: Child) -> Output {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().expect("ours").is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("measure did not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().expect("ours")
}

#[test]
fn a_run_leaves_valid_files_and_a_table() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), "echo unsupported by this fake");
    let child = measure(
        dir.path(),
        &trapline,
        &["--workloads", "al?", "--rounds", "1"],
    )
    .spawn();
    let output = finish(child.expect("built"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(
        table.contains("alu") && table.contains("unsupported"),
        "{table}"
    );
    let out = dir.path().join("out");
    let summary = Summary::read(&out.join(SUMMARY)).expect("valid");
    assert!(summary.rows.iter().any(|row| row.workload == "alu"));
    let manifest = Manifest::read(&out.join(MANIFEST)).expect("valid");
    assert_eq!(manifest.modes[0].name, "hardware");
    assert!(manifest.duration_s.is_some_and(|seconds| seconds > 0.0));
    assert_eq!(manifest.images.len(), 4);
    assert_eq!(manifest.backing, None);
}

#[test]
fn floors_come_with_para_and_have_rows_of_their_own() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), "echo unsupported by this fake");
    let run = |modes: &str| {
        let more = ["--workloads", "alu", "--rounds", "1", "--modes", modes];
        let mut command = measure(dir.path(), &trapline, &more);
        let output = finish(command.spawn().expect("built"));
        // The fake does not know what a floor's empty window answers, so there is no figure.
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        samples(dir.path())
    };
    let rows = run("para,native");
    let has = |workload: &str, mode: &str| {
        let mut rows = rows.iter();
        rows.any(|row| row.workload == workload && row.mode == mode)
    };
    for mode in ["para", "native"] {
        assert!(has("alu", mode) && !has("notification", mode), "{mode}");
    }
    for floor in ["host_syscall", "notification", "map_page", "sigsegv"] {
        assert!(has(floor, FLOOR), "{floor}");
    }
    assert!(!has("alu", FLOOR));
    assert!(run("native").iter().all(|row| row.mode != FLOOR));
}

#[test]
fn wrong_usage_is_status_2_with_one_clear_line() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), ":");
    for (arguments, words) in [
        (&["--workloads", "nosuch*"][..], "no workload matches"),
        (&["--peers", "bochs"], "unknown peer"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_measure"));
        command.arg("--out").arg(dir.path().join("out"));
        command.arg("--trapline").arg(&trapline).args(arguments);
        let output = command.output().expect("built");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(words), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// Measures, and interrupts the run while its first guest is there.
fn interrupt(dir: &Path, trapline: &Path, workloads: &str) {
    let mut child = measure(dir, trapline, &["--workloads", workloads])
        .spawn()
        .expect("built");
    wait_for_boot(dir, &mut child);
    // SAFETY: kill has no memory effects; the child is ours and not reaped yet.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130), "{output:?}");
}

#[test]
fn interrupt_keeps_what_was_measured_and_leaves_nothing_running() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), "echo begin; sleep 60");
    interrupt(dir.path(), &trapline, "alu,sieve");
    for workload in ["alu", "sieve"] {
        let samples = samples(dir.path());
        let row = samples.iter().find(|sample| sample.workload == workload);
        let row = row.expect("every workload has a row");
        assert!(
            !row.status.is_ok() && row.status != Status::Invalid,
            "{row:?}"
        );
    }
    assert!(dir.path().join("out").join(SUMMARY).is_file());
    assert_nothing_runs(dir.path());
}

#[test]
fn devices_are_there_while_a_guest_runs_and_gone_after_an_interrupt() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), "echo begin; sleep 60");
    let noted = dir.path().join("devices");
    // What the fake finds at the paths that it is told, before it greets.
    let script = std::fs::read_to_string(&trapline).expect("just written");
    let note = format!(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do case $1 in\n\
         --disk) wc -c < \"$2\";;\n\
         --net) socket=${{2#unix:}}; test -S \"$socket\" && echo \"$socket\";;\n\
         esac; shift; done >> '{}'",
        noted.display()
    );
    std::fs::write(&trapline, script.replacen("#!/bin/sh", &note, 1)).expect("writable");
    interrupt(dir.path(), &trapline, "alu,blk_randread");
    let noted = std::fs::read_to_string(&noted).expect("noted");
    let lines: Vec<&str> = noted.lines().collect();
    assert_eq!(lines[0], benches::disk::DISK_BYTES.to_string(), "{noted}");
    assert!(lines.len() > 1 && !Path::new(lines[1]).exists(), "{noted}");
    let out = std::fs::read_dir(dir.path().join("out")).expect("there");
    let large: u64 = out
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(large < 1 << 20, "a disk is left");
    let manifest = Manifest::read(&dir.path().join("out").join(MANIFEST)).expect("valid");
    assert_eq!(manifest.backing.expect("devices").disk_mib, 64);
}

#[test]
fn guests_die_with_a_killed_harness() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let trapline = fake_trapline(dir.path(), "while :; do :; done");
    let mut child = measure(dir.path(), &trapline, &["--workloads", "alu"])
        .spawn()
        .expect("built");
    wait_for_boot(dir.path(), &mut child);
    child.kill().expect("ours");
    finish(child);
    assert_nothing_runs(dir.path());
}
