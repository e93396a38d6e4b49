//! `summary.json`: samples brought together, one row per workload, mode, phase and metric.
//!
//! # What becomes of a row whose samples disagree
//!
//! The first of these statuses that any sample of the row has is the row's, with that sample's
//! reason: `failed`, `invalid`, `unavailable`, `unsupported`. One bad sample is enough, because a
//! figure beside a failure would be read as if nothing had happened. `skipped` samples count only
//! where nothing was measured: a row with fewer rounds is a smaller `n`, not a fault.
//! A row that is not `ok` has a reason, no value, no interval, and `n` = 0.
//!
//! # Derived rows
//!
//! `slowdown` (unit `x`, phase `warm`) stands for every mode but `native` where native's warm
//! `time` is `ok`, but not for workload [`EMPTY`], which is the harness's own cost; if the mode's own row is not, the derived row has its status and reason.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Fault};
use crate::sample::check_state;
use crate::statistics::{Rng, keyed, median, median_interval, ratio_interval};
use crate::{Metric, Phase, SCHEMA_VERSION, Sample, Status, Unit, json};

/// Name of the baseline in column `mode`.
pub const NATIVE: &str = "native";
/// Name in column `mode` of the host's own operations; see [`crate::held_against`].
pub const FLOOR: &str = "floor";
/// The workload that does nothing: what its window takes is subtracted from all others.
pub const EMPTY: &str = "empty";

/// Everything that `summary.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// The rows, in order of first appearance among the samples; derived rows last.
    pub rows: Vec<SummaryRow>,
}

/// One figure with its spread, or the reason why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// Workload, or `boot`.
    pub workload: String,
    /// Mode, `native` or a peer.
    pub mode: String,
    /// When in the guest's life.
    pub phase: Phase,
    /// Name of the metric.
    pub metric: String,
    /// Unit of value and interval.
    pub unit: Unit,
    /// The median.
    pub value: Option<f64>,
    /// Lower end of the 95 % bootstrap interval; `None` for fewer than two samples.
    pub ci_low: Option<f64>,
    /// Upper end.
    pub ci_high: Option<f64>,
    /// How many samples stand behind the value.
    pub n: usize,
    /// What became of the row.
    pub status: Status,
    /// Why, for anything but `ok`; empty otherwise.
    pub reason: String,
}

impl Summary {
    /// The row of one workload, mode, phase and metric.
    pub fn find(
        &self,
        workload: &str,
        mode: &str,
        phase: Phase,
        metric: &str,
    ) -> Option<&SummaryRow> {
        self.rows.iter().find(|row| {
            row.workload == workload
                && row.mode == mode
                && row.phase == phase
                && row.metric == metric
        })
    }

    /// Reads `summary.json`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Json`] for malformed JSON, another schema version or a row that
    /// breaks a rule.
    pub fn read(path: &Path) -> Result<Summary, Error> {
        let summary: Summary = json::read(path)?;
        json::check_version(path, summary.schema_version)?;
        for (index, row) in summary.rows.iter().enumerate() {
            row.check().map_err(|fault| Error::Json {
                path: path.to_owned(),
                line: 0,
                column: 0,
                message: format!("row {index}: {fault}"),
            })?;
        }
        Ok(summary)
    }

    /// Writes `summary.json`, replacing the file at once.
    ///
    /// # Errors
    /// [`Error::Refused`] if a row breaks a rule, [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        for row in &self.rows {
            row.check()
                .map_err(|Fault { column, message }| Error::Refused {
                    path: path.to_owned(),
                    column,
                    message: format!("{} in {}: {message}", row.workload, row.mode),
                })?;
        }
        json::write(path, self)
    }
}

impl SummaryRow {
    fn check(&self) -> Result<(), Fault> {
        check_state(self.value, self.status, &self.reason)?;
        for (column, bound) in [("ci_low", self.ci_low), ("ci_high", self.ci_high)] {
            if bound.is_some_and(|bound| !bound.is_finite()) {
                return Err(Fault::new(column, "not a finite number"));
            }
            if bound.is_some() && !self.status.is_ok() {
                return Err(Fault::new(column, "a row that is not ok has no interval"));
            }
        }
        Ok(())
    }
}

struct Group<'a> {
    first: &'a Sample,
    samples: Vec<&'a Sample>,
}

impl Group<'_> {
    fn is(&self, sample: &Sample) -> bool {
        self.first.workload == sample.workload
            && self.first.mode == sample.mode
            && self.first.phase == sample.phase
            && self.first.metric.name == sample.metric.name
            && self.first.metric.unit == sample.metric.unit
    }

    fn values(&self) -> Vec<f64> {
        let values = self.samples.iter().filter(|s| s.status.is_ok());
        values.filter_map(|s| s.value).collect()
    }

    /// Status and reason by the rule of the module's head.
    fn state(&self) -> (Status, &str) {
        let first_with = |status| self.samples.iter().find(|s| s.status == status);
        for status in [
            Status::Failed,
            Status::Invalid,
            Status::Unavailable,
            Status::Unsupported,
            Status::Ok,
            Status::Skipped,
        ] {
            if let Some(sample) = first_with(status) {
                return (status, &sample.reason);
            }
        }
        (Status::Skipped, "no sample")
    }

    fn row(&self, seed: u64) -> SummaryRow {
        let (status, reason) = self.state();
        let mut row = SummaryRow {
            workload: self.first.workload.clone(),
            mode: self.first.mode.clone(),
            phase: self.first.phase,
            metric: self.first.metric.name.to_string(),
            unit: self.first.metric.unit,
            value: None,
            ci_low: None,
            ci_high: None,
            n: 0,
            status,
            reason: if status.is_ok() { "" } else { reason }.to_owned(),
        };
        if status.is_ok() {
            let values = self.values();
            row.value = median(&values);
            row.n = values.len();
            let interval = median_interval(&values, &mut row_rng(seed, &row));
            row.ci_low = interval.map(|(low, _)| low);
            row.ci_high = interval.map(|(_, high)| high);
        }
        row
    }
}

/// Brings samples together. Deterministic: the same samples in the same order and the same seed
/// give the same summary; a row's interval does not depend on which other rows there are.
pub fn summarise(samples: &[Sample], seed: u64) -> Summary {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for sample in samples {
        match groups.iter_mut().rev().find(|group| group.is(sample)) {
            Some(group) => group.samples.push(sample),
            None => groups.push(Group {
                first: sample,
                samples: vec![sample],
            }),
        }
    }
    let mut rows: Vec<SummaryRow> = groups.iter().map(|group| group.row(seed)).collect();
    let slowdowns: Vec<SummaryRow> = groups
        .iter()
        .zip(&rows)
        .filter(|(group, _)| {
            is_warm_time(group) && group.first.mode != NATIVE && group.first.workload != EMPTY
        })
        .filter_map(|(group, row)| {
            let native = groups.iter().find(|native| {
                is_warm_time(native)
                    && native.first.mode == NATIVE
                    && native.first.workload == group.first.workload
            })?;
            slowdown(group, row, native, seed)
        })
        .collect();
    rows.extend(slowdowns);
    Summary {
        schema_version: SCHEMA_VERSION,
        rows,
    }
}

fn is_warm_time(group: &Group<'_>) -> bool {
    group.first.phase == Phase::Warm && group.first.metric.name == Metric::TIME.name
}

/// `None` where native has no positive figure.
fn slowdown(
    group: &Group<'_>,
    time: &SummaryRow,
    native: &Group<'_>,
    seed: u64,
) -> Option<SummaryRow> {
    if !native.state().0.is_ok() {
        return None;
    }
    let baseline = native.values();
    let base = median(&baseline).filter(|&base| base > 0.0)?;
    let mut row = SummaryRow {
        metric: Metric::SLOWDOWN.name.to_string(),
        unit: Metric::SLOWDOWN.unit,
        value: None,
        ci_low: None,
        ci_high: None,
        ..time.clone()
    };
    if let Some(value) = time.value {
        let values = group.values();
        row.value = Some(value / base).filter(|ratio| ratio.is_finite());
        row.value?;
        row.n = values.len().min(baseline.len());
        let interval = ratio_interval(&values, &baseline, &mut row_rng(seed, &row));
        row.ci_low = interval.map(|(low, _)| low);
        row.ci_high = interval.map(|(_, high)| high);
    }
    Some(row)
}

/// A generator of the row's own.
fn row_rng(seed: u64, row: &SummaryRow) -> Rng {
    keyed(
        seed,
        &[&row.workload, &row.mode, row.phase.as_str(), &row.metric],
    )
}
