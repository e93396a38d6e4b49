//! `trapline probe`: what this host can run, and how to mend what it can't.

use std::env;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use engine_core::{Irqchip, Unavailable};
use serde::Serialize;

use crate::{cli, status};

/// The peers' emulator.
const QEMU: &str = "qemu-system-x86_64";

/// One thing that can or can't run here.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    /// `mode`, `baseline` or `peer`.
    role: &'static str,
    engine: Option<&'static str>,
    backend: Option<&'static str>,
    /// Whose interrupt controllers it can have, the default first.
    irqchips: Vec<&'static str>,
    available: bool,
    /// What was found, or the probe that failed.
    probe: String,
    /// Why it can't run.
    reason: Option<String>,
    /// How to mend that.
    fix: Option<String>,
}

impl Row {
    fn unavailable(mut self, error: Unavailable) -> Self {
        self.available = false;
        self.probe = error.probe;
        self.reason = Some(error.reason);
        self.fix = Some(error.fix);
        self
    }
}

/// Prints a table or JSON. The status is 0 whatever was found: the probe itself has worked.
pub(crate) fn run(arguments: &cli::Probe) -> anyhow::Result<ExitCode> {
    let rows = rows();
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        writeln!(out)?;
    } else {
        for row in &rows {
            let name = match row.backend {
                Some(backend) => format!("{} ({backend})", row.name),
                None => row.name.to_owned(),
            };
            match (&row.reason, &row.fix) {
                (Some(reason), Some(fix)) => {
                    writeln!(out, "{name:<18} unavailable  {}: {reason}", row.probe)?;
                    writeln!(out, "{:<18} to mend it   {fix}", "")?;
                }
                _ => writeln!(out, "{name:<18} available    {}", row.probe)?,
            }
            if row.irqchips.len() > 1 {
                writeln!(out, "{:<18} irqchip      {}", "", row.irqchips.join(", "))?;
            }
        }
    }
    out.flush()?;
    Ok(ExitCode::from(status::SUCCESS))
}

fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = engines::MODES.iter().map(mode).collect();
    rows.push(Row {
        name: cli::NATIVE,
        role: "baseline",
        engine: None,
        backend: None,
        irqchips: Vec::new(),
        available: true,
        probe: "an ordinary process".into(),
        reason: None,
        fix: None,
    });
    let kvm = kvm::probe();
    rows.push(peer("qemu-tcg", None));
    rows.push(match kvm {
        Ok(host) => peer("qemu-kvm", Some(host.backend.name())),
        Err(error) => peer("qemu-kvm", None).unavailable(error),
    });
    rows
}

fn mode(mode: &'static engines::Mode) -> Row {
    let row = Row {
        name: mode.name,
        role: "mode",
        engine: Some(mode.engine),
        backend: None,
        irqchips: Vec::new(),
        available: true,
        probe: mode.about.into(),
        reason: None,
        fix: None,
    };
    match (mode.probe)() {
        Ok(found) => Row {
            backend: found.backend,
            irqchips: irqchips(mode),
            ..row
        },
        Err(error) => row.unavailable(error),
    }
}

/// Whose interrupt controllers a mode's guests can have here.
fn irqchips(mode: &engines::Mode) -> Vec<&'static str> {
    let user = matches!(mode.runs, engines::Runs::Vcpu(_)).then_some(Irqchip::User);
    let kernel = mode
        .kernel_irqchip
        .and_then(|probe| probe().ok())
        .map(|()| Irqchip::Kernel);
    user.into_iter().chain(kernel).map(Irqchip::name).collect()
}

fn peer(name: &'static str, backend: Option<&'static str>) -> Row {
    let row = Row {
        name,
        role: "peer",
        engine: None,
        backend,
        irqchips: Vec::new(),
        available: true,
        probe: String::new(),
        reason: None,
        fix: None,
    };
    match find_in_path(QEMU) {
        Some(path) => Row {
            probe: path.display().to_string(),
            ..row
        },
        None => row.unavailable(Unavailable {
            probe: format!("look for {QEMU} in PATH"),
            reason: "not found".into(),
            fix: "install it: sudo apt-get install qemu-system-x86".into(),
        }),
    }
}

fn find_in_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| {
            path.metadata()
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
}
