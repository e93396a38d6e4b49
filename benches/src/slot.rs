//! One contender in the course of a run: its virtual machine of the moment, and what is known of it.
//!
//! Writes no row. Invariant: a virtual machine in a slot is paused except while it answers.

use std::time::Duration;

use reports_data::{Phase, Status};

use crate::console::Done;
use crate::contender::{COUNT_PATHS, Contender};
use crate::oracle::Oracle;
use crate::priority::Delays;
use crate::record::Place;
use crate::stats::Count;
use crate::task::Task;
use crate::verdict::{Refusal, Traits, software_backend};
use crate::vm::{Fault, Launch, Request, Vm};

/// Boots in a row that may fail before a contender is given up.
const BOOT_TRIES: u32 = 2;

/// The harness's own delay may be one part in this many of a window,
const MOST_DELAY: u32 = 50;
/// on top of what a dozen undisturbed wake-ups add up to.
const USUAL_DELAY: Duration = Duration::from_micros(200);

/// Window of the `empty` workload: what the marks themselves cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Empty {
    /// Median on the host's clock.
    pub window: Duration,
    /// Median in guest TSC ticks.
    pub cycles: u64,
}

/// What is known of a contender and one task.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// Iterations of a warm window, once calibrated.
    pub iterations: Option<u64>,
    /// Whether any row stands in the files.
    pub recorded: bool,
    /// Not tried again: the row that says why stands in the files.
    pub given_up: bool,
    /// Whether the cold phase's iterations stand in the files.
    pub cold_recorded: bool,
}

/// A verified run.
#[derive(Clone, Debug)]
pub struct Verified {
    /// Window, checksum, cycles.
    pub done: Done,
    /// Counters of the window.
    pub counts: Option<Vec<Count>>,
    /// How long the harness stood ready without a processor meanwhile.
    pub delay: Duration,
}

impl Verified {
    /// Whether the harness may have seen the window's ends too late to call it measured.
    pub fn is_disturbed(&self) -> bool {
        let window = self.done.window;
        window.is_zero() || self.delay > USUAL_DELAY + window / MOST_DELAY
    }
}

/// Why a run gave nothing.
#[derive(Debug)]
pub struct Failure {
    /// What the row says.
    pub refusal: Refusal,
    /// The time limit was the reason.
    pub timed_out: bool,
}

impl Failure {
    /// A failure that another try would not mend.
    pub fn lasting(refusal: Refusal) -> Failure {
        Failure {
            refusal,
            timed_out: false,
        }
    }
}

/// A contender and its virtual machine.
#[derive(Debug)]
pub struct Slot {
    /// Who.
    pub contender: Contender,
    /// One per task of the run.
    pub pairs: Vec<Pair>,
    /// Last known empty window.
    pub empty: Option<Empty>,
    /// Set once the contender can't be used at all.
    pub out: Option<Refusal>,
    vm: Option<Vm>,
    traits: Traits,
    failed_boots: u32,
    delays: Delays,
}

impl Slot {
    /// A contender that is not started yet.
    pub fn new(contender: Contender, tasks: usize) -> Slot {
        Slot {
            traits: contender.traits.clone(),
            contender,
            pairs: vec![Pair::default(); tasks],
            empty: None,
            out: None,
            vm: None,
            failed_boots: 0,
            delays: Delays::open(),
        }
    }

    /// Whether a task is asked of this contender.
    pub fn has(&self, task: Task) -> bool {
        self.contender.is_asked(task)
    }

    /// Where a row of this contender stands.
    pub fn place<'a>(&'a self, workload: &'a str, phase: Phase, round: u32) -> Place<'a> {
        Place {
            contender: &self.contender,
            workload,
            phase,
            round,
        }
    }

    /// Whether a virtual machine stands ready.
    pub fn is_up(&self) -> bool {
        self.vm.is_some()
    }

    /// Process id of the virtual machine, if one is up.
    pub fn process_id(&self) -> Option<u32> {
        self.vm.as_ref().map(Vm::id)
    }

    /// Starts a fresh virtual machine and pauses it; returns how long it took to greet.
    ///
    /// # Errors
    /// It did not come up. A contender that is unavailable or has failed too often is
    /// [`out`](Slot::out) from now on.
    pub fn boot(&mut self, limit: Duration) -> Result<Duration, Failure> {
        let launch = self.contender.launch.clone();
        self.boot_as(&launch, limit)
    }

    /// As [`boot`](Slot::boot), with a machine that counts what its translated code does by itself.
    ///
    /// # Errors
    /// As [`boot`](Slot::boot).
    pub fn boot_counting(&mut self, limit: Duration) -> Result<(), Failure> {
        let mut launch = self.contender.launch.clone();
        launch.command.args.push(COUNT_PATHS.to_owned());
        self.boot_as(&launch, limit).map(|_| ())
    }

    fn boot_as(&mut self, launch: &Launch, limit: Duration) -> Result<Duration, Failure> {
        self.drop_vm();
        if let Some(devices) = &self.contender.devices {
            devices.settle().map_err(|error| {
                let reason = format!("disk of this contender: {error}");
                Failure::lasting(Refusal::new(Status::Failed, reason))
            })?;
        }
        match Vm::boot(launch, limit) {
            Ok(vm) => {
                vm.pause();
                self.learn_backend(vm.backend());
                self.failed_boots = 0;
                let time = vm.boot_time();
                self.vm = Some(vm);
                Ok(time)
            }
            Err((fault, backend)) => {
                self.learn_backend(backend.as_deref());
                let failure = self.failure(&fault);
                self.failed_boots += 1;
                // What this host lacks will not come with a second try.
                let hopeless = match failure.refusal.status {
                    Status::Unavailable => !failure.timed_out,
                    Status::Ok
                    | Status::Unsupported
                    | Status::Skipped
                    | Status::Failed
                    | Status::Invalid => false,
                };
                if hopeless || self.failed_boots >= BOOT_TRIES {
                    self.out = Some(failure.refusal.clone());
                }
                Err(failure)
            }
        }
    }

    /// Runs a task once and holds its checksum against the oracle's.
    ///
    /// # Errors
    /// No verified result. The virtual machine is gone unless it has said so itself.
    pub fn run(
        &mut self,
        task: impl Into<Task>,
        iterations: u64,
        limit: Duration,
        oracle: &mut Oracle,
    ) -> Result<Verified, Failure> {
        let task = task.into();
        let Some(vm) = &mut self.vm else {
            return Err(Failure::lasting(Refusal::new(
                Status::Failed,
                "the virtual machine is not up",
            )));
        };
        let request = Request {
            workload: task.name(),
            size: 0,
            iterations,
        };
        vm.resume();
        let before = self.delays.total();
        let answer = vm.run(request, limit);
        let after = self.delays.total();
        vm.pause();
        let answer = answer.map_err(|fault| {
            self.drop_vm();
            self.failure(&fault)
        })?;
        let (done, counts) = self.traits.answer(answer).map_err(Failure::lasting)?;
        let expected = oracle
            .checksum(task, 0, iterations)
            .map_err(|error| Failure::lasting(Refusal::new(Status::Failed, error)))?;
        if done.checksum != expected {
            let refusal = self.traits.wrong_checksum(done.checksum, expected);
            return Err(Failure::lasting(refusal));
        }
        if let Some(latencies) = &done.latencies {
            let (values, requests) = (latencies.total(), task.timed(iterations));
            if requests != Some(values) {
                let reason = format!(
                    "a histogram of {values} values, expected {}",
                    requests.map_or("none".to_owned(), |requests| requests.to_string())
                );
                return Err(Failure::lasting(Refusal::new(Status::Failed, reason)));
            }
        }
        let delay = match (before, after) {
            (Some(before), Some(after)) => after.saturating_sub(before),
            (None, _) | (_, None) => Duration::ZERO,
        };
        Ok(Verified {
            done,
            counts,
            delay,
        })
    }

    /// Ends the virtual machine, if one is up.
    pub fn drop_vm(&mut self) {
        self.vm = None;
    }

    fn failure(&self, fault: &Fault) -> Failure {
        Failure {
            refusal: self.traits.fault(fault),
            timed_out: matches!(fault, Fault::Limit { .. }),
        }
    }

    /// The VMM knows better than a probe of /sys what it runs on.
    fn learn_backend(&mut self, backend: Option<&str>) {
        if backend.is_some() {
            self.traits.software_kvm = software_backend(backend);
        }
    }
}
