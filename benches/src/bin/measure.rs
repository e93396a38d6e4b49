//! `measure`: one comparison, from the command line to the run's directory.
//!
//! Chooses contenders and workloads, lets the harness measure, and closes the files. Builds
//! nothing and renders no report: that is `cargo xtask compare`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use benches::choices::{DiskCache, Doorbell, Irqchip};
use benches::contender::{Contender, Parts, QEMU, mode_names};
use benches::devices::{self, Devices};
use benches::plan::Plan;
use benches::priority::{self, Priority};
use benches::progress::Progress;
use benches::record::Recorder;
use benches::session::{Ending, Session};
use benches::table::{Format, render};
use benches::task::Task;
use benches::{glob, interrupt};
use clap::Parser;
use programs::Workload;
use reports_data::{
    Circumstances, EMPTY, MANIFEST, Manifest, SUMMARY, sha256_hex, summarise, tool_version,
};

/// Exit status of a run that the user cut short: 128 + SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

/// Measures workloads in every mode and writes manifest.json, samples.csv, exits.csv,
/// latency.csv and summary.json.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    /// Short windows, fewer rounds, and an end within two minutes.
    #[arg(long)]
    quick: bool,
    /// Modes, comma-separated, of those that `trapline list` names; `none` for none. All by default.
    #[arg(long, value_delimiter = ',', default_values = mode_names())]
    modes: Vec<String>,
    /// Peers, comma-separated: qemu-tcg, qemu-tcg-virtio (devices alone), qemu-kvm; `none` for none.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "qemu-tcg,qemu-tcg-virtio"
    )]
    peers: Vec<String>,
    /// Workloads by name, comma-separated patterns with * and ?.
    #[arg(long, value_name = "GLOB", default_value = "*")]
    workloads: String,
    /// Directory for the run's files; created if it is not there.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Rounds of fresh virtual machines.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// What stands between every contender's disk and the file system.
    #[arg(long, value_enum, default_value_t)]
    disk_cache: DiskCache,
    /// Whose interrupt controllers guests under KVM have.
    #[arg(long, value_enum, default_value_t)]
    irqchip: Irqchip,
    /// How virtio drivers under KVM notify (mode hybrid).
    #[arg(long, value_enum, default_value_t)]
    doorbell: Doorbell,
    /// Seed of the orders and of the bootstrap.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The binary `trapline`; by default the one beside this program.
    #[arg(long, value_name = "PATH")]
    trapline: Option<PathBuf>,
    /// How to print the results.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

const EXAMPLES: &str = "Examples:
  measure --quick --out out/run
  measure --modes full,native --peers none --workloads 'alu,s*' --out out/alu --format tsv

Exit status: 0 measured, 1 could not measure, 2 wrong usage, 130 interrupted (what was measured
until then is kept).";

fn main() -> ExitCode {
    match measure(&Arguments::parse()) {
        Ok(Ending::Complete) => ExitCode::SUCCESS,
        Ok(Ending::Interrupted) => {
            eprintln!("measure: interrupted; what was measured until then is kept");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            let usage = error.is::<Usage>();
            eprintln!("measure: {}", one_line(&error));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// The command line asks for something that there is not.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

fn measure(arguments: &Arguments) -> anyhow::Result<Ending> {
    interrupt::install();
    let mut tasks = choose_workloads(&arguments.workloads)?;
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("create {}", arguments.out.display()))?;
    let images = Images::write(&arguments.out)?;
    let manifest_path = arguments.out.join(MANIFEST);
    let run = format!("{}-{}", unix_seconds()?, std::process::id());
    let mut manifest = Manifest::collect(Circumstances {
        run: &run,
        started_unix_s: unix_seconds()?,
        command: std::env::args().collect(),
        seed: arguments.seed,
        profile: if cfg!(debug_assertions) {
            "dev"
        } else {
            "release"
        },
        source_tree: Path::new(env!("CARGO_MANIFEST_DIR")),
    });
    let parts = Parts {
        trapline: find_trapline(arguments.trapline.as_deref())?,
        unaware_image: images.unaware.clone(),
        hybrid_image: images.hybrid.clone(),
        kvm_backend: manifest.kvm.backend.clone(),
        irqchip: arguments.irqchip,
        doorbell: arguments.doorbell,
    };
    let mut contenders = choose_contenders(arguments, &parts)?;
    if contenders.iter().any(Contender::has_floors) {
        contenders.push(Contender::floors(&parts));
        tasks.extend(Task::floors());
    }
    contenders.retain(|contender| tasks.iter().any(|task| contender.is_asked(*task)));
    // Not in the run's own directory: the name of a socket has room for 107 bytes (unix(7)).
    let sockets;
    if tasks.iter().any(|task| task.uses_devices()) {
        sockets = tempfile::Builder::new()
            .prefix("trapline-")
            .tempdir()
            .context("create a directory for sockets")?;
        let takers = contenders.iter_mut().filter(|c| c.takes_devices());
        for (number, contender) in takers.enumerate() {
            let name = number.to_string();
            let cache = arguments.disk_cache;
            let devices = Devices::create(&arguments.out, sockets.path(), &name, cache);
            let devices = devices.with_context(|| format!("devices of {}", contender.name))?;
            contender.attach(devices);
        }
        manifest.backing = Some(devices::backing(&arguments.out, arguments.disk_cache));
    }
    manifest.modes = contenders.iter().map(Contender::info).collect();
    manifest.images = [
        ("unaware", images::unaware()),
        ("hybrid", images::hybrid()),
        ("aware", images::aware()),
        ("native", images::native()),
    ]
    .map(|(name, bytes)| (name.to_owned(), sha256_hex(bytes)))
    .into();
    if let Some(version) = tool_version(QEMU, "--version") {
        manifest.tools.insert(QEMU.to_owned(), version);
    }
    manifest.write(&manifest_path)?;

    let mut plan = if arguments.quick {
        Plan::quick()
    } else {
        Plan::thorough()
    };
    plan.seed = arguments.seed;
    if let Some(rounds) = arguments.rounds {
        plan.rounds = rounds;
        plan.min_rounds = plan.min_rounds.min(rounds);
    }
    let progress = Progress::new();
    let mut recorder = Recorder::create(&arguments.out, &run)?;
    match priority::raise() {
        Priority::RealTime => {}
        Priority::Nice | Priority::Ordinary => progress
            .line("no real-time priority (CAP_SYS_NICE): other programs disturb this run more"),
    }
    let session = Session::new(&plan, contenders, &tasks, &mut recorder, &progress);
    let ending = session.run()?;
    progress.finish();

    manifest.finish(progress.elapsed().as_secs_f64());
    manifest.write(&manifest_path)?;
    let summary = summarise(recorder.samples(), arguments.seed);
    summary.write(&arguments.out.join(SUMMARY))?;
    print!("{}", render(arguments.format, &manifest, &summary)?);
    Ok(ending)
}

/// The chosen workloads in catalogue order. `empty` is not among them: it is measured in any case,
/// because everything else rests on it.
fn choose_workloads(patterns: &str) -> anyhow::Result<Vec<Task>> {
    let (empty, rest): (Vec<&Workload>, Vec<&Workload>) = programs::CATALOGUE
        .iter()
        .filter(|workload| glob::matches(patterns, workload.name))
        .partition(|workload| workload.name == EMPTY);
    if empty.is_empty() && rest.is_empty() {
        let names: Vec<&str> = programs::CATALOGUE.iter().map(|w| w.name).collect();
        bail!(Usage(format!(
            "no workload matches {patterns:?}; there are {}",
            names.join(", ")
        )));
    }
    Ok(rest.into_iter().map(Task::Workload).collect())
}

fn choose_contenders(arguments: &Arguments, parts: &Parts) -> anyhow::Result<Vec<Contender>> {
    let mut contenders: Vec<Contender> = Vec::new();
    let named = |names: &[String]| -> Vec<String> {
        let none = ["", "none"];
        names
            .iter()
            .map(|name| name.trim().to_owned())
            .filter(|name| !none.contains(&name.as_str()))
            .collect()
    };
    for name in named(&arguments.modes) {
        contenders.push(Contender::mode(&name, parts).map_err(|e| Usage(e.to_string()))?);
    }
    for name in named(&arguments.peers) {
        contenders.push(Contender::peer(&name, parts).map_err(|e| Usage(e.to_string()))?);
    }
    for (index, contender) in contenders.iter().enumerate() {
        if contenders[..index].iter().any(|c| c.name == contender.name) {
            bail!(Usage(format!("{} is named twice", contender.name)));
        }
    }
    if contenders.is_empty() {
        bail!(Usage("neither a mode nor a peer to measure".to_owned()));
    }
    Ok(contenders)
}

fn find_trapline(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .context("find this program")?
            .with_file_name("trapline"),
    };
    if !path.is_file() {
        bail!(
            "{} is not there: cargo build --release -p engines --bin trapline",
            path.display()
        );
    }
    Ok(path)
}

/// The images as files, because peers take theirs by path, and the directory that they lie in: one in
/// the run's own, so that a harness that is killed leaves nothing elsewhere. Removed at the end.
struct Images {
    unaware: PathBuf,
    hybrid: PathBuf,
    _dir: tempfile::TempDir,
}

impl Images {
    fn write(out: &Path) -> anyhow::Result<Images> {
        let dir = tempfile::Builder::new()
            .prefix(".images-")
            .tempdir_in(out)
            .with_context(|| format!("create a directory for the images in {}", out.display()))?;
        let write = |name: &str, image: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, image).with_context(|| format!("write {}", path.display()))?;
            anyhow::Ok(path)
        };
        Ok(Images {
            unaware: write("unaware.elf", images::unaware())?,
            hybrid: write("hybrid.elf", images::hybrid())?,
            _dir: dir,
        })
    }
}

fn unix_seconds() -> anyhow::Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(now.context("the clock stands before 1970")?.as_secs())
}

/// An error and what caused it, on one line. Causes that an error already quotes are not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            line = match line.as_str() {
                "" => cause,
                _ => format!("{line}: {cause}"),
            };
        }
    }
    line
}
