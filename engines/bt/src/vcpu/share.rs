//! This vCPU among the others of its VM: see [`crate::vm`].
//!
//! Invariant: translated code runs, and guest memory is written, only while this vCPU isn't parked
//! and after it has answered what it was asked while it was.

use std::sync::atomic::{Ordering, fence};

use super::{BtVcpu, Pending};
use crate::{
    vcpu::Missing,
    vm::{Guarantee, Request, Ticket},
};

/// Writes to one page of code, one after the other, after which the others drop all of it: somebody
/// is writing it anew.
const REWRITTEN: u32 = 4;

/// Writes to code that others have to know of.
#[derive(Default)]
pub(super) struct Told {
    /// Answers that are owed before the next instruction.
    owed: Vec<Ticket>,
    /// The page written last, and how many times.
    page: u64,
    times: u32,
}

impl BtVcpu {
    /// Begins to run the guest, or to write its memory.
    pub(super) fn join(&mut self) {
        if !self.alone && self.core.mmu.vm.is_parked(self.core.mmu.me) {
            self.core.mmu.vm.unpark(self.core.mmu.me);
            self.catch_up();
        }
    }

    /// Ends it, unless a device is being asked in the middle of a block that is still to write
    /// through an address looked up before.
    pub(super) fn part(&mut self) {
        let amid = matches!(&self.pending, Pending::Device(transfer) if transfer.slow.pinned)
            && !self.core.mmu.vm.without(Guarantee::Pins);
        if !self.alone && !amid {
            self.core.mmu.vm.park(self.core.mmu.me);
        }
    }

    /// Answers the others.
    pub(super) fn catch_up(&mut self) {
        let me = self.core.mmu.me;
        let Some(number) = self.core.mmu.vm.asked(me) else {
            return;
        };
        for request in self.core.mmu.vm.requests(me) {
            match request {
                Request::GiveUp(phys) => self.core.mmu.give_up(phys),
                // Should this be in the middle of a block, it ends with this instruction.
                Request::Drop(phys, len) => self.stale |= self.kill(phys, len) > 0,
            }
        }
        self.core.mmu.vm.answer(me, number);
    }

    /// Between two instructions: answers the others, and sees to it that they have dropped what this
    /// vCPU has overwritten. False if a kick came first.
    pub(super) fn agree(&mut self) -> bool {
        self.catch_up();
        if self.told.owed.is_empty() {
            return true;
        }
        let owed = std::mem::take(&mut self.told.owed);
        let answered = self.wait(&owed);
        if !answered {
            self.told.owed = owed;
        }
        answered
    }

    /// Waits for answers. False if a kick came first.
    fn wait(&mut self, tickets: &[Ticket]) -> bool {
        let me = self.core.mmu.me;
        let vm = &self.core.mmu.vm;
        if !vm.without(Guarantee::Parking) {
            vm.park(me);
        }
        let answered = vm.wait(tickets, || self.doorbell.is_kicked());
        vm.unpark(me);
        self.catch_up();
        answered
    }

    /// Makes the pages around these addresses ones that code may be read from: nobody writes to them
    /// unseen.
    pub(super) fn enter_pages(&mut self, pages: &[u64]) -> Result<(), Missing> {
        if self.alone && pages.iter().all(|&phys| self.cache.just_entered(phys)) {
            return Ok(());
        }
        loop {
            let mut tickets = Vec::new();
            for &phys in pages {
                let writers = self.cache.enter(phys, &mut self.core.mmu);
                let vm = &self.core.mmu.vm;
                if !vm.without(Guarantee::Acknowledgement) {
                    let request = Request::GiveUp(phys & !0xfff);
                    tickets.extend(vm.ask_all(writers, request));
                }
            }
            if tickets.is_empty() {
                return Ok(());
            }
            if !self.wait(&tickets) {
                return Err(Missing::Kicked);
            }
            // Meanwhile somebody may have asked for all code from a page to be dropped, and with the
            // last of it the page is left.
            if pages.iter().all(|&phys| self.core.mmu.holds(phys)) {
                return Ok(());
            }
        }
    }

    /// True if block `number` was made from what is in memory now that writes to it are told. `bytes`
    /// is what was read before.
    pub(super) fn still_there(&mut self, number: u32, bytes: &[u8]) -> bool {
        if self.alone {
            return true;
        }
        let block = self.cache.block(number);
        let (phys, second, len) = (block.phys, block.second(), u64::from(block.watched));
        let leaf = self.cache.leaf(number).copied();
        let first = len.min(4096 - (phys & 0xfff));
        let pages = &self.core.mmu.vm.pages;
        let mut news = pages.watch(phys, first);
        if let Some(second) = second {
            news |= pages.watch(second, len - first);
        }
        if let Some(leaf) = leaf {
            news |= pages.watch(leaf.phys, leaf.len.into());
        }
        if !news {
            return true;
        }
        let mut now = vec![0xff; len as usize];
        self.fetch(phys, &mut now[..first as usize]);
        if let Some(second) = second {
            self.fetch(second, &mut now[first as usize..]);
        }
        let same = leaf.is_none_or(|leaf| {
            let mut now = leaf.bytes;
            self.fetch(leaf.phys, &mut now[..leaf.len as usize]);
            now == leaf.bytes
        });
        if same && now == bytes[..now.len()] {
            return true;
        }
        self.cache.discard(number, &self.arena, &self.core.mmu);
        false
    }

    /// RAM was written that may hold code: drops what was made of it, here and everywhere. Returns
    /// how much that is, as far as is known at once.
    pub(super) fn overwritten(&mut self, phys: u64, len: u64) -> usize {
        let killed = self.kill(phys, len);
        if self.alone || self.core.mmu.vm.without(Guarantee::Invalidation) {
            return killed;
        }
        // What was written is in memory before anybody's lines are looked at.
        fence(Ordering::SeqCst);
        let mut told = 0;
        let mut from = phys;
        while from < phys + len {
            let end = ((from | 0xfff) + 1).min(phys + len);
            told += self.tell(from, end - from);
            from = end;
        }
        killed + told
    }

    /// Tells the others of a write within a page. Returns how many there are to tell.
    fn tell(&mut self, phys: u64, len: u64) -> usize {
        let me = self.core.mmu.me;
        let vm = &self.core.mmu.vm;
        let others = vm.pages.watchers(phys, len) & !(1 << me);
        if others == 0 {
            return 0;
        }
        let told = &mut self.told;
        if told.page == phys >> 12 {
            told.times += 1;
        } else {
            (told.page, told.times) = (phys >> 12, 1);
        }
        let request = if told.times < REWRITTEN {
            Request::Drop(phys, len)
        } else {
            Request::Drop(phys & !0xfff, 4096)
        };
        told.owed.extend(vm.ask_all(others, request));
        others.count_ones() as usize
    }

    /// The instruction under way has overwritten code, and can't end its block: the next branch that
    /// looks at the doorbell does.
    pub(super) fn stop_soon(&mut self) {
        if !self.told.owed.is_empty() {
            self.doorbell.ring();
        }
    }

    /// Leaves the VM for good.
    pub(super) fn retire(&mut self) {
        if !self.alone {
            self.cache.empty(&mut self.core.mmu);
            self.core.mmu.vm.park(self.core.mmu.me);
        }
    }
}
