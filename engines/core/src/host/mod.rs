//! The host's side of a machine: what wakes a vCPU, console input and console output.

pub mod console;
pub mod events;
pub mod input;
mod pump;

pub use pump::{Pump, PumpOptions, WATCHED};
