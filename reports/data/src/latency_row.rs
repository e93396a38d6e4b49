//! `latency.csv`: how long single requests took, one row per range of nanoseconds.
//!
//! The rows of one key (run, workload, mode, phase, round) are one histogram: all windows of that
//! phase in that round together. The lowest range begins with the exact least value and the highest
//! ends with the exact greatest. Ranges without values have no row. What a value is, is the
//! workload's: a request's time from submission to completion, a timer's lateness.

use serde::{Deserialize, Serialize};

use crate::Phase;
use crate::error::Fault;
use crate::histogram::Range;
use crate::sample::check_names;
use crate::table::{Row, parse};

/// How many requests of one round took that long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyRow {
    /// The run it belongs to: [`crate::Manifest::run`].
    pub run: String,
    /// Workload name as in the catalogue.
    pub workload: String,
    /// Mode or peer.
    pub mode: String,
    /// Phase of the windows.
    pub phase: Phase,
    /// Round of the windows.
    pub round: u32,
    /// The range and its count.
    pub range: Range,
}

#[derive(Serialize, Deserialize)]
pub struct LatencyWire {
    run: String,
    workload: String,
    mode: String,
    phase: String,
    round: String,
    low_ns: String,
    high_ns: String,
    count: String,
}

impl Row for LatencyRow {
    type Wire = LatencyWire;
    const COLUMNS: &'static [&'static str] = &[
        "run", "workload", "mode", "phase", "round", "low_ns", "high_ns", "count",
    ];

    fn check(&self) -> Result<(), Fault> {
        check_names(&[
            ("run", &self.run),
            ("workload", &self.workload),
            ("mode", &self.mode),
        ])?;
        let Range { low, high, count } = self.range;
        if high < low {
            return Err(Fault::new("high_ns", format!("{high} is below {low}")));
        }
        if count == 0 {
            return Err(Fault::new("count", "a range without values has no row"));
        }
        Ok(())
    }

    fn to_wire(&self) -> LatencyWire {
        LatencyWire {
            run: self.run.clone(),
            workload: self.workload.clone(),
            mode: self.mode.clone(),
            phase: self.phase.to_string(),
            round: self.round.to_string(),
            low_ns: self.range.low.to_string(),
            high_ns: self.range.high.to_string(),
            count: self.range.count.to_string(),
        }
    }

    fn from_wire(wire: LatencyWire) -> Result<Self, Fault> {
        Ok(LatencyRow {
            phase: parse("phase", &wire.phase)?,
            round: parse("round", &wire.round)?,
            range: Range {
                low: parse("low_ns", &wire.low_ns)?,
                high: parse("high_ns", &wire.high_ns)?,
                count: parse("count", &wire.count)?,
            },
            run: wire.run,
            workload: wire.workload,
            mode: wire.mode,
        })
    }
}
