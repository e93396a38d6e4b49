//! What the criterion benches share: one live virtual machine, one benchmark per workload.
//!
//! Wall time only, by `iter_custom`: criterion asks for a number of iterations, the guest runs
//! them in one window, and that window without the marks' own cost is the answer. Counters stay
//! with the binary `measure`. Invariant: a workload is timed only after a verified run, and a
//! window whose checksum is not the oracle's ends the bench instead of becoming a figure.

mod translate;

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::time::Duration;

use benches::choices::{DiskCache, Doorbell, Irqchip};
use benches::contender::{Contender, Parts};
use benches::devices::Devices;
use benches::interrupt;
use benches::oracle::Oracle;
use benches::priority;
use benches::slot::{Failure, Slot};
use criterion::Criterion;
use programs::{Group, Workload};
use reports_data::EMPTY;

/// Empty windows whose median is subtracted.
const EMPTY_WINDOWS: usize = 15;
/// Limit from spawning a virtual machine to its greeting.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// Limit of the run that shows whether a workload works at all.
const TRIAL_LIMIT: Duration = Duration::from_secs(5);
/// Limit of a measured run.
const RUN_LIMIT: Duration = Duration::from_secs(60);
/// Iterations of the trial.
const TRIAL_ITERATIONS: u64 = 2;

/// Benchmarks every workload that `mode` can run, each named group/workload.
pub(crate) fn bench_mode(mode: &str) {
    interrupt::install();
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        // Names are the same in every mode: kept apart, or one mode would be the other's baseline.
        .output_directory(&target_dir().join("criterion").join(mode))
        .configure_from_args();
    if engines::find(mode).is_some_and(|mode| mode.translates()) {
        translate::bench(&mut criterion, mode);
    }
    let parts = Parts {
        trapline: trapline(),
        // Peers alone take their image by path, and there are none here.
        unaware_image: PathBuf::new(),
        hybrid_image: PathBuf::new(),
        kvm_backend: None,
        irqchip: Irqchip::default(),
        doorbell: Doorbell::default(),
    };
    let mut contender = Contender::mode(mode, &parts).unwrap_or_else(|e| fail(&e.to_string()));
    let sockets = tempfile::tempdir().unwrap_or_else(|e| fail(&format!("sockets: {e}")));
    if contender.takes_devices() {
        let devices = Devices::create(&target_dir(), sockets.path(), mode, DiskCache::Host)
            .unwrap_or_else(|e| fail(&format!("devices: {e}")));
        contender.attach(devices);
    }
    priority::raise();
    let mut machine = Machine {
        slot: Slot::new(contender, 0),
        oracle: Oracle::default(),
        empty: Duration::ZERO,
    };
    if let Err(failure) = machine.boot() {
        // A mode that this host can't run is no failure of the benches.
        eprintln!("{mode}: {}", words(&failure));
        return;
    }
    let filter = filter(std::env::args().skip(1));
    for workload in programs::CATALOGUE {
        let group = match workload.group {
            Group::Compute => "compute",
            Group::Nano => "nano",
            Group::Micro => "micro",
            Group::Io => "io",
            // Its window is subtracted from every other one.
            Group::Empty => continue,
        };
        let id = format!("{group}/{}", workload.name);
        if filter.as_ref().is_some_and(|filter| !id.contains(filter)) {
            continue;
        }
        if let Err(failure) = machine.run(workload, TRIAL_ITERATIONS, TRIAL_LIMIT) {
            eprintln!("{id}: {}", words(&failure));
            continue;
        }
        criterion.bench_function(&id, |bencher| {
            bencher.iter_custom(|iterations| {
                machine
                    .run(workload, iterations, RUN_LIMIT)
                    .unwrap_or_else(|failure| fail(&format!("{id}: {}", words(&failure))))
            });
        });
    }
    criterion.final_summary();
}

struct Machine {
    slot: Slot,
    oracle: Oracle,
    empty: Duration,
}

impl Machine {
    fn boot(&mut self) -> Result<(), Failure> {
        self.slot.boot(BOOT_LIMIT)?;
        let Some(empty) = programs::find(EMPTY) else {
            return Ok(());
        };
        let mut windows = Vec::with_capacity(EMPTY_WINDOWS);
        for _ in 0..EMPTY_WINDOWS {
            let run = self.slot.run(empty, 1, TRIAL_LIMIT, &mut self.oracle)?;
            windows.push(run.done.window);
        }
        windows.sort_unstable();
        self.empty = windows[EMPTY_WINDOWS / 2];
        Ok(())
    }

    /// The window of `iterations` without the empty one. Never zero, which criterion's statistics
    /// can't take: one nanosecond stands for a window of its warm-up that drowned in the marks.
    fn run(
        &mut self,
        workload: &'static Workload,
        iterations: u64,
        limit: Duration,
    ) -> Result<Duration, Failure> {
        if !self.slot.is_up() {
            self.boot()?;
        }
        let run = self
            .slot
            .run(workload, iterations, limit, &mut self.oracle)?;
        let window = run.done.window.saturating_sub(self.empty);
        Ok(window.max(Duration::from_nanos(1)))
    }
}

fn words(failure: &Failure) -> String {
    let refusal = &failure.refusal;
    format!("{}: {}", refusal.status, refusal.reason)
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    // The virtual machine dies with this process.
    exit(1)
}

/// The filter among criterion's arguments, if it is plain text: spares the trials of workloads
/// that criterion would leave out anyway.
fn filter(arguments: impl Iterator<Item = String>) -> Option<String> {
    const VALUED: &[&str] = &[
        "-c",
        "--color",
        "--colour",
        "-s",
        "--save-baseline",
        "-b",
        "--baseline",
        "--baseline-lenient",
        "--format",
        "--profile-time",
        "--load-baseline",
        "--sample-size",
        "--warm-up-time",
        "--measurement-time",
        "--nresamples",
        "--noise-threshold",
        "--confidence-level",
        "--significance-level",
        "--plotting-backend",
        "--output-format",
    ];
    let mut value_follows = false;
    let plain = |c: char| c.is_alphanumeric() || "/_".contains(c);
    arguments
        .filter(|argument| {
            let positional = !value_follows && !argument.starts_with('-');
            value_follows = VALUED.contains(&argument.as_str());
            positional
        })
        .find(|argument| argument.chars().all(plain))
}

/// The binary `trapline` of the same build. Cargo builds no binaries of other packages for a
/// bench, so the bench asks for it; that is a matter of milliseconds if nothing has changed.
fn trapline() -> PathBuf {
    let target = target_dir();
    let path = target.join("release/trapline");
    // Cargo sets CARGO for what it runs; a bench that is started by hand takes what is there.
    if let Some(cargo) = std::env::var_os("CARGO") {
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--release", "--package", "engines"])
            .args(["--bin", "trapline", "--target-dir"])
            .arg(&target)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .status();
        if !status.is_ok_and(|status| status.success()) {
            fail("cargo build --release --package engines --bin trapline failed");
        }
    }
    if !path.is_file() {
        fail(&format!("{} is not there", path.display()));
    }
    path
}

/// The target directory that this bench was built into: it lies in TARGET/PROFILE/deps.
fn target_dir() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_else(|e| fail(&e.to_string()));
    match program.ancestors().nth(3) {
        Some(target) => target.to_owned(),
        None => fail("this bench lies in no target directory"),
    }
}
