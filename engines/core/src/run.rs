//! The run loop: the only place that answers exits.
//!
//! [`drive`] runs one vCPU in one machine until the guest ends, breaks, or a limit is reached. In
//! each round it looks at the events from outside, injects an interrupt if one is due, runs the
//! guest and answers the exit. A guest's fault is an [`Outcome`] and never a panic.
//!
//! Idling. A halted guest sleeps on the machine's events. A guest that polls the UART for input
//! sleeps too, for a time that grows with each fruitless poll up to [`LONGEST_NAP`]: input, timers
//! and the limits end the nap at once, and the bound keeps a guest going that polls for input
//! beside other work.
//!
//! Task priority. A guest lowers it with `mov cr8`, for which not every engine exits; so while it
//! holds an interrupt back, the host timer looks again every [`PRIORITY_RECHECK_NS`].
//!
//! What this does not do: read a clock to measure anything, or know which engine runs the guest.

use std::time::Duration;

use crate::devices::Action;
use crate::host::{self, events::flag};
use crate::{CpuState, Error, Exit, Machine, Vcpu};

/// Polls for input, one directly after the other, after which output is written out. A guest that
/// checks the transmitter before each byte polls once per byte.
const POLLS_UNTIL_FLUSH: u32 = 2;
/// Polls for input after which the guest is held to wait for it.
const POLLS_UNTIL_NAP: u32 = 64;
/// The first nap.
const SHORTEST_NAP: Duration = Duration::from_micros(100);
/// The longest time that a polling guest is held.
const LONGEST_NAP: Duration = Duration::from_millis(50);
/// As long where interrupts don't pass the run loop, so that none can end the nap.
const LONGEST_BLIND_NAP: Duration = Duration::from_millis(1);
/// Naps after which a guest that polls for input that can't come any more is given up.
const NAPS_WITHOUT_INPUT: u32 = 20;

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
    /// The guest reset the machine, which ends the run: one machine serves one.
    Reset,
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
    End(Outcome),
}

/// Runs `vcpu` in `machine` until it ends.
pub fn drive(vcpu: &mut dyn Vcpu, machine: &mut Machine, limits: &Limits) -> Outcome {
    host::sharpen_sleeps();
    let outcome = match (Run {
        vcpu,
        machine,
        limits,
        polls: 0,
        naps: 0,
        window_wanted: false,
        recheck: None,
        pages: Vec::new(),
    })
    .run()
    {
        Ok(outcome) => outcome,
        Err(error) => Outcome::EngineError {
            state: state_of(vcpu),
            error,
        },
    };
    machine.events.attach(None);
    machine.pump.arm_deadline(None);
    machine.pump.arm_timer(None);
    machine.schedule.expired();
    // A reader that is gone has been reported already, or comes too late to matter.
    let _ = machine.serial.output_mut().flush_now();
    machine.report_windows(vcpu);
    outcome
}

fn state_of(vcpu: &dyn Vcpu) -> Option<Box<CpuState>> {
    vcpu.state().ok().map(Box::new)
}

struct Run<'a> {
    vcpu: &'a mut dyn Vcpu,
    machine: &'a mut Machine,
    limits: &'a Limits,
    /// Fruitless polls for input since the guest last did anything else.
    polls: u32,
    /// Naps since then.
    naps: u32,
    /// What was last asked of the vCPU.
    window_wanted: bool,
    /// When to look at the task priority again, while it holds an interrupt back.
    recheck: Option<u64>,
    /// Pages that devices wrote.
    pages: Vec<u64>,
}

impl Run<'_> {
    fn run(&mut self) -> Result<Outcome, Error> {
        self.machine.events.attach(Some(self.vcpu.kick_handle()));
        self.machine.pump.arm_deadline(self.limits.timeout);
        let most = self.limits.max_exits.unwrap_or(u64::MAX);
        loop {
            if let Some(outcome) = self.events() {
                return Ok(outcome);
            }
            if self.machine.tally.total() >= most {
                return Ok(Outcome::Limit(Limit::Exits));
            }
            self.interrupts()?;
            if self.machine.written(&mut self.pages) {
                self.vcpu.memory_written(&self.pages);
            }
            let exit = self.vcpu.run()?;
            let reason = exit.reason();
            self.machine.tally.exit(reason);
            let next = answer(self.machine, exit);
            match next {
                Next::Continue => {
                    self.polls = 0;
                    self.naps = 0;
                }
                Next::Poll => {
                    if let Some(outcome) = self.polled() {
                        return Ok(outcome);
                    }
                }
                Next::Mark(value) => self.machine.mark(value, self.vcpu),
                Next::Halt => {
                    if let Some(outcome) = self.halted()? {
                        return Ok(outcome);
                    }
                }
                Next::End(Outcome::Crashed { message, .. }) => {
                    let state = state_of(self.vcpu);
                    return Ok(Outcome::Crashed { state, message });
                }
                Next::End(outcome) => return Ok(outcome),
            }
        }
    }

    /// Takes in what came from outside. Costs one load when nothing did.
    #[inline]
    fn events(&mut self) -> Option<Outcome> {
        if self.machine.events.pending() == 0 {
            return None;
        }
        self.take_events()
    }

    fn take_events(&mut self) -> Option<Outcome> {
        // FINAL flags stay set: they also keep console output from blocking.
        let flags = self
            .machine
            .events
            .take(flag::INPUT | flag::TIMER | flag::LINES | flag::DEVICES);
        let input = if flags & flag::INPUT != 0 {
            self.machine.take_input()
        } else {
            Action::None
        };
        let devices = if flags & flag::DEVICES != 0 {
            self.machine.host_ready()
        } else {
            Action::None
        };
        for action in [input, devices] {
            match next(action) {
                Next::End(outcome) => return Some(outcome),
                Next::Continue | Next::Poll | Next::Mark(_) | Next::Halt => {}
            }
        }
        if flags & flag::TIMER != 0 {
            self.machine.schedule.expired();
            self.recheck = None;
            self.machine.advance();
        }
        if self.machine.events.take(flag::LINES) | flags & flag::LINES != 0 {
            self.machine.take_lines();
        }
        let pending = self.machine.events.pending();
        if pending & flag::SIGNAL != 0 {
            let signal = self.machine.events.signal();
            return Some(Outcome::Interrupted { signal });
        }
        (pending & flag::DEADLINE != 0).then_some(Outcome::Limit(Limit::Timeout))
    }

    /// Carries what the devices want to the host timer and to the vCPU. Costs two loads when they
    /// want nothing.
    #[inline]
    fn interrupts(&mut self) -> Result<(), Error> {
        if !self.machine.attention && !self.window_wanted {
            return Ok(());
        }
        self.attend()
    }

    fn attend(&mut self) -> Result<(), Error> {
        let irqchip = &mut self.machine.irqchip;
        if let Some(priority) = irqchip.lapic.take_priority_write() {
            self.vcpu.set_task_priority(priority)?;
        }
        let mut held = false;
        if irqchip.waiting() || self.window_wanted {
            irqchip.lapic.sync_task_priority(self.vcpu.task_priority());
            if let Some(request) = irqchip.deliverable()
                && self.vcpu.interruptible()
            {
                let vector = irqchip.acknowledge(request);
                self.vcpu.interrupt(vector)?;
            }
            let wanted = irqchip.deliverable().is_some();
            if wanted != self.window_wanted {
                self.vcpu.request_interrupt_window(wanted);
                self.window_wanted = wanted;
            }
            held = irqchip.lapic.held_by_task_priority();
        }
        if !held {
            self.recheck = None;
        } else if self.recheck.is_none() {
            self.recheck = Some(self.machine.clock().now() + PRIORITY_RECHECK_NS);
        }
        self.machine.arm(self.recheck);
        // What waits has to be looked at after each exit.
        self.machine.attention = self.machine.irqchip.waiting();
        Ok(())
    }

    /// The guest polled for input and there is none.
    fn polled(&mut self) -> Option<Outcome> {
        self.polls = self.polls.saturating_add(1);
        if self.polls == POLLS_UNTIL_FLUSH {
            self.idle();
        }
        // An interrupt that waits for the guest must not wait for the nap too.
        if self.polls < POLLS_UNTIL_NAP || self.machine.irqchip.waiting() {
            return None;
        }
        if self.naps >= NAPS_WITHOUT_INPUT
            && self.machine.serial.input_exhausted()
            && self.machine.schedule.next().is_none()
        {
            return Some(Outcome::Limit(Limit::Input));
        }
        let nap = SHORTEST_NAP.saturating_mul(1 << self.naps.min(16)).min(
            if self.machine.own_controllers {
                LONGEST_NAP
            } else {
                LONGEST_BLIND_NAP
            },
        );
        self.naps += 1;
        self.machine.events.sleep(Some(nap));
        None
    }

    /// The guest has nothing to do: time for what must not disturb a measurement.
    fn idle(&mut self) {
        // A broken console is noticed at the guest's next byte.
        let _ = self.machine.serial.output_mut().flush_now();
        self.machine.report_windows(self.vcpu);
    }

    /// The guest halted: sleeps until an interrupt can be delivered.
    fn halted(&mut self) -> Result<Option<Outcome>, Error> {
        self.polls = 0;
        self.naps = 0;
        self.idle();
        loop {
            if let Some(outcome) = self.events() {
                return Ok(Some(outcome));
            }
            let crashed = |vcpu: &dyn Vcpu, message: &str| {
                let state = state_of(vcpu);
                Ok(Some(Outcome::Crashed {
                    state,
                    message: message.to_owned(),
                }))
            };
            if !self.vcpu.interruptible() {
                return crashed(
                    self.vcpu,
                    "halted with interrupts disabled: nothing can wake it",
                );
            }
            let irqchip = &mut self.machine.irqchip;
            irqchip.lapic.sync_task_priority(self.vcpu.task_priority());
            if irqchip.deliverable().is_some() {
                return Ok(None);
            }
            if !self.machine.may_wake() {
                if self.machine.input.claimed() {
                    return Ok(Some(Outcome::Limit(Limit::Input)));
                }
                return crashed(
                    self.vcpu,
                    "halted with no interrupt source armed: nothing can wake it",
                );
            }
            self.sleep();
        }
    }

    /// Sleeps until something happens or the next deadline comes. The pump's timer is called off:
    /// a sleep of our own ends without another thread's help.
    fn sleep(&mut self) {
        let Some(due) = self.machine.schedule.next() else {
            return self.machine.events.sleep(None);
        };
        let left = due.saturating_sub(self.machine.clock().now());
        if left > 0 {
            if let Some(time) = self.machine.schedule.arm(None) {
                self.machine.pump.arm_timer(time);
            }
            self.machine.events.sleep(Some(Duration::from_nanos(left)));
        }
        self.machine.advance();
    }
}

/// Answers one exit.
#[inline]
fn answer(machine: &mut Machine, exit: Exit<'_>) -> Next {
    let action = match exit {
        Exit::PioIn { port, size, data } => machine.port_in(port, size, data),
        Exit::PioOut { port, size, data } => machine.port_out(port, size, data),
        Exit::MmioRead { addr, data } => machine.memory_read(addr, data),
        Exit::MmioWrite { addr, data } => machine.memory_write(addr, data),
        Exit::MsrRead { index, answer } => {
            *answer = machine.read_msr(index);
            Action::None
        }
        Exit::MsrWrite {
            index,
            value,
            tsc,
            accepted,
        } => {
            *accepted = machine.write_msr(index, value, tsc);
            Action::None
        }
        Exit::Hlt => return Next::Halt,
        Exit::InterruptWindow | Exit::Interrupted => Action::None,
        Exit::Shutdown => return crashed("triple fault".into()),
        Exit::Internal { message } => return crashed(message),
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
        Action::Reset => Next::End(Outcome::Reset),
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
