//! What translated code has left for: each kind of site to who answers it, and branches to their
//! targets.
//!
//! The answers are elsewhere: accesses in `access`, instructions in `answer`, ports in `ports`.
//!
//! Invariant: a site's registers are settled before anything reads or writes the guest's state.

use engine_core::ExitReason;

use super::{BtVcpu, Resume, Stop, access::Transfer};
use crate::{
    context::HOST_FAULT,
    cpu::Bits,
    decode::Mode,
    fault::Fault,
    features::uses_vectors,
    lower,
    site::{Homes, Kind, Site},
    transitions::{BOUNDARY, RAISING},
};

impl BtVcpu {
    /// Acts on what translated code has left for.
    pub(super) fn left(&mut self) -> Result<(), Stop> {
        let number = self.core.context().site;
        if number == HOST_FAULT {
            return self.host_fault();
        }
        if number == BOUNDARY {
            let target = self.core.context().target;
            self.settle(Homes::MEETING, target);
            self.counts.add(ExitReason::Helper);
            return Ok(());
        }
        if number == RAISING {
            let rip = self.core.rip;
            self.settle(Homes::MEETING, rip);
            return match self.raising.take() {
                Some(fault) => self.raise_here(fault),
                None => Err(Stop::Internal("nothing was being raised".into())),
            };
        }
        let index = (number >> 1) as usize;
        let site = self.cache.site(index);
        match site.kind {
            Kind::Memory(slow) if number & 1 == 0 => self.slow(index, site, slow),
            Kind::Memory(slow) if self.direct.is_some() => {
                self.written(slow);
                Ok(())
            }
            Kind::Memory(slow) => self.transfer(Transfer {
                index,
                site,
                slow,
                write: true,
                done: 0,
                step: 0,
            }),
            Kind::Outside { steps, missed } => {
                self.outside(site, steps, missed);
                Ok(())
            }
            Kind::Group(shared) => {
                self.shared(site, shared);
                Ok(())
            }
            Kind::Direct { target, .. } => self.direct(index, site, target),
            Kind::Guess(_) => Err(Stop::Internal("a guess isn't left through".into())),
            Kind::Indirect { rsp, gate } => {
                let target = self.core.context().target;
                self.settle(site.homes, target);
                self.counts.add(ExitReason::IndirectMiss);
                if self.core.check_target(target).is_err() {
                    // The branch faults, not its target.
                    let long = self.core.cpu.bits() == Bits::Bits64;
                    let before = self.core.gpr(4).wrapping_sub(rsp as i64 as u64);
                    self.core.set_gpr_sized(4, before, if long { 8 } else { 4 });
                    self.core.rip = site.ip;
                    return self.raise(Fault::gp());
                }
                if gate.is_some() {
                    return self.guess(index);
                }
                Ok(())
            }
            Kind::System { index } => {
                self.settle(site.homes, site.ip);
                let instr = self.cache.system(index);
                let mode = *self.cache.mode(site.block);
                if !mode.vectors && uses_vectors(&instr) {
                    self.bring_vectors(mode);
                    return Ok(());
                }
                self.system(&instr)
            }
            Kind::Port(port) => {
                self.settle(site.homes, site.ip);
                match self.port(port) {
                    Ok(()) => Err(Stop::Port),
                    Err(fault) => {
                        self.counts.add(ExitReason::Helper);
                        self.raise(fault)
                    }
                }
            }
            Kind::Window => {
                // The boundary that comes next finds the window open.
                self.settle(site.homes, site.ip);
                self.counts.add(ExitReason::Helper);
                Ok(())
            }
            Kind::Fault(fault) => {
                self.settle(site.homes, site.ip);
                self.raise(fault)
            }
        }
    }

    /// Code of `mode` has met its first vector instruction, at RIP: goes on there in code that has the
    /// vector registers, without looking left or right, as within an instruction.
    fn bring_vectors(&mut self, mode: Mode) {
        self.core.vectors[usize::from(mode.user)] = true;
        self.core.forget_modes();
        // RSP may have left the window since the block began: code that relies on it must not follow.
        let inside = mode.bits != Bits::Bits64 || self.core.gpr(4) < crate::window::SIZE;
        let mode = Mode {
            vectors: true,
            window: mode.window && inside,
            stack: mode.stack && inside,
            ..mode
        };
        let virt = self.core.linear_ip();
        // It was just executed from: should it be gone all the same, the next boundary says so.
        if let Ok(number) = self.block(mode, virt) {
            lower::lend(self.core.context());
            self.resume = Resume::Host(self.cache.block(number).entry());
        }
    }

    /// A return that has guesses left to make, at site `index`, leads to RIP.
    fn guess(&mut self, index: usize) -> Result<(), Stop> {
        if let Some(number) = self.found_here()? {
            self.cache.guess(index, self.core.rip, number, &self.arena);
        }
        Ok(())
    }

    /// A direct branch that isn't linked: finds its target and links it.
    fn direct(&mut self, index: usize, site: Site, target: u64) -> Result<(), Stop> {
        self.settle(site.homes, target);
        self.counts.add(ExitReason::DirectMiss);
        if let Some(number) = self.found_here()?
            && self.cache.link(index, number, &self.arena)
        {
            self.counts.add(ExitReason::Chain);
        }
        Ok(())
    }

    /// The block at RIP, where it goes on if it can, and only if the site that was left may remember it: not while stepping, and not if the
    /// site is gone since the cache was emptied to make room for the block.
    fn found_here(&mut self) -> Result<Option<u32>, Stop> {
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        let mode = self.core.mode_here();
        let virt = self.core.linear_ip();
        let emptied = self.cache.emptied;
        match self.block(mode, virt) {
            Ok(number) => {
                self.go_straight(number, mode);
                let kept = self.stepping.is_none() && emptied == self.cache.emptied;
                Ok(kept.then_some(number))
            }
            Err(missing) => self.missing(missing).map(|()| None),
        }
    }
}
