//! The run loop: the only place that answers exits.
//!
//! [`drive`] runs one vCPU in one machine until the guest ends, breaks, or a limit is reached; a
//! [`Crew`] does so for several, each on a thread of its own. In each round a vCPU's thread looks at
//! the events from outside, injects an interrupt if one is due, runs the guest and answers the exit.
//! A guest's fault is an [`Outcome`] and never a panic.
//!
//! | module | what |
//! |---|---|
//! | `inline` | exits that are answered before the engine's run ends |
//! | `reach` | the machine is the thread's own, or behind a lock |
//! | `rest` | what a thread does while its guest does nothing |
//! | `crew` | several vCPUs |
//!
//! Several. The lock is held from exit to entry and never while the guest runs or rests. Whoever
//! holds it does what there is to do for the machine; what comes from the host kicks or wakes the
//! first vCPU's thread. The first vCPU that ends the run stops the others.
//!
//! Idling. A halted guest sleeps on the machine's events. A guest that polls the UART for input
//! sleeps too, for a time that grows with each fruitless poll up to `LONGEST_NAP`: input, timers
//! and the limits end the nap at once, and the bound keeps a guest going that polls for input
//! beside other work.
//!
//! Task priority. A guest lowers it with `mov cr8`, for which not every engine exits; so while it
//! holds an interrupt back, the host timer looks again every [`PRIORITY_RECHECK_NS`].
//!
//! What this does not do: read a clock to measure anything, or know which engine runs the guest.

mod crew;
mod inline;
mod reach;
mod rest;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::devices::Action;
use crate::devices::irqchip::VcpuThread;
use crate::host::events::{Events, flag};
use crate::{CpuState, Error, Exit, Machine, Vcpu};
pub use crew::{Crew, Ended};
use inline::Inline;
use reach::{Reach, Sole};

/// How long an interrupt can go unnoticed after its task priority was lowered without an exit.
const PRIORITY_RECHECK_NS: u64 = 1_000_000;

/// When to stop a guest that does not stop by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Time for the whole run.
    pub timeout: Option<Duration>,
    /// Number of exits to the VMM.
    pub max_exits: Option<u64>,
}

/// Which limit ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::timeout`].
    Timeout,
    /// [`Limits::max_exits`].
    Exits,
    /// The guest waits for console input, which has ended.
    Input,
}

impl Limit {
    /// One line that says what happened.
    pub fn message(self) -> &'static str {
        match self {
            Limit::Timeout => "time limit reached",
            Limit::Exits => "exit limit reached",
            Limit::Input => "the guest waits for console input, which has ended",
        }
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest wrote 0 to the exit port.
    Success,
    /// The guest wrote this to the exit port.
    Failure(u32),
    /// The guest reset the machine and left no shutdown code to go on by, which ends the run: one
    /// machine serves one boot.
    Reset,
    /// The guest switched the machine off.
    Off,
    /// The guest is beyond help.
    Crashed {
        /// The vCPU at that point, if it can still be read.
        state: Option<Box<CpuState>>,
        /// What happened, in one line.
        message: String,
    },
    /// A limit was reached.
    Limit(Limit),
    /// The host asked the VMM to end with this signal, or took its console away (SIGPIPE).
    Interrupted {
        /// Signal number.
        signal: u32,
    },
    /// The engine failed; not the guest.
    EngineError {
        /// The vCPU at that point, if it can still be read.
        state: Option<Box<CpuState>>,
        /// What the engine said.
        error: Error,
    },
}

/// What the answer to an exit asks for.
enum Next {
    Continue,
    Poll,
    Mark(u8),
    Halt,
    Suspend,
    Reset,
    End(Outcome),
}

/// Why a vCPU's thread is done.
enum End {
    /// It has ended the run.
    Outcome(Outcome),
    /// Another has.
    Stopped,
}

impl From<Outcome> for End {
    fn from(outcome: Outcome) -> Self {
        End::Outcome(outcome)
    }
}

/// Runs `vcpu` in `machine`, whose only one it is, until it ends.
pub fn drive(vcpu: &mut dyn Vcpu, machine: &mut Machine, limits: &Limits) -> Outcome {
    let events = machine.seats.events(0);
    let own_controllers = machine.own_controllers;
    machine.pump.arm_deadline(limits.timeout);
    let mut run = Run::<false>::new(vcpu, 0, events, limits, own_controllers);
    let outcome = match run.conclude(&mut Sole(machine)) {
        End::Outcome(outcome) => outcome,
        End::Stopped => unreachable!("there is nobody else"),
    };
    finish(machine, vcpu);
    outcome
}

/// Lays the machine to rest after its last exit.
fn finish(machine: &mut Machine, vcpu: &dyn Vcpu) {
    machine.pump.arm_deadline(None);
    machine.pump.arm_timer(None);
    machine.schedule.expired();
    // A reader that is gone has been reported already, or comes too late to matter.
    let _ = machine.serial.output_mut().flush_now();
    machine.report_windows(vcpu);
}

fn state_of(vcpu: &dyn Vcpu) -> Option<Box<CpuState>> {
    vcpu.state().ok().map(Box::new)
}

/// One vCPU's thread. `SHARED` says that there are others.
struct Run<'a, const SHARED: bool> {
    vcpu: &'a mut dyn Vcpu,
    cpu: usize,
    /// This thread's; the first one's are the machine's.
    events: Arc<Events>,
    most_exits: u64,
    /// Fruitless polls for input since the guest last did anything else.
    polls: u32,
    /// Naps since then.
    naps: u32,
    /// What was last asked of the vCPU.
    window_wanted: bool,
    /// The interrupt controllers may have something for this vCPU.
    look: bool,
    /// It waits for a start-up IPI.
    stopped: bool,
    /// Pages that devices wrote.
    pages: Vec<u64>,
}

impl<'a, const SHARED: bool> Run<'a, SHARED> {
    fn new(
        vcpu: &'a mut dyn Vcpu,
        cpu: usize,
        events: Arc<Events>,
        limits: &Limits,
        own_controllers: bool,
    ) -> Self {
        Run {
            vcpu,
            cpu,
            events,
            most_exits: limits.max_exits.unwrap_or(u64::MAX),
            polls: 0,
            naps: 0,
            window_wanted: false,
            look: false,
            // Controllers in the kernel let their vCPUs wait there.
            stopped: cpu != 0 && own_controllers,
            pages: Vec::new(),
        }
    }

    /// Runs to the end, which is that of the run or of this vCPU's part in it.
    fn conclude<R: Reach>(&mut self, reach: &mut R) -> End {
        let _here = VcpuThread::enter();
        self.events.attach(Some(self.vcpu.kick_handle()));
        let end = self.run(reach).unwrap_or_else(|error| {
            End::Outcome(Outcome::EngineError {
                state: state_of(self.vcpu),
                error,
            })
        });
        self.events.attach(None);
        end
    }

    fn run<R: Reach>(&mut self, reach: &mut R) -> Result<End, Error> {
        let mut machine = reach.hold();
        loop {
            if let Some(end) = self.prepare(&mut machine)? {
                return Ok(end);
            }
            if SHARED && self.stopped {
                drop(machine);
                if let Some(end) = self.await_startup(reach) {
                    return Ok(end);
                }
                machine = reach.hold();
                continue;
            }
            let next = if SHARED {
                drop(machine);
                // Answered where it lies: to read it whole just after it was written in parts would
                // wait for the store buffer.
                let mut exit = self.vcpu.run()?;
                machine = reach.hold();
                let next = answer(&mut machine, &mut exit);
                machine.tally.publish(self.cpu, self.vcpu.counts());
                next
            } else {
                let mut bus = Inline::new(&mut machine, &self.events, self.most_exits, self.look);
                let mut left = self.vcpu.run_on(&mut bus);
                if bus.answered() {
                    self.polls = 0;
                    self.naps = 0;
                }
                let next = bus.next();
                match left {
                    Err(error) => return Err(error),
                    Ok(None) => next,
                    Ok(Some(ref mut exit)) => answer(&mut machine, exit),
                }
            };
            match next {
                Next::Continue => {
                    self.polls = 0;
                    self.naps = 0;
                }
                Next::Poll => {
                    drop(machine);
                    if let Some(end) = self.polled(reach) {
                        return Ok(end);
                    }
                    machine = reach.hold();
                }
                Next::Mark(value) => machine.mark(value, self.cpu, self.vcpu),
                Next::Halt => {
                    drop(machine);
                    if let Some(end) = self.halted(reach) {
                        return Ok(end);
                    }
                    machine = reach.hold();
                }
                Next::Reset if !machine.resumes() => return Ok(Outcome::Reset.into()),
                // The firmware knows what to go on by.
                Next::Suspend | Next::Reset => {
                    machine.irqchip.lapics.init_all();
                    machine.attention = true;
                }
                Next::End(Outcome::Crashed { message, .. }) => return Ok(self.crashed(message)),
                Next::End(outcome) => return Ok(outcome.into()),
            }
        }
    }

    fn crashed(&self, message: impl Into<String>) -> End {
        let state = state_of(self.vcpu);
        let message = message.into();
        Outcome::Crashed { state, message }.into()
    }

    /// What there is to do before the guest is entered.
    #[inline]
    fn prepare(&mut self, machine: &mut Machine) -> Result<Option<End>, Error> {
        if let Some(end) = self.events(machine) {
            return Ok(Some(end));
        }
        if machine.tally.total() >= self.most_exits {
            return Ok(Some(Outcome::Limit(Limit::Exits).into()));
        }
        // Costs two loads when the devices want nothing.
        if (machine.attention || self.look)
            && let Some(end) = self.attend(machine)?
        {
            return Ok(Some(end));
        }
        if machine.written(&mut self.pages) {
            self.vcpu.memory_written(&self.pages);
        }
        Ok(None)
    }

    /// Takes in what came from outside. Costs one load when nothing did.
    #[inline]
    fn events(&mut self, machine: &mut Machine) -> Option<End> {
        if self.events.pending() == 0 && (!SHARED || machine.events.pending() == 0) {
            return None;
        }
        self.take_events(machine)
    }

    fn take_events(&mut self, machine: &mut Machine) -> Option<End> {
        if self.events.pending() & flag::STOP != 0 {
            return Some(End::Stopped);
        }
        if self.events.take(flag::SOMETHING) != 0 {
            self.look = true;
        }
        // FINAL flags stay set: they also keep console output from blocking.
        let flags = machine
            .events
            .take(flag::INPUT | flag::TIMER | flag::LINES | flag::DEVICES);
        let input = if flags & flag::INPUT != 0 {
            if SHARED {
                machine.seats.wake_naps(self.cpu);
            }
            machine.take_input()
        } else {
            Action::None
        };
        let devices = if flags & flag::DEVICES != 0 {
            machine.host_ready()
        } else {
            Action::None
        };
        for action in [input, devices] {
            match next(action) {
                Next::End(outcome) => return Some(outcome.into()),
                Next::Reset => return Some(Outcome::Reset.into()),
                Next::Continue | Next::Poll | Next::Mark(_) | Next::Halt | Next::Suspend => {}
            }
        }
        if flags & flag::TIMER != 0 {
            machine.schedule.expired();
            let now = machine.clock().now();
            machine.seats.recheck_due(self.cpu, now);
            machine.advance();
        }
        if machine.events.take(flag::LINES) | flags & flag::LINES != 0 {
            machine.take_lines();
        }
        if self.events.take(flag::SOMETHING) != 0 {
            self.look = true;
        }
        // Only the first vCPU's have these.
        let pending = self.events.pending();
        if pending & flag::SIGNAL != 0 {
            let signal = self.events.signal();
            return Some(Outcome::Interrupted { signal }.into());
        }
        (pending & flag::DEADLINE != 0).then_some(Outcome::Limit(Limit::Timeout).into())
    }

    /// Carries what the devices want to the host timer and to the vCPUs.
    fn attend(&mut self, machine: &mut Machine) -> Result<Option<End>, Error> {
        machine.attention = false;
        if let Some(end) = self.signalled(machine)? {
            return Ok(Some(end));
        }
        let irqchip = &mut machine.irqchip;
        if let Some(priority) = irqchip.lapics.own().take_priority_write() {
            self.vcpu.set_task_priority(priority)?;
        }
        let mut held = false;
        if irqchip.waiting(self.cpu) || self.window_wanted {
            let priority = self.vcpu.task_priority();
            irqchip.lapics.own().sync_task_priority(priority);
            if let Some(request) = irqchip.deliverable(self.cpu)
                && self.vcpu.interruptible()
            {
                let vector = irqchip.acknowledge(self.cpu, request);
                self.vcpu.interrupt(vector)?;
            }
            let wanted = irqchip.deliverable(self.cpu).is_some();
            if wanted != self.window_wanted {
                self.vcpu.request_interrupt_window(wanted);
                self.window_wanted = wanted;
            }
            held = irqchip.lapics.own().held_by_task_priority();
        }
        if !held {
            machine.seats.set_recheck(self.cpu, None);
        } else if machine.seats.recheck(self.cpu).is_none() {
            let time = machine.clock().now() + PRIORITY_RECHECK_NS;
            machine.seats.set_recheck(self.cpu, Some(time));
        }
        machine.arm();
        machine.tell_others();
        // What waits has to be looked at after each exit.
        self.look = machine.irqchip.waiting(self.cpu) || self.window_wanted;
        Ok(None)
    }

    /// Takes what has come without a vector.
    fn signalled(&mut self, machine: &mut Machine) -> Result<Option<End>, Error> {
        let signal = machine.irqchip.lapics.take_signal(self.cpu);
        if signal.init {
            if self.cpu == 0 && !machine.firmware {
                return Ok(Some(Outcome::Reset.into()));
            }
            self.vcpu.init()?;
            self.vcpu.request_interrupt_window(false);
            self.window_wanted = false;
            if self.cpu == 0 {
                self.vcpu.set_state(&CpuState::at_firmware())?;
            } else {
                self.stopped = true;
            }
        }
        if let Some(page) = signal.startup {
            self.vcpu.set_state(&CpuState::startup(page))?;
            self.stopped = false;
        }
        for _ in 0..signal.nmis {
            self.vcpu.nmi()?;
        }
        Ok(None)
    }
}

/// Counts and answers one exit.
#[inline]
fn answer(machine: &mut Machine, exit: &mut Exit<'_>) -> Next {
    machine.tally.exit(exit.reason());
    let action = match exit {
        Exit::PioIn { port, size, data } => machine.port_in(*port, *size, data),
        Exit::PioOut { port, size, data } => machine.port_out(*port, *size, data),
        Exit::MmioRead {
            addr,
            data,
            priority,
        } => {
            machine.sync_task_priority(*priority);
            machine.memory_read(*addr, data)
        }
        Exit::MmioWrite { addr, data } => machine.memory_write(*addr, data),
        Exit::MsrRead {
            index,
            answer,
            priority,
        } => {
            machine.sync_task_priority(*priority);
            **answer = machine.read_msr(*index);
            Action::None
        }
        Exit::MsrWrite {
            index,
            value,
            tsc,
            accepted,
        } => {
            **accepted = machine.write_msr(*index, *value, *tsc);
            Action::None
        }
        Exit::Hlt => return Next::Halt,
        Exit::InterruptWindow | Exit::Interrupted | Exit::Stepped => Action::None,
        Exit::Shutdown => return crashed("triple fault".into()),
        Exit::Internal { message } => return crashed(std::mem::take(message)),
    };
    next(action)
}

/// What a device's answer asks for.
#[inline]
fn next(action: Action) -> Next {
    match action {
        Action::None | Action::Hold => Next::Continue,
        Action::Poll => Next::Poll,
        Action::Mark(value) => Next::Mark(value),
        Action::Exit(0) => Next::End(Outcome::Success),
        Action::Exit(code) => Next::End(Outcome::Failure(code)),
        Action::Reset => Next::Reset,
        Action::Off => Next::End(Outcome::Off),
        Action::Suspend => Next::Suspend,
        Action::ConsoleClosed => {
            let signal = libc::SIGPIPE as u32;
            Next::End(Outcome::Interrupted { signal })
        }
    }
}

/// The run loop adds the state, which is not at hand while the exit is borrowed.
fn crashed(message: String) -> Next {
    Next::End(Outcome::Crashed {
        state: None,
        message,
    })
}
