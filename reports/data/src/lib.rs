//! Samples, exits, manifest and summary: the data that a run leaves behind.
//!
//! Types here are the program's own; csv and JSON happen at the file boundary, through private
//! wire structs. Nothing here measures or renders, and no clock is read.
//!
//! # A run's directory
//!
//! | file | type | written |
//! |---|---|---|
//! | [`MANIFEST`] | [`Manifest`] | before the first sample, and again at the end |
//! | [`SAMPLES`] | [`Sample`], by [`SampleWriter`] | row by row |
//! | [`EXITS`] | [`ExitRow`], by [`ExitWriter`] | row by row |
//! | [`LATENCY`] | [`LatencyRow`], by [`LatencyWriter`] | row by row |
//! | [`SUMMARY`] | [`Summary`], by [`summarise`] | at the end |
//!
//! # Conventions for whoever measures
//!
//! - Boot is workload [`BOOT`], phase `boot`, metric [`Metric::TIME`].
//! - Warm and cold times are per iteration; write [`Metric::ITERATIONS`] once per phase beside
//!   them, or cold and warm can't be set against each other.
//! - What could not be measured is a sample with a status, a reason and no value, in phase `warm`
//!   and metric [`Metric::TIME`], so that it stands where the figure would have stood.
//! - The host's own operations stand as mode [`FLOOR`], each in column `workload`; there they have
//!   warm times, and nothing derived.
//! - Metrics that a mode does not have (counters of a foreign VMM) are simply not written.

mod advantage;
mod error;
mod exit_row;
pub mod held_against;
pub mod histogram;
mod host;
mod json;
mod latency_row;
pub mod manifest;
mod metric;
pub mod paths;
mod run;
mod sample;
pub mod statistics;
mod summary;
mod table;
mod words;

pub use advantage::{Advantage, Decision};
pub use error::{Error, Fault};
pub use exit_row::ExitRow;
pub use histogram::Histogram;
pub use host::{file_system, sha256_hex, tool_version};
pub use latency_row::LatencyRow;
pub use manifest::{Backing, Circumstances, Manifest, ModeInfo, Role};
pub use metric::Metric;
pub use paths::TRANSLATED_CODE;
pub use run::{
    EXITS, ExitWriter, LATENCY, LatencyWriter, MANIFEST, REPORT, Run, SAMPLES, SUMMARY,
    SampleWriter,
};
pub use sample::Sample;
pub use summary::{EMPTY, FLOOR, NATIVE, Summary, SummaryRow, summarise};
pub use table::{Row, TableWriter, read_table};
pub use words::{Class, Direction, Phase, Status, Unit};

/// Version of the format of all files of a run; raised when an old reader would misread them.
pub const SCHEMA_VERSION: u32 = 1;

/// Name in column `workload` of samples that belong to no workload but to the guest's boot.
pub const BOOT: &str = "boot";
