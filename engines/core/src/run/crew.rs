//! Several vCPUs in one machine: a thread each.
//!
//! Threads are made before the process gives up the right to make any ([`Crew::new`]), and wait for
//! their vCPU. [`Crew::drive`] gives them out, runs the first on its own thread, and takes all of
//! them back: when it returns no thread is left.
//!
//! Invariant: whoever ends the run writes the outcome down first and then stops the others; the
//! first one counts.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::reach::Shared;
use super::{End, Limits, Outcome, Reach, Run, drive, finish};
use crate::{Error, Machine, Vcpu};

type Job = Box<dyn FnOnce() + Send>;

struct Helper {
    job: Sender<Job>,
    thread: JoinHandle<()>,
}

/// Threads for the vCPUs beside the first.
pub struct Crew(Vec<Helper>);

/// A run that is over.
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// The vCPU that ended it.
    pub cpu: usize,
    /// All of them, stopped.
    pub vcpus: Vec<Box<dyn Vcpu>>,
    /// The machine.
    pub machine: Machine,
}

/// How the run ended, and on which vCPU.
type Verdict = Mutex<Option<(usize, Outcome)>>;

impl Crew {
    /// Threads for `cpus` vCPUs but the first, which the caller's thread will run. They are like the
    /// calling one in signals and timers.
    ///
    /// # Errors
    /// The host's, if it has no threads left.
    pub fn new(cpus: u8) -> io::Result<Self> {
        let helper = |number| {
            let (job, jobs) = channel::<Job>();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu {number}"))
                .spawn(move || {
                    if let Ok(job) = jobs.recv() {
                        job();
                    }
                })?;
            Ok(Helper { job, thread })
        };
        (1..cpus).map(helper).collect::<io::Result<_>>().map(Crew)
    }

    /// Runs `vcpus`, the first one on the calling thread, in `machine` until one of them ends the
    /// run.
    ///
    /// # Panics
    /// If there are not as many vCPUs as the machine and the crew were made for.
    pub fn drive(
        self,
        mut vcpus: Vec<Box<dyn Vcpu>>,
        mut machine: Machine,
        limits: &Limits,
    ) -> Ended {
        assert_eq!(vcpus.len(), self.0.len() + 1, "a thread for each vCPU");
        assert_eq!(vcpus.len(), machine.seats.count(), "a seat for each vCPU");
        if let [vcpu] = &mut vcpus[..] {
            let outcome = drive(&mut **vcpu, &mut machine, limits);
            return Ended {
                outcome,
                cpu: 0,
                vcpus,
                machine,
            };
        }
        machine.pump.arm_deadline(limits.timeout);
        let machine = Arc::new(Mutex::new(machine));
        let verdict = Arc::new(Verdict::default());
        let (back, returned) = channel();
        let mut vcpus = vcpus.into_iter();
        let mut first = vcpus.next().expect("there are several");
        let mut threads = Vec::with_capacity(self.0.len());
        for (number, (helper, mut vcpu)) in self.0.into_iter().zip(vcpus).enumerate() {
            let mut reach = Shared {
                machine: Arc::clone(&machine),
                cpu: number + 1,
            };
            let (limits, verdict, back) = (*limits, Arc::clone(&verdict), back.clone());
            let job = move || {
                work(&mut *vcpu, &mut reach, &limits, &verdict);
                let cpu = reach.cpu;
                // The machine is let go before the vCPU is told to be back.
                drop(reach);
                let _ = back.send((cpu, vcpu));
            };
            // A thread that was made waits for this.
            let sent = helper.job.send(Box::new(job));
            debug_assert!(sent.is_ok(), "the thread of vCPU {} is gone", number + 1);
            threads.push(helper.thread);
        }
        drop(back);
        let mut reach = Shared { machine, cpu: 0 };
        work(&mut *first, &mut reach, limits, &verdict);
        let mut vcpus = vec![(0, first)];
        vcpus.extend(returned);
        vcpus.sort_by_key(|(cpu, _)| *cpu);
        for thread in threads {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "panics are caught");
        }
        let mut machine = Arc::into_inner(reach.machine)
            .expect("the threads have let it go")
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let vcpus: Vec<_> = vcpus.into_iter().map(|(_, vcpu)| vcpu).collect();
        // Another vCPU's end must not keep output back.
        machine.events.take(crate::host::events::flag::STOP);
        finish(&mut machine, &*vcpus[0]);
        let (cpu, outcome) = lock(&verdict).take().expect("whoever stops first says why");
        Ended {
            outcome,
            cpu,
            vcpus,
            machine,
        }
    }
}

fn lock(verdict: &Verdict) -> std::sync::MutexGuard<'_, Option<(usize, Outcome)>> {
    verdict.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One vCPU's part in the run.
fn work(vcpu: &mut dyn Vcpu, reach: &mut Shared, limits: &Limits, verdict: &Verdict) {
    let cpu = reach.cpu;
    let (events, own_controllers) = {
        let machine = reach.hold();
        (machine.seats.events(cpu), machine.own_controllers)
    };
    let run = || Run::<true>::new(vcpu, cpu, events, limits, own_controllers).conclude(reach);
    let end = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        End::Outcome(Outcome::EngineError {
            state: None,
            error: Error::Engine(format!("the thread of vCPU {cpu} panicked")),
        })
    });
    match end {
        End::Outcome(outcome) => {
            lock(verdict).get_or_insert((cpu, outcome));
            reach.hold().seats.stop_others(cpu);
        }
        End::Stopped => {}
    }
}
