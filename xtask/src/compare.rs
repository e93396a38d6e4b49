//! `cargo xtask compare`: build, let `measure` measure, render the report.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::spawn;

/// Exit status of `measure` when it was interrupted: its files are valid.
const INTERRUPTED: i32 = 130;
/// Exit status of `measure` for a command line that asks for something that there is not.
const USAGE: i32 = 2;

pub(crate) const EXAMPLES: &str = "Examples:
  cargo xtask compare --quick
  cargo xtask compare --quick --modes full,native --peers none --workloads 'alu,s*'
  cargo xtask compare --peers qemu-tcg,qemu-kvm --out out/thorough
  cargo xtask compare --modes hybrid,native --workloads 'blk_*,net_*' --irqchip kernel --doorbell eventfd
  cargo xtask compare --quick --workloads 'blk_*' --disk-cache direct

The run's directory holds manifest.json, samples.csv, exits.csv, latency.csv,
summary.json and report.html.";

/// What to compare; passed on to `measure`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Short windows, fewer rounds, and an end within two minutes.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Modes, comma-separated: full, hardware, para, hybrid, hybrid-bt, native; all by default.
    #[arg(long)]
    pub(crate) modes: Option<String>,
    /// Peers, comma-separated: qemu-tcg, qemu-tcg-virtio (devices alone), qemu-kvm; `none` for none.
    #[arg(long, default_value = "qemu-tcg,qemu-tcg-virtio")]
    pub(crate) peers: String,
    /// Workloads by name, comma-separated patterns with * and ?.
    #[arg(long, value_name = "GLOB", default_value = "*")]
    pub(crate) workloads: String,
    /// Directory for the run's files; what an earlier run left there is replaced.
    #[arg(long, value_name = "DIR", default_value = "out/compare")]
    pub(crate) out: PathBuf,
    /// Rounds of fresh virtual machines.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: Option<u32>,
    /// What stands between every contender's disk and the file system: the host's page cache, warm, or
    /// nothing (O_DIRECT).
    #[arg(long, value_name = "host|direct", default_value = "host", value_parser = ["host", "direct"])]
    pub(crate) disk_cache: String,
    /// Whose interrupt controllers guests under KVM have: the VMM's, as in every other mode, or the
    /// host kernel's.
    #[arg(long, value_name = "user|kernel", default_value = "user", value_parser = ["user", "kernel"])]
    pub(crate) irqchip: String,
    /// How virtio drivers under KVM notify (mode hybrid): by an exit, as in every other mode, or by an
    /// eventfd of the host's kernel.
    #[arg(long, value_name = "exit|eventfd", default_value = "exit", value_parser = ["exit", "eventfd"])]
    pub(crate) doorbell: String,
    /// Seed of the orders and of the bootstrap.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How to print the results.
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// Every row of the summary, tab-separated.
    Tsv,
    /// The summary as JSON.
    Json,
}

/// Builds, measures and renders.
pub(crate) fn compare(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    spawn::build(&["engines", "benches"], &["trapline", "measure"])?;
    spawn::leave_interrupts_to_the_child();
    let mut measure = measure(arguments)?;
    let status = spawn::run(&mut measure)?;
    let ending = match status.code() {
        Some(0) => ExitCode::SUCCESS,
        Some(INTERRUPTED) => ExitCode::from(INTERRUPTED as u8),
        // It has said what is wrong.
        Some(USAGE) => return Ok(ExitCode::from(USAGE as u8)),
        Some(_) | None => bail!("measure: {status}"),
    };
    let report = reports::write_report(&arguments.out)
        .with_context(|| format!("render the report of {}", arguments.out.display()))?;
    match arguments.format {
        Format::Table => println!("\n{}", report.display()),
        // Standard output belongs to the data alone.
        Format::Tsv | Format::Json => eprintln!("{}", report.display()),
    }
    Ok(ending)
}

fn measure(arguments: &Arguments) -> anyhow::Result<Command> {
    let mut command = Command::new(spawn::sibling("measure")?);
    if arguments.quick {
        command.arg("--quick");
    }
    command
        .args(["--peers", &arguments.peers])
        .args(["--workloads", &arguments.workloads])
        .args(["--disk-cache", &arguments.disk_cache])
        .args(["--irqchip", &arguments.irqchip])
        .args(["--doorbell", &arguments.doorbell])
        .args(["--seed", &arguments.seed.to_string()])
        .args([
            "--format",
            match arguments.format {
                Format::Table => "table",
                Format::Tsv => "tsv",
                Format::Json => "json",
            },
        ])
        .arg("--out")
        .arg(&arguments.out)
        .arg("--trapline")
        .arg(spawn::sibling("trapline")?);
    if let Some(modes) = &arguments.modes {
        command.args(["--modes", modes]);
    }
    if let Some(rounds) = arguments.rounds {
        command.args(["--rounds", &rounds.to_string()]);
    }
    Ok(command)
}
