//! `trapline`: a VMM. One VM is one process.
//!
//! The guest's console is stdin and stdout, counters go to a descriptor of the caller's choice,
//! and the exit status says how the guest ended (see [`status`]).

mod cli;
mod conclude;
mod devices;
mod floor;
mod insn;
mod list;
mod lockstep;
mod modules;
mod native;
mod probe;
mod run;
mod status;
mod wire;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

/// Memory is given back once it isn't needed, rather than kept for more: what was read to be loaded, say,
/// and each list that has outgrown its place. glibc does that from a size on that it raises with what it sees,
/// unless told (mallopt(3)).
fn give_memory_back() {
    const FROM: libc::c_int = 128 << 10;
    // SAFETY: a parameter of the allocator, before there is a second thread.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, FROM) };
}

fn main() -> ExitCode {
    give_memory_back();
    let done = match cli::Cli::parse().command {
        cli::Command::Run(arguments) => run::run(&arguments),
        cli::Command::Probe(arguments) => probe::run(&arguments),
        cli::Command::Insn(arguments) => insn::run(&arguments),
        cli::Command::List => list::run(),
        cli::Command::Floor => floor::run(),
    };
    done.unwrap_or_else(|error| {
        if broken_pipe(&error) {
            return status::signalled(libc::SIGPIPE as u32);
        }
        say(&format!("{error:#}"));
        ExitCode::from(status::USAGE)
    })
}

/// The last line on stderr. A stderr that nobody reads is no reason to fail.
fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "trapline: {message}");
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
