//! Faults of user mode: what the guest's tables allow and the host has not mapped yet.
//!
//! The host's mappings of a user process are a cache of the guest's tables, filled by faults. One
//! fault maps the page and up to 15 behind it that lie in consecutive frames with the same rights: one
//! mmap, whatever its length.

use crate::hypercall::layout::USER_START;
use crate::tables::{Found, LARGE_SIZE, bit, is_leaf, span, target};
use crate::wire::{Command, PAGE};
use crate::{State, sys};

/// Pages that one fault maps at most.
const AHEAD: u64 = 16;

/// Bits of a page fault's error code (SDM 3A 4.7).
mod fault {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITE: u64 = 2;
    pub(super) const USER: u64 = 4;
    pub(super) const RESERVED: u64 = 8;
    pub(super) const FETCH: u64 = 16;
}

/// Whether the rights of all levels together allow an access with this error code.
fn allows(rights: u64, error: u64) -> bool {
    rights & bit::USER != 0
        && (error & fault::WRITE == 0 || rights & bit::WRITABLE != 0)
        && (error & fault::FETCH == 0 || rights & bit::NO_EXECUTE == 0)
}

fn protection(rights: u64) -> u32 {
    let write = if rights & bit::WRITABLE != 0 {
        sys::PROT_WRITE
    } else {
        0
    };
    let execute = if rights & bit::NO_EXECUTE == 0 {
        sys::PROT_EXEC
    } else {
        0
    };
    (sys::PROT_READ | write | execute) as u32
}

impl Found {
    /// The rights of the leaf and of all tables above it.
    fn leaf_rights(&self, entry: u64) -> u64 {
        self.rights & entry & (bit::WRITABLE | bit::USER) | (self.rights | entry) & bit::NO_EXECUTE
    }

    fn is_leaf(&self) -> bool {
        is_leaf(self.entry, self.level)
    }
}

impl State {
    /// Queues the commands that make an access possible, if the guest's tables allow it.
    pub(crate) fn map_in(&mut self, slot: usize, address: u64, error: u64) -> bool {
        let found = self.find(slot, address);
        let rights = found.leaf_rights(found.entry);
        let pages = span(found.level) / PAGE;
        let inside =
            found.is_leaf() && target(found.entry) + pages <= self.frames && address >= USER_START;
        if !inside || !allows(rights, error) {
            return false;
        }
        if self.is_mapped(found.table, found.index) {
            // It should not have faulted: the host refused the mapping, or the process removed it
            // itself, by a jump into the gate. Start again from none.
            self.evict(slot);
        }
        let first = address & !(span(found.level) - 1);
        let mut count = 1;
        self.touch(&found, found.index, rights);
        if found.level == 1 {
            while count < AHEAD && found.index + count < 512 {
                let index = found.index + count;
                let entry = self.entry(found.table, index);
                let same = is_leaf(entry, 1)
                    && target(entry) == target(found.entry) + count
                    && target(entry) < self.frames
                    && found.leaf_rights(entry) == rights
                    && !self.is_mapped(found.table, index);
                if !same {
                    break;
                }
                self.touch(&found, index, rights);
                count += 1;
            }
        }
        // A small range is made present at once, which saves the host's own fault.
        let (length, ahead) = if found.level == 1 {
            (count * PAGE, sys::MAP_POPULATE)
        } else {
            (LARGE_SIZE, 0)
        };
        self.queue_map(
            slot,
            Command {
                address: first,
                length,
                rights: protection(rights),
                flags: (sys::MAP_SHARED | sys::MAP_FIXED | ahead) as u32,
                offset: target(found.entry) * PAGE,
            },
        );
        true
    }

    /// Marks a leaf accessed, dirty too if it can be written to, and mapped.
    fn touch(&mut self, found: &Found, index: u64, rights: u64) {
        let entry = self.entry(found.table, index);
        let dirty = if rights & bit::WRITABLE != 0 {
            bit::DIRTY
        } else {
            0
        };
        self.store(found.table, index, entry | bit::ACCESSED | dirty);
        self.set_mapped(found.table, index, true);
    }

    /// The error code that the guest's own tables give for an access that they do not allow.
    pub(crate) fn fault_code(&self, slot: usize, address: u64, error: u64) -> u64 {
        let access = error & (fault::WRITE | fault::FETCH) | fault::USER;
        if address >= crate::hypercall::layout::USER_END {
            return access;
        }
        let found = self.find(slot, address);
        if !found.is_leaf() {
            return access;
        }
        let beyond = target(found.entry) + span(found.level) / PAGE > self.frames;
        access | fault::PRESENT | if beyond { fault::RESERVED } else { 0 }
    }
}
