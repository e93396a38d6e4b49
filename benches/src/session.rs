//! A whole run: rounds of fresh virtual machines that take turns at each workload.
//!
//! In each round every contender boots afresh, measures its empty window, and then has its turn at
//! every workload, in an order that [`Plan`] rotates. What one contender does at one workload
//! stands in module `turn`. Invariant: whatever happens, each pair of contender and workload ends
//! with at least one row, and no virtual machine outlives the run.

use std::time::{Duration, Instant};

use reports_data::{BOOT, EMPTY, Error, Metric, Phase, Status};

use crate::contender::Contender;
use crate::interrupt;
use crate::oracle::Oracle;
use crate::plan::{Budget, Plan};
use crate::progress::Progress;
use crate::record::Recorder;
use crate::slot::{Empty, Slot};
use crate::task::Task;
use crate::verdict::Refusal;

/// Least time in which a turn is worth starting.
const SHORTEST_TURN: Duration = Duration::from_millis(200);

/// Workload that the native control runs in every round.
const CONTROL: &str = "alu";

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As planned, or with fewer rounds for lack of time.
    Complete,
    /// The user asked for the end.
    Interrupted,
}

/// A run in progress.
pub struct Session<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) tasks: &'a [Task],
    pub(crate) slots: Vec<Slot>,
    pub(crate) recorder: &'a mut Recorder,
    pub(crate) progress: &'a Progress,
    pub(crate) oracle: Oracle,
    pub(crate) budget: Budget,
    pub(crate) round: u32,
    control: Option<f64>,
}

impl<'a> Session<'a> {
    /// Prepares a run of `contenders` over `tasks`. Its budget starts now.
    pub fn new(
        plan: &'a Plan,
        contenders: Vec<Contender>,
        tasks: &'a [Task],
        recorder: &'a mut Recorder,
        progress: &'a Progress,
    ) -> Session<'a> {
        Session {
            plan,
            tasks,
            slots: contenders
                .into_iter()
                .map(|contender| Slot::new(contender, tasks.len()))
                .collect(),
            recorder,
            progress,
            oracle: Oracle::default(),
            budget: Budget::start(plan.budget),
            round: 0,
            control: None,
        }
    }

    /// Measures.
    ///
    /// # Errors
    /// The files can't be written. What went wrong with a contender is a row, not an error.
    pub fn run(mut self) -> Result<Ending, Error> {
        let mut last_round = Duration::ZERO;
        for round in 0..self.plan.rounds {
            if round >= self.plan.min_rounds && !self.budget.fits(last_round) {
                self.progress.line(&format!(
                    "time is short: {round} rounds of {}",
                    self.plan.rounds
                ));
                break;
            }
            let started = Instant::now();
            self.round = round;
            self.measure_round()?;
            last_round = started.elapsed();
            if interrupt::requested() || self.spent() {
                break;
            }
        }
        let ending = if interrupt::requested() {
            Ending::Interrupted
        } else {
            Ending::Complete
        };
        if ending == Ending::Complete {
            self.count_paths()?;
        }
        self.account_for_the_rest(ending)?;
        Ok(ending)
    }

    fn measure_round(&mut self) -> Result<(), Error> {
        let turns = self
            .slots
            .iter()
            .map(|slot| self.tasks.iter().filter(|task| slot.has(**task)).count())
            .sum();
        self.progress.round(self.round, self.plan.rounds, turns);
        for index in self.plan.turn_order(self.round, 0, self.slots.len()) {
            self.boot(index)?;
            if self.slots[index].is_up() {
                self.measure_empty(index)?;
            }
        }
        self.measure_control()?;
        for workload in self.plan.workload_order(self.round, self.tasks.len()) {
            let task = self.tasks[workload];
            let takers: Vec<usize> = (0..self.slots.len())
                .filter(|&index| self.slots[index].has(task))
                .collect();
            for place in self.plan.turn_order(self.round, workload, takers.len()) {
                let index = takers[place];
                if interrupt::requested() {
                    break;
                }
                let contender = &self.slots[index].contender;
                self.progress.turn(&contender.name, task.name());
                if self.spent() {
                    self.skip(index, workload, &self.out_of_time())?;
                } else {
                    self.turn(index, workload)?;
                }
            }
        }
        for slot in &mut self.slots {
            slot.drop_vm();
        }
        Ok(())
    }

    /// Boots one contender afresh, with a row for it.
    pub(crate) fn boot(&mut self, index: usize) -> Result<(), Error> {
        if self.slots[index].out.is_some() || interrupt::requested() || self.spent() {
            self.slots[index].drop_vm();
            return Ok(());
        }
        let limit = self.budget.clip(self.plan.boot_limit);
        let booted = self.slots[index].boot(limit);
        let slot = &self.slots[index];
        let place = slot.place(BOOT, Phase::Boot, self.round);
        match booted {
            Ok(time) => {
                self.recorder
                    .value(place, &Metric::TIME, time.as_nanos() as f64, None)?;
                if let Some(mib) = slot.process_id().and_then(peak_memory_mib) {
                    self.recorder
                        .value(place, &Metric::PEAK_MEMORY, mib, None)?;
                }
            }
            Err(failure) if limit < self.plan.boot_limit && failure.timed_out => {
                let refusal = self.out_of_time();
                self.recorder.refusal(place, &refusal)?;
            }
            Err(failure) => {
                self.progress
                    .refused(&slot.contender.name, BOOT, &failure.refusal);
                self.recorder.refusal(place, &failure.refusal)?;
            }
        }
        Ok(())
    }

    /// Measures what the marks themselves cost. Without it there are no figures in this round.
    pub(crate) fn measure_empty(&mut self, index: usize) -> Result<(), Error> {
        let Some(empty) = Task::empty(self.slots[index].contender.role) else {
            return Ok(());
        };
        let mut windows = Vec::new();
        let mut cycles = Vec::new();
        for _ in 0..self.plan.empty_windows {
            let limit = self.budget.clip(self.plan.command_limit);
            let slot = &mut self.slots[index];
            match slot.run(empty, 1, limit, &mut self.oracle) {
                Ok(verified) => {
                    windows.push(verified.done.window);
                    cycles.push(verified.done.cycles);
                    let place = slot.place(EMPTY, Phase::Warm, self.round);
                    if verified.done.window.is_zero() {
                        self.recorder.refusal(place, &unseen())?;
                    } else {
                        let ns = verified.done.window.as_nanos() as f64;
                        let checksum = Some(verified.done.checksum);
                        self.recorder.value(place, &Metric::TIME, ns, checksum)?;
                    }
                }
                Err(failure) => {
                    let refusal = Refusal::new(
                        failure.refusal.status,
                        format!("empty window: {}", failure.refusal.reason),
                    );
                    self.progress.refused(&slot.contender.name, EMPTY, &refusal);
                    slot.drop_vm();
                    slot.out = Some(refusal);
                    return Ok(());
                }
            }
        }
        windows.sort_unstable();
        cycles.sort_unstable();
        self.slots[index].empty = Some(Empty {
            window: windows[windows.len() / 2],
            cycles: cycles[cycles.len() / 2],
        });
        Ok(())
    }

    /// The host's own steadiness: native `alu`, as a ratio to round 0.
    fn measure_control(&mut self) -> Result<(), Error> {
        let native = |slot: &Slot| slot.contender.traits.native && slot.is_up();
        let (Some(index), Some(alu)) =
            (self.slots.iter().position(native), programs::find(CONTROL))
        else {
            return Ok(());
        };
        let mut windows = Vec::new();
        // The first one warms up.
        for _ in 0..4 {
            let limit = self.budget.clip(self.plan.command_limit);
            match self.slots[index].run(alu, alu.iterations, limit, &mut self.oracle) {
                Ok(verified) => windows.push(verified.done.window.as_nanos() as f64),
                // The turn at the workload itself will say it in a row.
                Err(_) => return Ok(()),
            }
        }
        windows[1..].sort_by(f64::total_cmp);
        let now = windows[2];
        let first = *self.control.get_or_insert(now);
        let place = self.slots[index].place(CONTROL, Phase::Warm, self.round);
        self.recorder
            .value(place, &crate::control_metric(), now / first, None)
    }

    pub(crate) fn spent(&self) -> bool {
        !self.budget.fits(SHORTEST_TURN)
    }

    pub(crate) fn out_of_time(&self) -> Refusal {
        let seconds = self.plan.budget.unwrap_or_default().as_secs();
        Refusal::new(
            Status::Skipped,
            format!("the time budget of {seconds} s was spent"),
        )
    }

    /// Writes a row without a figure for a pair, at most one in a round.
    pub(crate) fn skip(
        &mut self,
        index: usize,
        workload: usize,
        refusal: &Refusal,
    ) -> Result<(), Error> {
        let slot = &mut self.slots[index];
        if slot.pairs[workload].given_up {
            return Ok(());
        }
        slot.pairs[workload].recorded = true;
        let place = slot.place(self.tasks[workload].name(), Phase::Warm, self.round);
        self.recorder.refusal(place, refusal)
    }

    /// Pairs that never had a turn get a row that says so.
    fn account_for_the_rest(&mut self, ending: Ending) -> Result<(), Error> {
        let refusal = match ending {
            Ending::Complete => self.out_of_time(),
            Ending::Interrupted => Refusal::new(Status::Skipped, "interrupted"),
        };
        for index in 0..self.slots.len() {
            for workload in 0..self.tasks.len() {
                let pending = !self.slots[index].pairs[workload].recorded;
                if pending && self.slots[index].has(self.tasks[workload]) {
                    let out = self.slots[index].out.clone();
                    self.skip(index, workload, out.as_ref().unwrap_or(&refusal))?;
                }
            }
        }
        Ok(())
    }
}

/// An empty window whose two ends the harness read at once. It counts as zero in the median that
/// is subtracted, which is what it took from the other windows; a row would call it a figure.
fn unseen() -> Refusal {
    Refusal::new(
        Status::Skipped,
        "both ends arrived in one read: shorter than a wake-up of the harness",
    )
}

/// Peak resident memory of a process so far: VmHWM in proc_pid_status(5).
fn peak_memory_mib(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}
