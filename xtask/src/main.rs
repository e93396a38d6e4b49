//! `cargo xtask`: the project's chores, each one command.
//!
//! Spawns cargo, `measure` and `trapline`, and asks `reports` for the page. Invariant: nothing is
//! measured in this process.

mod check;
mod compare;
mod doctor;
mod spawn;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Trapline's chores: compare modes, render reports, check the tree, look at the host.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Build, measure every mode beside native and peers, and write the report.
    #[command(after_help = compare::EXAMPLES)]
    Compare(compare::Arguments),
    /// Render report.html of a run's directory once more.
    Report {
        /// Directory that holds manifest.json and samples.csv.
        dir: PathBuf,
    },
    /// Everything that CI runs: format, lints, documentation, tests, layers, a short comparison.
    Check,
    /// What this host has, what it lacks, and how to mend that.
    Doctor,
}

const EXAMPLES: &str = "Examples:
  cargo xtask compare --quick
  cargo xtask report out/compare
  cargo xtask check
  cargo xtask doctor

Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.";

fn main() -> ExitCode {
    let chore = Arguments::parse().chore;
    let done = match &chore {
        Chore::Compare(arguments) => compare::compare(arguments),
        Chore::Report { dir } => report(dir),
        Chore::Check => check::check(),
        Chore::Doctor => doctor::doctor(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("xtask: {}", one_line(&error));
        ExitCode::FAILURE
    })
}

fn report(dir: &std::path::Path) -> anyhow::Result<ExitCode> {
    let path = reports::write_report(dir)
        .with_context(|| format!("render the report of {}", dir.display()))?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
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
