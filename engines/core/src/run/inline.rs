//! Exits that are answered before the engine's run ends.
//!
//! What the run loop does between two entries for such an exit is done here: it is counted, the device
//! answers, and it is found out whether anything is left to do. If so the engine is told to return, and
//! the loop goes on as after any other exit.
//!
//! Invariant: an access after which [`After::Enter`] is said leaves nothing that
//! [`Run::prepare`](super::Run) would act on.

use super::{Next, next};
use crate::devices::Action;
use crate::host::events::Events;
use crate::{After, DeviceBus, ExitReason, GuestPhys, Machine};

/// The machine of one vCPU, for as long as that runs.
pub(super) struct Inline<'a> {
    machine: &'a mut Machine,
    events: &'a Events,
    /// As [`Run`](super::Run) has them, but none while the loop wants to see every exit.
    most_exits: u64,
    /// What the last access asks for.
    action: Action,
    /// An access was answered, so the guest does something else than to poll for input.
    answered: bool,
}

impl<'a> Inline<'a> {
    pub(super) fn new(
        machine: &'a mut Machine,
        events: &'a Events,
        most_exits: u64,
        look: bool,
    ) -> Self {
        Inline {
            machine,
            events,
            most_exits: if look { 0 } else { most_exits },
            action: Action::None,
            answered: false,
        }
    }

    /// True if an access was answered with nothing more to do: fruitless polls count anew.
    pub(super) fn answered(&self) -> bool {
        self.answered
    }

    /// What the access asks for after which the engine has returned.
    pub(super) fn next(&self) -> Next {
        next(self.action)
    }

    #[inline]
    fn after(&mut self, action: Action) -> After {
        self.action = action;
        let goes_on = matches!(action, Action::None | Action::Hold);
        self.answered |= goes_on;
        let quiet = goes_on
            && !self.machine.attention
            && self.events.pending() == 0
            && self.machine.tally.total() < self.most_exits
            && !self.machine.has_written();
        if quiet { After::Enter } else { After::Return }
    }
}

impl DeviceBus for Inline<'_> {
    fn port_in(&mut self, port: u16, data: &mut [u8]) -> After {
        self.machine.tally.exit(ExitReason::PioIn);
        let action = self.machine.port_in(port, data.len() as u8, data);
        self.after(action)
    }

    fn port_out(&mut self, port: u16, data: &[u8]) -> After {
        self.machine.tally.exit(ExitReason::PioOut);
        let action = self.machine.port_out(port, data.len() as u8, data);
        self.after(action)
    }

    fn memory_read(&mut self, addr: GuestPhys, data: &mut [u8], priority: u8) -> After {
        self.machine.tally.exit(ExitReason::MmioRead);
        self.machine.sync_task_priority(priority);
        let action = self.machine.memory_read(addr, data);
        self.after(action)
    }

    fn memory_write(&mut self, addr: GuestPhys, data: &[u8]) -> After {
        self.machine.tally.exit(ExitReason::MmioWrite);
        let action = self.machine.memory_write(addr, data);
        self.after(action)
    }
}
