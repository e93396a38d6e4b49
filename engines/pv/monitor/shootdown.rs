//! Unmapping in user processes: gathered during a hypercall or a multicall, done before it returns.
//!
//! Neighbouring ranges are merged, so a run of pages costs one munmap. When the queue is full the
//! whole space is unmapped instead: it fills again by faults.
//!
//! A change could as well be done when the process next runs, since nothing of the guest runs before,
//! and that would save a round trip. It is done at once because the ABI says so: what a call has
//! revoked is gone when it returns, in every process, whatever else the host does meanwhile.

use crate::hypercall::layout::{USER_END, USER_START};
use crate::wire::{Command, event};
use crate::{State, ledger, vmm};

/// Ranges that are gathered.
const MOST: usize = 64;

/// What waits to be unmapped, in one space.
#[derive(Clone, Copy)]
pub(crate) struct Queue {
    slot: usize,
    count: usize,
    ranges: [Command; MOST],
}

const NOTHING: Command = Command {
    address: 0,
    length: 0,
    rights: 0,
    unmap: 1,
    offset: 0,
};
const EVERYTHING: Command = Command {
    address: USER_START,
    length: USER_END - USER_START,
    ..NOTHING
};

impl Queue {
    pub(crate) const EMPTY: Queue = Queue {
        slot: 0,
        count: 0,
        ranges: [NOTHING; MOST],
    };
}

impl State {
    /// Queues a range of a space.
    pub(crate) fn queue_unmap(&mut self, slot: usize, address: u64, length: u64) {
        if !self.spaces[slot].mapped {
            return;
        }
        if self.shootdown.count > 0 && self.shootdown.slot != slot {
            self.flush_queue();
        }
        let queue = &mut self.shootdown;
        queue.slot = slot;
        if let Some(last) = queue.count.checked_sub(1) {
            let last = &mut queue.ranges[last];
            if last.address + last.length == address {
                last.length += length;
                return;
            }
            if address + length == last.address {
                last.address = address;
                last.length += length;
                return;
            }
        }
        if queue.count == MOST {
            self.queue_everything(slot);
            return;
        }
        queue.ranges[queue.count] = Command {
            address,
            length,
            ..NOTHING
        };
        queue.count += 1;
    }

    /// Queues all that a space has mapped.
    pub(crate) fn queue_everything(&mut self, slot: usize) {
        if !self.spaces[slot].mapped {
            return;
        }
        if self.shootdown.count > 0 && self.shootdown.slot != slot {
            self.flush_queue();
        }
        let everything = self.forget_all(slot);
        self.shootdown.slot = slot;
        self.shootdown.count = 1;
        self.shootdown.ranges[0] = everything;
    }

    /// Notes that a space has nothing mapped; the command that makes it so.
    pub(crate) fn forget_all(&mut self, slot: usize) -> Command {
        self.spaces[slot].epoch += 1;
        self.spaces[slot].mapped = false;
        EVERYTHING
    }

    /// Drops what is queued for a space that ends.
    pub(crate) fn drop_queue(&mut self, slot: usize) {
        if self.shootdown.slot == slot {
            self.shootdown.count = 0;
        }
    }

    /// Does what is queued, unless a multicall goes on.
    pub(crate) fn flush(&mut self) {
        if !self.batching {
            self.flush_queue();
        }
    }

    fn flush_queue(&mut self) {
        let Queue {
            slot,
            count,
            ranges,
        } = self.shootdown;
        if count == 0 {
            return;
        }
        self.shootdown.count = 0;
        vmm::count(&ledger().events[event::SHOOTDOWN]);
        if self.carry_out(slot, &ranges[..count]) != 0 {
            // Unmapping the middle of an area needs one more of them, and there may be none left.
            vmm::count(&ledger().events[event::EVICTION]);
            let everything = self.forget_all(slot);
            self.carry_out(slot, &[everything]);
        }
    }
}
