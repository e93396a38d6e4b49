//! Between two instructions: what is due there, and where to go on.
//!
//! Here the vCPU may stop, interrupts and single steps get in, and what was done to mappings and to
//! code takes effect. Finding the code itself is `code`'s.
//!
//! Invariant: no translation that a write or an invalidation made wrong is entered behind a boundary.

use engine_core::{ExitReason, Stepping, Vcpu};

use super::{BtVcpu, Missing, Resume, Stop};
use crate::{cache::Dropped, core::Flushed, decode::Mode, lower, system::Trap};

impl BtVcpu {
    /// As [`BtVcpu::boundary`], where nothing has to be looked at and the code is known.
    pub(super) fn quick(&mut self) -> Option<u64> {
        if !self.quiet() {
            return None;
        }
        let (index, serial) = self.core.known_mode()?;
        // With a window, where RSP points belongs to the mode.
        let window = self.jump_modes[index].is_none_or(|mode| mode.window);
        if self.jump_serials[index] != serial || window {
            return None;
        }
        let entry = self.core.mmu.jumps[index].get(self.core.linear_ip(), false)?;
        self.stale = false;
        Some(entry)
    }

    /// Goes on in block `number`, which was found for `mode` and RIP just now, if nothing has to be looked at.
    pub(super) fn go_straight(&mut self, number: u32, mode: Mode) {
        if self.quiet() && self.jump_modes[mode.jumps()] == Some(mode) {
            self.stale = false;
            lower::lend(self.core.context());
            self.resume = Resume::Host(self.cache.block(number).entry());
        }
    }

    /// Nothing is due at this boundary.
    fn quiet(&self) -> bool {
        self.alone
            && matches!(self.core.flushed, Flushed::Nothing)
            && self.core.code_writes.is_empty()
            && !self.core.mmu.has_marked()
            && self.steps == 0
            && !self.window
            && !self.core.cpu.shadow
            && !self.doorbell.rang()
            && !self.core.debugging()
            && !self.core.nmi_due()
            && self.stepping.is_none()
    }

    /// Between two instructions: finds the code to go on with. None to look again.
    pub(super) fn boundary(&mut self) -> Result<Option<u64>, Stop> {
        self.settle_writes();
        self.stale = false;
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        // After the doorbell's page may have been opened, which forgets who rang.
        if !self.alone && !self.agree() {
            return Ok(None);
        }
        let debugging = self.core.debugging();
        if debugging && let Some(trap) = self.core.take_trap() {
            return self.raise(trap).map(|()| None);
        }
        if self.core.nmi_due() {
            return self.deliver_nmi().map(|()| None);
        }
        if self.window && self.interruptible() {
            self.request_interrupt_window(false);
            return Err(Stop::Window);
        }
        if self.stepping.is_some() && std::mem::take(&mut self.stepped) {
            return Err(Stop::Stepped);
        }
        self.stepped = true;
        let mut single = matches!(
            self.stepping,
            Some(Stepping::Instruction | Stepping::Towards(_))
        );
        if debugging {
            match self.core.debug_instruction() {
                Ok(alone) => single = alone,
                Err(fault) => return self.raise(fault).map(|()| None),
            }
        }
        single |= std::mem::take(&mut self.core.cpu.shadow) || self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        match self.find(single) {
            Ok((entry, _)) => Ok(Some(entry)),
            Err(missing) => self.missing(missing).map(|()| None),
        }
    }

    pub(super) fn missing(&mut self, missing: Missing) -> Result<(), Stop> {
        match missing {
            Missing::Trap(Trap::Fault(fault)) => self.raise(fault),
            Missing::Trap(Trap::Shutdown) => Err(Stop::Shutdown),
            Missing::Trap(Trap::Unsupported(message)) => Err(Stop::Internal(message)),
            // The boundary that comes next answers.
            Missing::Kicked => Ok(()),
        }
    }

    /// Acts on what privileged code did to memory and mappings.
    fn settle_writes(&mut self) {
        match self.core.flushed {
            Flushed::Nothing => {}
            Flushed::Page(span) => self.cache.unlink_across(Dropped::Span(span), &self.arena),
            Flushed::User(bank) => self.cache.unlink_across(Dropped::User(bank), &self.arena),
            Flushed::Bank(bank) => self.cache.unlink_across(Dropped::Bank(bank), &self.arena),
            Flushed::Everything => self.cache.unlink_across(Dropped::All, &self.arena),
        }
        self.core.flushed = Flushed::Nothing;
        while let Some((phys, len)) = self.core.code_writes.pop() {
            self.overwritten(phys, len);
        }
        self.settle_marked();
    }

    /// Drops code that page walks have set bits in. A block that is running goes on to its end: when
    /// a processor sets these bits is its own affair (SDM 3A 4.8).
    pub(super) fn settle_marked(&mut self) {
        if !self.core.mmu.has_marked() {
            return;
        }
        for at in self.core.mmu.take_marked() {
            self.overwritten(at, 8);
        }
    }

    pub(super) fn kill(&mut self, phys: u64, len: u64) -> usize {
        let killed = self.cache.kill(phys, len, &self.arena, &mut self.core.mmu);
        if killed > 0 {
            self.counts.add(ExitReason::SmcFlush);
        }
        killed
    }
}
