//! The measuring harness: virtual machines driven over their consoles, and the rows they leave.
//!
//! A [`vm::Vm`] is a child process that speaks the console protocol of [`abi`]; our own modes, the
//! native baseline and foreign virtual machine monitors are all measured by the same code. A
//! [`session::Session`] interleaves them in rounds; [`record::Recorder`] writes each row as soon
//! as it is measured. The binary `measure` and the criterion benches are thin users of this.
//!
//! Invariant: this is the only crate of the workspace that reads clocks for measuring, and no
//! value leaves it whose checksum was not the oracle's.

pub mod calibrate;
pub mod choices;
pub mod console;
pub mod contender;
pub mod devices;
pub mod disk;
pub mod glob;
pub mod interrupt;
mod latencies;
pub mod oracle;
mod paths;
pub mod peer;
pub mod plan;
pub mod priority;
pub mod process;
pub mod progress;
pub mod record;
pub mod session;
pub mod slot;
pub mod stats;
pub mod table;
pub mod task;
mod turn;
pub mod verdict;
pub mod vm;

use reports_data::{Class, Direction, Metric, Unit};

/// The native control: native `alu` of a round over that of round 0. Tells how steady the host was
/// during the run; it is no property of any mode.
pub const fn control_metric() -> Metric {
    Metric {
        name: std::borrow::Cow::Borrowed("control"),
        unit: Unit::Ratio,
        direction: Direction::Neither,
        class: Class::Noisy,
    }
}
