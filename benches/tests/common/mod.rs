//! Fake guests: small shell programs that speak the console protocol, more or less.
// Each test binary uses its own part of this module.
#![allow(dead_code, unreachable_pub)]

use std::path::Path;
use std::time::{Duration, Instant};

use benches::contender::Contender;
use benches::plan::Plan;
use benches::process::CommandLine;
use benches::progress::Progress;
use benches::record::Recorder;
use benches::session::Session;
use benches::task::Task;
use benches::verdict::Traits;
use benches::vm::Launch;
use reports_data::{Role, SAMPLES, Sample, read_table};

/// No session over fake guests may take longer: their limits add up to less.
const PATIENCE: Duration = Duration::from_secs(60);
/// Limit of what is meant to hang. Long enough for a good answer on a busy host.
pub const LIMIT: Duration = Duration::from_millis(1500);

/// A guest that is well-behaved except where `on_alu` says otherwise. It notes its process id in
/// `dir`, and refuses every workload but `empty` and `alu` in its own words.
pub fn script(dir: &Path, on_alu: &str) -> String {
    let empty = programs::find("empty").expect("in the catalogue");
    let checksum = programs::oracle(empty, 0, 1).expect("takes no size");
    format!(
        "echo $$ >> '{}'\n\
         echo ready 1 unaware\n\
         while read -r verb name size iterations; do case $name in\n\
         empty) echo begin; echo end; echo done {checksum:016x} 10;;\n\
         alu) {on_alu};;\n\
         *) echo unsupported not by this guest;;\n\
         esac; done\n",
        dir.join("pids").display()
    )
}

/// A contender that runs a shell script.
pub fn contender(script: &str) -> Contender {
    Contender {
        name: "fake".to_owned(),
        label: "fake".to_owned(),
        engine: "sh".to_owned(),
        flavour: "unaware".to_owned(),
        role: Role::Mode,
        launch: Launch {
            command: CommandLine {
                program: "/bin/sh".to_owned(),
                args: vec!["-c".to_owned(), script.to_owned()],
            },
            counts_windows: false,
        },
        irqchip: None,
        doorbell: None,
        traits: Traits::default(),
        devices_only: false,
        devices: None,
    }
}

/// Short rounds with short limits.
pub fn plan() -> Plan {
    Plan {
        rounds: 2,
        min_rounds: 2,
        windows: 2,
        empty_windows: 3,
        target: Duration::from_millis(5),
        device_target: Duration::from_millis(5),
        command_limit: LIMIT,
        boot_limit: Duration::from_secs(20),
        budget: None,
        seed: 1,
    }
}

/// Measures `workloads` and returns the rows as they stand in the file.
pub fn measure(
    dir: &Path,
    plan: &Plan,
    contenders: Vec<Contender>,
    workloads: &[&str],
) -> Vec<Sample> {
    let tasks: Vec<Task> = workloads
        .iter()
        .map(|name| programs::find(name).expect("in the catalogue").into())
        .collect();
    let mut recorder = Recorder::create(dir, "test").expect("directory is writable");
    let progress = Progress::silent();
    let started = Instant::now();
    Session::new(plan, contenders, &tasks, &mut recorder, &progress)
        .run()
        .expect("directory is writable");
    let elapsed = started.elapsed();
    assert!(elapsed < PATIENCE, "took {elapsed:?}");
    assert_nothing_runs(dir);
    read_table(&dir.join(SAMPLES)).expect("rows are valid")
}

/// Asserts that nothing is left of the process groups whose leaders noted themselves in `dir`.
pub fn assert_nothing_runs(dir: &Path) {
    let noted = std::fs::read_to_string(dir.join("pids")).unwrap_or_default();
    let groups: Vec<&str> = noted.lines().collect();
    // A killed group's orphans are reaped by init in their own time.
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let left = members_of(&groups);
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "still there: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Lines of /proc/PID/stat of processes in one of `groups` that are not dead yet.
fn members_of(groups: &[&str]) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("/proc is mounted");
    processes
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter(|stat| {
            // Fields after the name, which may hold anything: state, ppid, pgrp (proc_pid_stat(5)).
            let (_, rest) = stat.rsplit_once(')').unwrap_or(("", ""));
            let mut fields = rest.split_whitespace();
            let (state, group) = (fields.next(), fields.nth(1));
            state != Some("Z") && group.is_some_and(|group| groups.contains(&group))
        })
        .collect()
}
