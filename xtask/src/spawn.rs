//! Spawning others: cargo of the same toolchain, and programs of the same build.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::LazyLock;

use anyhow::{Context, bail};

/// The workspace's root: of the checkout that cargo runs this from. Where another one was compiled does not
/// matter, as a shared target directory may hold a program that came from a checkout that is gone.
pub(crate) fn root() -> &'static Path {
    static XTASK: LazyLock<PathBuf> = LazyLock::new(|| {
        let run = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let run = run.filter(|xtask| xtask.ends_with("xtask"));
        run.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")))
    });
    // xtask lies directly below it.
    XTASK.parent().unwrap_or(&XTASK)
}

/// The cargo that runs this, in the workspace's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// A program that was built into the same directory as this one.
pub(crate) fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let xtask = std::env::current_exe().context("find this program")?;
    Ok(xtask.with_file_name(name))
}

/// Builds binaries of the workspace as this one was built.
pub(crate) fn build(packages: &[&str], binaries: &[&str]) -> anyhow::Result<()> {
    let mut command = cargo(&["build", "--release"]);
    for package in packages {
        command.args(["--package", package]);
    }
    for binary in binaries {
        command.args(["--bin", binary]);
    }
    if !run(&mut command)?.success() {
        bail!("{} could not be built", binaries.join(" and "));
    }
    Ok(())
}

/// Runs a command to its end, on this process's terminal.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<ExitStatus> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.status().with_context(|| format!("start {program}"))
}

/// Leaves Ctrl-C to the child, which ends in its own way and keeps what it has; children that
/// want the signal install a handler, which replaces what they inherit.
pub(crate) fn leave_interrupts_to_the_child() {
    // SAFETY: signal with SIG_IGN has no memory effects.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
}
