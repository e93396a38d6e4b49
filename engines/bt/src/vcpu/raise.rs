//! Exceptions and NMIs on their way to the guest: by a stub where that may succeed, or else by the
//! runtime, or to whoever intercepts them.
//!
//! Which gates a stub may use is [`crate::privileged`]'s, what delivery means `system/deliver.rs`'s.
//!
//! Invariant: whether the stub did it can't be told from the guest's state.

use engine_core::ExitReason;

use super::{BtVcpu, Resume, Stop};
use crate::{
    cpu::Bits,
    fault::Fault,
    lower,
    privileged::KERNEL,
    transitions::{FROM_USER, HAS_ERROR, RAISING},
};

impl BtVcpu {
    pub(super) fn raise(&mut self, fault: Fault) -> Result<(), Stop> {
        if self.deliver(fault) {
            return Ok(());
        }
        self.raise_here(fault)
    }

    /// Has `fault` delivered by the stub, if that may succeed. Whether it does shows at the next exit.
    fn deliver(&mut self, fault: Fault) -> bool {
        let known = (self.core.shortcuts.gates.get(usize::from(fault.vector)))
            .is_some_and(|gate| gate.low != 0);
        // With other vCPUs the boundary before the handler has more to do.
        if !known || !self.alone || self.intercept || !self.core.settled || self.core.debugging() {
            return false;
        }
        let mode = self.core.mode();
        if self.core.shortcuts.enabled & KERNEL == 0
            || mode.bits != Bits::Bits64
            || !(mode.ring_0 || mode.user)
            || fault.vector == crate::fault::DB
        {
            return false;
        }
        self.core.forget_traps();
        self.core.cpu.shadow = false;
        if let Some(address) = fault.address {
            self.core.cpu.cr2 = address;
        }
        let mut delivery = i32::from(fault.vector) | if mode.user { FROM_USER } else { 0 };
        if let Some(error) = fault.error {
            self.core.shortcuts.error = error;
            delivery |= HAS_ERROR;
        }
        let rip = self.core.rip;
        let context = self.core.context();
        lower::lend(context);
        context.gpr[12] = rip;
        context.gpr[13] = delivery as u64;
        context.site = RAISING;
        self.raising = Some(fault);
        self.resume = Resume::Stub(self.transitions[self.core.cpu.bank()].deliver);
        true
    }

    pub(super) fn raise_here(&mut self, fault: Fault) -> Result<(), Stop> {
        self.counts.add(ExitReason::GuestFault);
        if self.intercept {
            self.core.forget_traps();
            return Err(Stop::Exception(fault));
        }
        Ok(self.core.raise(fault)?)
    }

    pub(super) fn deliver_nmi(&mut self) -> Result<(), Stop> {
        self.counts.add(ExitReason::Interrupt);
        match self.core.deliver_nmi() {
            Ok(()) => Ok(()),
            Err(fault) => self.raise(fault),
        }
    }
}
