//! `trapline list`: modes and workloads.

use std::io::Write;
use std::process::ExitCode;

use crate::{cli, status};

/// Prints both tables.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "modes")?;
    for mode in engines::MODES {
        writeln!(
            out,
            "  {:<10} {:<4} {:<8} {}",
            mode.name, mode.engine, mode.flavour, mode.about
        )?;
    }
    let native = "the same workload code as an ordinary process: the baseline";
    writeln!(out, "  {:<10} {:<4} {:<8} {native}", cli::NATIVE, "-", "-")?;
    writeln!(
        out,
        "workloads: name, ring, default size and iterations, one iteration"
    )?;
    for workload in programs::CATALOGUE {
        let ring = match workload.ring {
            programs::Ring::User => 3,
            programs::Ring::Kernel => 0,
        };
        writeln!(
            out,
            "  {:<10} {ring} {:>10} {:>10}  {}",
            workload.name, workload.size, workload.iterations, workload.operation
        )?;
    }
    out.flush()?;
    Ok(ExitCode::from(status::SUCCESS))
}
