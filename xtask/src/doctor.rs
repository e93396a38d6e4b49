//! `cargo xtask doctor`: what this host has, what it lacks, and how to mend that.

use std::process::{Command, ExitCode};

use reports_data::tool_version;

use crate::spawn;

/// A program that Trapline uses.
struct Tool {
    program: &'static str,
    argument: &'static str,
    /// What it is for.
    purpose: &'static str,
    /// How to get it.
    remedy: &'static str,
    /// Whether nothing works without it.
    required: bool,
}

const TOOLS: &[Tool] = &[
    Tool {
        program: "rustc",
        argument: "--version",
        purpose: "everything",
        remedy: "https://rustup.rs",
        required: true,
    },
    Tool {
        program: "cc",
        argument: "--version",
        purpose: "linking guest images",
        remedy: "apt-get install build-essential",
        required: true,
    },
    Tool {
        program: "rustfmt",
        argument: "--version",
        purpose: "cargo xtask check",
        remedy: "rustup component add rustfmt",
        required: false,
    },
    Tool {
        program: "cargo-clippy",
        argument: "--version",
        purpose: "cargo xtask check",
        remedy: "rustup component add clippy",
        required: false,
    },
    Tool {
        program: "git",
        argument: "--version",
        purpose: "the revision in manifest.json",
        remedy: "apt-get install git",
        required: false,
    },
    Tool {
        program: "qemu-system-x86_64",
        argument: "--version",
        purpose: "peers qemu-tcg and qemu-kvm",
        remedy: "apt-get install qemu-system-x86",
        required: false,
    },
];

/// Looks at the host; fails if something is missing without which nothing works.
pub(crate) fn doctor() -> anyhow::Result<ExitCode> {
    let mut able = true;
    for tool in TOOLS {
        match tool_version(tool.program, tool.argument) {
            Some(version) => println!("{:<20} {version}", tool.program),
            None => {
                able &= !tool.required;
                let Tool {
                    program,
                    purpose,
                    remedy,
                    ..
                } = tool;
                println!("{program:<20} MISSING, needed for {purpose}: {remedy}");
            }
        }
    }
    println!();
    spawn::build(&["engines"], &["trapline"])?;
    let status = spawn::run(Command::new(spawn::sibling("trapline")?).arg("probe"))?;
    // A mode that can't run here is said by the probe; it is no fault of the installation.
    if status.code().is_none() {
        println!("trapline probe: {status}");
        able = false;
    }
    Ok(if able {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
