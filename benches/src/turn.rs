//! One contender's turn at one task: cold run, calibration, warm windows.
//!
//! Order of events: the cold run is the workload's first in this virtual machine, calibration
//! happens once per run, and only then come the windows that count. Invariant: a value is
//! written only if its checksum was the oracle's and its window stood clear of the empty one.

use std::time::Duration;

use reports_data::{Error, Histogram, Metric, Phase, Status};

use crate::calibrate::{MAX_TRIES, Step, first_try, step};
use crate::interrupt;
use crate::session::Session;
use crate::slot::{Empty, Failure, Verified};
use crate::task::Task;
use crate::verdict::Refusal;

/// How many empty windows a warm window must hold for its difference to mean something.
const WARM_CLEARANCE: u32 = 5;
/// The same for a cold run, whose length is what it is.
const COLD_CLEARANCE: u32 = 2;

/// How often a window is measured until the harness was in time for it.
const DISTURBED_TRIES: u32 = 4;
/// Source of the counts that are exits to the VMM; a translator's callouts are none.
const VM_EXITS: &str = "vmm";

/// What a turn has come to.
type Attempt<T> = Result<T, Failure>;

impl Session<'_> {
    /// Gives contender `index` its turn at the task in place `workload`.
    pub(crate) fn turn(&mut self, index: usize, workload: usize) -> Result<(), Error> {
        let task = self.tasks[workload];
        let pair = &self.slots[index].pairs[workload];
        if pair.given_up {
            return Ok(());
        }
        if !self.slots[index].is_up() {
            self.boot(index)?;
            if self.slots[index].is_up() && self.slots[index].empty.is_none() {
                self.measure_empty(index)?;
            }
        }
        if let Some(refusal) = self.slots[index].out.clone() {
            self.skip(index, workload, &refusal)?;
            self.slots[index].pairs[workload].given_up = true;
            return Ok(());
        }
        let Some(empty) = self.slots[index]
            .empty
            .filter(|_| self.slots[index].is_up())
        else {
            let refusal = Refusal::new(Status::Failed, "the virtual machine did not boot");
            return self.skip(index, workload, &refusal);
        };
        match self.attempt(index, workload, task, empty)? {
            Ok(()) => {
                self.slots[index].pairs[workload].recorded = true;
                Ok(())
            }
            Err(failure) => self.give_up(index, workload, failure),
        }
    }

    fn attempt(
        &mut self,
        index: usize,
        workload: usize,
        task: Task,
        empty: Empty,
    ) -> Result<Attempt<()>, Error> {
        let cold_iterations = task.cold_iterations();
        let cold = match self.once(index, task, cold_iterations) {
            Ok(cold) => cold,
            Err(failure) => return Ok(Err(failure)),
        };
        if task.has_cold_phase() {
            self.write_cold(index, workload, cold_iterations, &cold, empty)?;
        }

        let known = self.slots[index].pairs[workload].iterations;
        let iterations = match known {
            Some(iterations) => iterations,
            None => {
                let first = cold.done.window.saturating_sub(empty.window);
                match self.calibrate(index, task, cold_iterations, first, empty) {
                    Ok(iterations) => iterations,
                    Err(failure) => return Ok(Err(failure)),
                }
            }
        };
        if known.is_none() {
            let slot = &mut self.slots[index];
            slot.pairs[workload].iterations = Some(iterations);
            let place = slot.place(task.name(), Phase::Warm, self.round);
            let metric = &Metric::ITERATIONS;
            self.recorder
                .value(place, metric, iterations as f64, None)?;
        }
        let mut latencies = Histogram::default();
        let measured = self.windows(index, workload, iterations, empty, &mut latencies)?;
        let place = self.slots[index].place(task.name(), Phase::Warm, self.round);
        self.recorder.latencies(place, &latencies)?;
        Ok(measured)
    }

    /// Measures the windows that count; `latencies` takes their histograms.
    fn windows(
        &mut self,
        index: usize,
        workload: usize,
        iterations: u64,
        empty: Empty,
        latencies: &mut Histogram,
    ) -> Result<Attempt<()>, Error> {
        let task = self.tasks[workload];
        for window in 0..self.plan.windows {
            if interrupt::requested() {
                break;
            }
            for _ in 0..DISTURBED_TRIES {
                let warm = match self.once(index, task, iterations) {
                    Ok(warm) => warm,
                    Err(failure) => return Ok(Err(failure)),
                };
                if !warm.is_disturbed() {
                    self.write_warm(index, task, iterations, &warm, empty, window)?;
                    if let Some(own) = &warm.done.latencies {
                        latencies.merge(own);
                    }
                    break;
                }
                self.skip(index, workload, &disturbed(&warm))?;
            }
        }
        Ok(Ok(()))
    }

    fn once(&mut self, index: usize, task: Task, iterations: u64) -> Attempt<Verified> {
        let limit = self.budget.clip(self.plan.command_limit);
        let result = self.slots[index].run(task, iterations, limit, &mut self.oracle);
        result.map_err(|failure| {
            if failure.timed_out && limit < self.plan.command_limit {
                Failure {
                    refusal: self.out_of_time(),
                    timed_out: true,
                }
            } else {
                failure
            }
        })
    }

    fn calibrate(
        &mut self,
        index: usize,
        task: Task,
        cold_iterations: u64,
        cold_window: Duration,
        empty: Empty,
    ) -> Attempt<u64> {
        let target = match task.uses_devices() {
            true => self.plan.device_target,
            false => self.plan.target,
        };
        let mut tried = first_try(cold_iterations, cold_window, target);
        for _ in 0..MAX_TRIES {
            let mut run = self.once(index, task, tried)?;
            for _ in 1..DISTURBED_TRIES {
                if !run.is_disturbed() {
                    break;
                }
                run = self.once(index, task, tried)?;
            }
            let mut window = run.done.window;
            if filled_by_several(tried, window.saturating_sub(empty.window), target) {
                // A host that was away meanwhile makes a window look full that hardly holds anything.
                window = window.min(self.once(index, task, tried)?.done.window);
            }
            match step(tried, window.saturating_sub(empty.window), target) {
                Step::Use(iterations) => return Ok(iterations),
                Step::Try(iterations) => tried = iterations,
            }
        }
        Ok(tried)
    }

    fn write_cold(
        &mut self,
        index: usize,
        workload: usize,
        iterations: u64,
        run: &Verified,
        empty: Empty,
    ) -> Result<(), Error> {
        let slot = &mut self.slots[index];
        let name = self.tasks[workload].name();
        let first_time = !std::mem::replace(&mut slot.pairs[workload].cold_recorded, true);
        let place = slot.place(name, Phase::Cold, self.round);
        if let Some(counts) = &run.counts {
            self.recorder.counts(place, counts, iterations)?;
        }
        if first_time {
            let metric = &Metric::ITERATIONS;
            self.recorder
                .value(place, metric, iterations as f64, None)?;
        }
        if run.is_disturbed() {
            return self.recorder.refusal(place, &disturbed(run));
        }
        match cleared(run, empty, COLD_CLEARANCE) {
            Ok(window) => {
                let ns = window.as_nanos() as f64 / iterations as f64;
                let checksum = Some(run.done.checksum);
                self.recorder.value(place, &Metric::TIME, ns, checksum)
            }
            Err(refusal) => self.recorder.refusal(place, &refusal),
        }
    }

    fn write_warm(
        &mut self,
        index: usize,
        task: Task,
        iterations: u64,
        run: &Verified,
        empty: Empty,
        window: u32,
    ) -> Result<(), Error> {
        let place = self.slots[index].place(task.name(), Phase::Warm, self.round);
        let per_iteration = |value: f64| value / iterations as f64;
        let checksum = Some(run.done.checksum);
        match cleared(run, empty, WARM_CLEARANCE) {
            Ok(time) => {
                let ns = per_iteration(time.as_nanos() as f64);
                self.recorder.value(place, &Metric::TIME, ns, checksum)?;
            }
            Err(refusal) => return self.recorder.refusal(place, &refusal),
        }
        let cycles = run.done.cycles.saturating_sub(empty.cycles);
        let cycles = per_iteration(cycles as f64);
        self.recorder
            .value(place, &Metric::CYCLES, cycles, checksum)?;
        let Some(counts) = &run.counts else {
            return Ok(());
        };
        let exits: u64 = counts
            .iter()
            .filter(|count| count.source == VM_EXITS)
            .map(|count| count.count)
            .sum();
        let exits = per_iteration(exits as f64);
        self.recorder
            .value(place, &Metric::EXITS, exits, checksum)?;
        if window == 0 {
            self.recorder.counts(place, counts, iterations)?;
        }
        Ok(())
    }

    /// Writes why a pair has no figure. It is not tried again, unless only time was lacking.
    fn give_up(&mut self, index: usize, workload: usize, failure: Failure) -> Result<(), Error> {
        let Failure { refusal, .. } = failure;
        let name = self.tasks[workload].name();
        self.skip(index, workload, &refusal)?;
        match refusal.status {
            Status::Skipped => {}
            Status::Ok
            | Status::Unsupported
            | Status::Unavailable
            | Status::Failed
            | Status::Invalid => {
                self.slots[index].pairs[workload].given_up = true;
                // What is so by design is no news.
                if refusal.status != Status::Unsupported {
                    let contender = &self.slots[index].contender.name;
                    self.progress.refused(contender, name, &refusal);
                }
            }
        }
        Ok(())
    }
}

/// True if so many iterations, more than one, seem to fill the window.
fn filled_by_several(iterations: u64, window: Duration, target: Duration) -> bool {
    iterations > 1 && matches!(step(iterations, window, target), Step::Use(_))
}

/// What becomes of a window that the harness saw too late: it does not count, and that is said.
fn disturbed(run: &Verified) -> Refusal {
    let Verified { done, delay, .. } = run;
    let window = done.window;
    Refusal::new(
        Status::Skipped,
        format!("the host kept the harness waiting for {delay:.1?} about a window of {window:.1?}"),
    )
}

/// The window without the marks' own cost, if there is enough of it.
fn cleared(run: &Verified, empty: Empty, clearance: u32) -> Result<Duration, Refusal> {
    let window = run.done.window;
    if window < empty.window * clearance || window <= empty.window {
        return Err(Refusal::new(
            Status::Invalid,
            format!(
                "window of {window:.1?} is under {clearance} empty windows of {:.1?}",
                empty.window
            ),
        ));
    }
    Ok(window - empty.window)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Done;

    fn check(window_us: u64, empty_us: u64) -> Result<Duration, Status> {
        let run = Verified {
            done: Done {
                window: Duration::from_micros(window_us),
                checksum: 0,
                cycles: 0,
                latencies: None,
            },
            counts: None,
            delay: Duration::ZERO,
        };
        let empty = Empty {
            window: Duration::from_micros(empty_us),
            cycles: 0,
        };
        cleared(&run, empty, WARM_CLEARANCE).map_err(|refusal| refusal.status)
    }

    #[test]
    fn a_window_must_stand_clear_of_the_empty_one() {
        assert_eq!(check(50, 10), Ok(Duration::from_micros(40)));
        assert_eq!(check(49, 10), Err(Status::Invalid));
        assert_eq!(check(10, 10), Err(Status::Invalid));
        assert_eq!(check(0, 0), Err(Status::Invalid));
        assert_eq!(check(1, 0), Ok(Duration::from_micros(1)));
    }
}
