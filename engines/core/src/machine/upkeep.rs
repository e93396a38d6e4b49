//! What moves a machine on between two exits: deadlines, lines, descriptors, and news for other
//! vCPUs.

use std::sync::Arc;

use crate::bus::Slot;
use crate::devices::{Action, lapic, lapics};
use crate::dma::KeptCode;
use crate::host::events::flag;
use crate::{GuestPhys, Machine};

impl Machine {
    /// The device at `addr`, and the offset in it.
    #[inline]
    pub(super) fn at(&self, addr: GuestPhys) -> Option<(Slot, u64)> {
        if self.irqchip.lapics.moved() {
            return self.at_moved(addr);
        }
        self.map.memory(addr)
    }

    /// As [`at`](Machine::at), after a guest has moved the registers of a local APIC: they lie at
    /// another place for each vCPU.
    #[cold]
    fn at_moved(&self, addr: GuestPhys) -> Option<(Slot, u64)> {
        let lapics = &self.irqchip.lapics;
        let page = lapics.of(lapics.current()).page();
        if (page..page + lapic::SIZE).contains(&addr.0) {
            return Some((super::LAPIC, addr.0 - page));
        }
        self.map
            .memory(addr)
            .filter(|found| found.0 != super::LAPIC)
    }

    /// Has devices' writes told of that matter to `kept` alone, if an engine says so
    /// ([`Vcpu::kept_code`](crate::Vcpu::kept_code)).
    pub fn limit_log(&self, kept: Option<Arc<dyn KeptCode>>) {
        if let (Some(log), Some(kept)) = (&self.write_log, kept) {
            log.limit(kept);
        }
    }

    /// True if [`written`](Machine::written) would find something.
    #[inline]
    pub(crate) fn has_written(&self) -> bool {
        self.write_log.as_ref().is_some_and(|log| log.has_any())
    }

    /// Lets every device whose deadline has come go on, and the interrupt controllers take over
    /// what the lines say.
    pub(crate) fn advance(&mut self) {
        let now = self.clock.now();
        while let Some(slot) = self.schedule.due(now) {
            let device = self.device(slot as Slot);
            device.advance(now);
            let deadline = device.deadline();
            self.schedule.set(slot, deadline);
            if deadline.is_some_and(|deadline| deadline <= now) {
                // Behind by more than it caught up with: the guest goes on first.
                break;
            }
        }
        self.take_lines();
    }

    /// Lets the interrupt controllers take over what the lines say.
    pub(crate) fn take_lines(&mut self) {
        self.irqchip.take(&self.wires);
        self.attention = true;
    }

    /// Sets the host timer to the earliest deadline of all devices, or to when a task priority is
    /// to be looked at if that is earlier.
    pub(crate) fn arm(&mut self) {
        let next = self.schedule.next();
        let wanted = next.into_iter().chain(self.seats.first_recheck()).min();
        if let Some(time) = self.schedule.arm(wanted) {
            self.pump
                .arm_timer(time.map(|time| self.clock.to_host(time)));
        }
    }

    /// Hands descriptors that have become readable to their devices. Answers the first action that
    /// is more than none.
    pub(crate) fn host_ready(&mut self) -> Action {
        let mut first = Action::None;
        let mut ready = self.pump.take_ready() & self.watched;
        while ready != 0 {
            let slot = ready.trailing_zeros() as Slot;
            ready &= ready - 1;
            let action = self.access(slot, |device| device.host_ready());
            if action == Action::Hold {
                self.held |= 1 << slot;
                continue;
            }
            self.pump.rewatch(slot.into());
            if first == Action::None {
                first = action;
            }
        }
        first
    }

    /// True when something outside of the vCPU may still interrupt it.
    pub(crate) fn may_wake(&mut self) -> bool {
        self.schedule.next().is_some()
            || self.watched != 0
            || self.io.is_some()
            || self.input.claimed() && !self.input.exhausted()
            || self.serial.may_interrupt()
    }

    /// Lets other vCPUs' threads know of what the interrupt controllers have for them.
    #[inline]
    pub(crate) fn tell_others(&mut self) {
        let lapics = &mut self.irqchip.lapics;
        let news = lapics.take_news() & !(1 << lapics.current());
        if news != 0 {
            self.tell(news);
        }
    }

    #[cold]
    fn tell(&mut self, news: u32) {
        for cpu in lapics::bits(news) {
            self.seats.tell(cpu, flag::SOMETHING);
        }
    }

    /// Watches the descriptor of a device again that had no room.
    #[cold]
    pub(super) fn release(&mut self, slot: Slot) {
        let bit = 1u64.checked_shl(slot.into()).unwrap_or(0);
        if self.held & bit != 0 {
            self.held &= !bit;
            self.pump.rewatch(slot.into());
        }
    }
}

/// Has `data` be what bytes that no device drives read as.
#[inline]
pub(super) fn undriven(data: &mut [u8]) {
    match data {
        // Most reads are this, and a call to fill a byte costs as much as the device.
        [byte] => *byte = 0xff,
        _ => data.fill(0xff),
    }
}
