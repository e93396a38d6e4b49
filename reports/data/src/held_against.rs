//! What the figures of engine `pv` are held against: the floors beneath its operations, and its aims.
//!
//! An aim is a bound that the project has set itself: a ratio to a floor, or a time. Invariant: a
//! ratio is given only where both figures are `ok`, and comes from one run.

use crate::{FLOOR, Metric, Phase, Summary, SummaryRow};

/// The engine whose modes have floors.
pub const ENGINE: &str = "pv";

/// Names of the floors, in the order to show them, each with what one operation is.
pub const FLOORS: &[(&str, &str)] = &[
    ("host_syscall", "system call"),
    ("map_page", "mmap of a page"),
    ("sigsegv", "SIGSEGV and back"),
    ("notification", "user notification round trip"),
];

/// One bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aim {
    /// Workload of the mode.
    pub workload: &'static str,
    /// The floor that its time is divided by; without one the bound is a time.
    pub floor: Option<&'static str>,
    /// The ratio, or the time in ns, that is aimed at: at most this.
    pub most: f64,
}

const fn aim(workload: &'static str, floor: Option<&'static str>, most: f64) -> Aim {
    Aim {
        workload,
        floor,
        most,
    }
}

/// Every bound of a single operation.
pub const AIMS: &[Aim] = &[
    aim("syscall", Some("notification"), 1.5),
    aim("pgfault", Some("notification"), 3.0),
    aim("ptemod", None, 1500.0),
    aim("cli_sti", None, 5.0),
];

/// The bound of the compute workloads: geometric mean of the times over native's.
pub const COMPUTE: f64 = 1.03;

/// How a mode stands to one aim.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// The aim.
    pub aim: Aim,
    /// Time of the mode's operation in ns.
    pub time: f64,
    /// Time of the floor's in ns.
    pub floor: Option<f64>,
}

impl Standing {
    /// What the bound is held against: the ratio, or the time.
    pub fn measure(&self) -> f64 {
        self.floor.map_or(self.time, |floor| self.time / floor)
    }

    /// Whether the bound is kept.
    pub fn is_met(&self) -> bool {
        self.measure() <= self.aim.most
    }
}

/// How `mode` stands to each aim for which this run has the figures.
pub fn standings(summary: &Summary, mode: &str) -> Vec<Standing> {
    let time = |workload: &str, mode: &str| -> Option<f64> {
        let row: &SummaryRow = summary.find(workload, mode, Phase::Warm, &Metric::TIME.name)?;
        row.value.filter(|&value| row.status.is_ok() && value > 0.0)
    };
    AIMS.iter()
        .filter_map(|aim| {
            let floor = match aim.floor {
                Some(floor) => Some(time(floor, FLOOR)?),
                None => None,
            };
            Some(Standing {
                aim: *aim,
                time: time(aim.workload, mode)?,
                floor,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SCHEMA_VERSION, Status, Unit};

    fn row(workload: &str, mode: &str, value: Option<f64>) -> SummaryRow {
        SummaryRow {
            workload: workload.to_owned(),
            mode: mode.to_owned(),
            phase: Phase::Warm,
            metric: Metric::TIME.name.to_string(),
            unit: Unit::Ns,
            value,
            ci_low: None,
            ci_high: None,
            n: usize::from(value.is_some()),
            status: if value.is_some() {
                Status::Ok
            } else {
                Status::Failed
            },
            reason: String::new(),
        }
    }

    fn measures(rows: Vec<SummaryRow>) -> Vec<(&'static str, f64, bool)> {
        let summary = Summary {
            schema_version: SCHEMA_VERSION,
            rows,
        };
        standings(&summary, "para")
            .iter()
            .map(|standing| (standing.aim.workload, standing.measure(), standing.is_met()))
            .collect()
    }

    #[test]
    fn ratios_need_both_figures_and_times_one() {
        let syscall = || row("syscall", "para", Some(3000.0));
        let floor = |value| row("notification", FLOOR, value);
        assert_eq!(
            measures(vec![syscall(), floor(Some(2000.0))]),
            [("syscall", 1.5, true)]
        );
        assert_eq!(
            measures(vec![syscall(), floor(Some(1000.0))]),
            [("syscall", 3.0, false)]
        );
        assert_eq!(measures(vec![syscall(), floor(None)]), []);
        assert_eq!(measures(vec![syscall()]), []);
        assert_eq!(measures(vec![floor(Some(1.0))]), []);
        assert_eq!(
            measures(vec![row("cli_sti", "para", Some(6.0))]),
            [("cli_sti", 6.0, false)]
        );
    }

    #[test]
    fn every_aim_names_a_known_floor() {
        for floor in AIMS.iter().filter_map(|aim| aim.floor) {
            assert!(FLOORS.iter().any(|(name, _)| *name == floor), "{floor}");
        }
    }
}
