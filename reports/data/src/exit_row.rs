//! `exits.csv`: what was counted inside a measured window, one row per reason.
//!
//! A row belongs to one window (run, workload, mode, phase, round): where a round holds several
//! windows of a phase, one of them leaves its counts. Reasons that did not occur
//! have no row. Exits of different sources, and of different engines, are never added up: a
//! translator's callout (source `translator`) is not a VM exit.

use serde::{Deserialize, Serialize};

use crate::Phase;
use crate::error::Fault;
use crate::sample::check_names;
use crate::table::{Row, parse};

/// How often one reason occurred in one window.
#[derive(Clone, Debug, PartialEq)]
pub struct ExitRow {
    /// The run it belongs to: [`crate::Manifest::run`].
    pub run: String,
    /// Workload name as in the catalogue.
    pub workload: String,
    /// Mode or peer.
    pub mode: String,
    /// Phase of the window.
    pub phase: Phase,
    /// Round of the window: with `phase` the key to its samples.
    pub round: u32,
    /// Who counted: `vmm` (the run loop), `translator`, `translated-code`
    /// ([`TRANSLATED_CODE`](crate::TRANSLATED_CODE)), `kvm-stats`, `tracepoint`.
    pub source: String,
    /// Mode-neutral kind (`pio`, `shadow-fault`, `translate`, ...).
    pub kind: String,
    /// The reason in the field's own terms (`KVM_EXIT_IO out 0x3ff`, `tlb-miss`).
    pub reason: String,
    /// How often in the window.
    pub count: u64,
    /// `count` over the window's iterations.
    pub per_iteration: f64,
}

#[derive(Serialize, Deserialize)]
pub struct ExitWire {
    run: String,
    workload: String,
    mode: String,
    phase: String,
    round: String,
    source: String,
    kind: String,
    reason: String,
    count: String,
    per_iteration: String,
}

impl Row for ExitRow {
    type Wire = ExitWire;
    const COLUMNS: &'static [&'static str] = &[
        "run",
        "workload",
        "mode",
        "phase",
        "round",
        "source",
        "kind",
        "reason",
        "count",
        "per_iteration",
    ];

    fn check(&self) -> Result<(), Fault> {
        check_names(&[
            ("run", &self.run),
            ("workload", &self.workload),
            ("mode", &self.mode),
            ("source", &self.source),
            ("kind", &self.kind),
            ("reason", &self.reason),
        ])?;
        if !self.per_iteration.is_finite() || self.per_iteration < 0.0 {
            return Err(Fault::new(
                "per_iteration",
                format!("{} is not a finite count", self.per_iteration),
            ));
        }
        Ok(())
    }

    fn to_wire(&self) -> ExitWire {
        ExitWire {
            run: self.run.clone(),
            workload: self.workload.clone(),
            mode: self.mode.clone(),
            phase: self.phase.to_string(),
            round: self.round.to_string(),
            source: self.source.clone(),
            kind: self.kind.clone(),
            reason: self.reason.clone(),
            count: self.count.to_string(),
            per_iteration: self.per_iteration.to_string(),
        }
    }

    fn from_wire(wire: ExitWire) -> Result<Self, Fault> {
        Ok(ExitRow {
            phase: parse("phase", &wire.phase)?,
            round: parse("round", &wire.round)?,
            count: parse("count", &wire.count)?,
            per_iteration: parse("per_iteration", &wire.per_iteration)?,
            run: wire.run,
            workload: wire.workload,
            mode: wire.mode,
            source: wire.source,
            kind: wire.kind,
            reason: wire.reason,
        })
    }
}
