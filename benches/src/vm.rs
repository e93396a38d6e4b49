//! A virtual machine under measurement: a child process that speaks the console protocol.
//!
//! Our own VMM, a native process and a foreign VMM are one and the same here: what differs is the
//! [`Launch`]. One thread does everything, because a second one on the console's path would add a
//! wake-up to every window: it waits on console, diagnostics and counters at once, stamps console
//! bytes directly after the read that brought them, and so never lets the child block on a full
//! pipe. Invariant: every wait has a limit, and a `Vm` that has failed is of no further use
//! (dropping it kills what is left).

use std::io;
use std::time::{Duration, Instant};

use abi::word;

use crate::console::{Console, Done, Message, Violation, shorten};
use crate::interrupt;
use crate::process::{CommandLine, Output, Process, describe};
use crate::stats::{Count, Event, Lines};

/// Most console output that one command may cause. A guest needs under 200 bytes.
const FLOOD_LIMIT: usize = 1 << 20;
/// Most diagnostics that are kept; the last line matters.
const DIAGNOSTICS_KEPT: usize = 16 << 10;
/// How long a child that has closed its console may take to end.
const REAP_LIMIT: Duration = Duration::from_millis(500);
/// How long a window's counters may arrive after the window's answer.
const COUNTERS_LIMIT: Duration = Duration::from_millis(250);
/// Reads from one side channel before the console has its turn again: a child that never stops
/// writing diagnostics must not keep the harness from its clock.
const READS_PER_PUMP: usize = 16;
/// Longest single wait: a signal may arrive between looking at the flag and waiting.
const SLICE: Duration = Duration::from_millis(200);

/// How a virtual machine is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What to spawn.
    pub command: CommandLine,
    /// Whether it sends counters after each window.
    pub counts_windows: bool,
}

/// One `run` command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Workload.
    pub workload: &'a str,
    /// Size, 0 for the catalogue's.
    pub size: u64,
    /// Iterations, 0 for the catalogue's.
    pub iterations: u64,
}

/// What a guest answered to a `run` command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The run ended well; counters of its window, if the VMM sends any.
    Done(Done, Option<Vec<Count>>),
    /// The run was tried and went wrong.
    Failed(String),
    /// The run has no meaning in this flavour.
    Unsupported(String),
    /// The guest does not know the workload.
    Unknown(String),
}

/// Why a virtual machine is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The program could not be started.
    #[error("{program}: {source}")]
    Spawn {
        /// What was to be spawned.
        program: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The process ended.
    #[error("{how}{}", last_line(.words))]
    Died {
        /// Exit status or signal.
        how: String,
        /// Exit status, if it ended by itself.
        code: Option<i32>,
        /// The last line of diagnostics, or else of the console.
        words: Option<String>,
    },
    /// The time limit was reached.
    #[error("no `{waiting_for}` within {limit:.1?}{}", last_line(.words))]
    Limit {
        /// The limit.
        limit: Duration,
        /// Which word did not come.
        waiting_for: &'static str,
        /// The last line of diagnostics, or else of the console.
        words: Option<String>,
    },
    /// The guest broke the protocol.
    #[error(transparent)]
    Protocol(#[from] Violation),
    /// The pipes failed.
    #[error("pipe to the virtual machine: {0}")]
    Pipe(#[source] io::Error),
    /// The VMM sent counters that are none.
    #[error("counters: {0}")]
    Counters(#[source] serde_json::Error),
    /// The user asked for the end.
    #[error("interrupted")]
    Interrupted,
}

fn last_line(words: &Option<String>) -> String {
    words
        .as_ref()
        .map_or(String::new(), |words| format!(": {words}"))
}

/// A booted virtual machine.
#[derive(Debug)]
pub struct Vm {
    process: Process,
    console: Console,
    counters: Lines,
    window: Option<Vec<Count>>,
    counts_windows: bool,
    diagnostics: Vec<u8>,
    backend: Option<String>,
    boot: Duration,
}

impl Vm {
    /// Starts a virtual machine and waits for its greeting.
    ///
    /// # Errors
    /// Nothing that greets within `limit`. The fault's companion is the backend that the VMM
    /// named before it failed.
    pub fn boot(launch: &Launch, limit: Duration) -> Result<Vm, (Fault, Option<String>)> {
        let spawned = Instant::now();
        let process = Process::spawn(&launch.command).map_err(|source| {
            let program = launch.command.program.clone();
            (Fault::Spawn { program, source }, None)
        })?;
        let mut vm = Vm {
            process,
            console: Console::new(FLOOD_LIMIT),
            counters: Lines::default(),
            window: None,
            counts_windows: launch.counts_windows,
            diagnostics: Vec::new(),
            backend: None,
            boot: Duration::ZERO,
        };
        match vm.next_message(spawned, limit) {
            Ok((Message::Ready { version, .. }, at)) if version == abi::PROTOCOL_VERSION => {
                vm.boot = at.saturating_duration_since(spawned);
                // The backend is named before the guest starts, so it is in the pipe by now.
                match vm.pump_counters() {
                    Ok(()) => Ok(vm),
                    Err(fault) => Err((fault, vm.backend.take())),
                }
            }
            Ok((message, _)) => {
                let line = match message {
                    Message::Ready { version, .. } => format!("{} {version}", word::READY),
                    Message::Done(_) => word::DONE.to_owned(),
                    Message::Failed(reason) => format!("{} {reason}", word::FAILED),
                    Message::Unsupported(reason) => format!("{} {reason}", word::UNSUPPORTED),
                    Message::Unknown(name) => format!("{} {name}", word::UNKNOWN),
                };
                let waiting_for = word::READY;
                let violation = Violation::OutOfPlace { line, waiting_for };
                Err((violation.into(), vm.backend.take()))
            }
            Err(fault) => Err((fault, vm.backend.take())),
        }
    }

    /// From spawning to the greeting.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// What stands behind the engine, as the VMM says: `intel`, `amd`, `pvm`.
    pub fn backend(&self) -> Option<&str> {
        self.backend.as_deref()
    }

    /// Process id of the VMM.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Runs a workload once.
    ///
    /// # Errors
    /// The virtual machine did not answer as the protocol says within `limit`.
    pub fn run(&mut self, request: Request<'_>, limit: Duration) -> Result<Answer, Fault> {
        let Request {
            workload,
            size,
            iterations,
        } = request;
        let line = format!("{} {workload} {size} {iterations}\n", word::RUN);
        self.window = None;
        self.console.command_sent();
        let sent = Instant::now();
        if let Err(error) = self.process.send(line.as_bytes()) {
            return Err(if error.kind() == io::ErrorKind::BrokenPipe {
                self.died()
            } else {
                Fault::Pipe(error)
            });
        }
        match self.next_message(sent, limit)?.0 {
            Message::Done(done) => {
                let counts = self.window_counts()?;
                Ok(Answer::Done(done, counts))
            }
            Message::Failed(reason) => Ok(Answer::Failed(shorten(&reason))),
            Message::Unsupported(reason) => Ok(Answer::Unsupported(shorten(&reason))),
            Message::Unknown(name) => Ok(Answer::Unknown(shorten(&name))),
            Message::Ready { .. } => Err(Violation::OutOfPlace {
                line: word::READY.to_owned(),
                waiting_for: word::BEGIN,
            }
            .into()),
        }
    }

    /// Stops the virtual machine while others are measured: a guest polls its console, and would
    /// burn a processor that they need. The same is done to every mode and peer.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// Lets a paused virtual machine go on.
    pub fn resume(&self) {
        self.process.resume();
    }

    /// Counters of the window that was just answered. They are sent at the closing mark, before
    /// the answer, so they are in the pipe already, unless the VMM has none.
    fn window_counts(&mut self) -> Result<Option<Vec<Count>>, Fault> {
        if !self.counts_windows {
            return Ok(None);
        }
        let deadline = Instant::now() + COUNTERS_LIMIT;
        loop {
            self.pump_counters()?;
            if let Some(counts) = self.window.take() {
                return Ok(Some(counts));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.process.is_open(Output::Stats) {
                return Ok(None);
            }
            self.wait(left)?;
            // What else may have come would keep the wait from waiting.
            self.pump_diagnostics()?;
        }
    }

    /// Pumps everything until the console has brought a message; with the arrival of its last byte.
    fn next_message(
        &mut self,
        from: Instant,
        limit: Duration,
    ) -> Result<(Message, Instant), Fault> {
        let mut buffer = [0; 4096];
        loop {
            let left = limit.saturating_sub(from.elapsed());
            if left.is_zero() {
                self.pump_diagnostics()?;
                return Err(Fault::Limit {
                    limit,
                    waiting_for: self.console.waiting_for(),
                    words: self.words(),
                });
            }
            self.wait(left)?;
            // The console first: nothing stands between its wake-up and its time stamp.
            let console = self.process.read(Output::Console, &mut buffer);
            let at = Instant::now();
            match console.map_err(Fault::Pipe)? {
                Some(count) => {
                    if let Some(message) = self.console.push(&buffer[..count], at)? {
                        return Ok((message, at));
                    }
                }
                None => return Err(self.died()),
            }
            self.pump_counters()?;
            self.pump_diagnostics()?;
        }
    }

    fn wait(&self, left: Duration) -> Result<(), Fault> {
        match self.process.wait(left.min(SLICE)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Fault::Pipe(error)),
        }
        if interrupt::requested() {
            return Err(Fault::Interrupted);
        }
        Ok(())
    }

    fn pump_counters(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 4096];
        for _ in 0..READS_PER_PUMP {
            let read = self.process.read(Output::Stats, &mut buffer);
            let Some(count @ 1..) = read.map_err(Fault::Pipe)? else {
                break;
            };
            let events = self.counters.push(&buffer[..count]);
            for event in events.map_err(Fault::Counters)? {
                match event {
                    Event::Start { backend, .. } => self.backend = backend,
                    Event::Window { counts, .. } => self.window = Some(counts),
                    // The exit status and the last line of diagnostics say the same.
                    Event::End { .. } => {}
                }
            }
        }
        Ok(())
    }

    fn pump_diagnostics(&mut self) -> Result<(), Fault> {
        let mut buffer = [0; 4096];
        for _ in 0..READS_PER_PUMP {
            let read = self.process.read(Output::Diagnostics, &mut buffer);
            let Some(count @ 1..) = read.map_err(Fault::Pipe)? else {
                break;
            };
            self.diagnostics.extend_from_slice(&buffer[..count]);
            let excess = self.diagnostics.len().saturating_sub(DIAGNOSTICS_KEPT);
            self.diagnostics.drain(..excess);
        }
        Ok(())
    }

    /// The console has ended: finds out how the process did.
    fn died(&mut self) -> Fault {
        let status = self.process.reap(REAP_LIMIT);
        // Everything that the child wrote is in the pipes now.
        let _ = self.pump_counters();
        let _ = self.pump_diagnostics();
        Fault::Died {
            how: status.map_or_else(|| "closed its console without ending".to_owned(), describe),
            code: status.and_then(|status| status.code()),
            words: self.words(),
        }
    }

    fn words(&self) -> Option<String> {
        String::from_utf8_lossy(&self.diagnostics)
            .lines()
            .rev()
            .map(shorten)
            .find(|line| !line.is_empty())
            .or_else(|| self.console.noise().map(str::to_owned))
    }
}
