//! `trapline run --mode native`: the baseline, as an ordinary process on the same stdin and stdout.
//!
//! The baseline is a child that has the caller's own stdin and stdout, so nothing stands between
//! the two; the parent only waits, keeps the time limit and translates the exit status. Only with
//! a workload named on the command line does it send the order and pass on the answers. No exits
//! are counted: there are none.

use std::ffi::CString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use abi::word;
use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags};

use crate::conclude::report_end;
use crate::run::{Order, watch};
use crate::wire::{Event, Stats};
use crate::{cli, devices, status};

/// Runs the baseline.
pub(crate) fn run(
    arguments: &cli::Run,
    order: Option<&Order>,
    mut stats: Stats,
) -> anyhow::Result<ExitCode> {
    if let Some(image) = arguments
        .guest
        .image
        .as_ref()
        .or(arguments.guest.kernel.as_ref())
        && !image
            .as_os_str()
            .as_encoded_bytes()
            .starts_with(cli::BUILTIN.as_bytes())
    {
        bail!(
            "mode {} runs no image file: it is the baseline",
            cli::NATIVE
        );
    }
    if arguments.smp > 1 {
        bail!("mode {} has no vCPU: leave out --smp", cli::NATIVE);
    }
    if let Some(timeout) = arguments.timeout {
        watch(timeout);
    }
    stats.write(&Event::Start {
        mode: cli::NATIVE,
        engine: cli::NATIVE,
        backend: None,
        irqchip: None,
        doorbell: None,
        cpus: 1,
        memory_mib: 0,
    });
    let program = program().context("native program")?;
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.arg0("trapline-native");
    if order.is_some() {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
    }
    // SAFETY: prctl with these arguments is a system call and nothing else, as is needed between
    // fork and exec.
    unsafe {
        command.pre_exec(|| {
            // The baseline must not outlive a parent that is killed.
            match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let _inherited = devices::hand_over(arguments, &mut command)?;
    let mut child = command.spawn().context("start of the native program")?;
    let reader = order.map(|order| converse(&mut child, order)).transpose()?;
    let ended = wait(&mut child, arguments.timeout)?;
    let (outcome, message, code) = match ended {
        None => ("limit", "time limit reached".to_owned(), status::LIMIT),
        Some(ended) => verdict(ended, reader.and_then(|reader| reader.join().ok())),
    };
    Ok(report_end(
        &mut stats,
        outcome,
        &message,
        &[],
        ExitCode::from(code),
    ))
}

/// The program as an unnamed file. Not closed on exec: /proc/self/fd is looked up then.
fn program() -> anyhow::Result<OwnedFd> {
    let name = CString::new("trapline-native")?;
    let fd = rustix::fs::memfd_create(&name, MemfdFlags::empty())?;
    let mut file = std::fs::File::from(fd);
    file.write_all(images::native())?;
    // A file that is open for writing can't be executed (ETXTBSY); memfds are exempt only when
    // sealed or reopened, so this one is handed on read-only.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let reopened = rustix::fs::open(path, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
    Ok(reopened)
}

/// Sends the order and passes on the answers; the thread answers with whether it was carried out.
fn converse(child: &mut Child, order: &Order) -> anyhow::Result<std::thread::JoinHandle<bool>> {
    let mut input = child.stdin.take().context("pipe to the native program")?;
    let output = child
        .stdout
        .take()
        .context("pipe from the native program")?;
    // The pipe holds both lines; a child that has died already is found out by its status.
    let _ = write!(input, "{order}\n{} 0\n", word::QUIT);
    Ok(std::thread::spawn(move || {
        let mut done = false;
        for line in BufReader::new(output).lines() {
            let Ok(line) = line else { break };
            done |= line.split(' ').next() == Some(word::DONE);
            if writeln!(std::io::stdout(), "{line}").is_err() {
                break;
            }
        }
        done
    }))
}

/// Waits for the child; kills it and answers `None` when the time is up.
fn wait(child: &mut Child, timeout: Option<Duration>) -> anyhow::Result<Option<ExitStatus>> {
    let Some(timeout) = timeout else {
        return Ok(Some(child.wait()?));
    };
    let pid = Pid::from_child(child);
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    if rustix::event::poll(&mut fds, Some(&limit))? == 0 {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    Ok(Some(child.wait()?))
}

/// (outcome, message, status) of a child that ended by itself; `ran` is `None` without an order.
fn verdict(ended: ExitStatus, ran: Option<bool>) -> (&'static str, String, u8) {
    if let Some(signal) = ended.signal() {
        let message = format!("the native program was ended by signal {signal}");
        return ("crashed", message, status::CRASHED);
    }
    match (ended.code(), ran) {
        (Some(0), Some(true) | None) => ("success", String::new(), status::SUCCESS),
        (Some(0), Some(false)) => {
            let message = "the native program did not carry out the workload".to_owned();
            ("failure", message, status::FAILURE)
        }
        (code, _) => {
            let code = code.unwrap_or(-1);
            let message = format!("the native program failed with code {code}");
            ("failure", message, status::FAILURE)
        }
    }
}
