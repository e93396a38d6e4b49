//! Stopping a running vCPU from a signal handler or another thread.

mod watch;

use std::sync::Arc;

pub use watch::Watch;

/// Makes a running [`crate::Vcpu::run`] return [`crate::Exit::Interrupted`] soon.
///
/// `kick` is called from signal handlers: implementations use async-signal-safe operations only
/// (atomics, plain stores to shared pages, mprotect, tgkill), never locks or allocation.
/// A kick that arrives while the guest is not running makes the next `run` return at once.
pub trait Kick: Send + Sync {
    /// Asks the vCPU to stop between two instructions.
    fn kick(&self);
}

/// A shared handle to a vCPU's [`Kick`].
pub type KickHandle = Arc<dyn Kick>;
