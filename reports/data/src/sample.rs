//! `samples.csv`: every measured value, one row each, and the rows that could not be measured.
//!
//! Invariant of a valid row, checked on writing and on reading: status `ok` if and only if there
//! is a value; the value is finite; anything but `ok` has a reason.

use serde::{Deserialize, Serialize};

use crate::error::Fault;
use crate::table::{Row, parse, parse_optional};
use crate::{Metric, Phase, Status};

/// One measured value, or the reason why there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The run it belongs to: [`crate::Manifest::run`].
    pub run: String,
    /// Workload name as in the catalogue, or `boot`.
    pub workload: String,
    /// Mode (`full`, `hardware`, ...), `native`, or a peer's name (`qemu-tcg`).
    pub mode: String,
    /// What ran the guest (`bt`, `kvm`, `qemu`, `native`).
    pub engine: String,
    /// How the guest reaches its machine (`unaware`, ...); `native` outside a guest.
    pub flavour: String,
    /// When in the guest's life.
    pub phase: Phase,
    /// What was measured, with unit, direction and class.
    pub metric: Metric,
    /// Round of the interleaved measurement, from 0.
    pub round: u32,
    /// Position within the whole run, from 0: the order in which samples were taken.
    pub order: u32,
    /// The value in the metric's unit; `None` unless the status is `ok`.
    pub value: Option<f64>,
    /// What the workload returned; 16 hex digits in csv.
    pub checksum: Option<u64>,
    /// What became of it.
    pub status: Status,
    /// Why, for anything but `ok`; empty otherwise.
    pub reason: String,
}

#[derive(Serialize, Deserialize)]
pub struct SampleWire {
    run: String,
    workload: String,
    mode: String,
    engine: String,
    flavour: String,
    phase: String,
    metric: String,
    class: String,
    unit: String,
    direction: String,
    round: String,
    order: String,
    value: String,
    checksum: String,
    status: String,
    reason: String,
}

/// Rules that hold between value, status and reason; shared with the summary.
pub(crate) fn check_state(value: Option<f64>, status: Status, reason: &str) -> Result<(), Fault> {
    match (status.is_ok(), value) {
        (_, Some(value)) if !value.is_finite() => Err(Fault::new(
            "value",
            format!("{value} is not a finite number"),
        )),
        (true, None) => Err(Fault::new("value", "a row with status ok needs a value")),
        (false, Some(_)) => Err(Fault::new(
            "value",
            format!("a row with status {status} may not carry a value"),
        )),
        (false, None) if reason.trim().is_empty() => Err(Fault::new(
            "reason",
            format!("a row with status {status} needs a reason"),
        )),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

pub(crate) fn check_names(names: &[(&'static str, &str)]) -> Result<(), Fault> {
    match names.iter().find(|(_, name)| name.trim().is_empty()) {
        Some((column, _)) => Err(Fault::new(column, "may not be empty")),
        None => Ok(()),
    }
}

impl Row for Sample {
    type Wire = SampleWire;
    const COLUMNS: &'static [&'static str] = &[
        "run",
        "workload",
        "mode",
        "engine",
        "flavour",
        "phase",
        "metric",
        "class",
        "unit",
        "direction",
        "round",
        "order",
        "value",
        "checksum",
        "status",
        "reason",
    ];

    fn check(&self) -> Result<(), Fault> {
        check_names(&[
            ("run", &self.run),
            ("workload", &self.workload),
            ("mode", &self.mode),
            ("metric", &self.metric.name),
        ])?;
        check_state(self.value, self.status, &self.reason)
    }

    fn to_wire(&self) -> SampleWire {
        SampleWire {
            run: self.run.clone(),
            workload: self.workload.clone(),
            mode: self.mode.clone(),
            engine: self.engine.clone(),
            flavour: self.flavour.clone(),
            phase: self.phase.to_string(),
            metric: self.metric.name.to_string(),
            class: self.metric.class.to_string(),
            unit: self.metric.unit.to_string(),
            direction: self.metric.direction.to_string(),
            round: self.round.to_string(),
            order: self.order.to_string(),
            value: self.value.map(|v| v.to_string()).unwrap_or_default(),
            checksum: self
                .checksum
                .map(|c| format!("{c:016x}"))
                .unwrap_or_default(),
            status: self.status.to_string(),
            reason: self.reason.clone(),
        }
    }

    fn from_wire(wire: SampleWire) -> Result<Self, Fault> {
        Ok(Sample {
            run: wire.run,
            workload: wire.workload,
            mode: wire.mode,
            engine: wire.engine,
            flavour: wire.flavour,
            phase: parse("phase", &wire.phase)?,
            metric: Metric {
                name: wire.metric.into(),
                unit: parse("unit", &wire.unit)?,
                direction: parse("direction", &wire.direction)?,
                class: parse("class", &wire.class)?,
            },
            round: parse("round", &wire.round)?,
            order: parse("order", &wire.order)?,
            value: parse_optional("value", &wire.value)?,
            checksum: match wire.checksum.as_str() {
                "" => None,
                digits => Some(u64::from_str_radix(digits, 16).map_err(|error| {
                    Fault::new("checksum", format!("`{}`: {error}", digits.escape_debug()))
                })?),
            },
            status: parse("status", &wire.status)?,
            reason: wire.reason,
        })
    }
}
