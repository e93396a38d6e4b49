//! Accesses that the window wasn't ready for, or isn't for.
//!
//! A page that isn't mapped there is filled, and the instruction of the host's that faulted runs
//! again. Whatever else happens is left to the software TLB: the instructions concerned are executed
//! one by one, in blocks that use nothing else, which see the guest's faults, its devices and its code
//! pages as they always do.

use engine_core::ExitReason;

use super::{BtVcpu, Resume};
use crate::{
    checks::Outside,
    mmu::Access,
    site::{Mark, Site},
};

/// Error code of a page fault: the access was a write (SDM 3A 4.7).
const WRITE: u32 = 2;

impl BtVcpu {
    /// Translated code faulted on `address` in the window.
    pub(super) fn window_fault(&mut self, address: u64, mark: Mark, block: u32, ip: u64) {
        let fault = self.core.context().fault;
        let write = fault.error & WRITE != 0;
        let filled = self.core.mmu.fill_window(&self.core.cpu, address, write);
        if filled {
            self.settle_marked();
            self.resume = Resume::Host(fault.rip);
            return;
        }
        self.settle(mark.homes, ip);
        self.steps = 1;
        self.counts.add(ExitReason::WindowMiss);
        // A fault of the guest's is its kernel's business: the same instruction may well find memory
        // next time.
        let access = if write { Access::Write } else { Access::Read };
        if self
            .core
            .mmu
            .walk(&self.core.cpu, address, access, true)
            .is_ok()
        {
            let missed = Outside {
                tlb: 1 << mark.at,
                ..Outside::default()
            };
            self.cache.miss(block, missed, &self.arena, &self.core.mmu);
        }
    }

    /// A register was too large for the window.
    pub(super) fn outside(&mut self, site: Site, steps: u16, missed: Outside) {
        self.settle(site.homes, site.ip);
        self.steps = steps;
        self.counts.add(ExitReason::WindowMiss);
        if missed != Outside::default() {
            self.cache
                .miss(site.block, missed, &self.arena, &self.core.mmu);
        }
    }

    /// The software TLB missed: a sign of life of code that may be waiting for the window.
    pub(super) fn tlb_missed(&mut self) {
        self.counts.add(ExitReason::TlbMiss);
        self.settle_marked();
        // Now and then is often enough, and the loop notices what it leads to.
        self.misses = self.misses.wrapping_add(1);
        if self.misses.is_multiple_of(16) && self.core.mmu.window.waits() {
            self.core.mmu.window.ready();
        }
    }

    /// Keeps the window open whatever it costs, for tests of what can be reached through it. Returns
    /// the host address of guest address 0, None on a host without a window.
    #[doc(hidden)]
    pub fn hold_window(&mut self) -> Option<u64> {
        self.core.mmu.window.hold()
    }

    /// Leaves all accesses to the software TLB, for tests of that. To be called before anything runs.
    #[doc(hidden)]
    pub fn refuse_window(&mut self) {
        self.core.mmu.window.refuse();
    }

    /// Has returns go where they went before, whatever has become of it, for tests that show what
    /// undoing that is good for.
    #[doc(hidden)]
    pub fn keep_guesses(&mut self) {
        self.cache.keep_guesses = true;
    }

    /// Lets every address pass the window's comparisons, for tests that show what they are good for.
    #[doc(hidden)]
    pub fn remove_window_checks(&mut self) {
        let context = self.core.context();
        context.window_limit = u64::MAX;
        context.index_limit = u64::MAX;
    }
}
