//! `cargo xtask check`: exactly what CI runs.
//!
//! Every step runs even if an earlier one failed, so that one run shows all there is to mend.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, bail};
use reports_data::{Metric, NATIVE, Phase, SUMMARY, Status, Summary};

use crate::compare::{self, Format};
use crate::spawn::{self, cargo};

/// Modes of the short comparison.
const SMOKE_MODES: &str = "full,hardware,para,hybrid,hybrid-bt,native";
/// Workloads of the short comparison: one per way in which a guest leaves its code, and a device.
const SMOKE_WORKLOADS: &str = "alu,fib,syscall,cpuid,out,blk_randread";
/// Modes that run on every host, so that their rows must be there.
const EVERYWHERE: &[&str] = &["full", NATIVE];

/// Flavours of the guest, each of which is an image of its own.
const GUEST_FLAVOURS: &[&str] = &["unaware", "hybrid", "aware"];

struct Step {
    name: &'static str,
    run: fn() -> anyhow::Result<()>,
}

const STEPS: &[Step] = &[
    Step {
        name: "format",
        run: || passes(&mut cargo(&["fmt", "--all", "--check"])),
    },
    Step {
        name: "lints",
        run: || {
            let clippy = ["clippy", "--workspace", "--all-targets"];
            passes(cargo(&clippy).args(["--", "-D", "warnings"]))?;
            // The workspace's own pass sees the guest with its default features, which is no image.
            GUEST_FLAVOURS.iter().try_for_each(|flavour| {
                let clippy = ["clippy", "--package", "guest", "--no-default-features"];
                let flavour = ["--features", flavour, "--", "-D", "warnings"];
                passes(cargo(&clippy).args(flavour))
            })
        },
    },
    Step {
        name: "documentation",
        run: || {
            let doc = [
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ];
            // These pages are for who works on the tree, so private items are in them, and a
            // public page may link to one.
            let flags = "-D warnings -A rustdoc::private_intra_doc_links";
            passes(cargo(&doc).env("RUSTDOCFLAGS", flags))
        },
    },
    Step {
        name: "layers",
        run: || {
            passes(&mut cargo(&[
                "test",
                "--package",
                "xtask",
                "--test",
                "layers",
            ]))
        },
    },
    Step {
        name: "tests",
        run: || passes(&mut cargo(&["test", "--workspace", "--no-fail-fast"])),
    },
    Step {
        name: "comparison",
        run: smoke,
    },
];

/// Runs every step and says what came of each.
pub(crate) fn check() -> anyhow::Result<ExitCode> {
    let mut lines = Vec::new();
    let mut failed = 0;
    for step in STEPS {
        println!("== {}", step.name);
        let started = Instant::now();
        let result = (step.run)();
        let seconds = started.elapsed().as_secs_f64();
        let verdict = match result {
            Ok(()) => "ok".to_owned(),
            Err(error) => {
                failed += 1;
                format!("FAILED: {}", crate::one_line(&error))
            }
        };
        lines.push(format!("{:<14} {seconds:6.1} s  {verdict}", step.name));
        println!();
    }
    println!("== summary");
    for line in lines {
        println!("{line}");
    }
    println!(
        "check: {} of {} steps ok",
        STEPS.len() - failed,
        STEPS.len()
    );
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn passes(command: &mut Command) -> anyhow::Result<()> {
    let status = spawn::run(command)?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

/// A short comparison from end to end, held against what every host must be able to do.
fn smoke() -> anyhow::Result<()> {
    let out = smoke_dir()?;
    let arguments = compare::Arguments {
        quick: true,
        modes: Some(SMOKE_MODES.to_owned()),
        peers: "qemu-tcg".to_owned(),
        workloads: SMOKE_WORKLOADS.to_owned(),
        out: out.clone(),
        disk_cache: "host".to_owned(),
        irqchip: "user".to_owned(),
        doorbell: "exit".to_owned(),
        rounds: Some(2),
        seed: 1,
        format: Format::Table,
    };
    compare::compare(&arguments)?;
    let summary = Summary::read(&out.join(SUMMARY))?;
    judge(&summary)
}

fn smoke_dir() -> anyhow::Result<PathBuf> {
    let xtask = spawn::sibling("check-comparison")?;
    std::fs::create_dir_all(&xtask).with_context(|| format!("create {}", xtask.display()))?;
    Ok(xtask)
}

/// No row has gone wrong, and the modes that run everywhere have figures.
fn judge(summary: &Summary) -> anyhow::Result<()> {
    let wrong: Vec<String> = summary
        .rows
        .iter()
        .filter(|row| match row.status {
            Status::Failed => true,
            // A cold window is as long as it is; on a fast host it may drown in the marks.
            Status::Invalid => row.phase == Phase::Warm,
            Status::Ok | Status::Unsupported | Status::Unavailable | Status::Skipped => false,
        })
        .map(|row| {
            format!(
                "{} in {}: {}: {}",
                row.workload, row.mode, row.status, row.reason
            )
        })
        .collect();
    if !wrong.is_empty() {
        bail!("{}", wrong.join("; "));
    }
    for mode in EVERYWHERE {
        let row = summary.find("alu", mode, Phase::Warm, &Metric::TIME.name);
        match row {
            Some(row) if row.status.is_ok() => {}
            Some(row) => bail!("alu in {mode}: {}: {}", row.status, row.reason),
            None => bail!("alu in {mode}: no row"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use reports_data::{SCHEMA_VERSION, SummaryRow, Unit};

    fn row(mode: &str, status: Status) -> SummaryRow {
        let ok = status.is_ok();
        SummaryRow {
            workload: "alu".to_owned(),
            mode: mode.to_owned(),
            phase: Phase::Warm,
            metric: Metric::TIME.name.to_string(),
            unit: Unit::Ns,
            value: ok.then_some(1.0),
            ci_low: None,
            ci_high: None,
            n: usize::from(ok),
            status,
            reason: if ok { "" } else { "because" }.to_owned(),
        }
    }

    fn verdict(rows: Vec<SummaryRow>) -> Result<(), String> {
        let summary = Summary {
            schema_version: SCHEMA_VERSION,
            rows,
        };
        judge(&summary).map_err(|error| error.to_string())
    }

    #[test]
    fn unavailable_hardware_passes_and_unavailable_full_does_not() {
        let native = || row("native", Status::Ok);
        assert_eq!(
            verdict(vec![
                row("full", Status::Ok),
                native(),
                row("hardware", Status::Unavailable)
            ]),
            Ok(())
        );
        assert_eq!(
            verdict(vec![row("full", Status::Unavailable), native()]),
            Err("alu in full: unavailable: because".to_owned())
        );
        assert_eq!(
            verdict(vec![native()]),
            Err("alu in full: no row".to_owned())
        );
    }

    #[test]
    fn a_failed_row_anywhere_fails() {
        let rows = ["full", "native"].map(|mode| row(mode, Status::Ok));
        let failed = row("qemu-tcg", Status::Failed);
        assert_eq!(
            verdict(rows.into_iter().chain([failed]).collect()),
            Err("alu in qemu-tcg: failed: because".to_owned())
        );
    }
}
