//! Non-maskable interrupts (SDM 3A 6.7): one may be under way and one may wait. Before one is under
//! way two may have come, since a processor would have delivered the first at once.
//!
//! Invariant: from the delivery of one to the next `iret`, whatever that returns from, none is
//! delivered.

use crate::{
    core::{Cause, Core},
    fault::Fault,
};

const VECTOR: u8 = 2;

/// The NMIs of one CPU.
#[derive(Debug, Default)]
pub(crate) struct Nmi {
    pending: u8,
    blocked: bool,
}

impl Core {
    /// The CPU's NMI line was asserted. Several that wait for an `iret` are one.
    pub(crate) fn latch_nmi(&mut self) {
        let most = if self.nmi.blocked { 1 } else { 2 };
        self.nmi.pending = (self.nmi.pending + 1).min(most);
    }

    /// One has to be delivered before the next instruction.
    pub(crate) fn nmi_due(&self) -> bool {
        self.nmi.pending != 0 && !self.nmi.blocked && !self.cpu.shadow
    }

    /// Delivers the one that waits.
    ///
    /// # Errors
    /// The exception met on the way.
    pub(crate) fn deliver_nmi(&mut self) -> Result<(), Fault> {
        self.nmi = Nmi {
            pending: self.nmi.pending.saturating_sub(1),
            blocked: true,
        };
        // The runtime has to see the iret that ends this.
        self.forget_modes();
        self.deliver(VECTOR, None, Cause::External)
    }

    /// None is delivered before the next `iret`.
    pub(crate) fn nmi_blocked(&self) -> bool {
        self.nmi.blocked
    }

    /// As after INIT.
    pub(crate) fn forget_nmis(&mut self) {
        self.nmi = Nmi::default();
        self.forget_modes();
    }

    /// An `iret` is being executed.
    pub(super) fn unblock_nmi(&mut self) {
        if std::mem::take(&mut self.nmi.blocked) {
            self.forget_modes();
        }
    }
}
