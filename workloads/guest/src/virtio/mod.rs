//! Virtio drivers: the `hybrid` flavour's over memory-mapped registers, the `aware` one's over a page
//! that it shares with its host.
//!
//! The drivers and their rings are the same; what differs is the bus: how a device is found, set up
//! and notified, and how the kernel sleeps until a device has something to say. A driver polls the
//! used ring right after a notification and keeps the device from interrupting meanwhile; only where
//! that is in vain it asks to be told and sleeps.
//!
//! A bus has a type `Transport`, and the functions `wait`, `arena_word`, `patience`, `start_watch` and
//! `stop_watch`.

mod block;
#[cfg(feature = "hybrid")]
mod console;
#[cfg(feature = "hybrid")]
mod mmio;
mod net;
mod queue;

#[cfg(not(feature = "hybrid"))]
use crate::aware::bus;
#[cfg(feature = "hybrid")]
use mmio as bus;

pub(crate) use block::Disk;
#[cfg(feature = "hybrid")]
pub(crate) use console::Terminal;
#[cfg(feature = "hybrid")]
pub(crate) use mmio::{LINES, acknowledge};
pub(crate) use net::Card;
pub(crate) use queue::{MOST, Queue};

/// Features that are not one device's alone (clause 6).
pub(crate) mod feature {
    pub(crate) const INDIRECT: u64 = 1 << 28;
    pub(crate) const EVENT_INDEX: u64 = 1 << 29;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}
