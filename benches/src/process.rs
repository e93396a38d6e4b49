//! A child process with its console, diagnostics and counters on pipes.
//!
//! Knows nothing of the protocol spoken over them. The leaf that holds the harness's system calls.
//! Invariants: a child leads a process group of its own, which is killed and reaped when the value
//! is dropped, and by the kernel if the harness itself dies; our ends of the pipes never block.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Stands in an argument list for the number of the counters' file descriptor.
pub const STATS_FD: &str = "{stats-fd}";

/// What to spawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// Program, looked up in PATH if it has no slash.
    pub program: String,
    /// Arguments; [`STATS_FD`] is replaced by the number of a pipe's end.
    pub args: Vec<String>,
}

/// Which of the child's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output: the guest's console.
    Console,
    /// Standard error: diagnostics.
    Diagnostics,
    /// The counters' pipe.
    Stats,
}

/// A running child.
#[derive(Debug)]
pub struct Process {
    child: Child,
    group: libc::pid_t,
    input: File,
    console: Option<File>,
    diagnostics: Option<File>,
    stats: Option<File>,
}

impl Process {
    /// Spawns `command`.
    ///
    /// # Errors
    /// Whatever the host says to pipe, fork or exec.
    pub fn spawn(command: &CommandLine) -> io::Result<Process> {
        let wants_stats = command.args.iter().any(|arg| arg.contains(STATS_FD));
        let pipe = if wants_stats { Some(pipe()?) } else { None };
        let child_end = pipe.as_ref().map(|(_, write)| write.as_raw_fd());
        let number = child_end.map_or(String::new(), |fd| fd.to_string());
        // SAFETY: getpid has no preconditions.
        let parent = unsafe { libc::getpid() };

        let mut builder = Command::new(&command.program);
        builder
            .args(
                command
                    .args
                    .iter()
                    .map(|arg| arg.replace(STATS_FD, &number)),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        // SAFETY: between fork and exec the closure makes async-signal-safe system calls only.
        unsafe { builder.pre_exec(move || bind_to_parent(parent, child_end)) };
        let mut child = builder.spawn()?;
        // From here on dropping the value kills the child, whatever fails.
        let group = child.id() as libc::pid_t;
        let input = child.stdin.take().map(OwnedFd::from).map(File::from);
        let console = child.stdout.take().map(OwnedFd::from).map(File::from);
        let diagnostics = child.stderr.take().map(OwnedFd::from).map(File::from);
        let Some(input) = input else {
            return Err(io::Error::other("the child has no standard input"));
        };
        let process = Process {
            child,
            group,
            input,
            console,
            diagnostics,
            stats: pipe.map(|(read, _)| File::from(read)),
        };
        set_nonblocking(process.input.as_fd().as_raw_fd())?;
        for output in [&process.console, &process.diagnostics, &process.stats]
            .into_iter()
            .flatten()
        {
            set_nonblocking(output.as_raw_fd())?;
        }
        Ok(process)
    }

    /// Writes to the child's standard input. Commands are far smaller than a pipe's buffer, so a
    /// full one means a child that has stopped reading: `WouldBlock`.
    ///
    /// # Errors
    /// `BrokenPipe` when the child is gone.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.input.write_all(bytes)
    }

    /// Waits until an output has something to say or has ended, or until `timeout` is over.
    ///
    /// # Errors
    /// `Interrupted` when a signal arrived.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut polled: [libc::pollfd; 3] = [(&self.console), (&self.diagnostics), (&self.stats)]
            .map(|file| libc::pollfd {
                // poll ignores negative descriptors.
                fd: file.as_ref().map_or(-1, |file| file.as_raw_fd()),
                events: libc::POLLIN,
                revents: 0,
            });
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: the array and the timespec live through the call; a null mask leaves signals as
        // they are.
        let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), 3, &timeout, std::ptr::null()) };
        match ready {
            -1 => Err(io::Error::last_os_error()),
            count => Ok(count > 0),
        }
    }

    /// Reads what an output holds now: `Some(0)` means that there is nothing, `None` that it ended.
    ///
    /// # Errors
    /// Whatever the host says to read.
    pub fn read(&mut self, output: Output, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let slot = match output {
            Output::Console => &mut self.console,
            Output::Diagnostics => &mut self.diagnostics,
            Output::Stats => &mut self.stats,
        };
        let Some(file) = slot else { return Ok(None) };
        match file.read(buffer) {
            Ok(0) => {
                *slot = None;
                Ok(None)
            }
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(0)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
            Err(error) => Err(error),
        }
    }

    /// Whether an output has not ended yet.
    pub fn is_open(&self, output: Output) -> bool {
        match output {
            Output::Console => self.console.is_some(),
            Output::Diagnostics => self.diagnostics.is_some(),
            Output::Stats => self.stats.is_some(),
        }
    }

    /// Stops the whole process group, so that it uses no processor time.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets the process group go on.
    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Waits at most `limit` for the end of a child that has closed its console; kills it then.
    /// `None` means that it had to be killed.
    pub fn reap(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(None) | Err(_) => {
                    self.kill();
                    return None;
                }
            }
        }
    }

    /// Kills the process group and reaps the child.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        // SIGKILL also ends stopped processes, so this wait is short.
        let _ = self.child.wait();
    }

    /// Process id, which is also the process group's.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: killpg has no memory effects. The group is ours: its leader is our child, whose
        // id can't be reused before it is reaped, and groups outlive their leader.
        unsafe { libc::killpg(self.group, signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Describes an end the way a shell user would say it.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown exit status".to_owned(),
    }
}

/// Runs in the child between fork and exec.
fn bind_to_parent(parent: libc::pid_t, inherited: Option<RawFd>) -> io::Result<()> {
    // SAFETY: plain system calls on integers.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the line above took effect.
        if libc::getppid() != parent {
            libc::_exit(1);
        }
        // Keeps its number, which stands on the command line, and survives exec.
        if let Some(fd) = inherited
            && libc::fcntl(fd, libc::F_SETFD, 0) == -1
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A pipe whose ends are closed on exec: (read, write).
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills the array with two descriptors that nobody else owns.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor of ours with integer arguments.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags == -1 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
