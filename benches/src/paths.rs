//! The counting pass: what translated code does by itself, once for each workload.
//!
//! A translator's callouts are counted in every window, because they are counted where the time
//! goes anyway. What never leaves translated code is not: counting it costs time. So it has runs of
//! its own, after the rounds, whose times are thrown away and whose counts of source
//! [`TRANSLATED_CODE`] are kept: shares such as that of linked branches are made of them.
//!
//! Invariant: nothing that this pass measures becomes a time, and no count of any other source is
//! written from here.

use reports_data::{Error, Phase, TRANSLATED_CODE};

use crate::interrupt;
use crate::session::Session;
use crate::task::Task;

impl Session<'_> {
    /// Counts, as far as there is time. A machine that fails here has had its rows already.
    pub(crate) fn count_paths(&mut self) -> Result<(), Error> {
        for index in 0..self.slots.len() {
            if !self.slots[index].contender.counts_paths() || self.slots[index].out.is_some() {
                continue;
            }
            let limit = self.budget.clip(self.plan.boot_limit);
            if self.spent() || self.slots[index].boot_counting(limit).is_err() {
                continue;
            }
            for workload in 0..self.tasks.len() {
                if interrupt::requested() || self.spent() {
                    break;
                }
                self.count_paths_of(index, workload)?;
            }
            self.slots[index].drop_vm();
        }
        Ok(())
    }

    fn count_paths_of(&mut self, index: usize, workload: usize) -> Result<(), Error> {
        let task = self.tasks[workload];
        let pair = &self.slots[index].pairs[workload];
        let Some(warm) = pair.iterations.filter(|_| !pair.given_up) else {
            return Ok(());
        };
        let name = self.slots[index].contender.name.clone();
        self.progress.turn(&name, task.name());
        let cold = task.has_cold_phase().then(|| task.cold_iterations());
        let phases = [(Phase::Cold, cold), (Phase::Warm, Some(warm))];
        for (phase, iterations) in phases {
            let Some(iterations) = iterations else {
                continue;
            };
            if !self.count_window(index, task, phase, iterations)? {
                break;
            }
        }
        Ok(())
    }

    /// One window; false if there was none.
    fn count_window(
        &mut self,
        index: usize,
        task: Task,
        phase: Phase,
        iterations: u64,
    ) -> Result<bool, Error> {
        if !self.slots[index].is_up() {
            let limit = self.budget.clip(self.plan.boot_limit);
            if self.slots[index].boot_counting(limit).is_err() {
                return Ok(false);
            }
        }
        let limit = self.budget.clip(self.plan.command_limit);
        let Ok(run) = self.slots[index].run(task, iterations, limit, &mut self.oracle) else {
            return Ok(false);
        };
        let mut counts = run.counts.unwrap_or_default();
        counts.retain(|count| count.source == TRANSLATED_CODE);
        let place = self.slots[index].place(task.name(), phase, self.round);
        self.recorder.counts(place, &counts, iterations)?;
        Ok(true)
    }
}
