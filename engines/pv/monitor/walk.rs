//! Faults of user mode: what the guest's tables allow and the host has not mapped yet. And what becomes
//! of what it has mapped, when the tables change.
//!
//! The host's mappings of a user process are a cache of the guest's tables, filled by faults. One
//! fault maps the page and up to 15 behind it that lie in consecutive frames with the same rights: one
//! mmap, whatever its length. A page that goes away is unmapped
//! or parked (`held`); one that changes, and whose
//! new entry says that it was accessed already, is changed at once. An entry that does not say so has
//! to fault, since the fault is what sets the bit.

use crate::held::Held;
use crate::hypercall::layout::USER_START;
use crate::tables::{Found, LARGE_SIZE, bit, is_leaf, span, target};
use crate::wire::{Command, PAGE, PROTECT};
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

/// The command that maps frames from `frame` on.
fn map(address: u64, length: u64, rights: u32, frame: u64, present: bool) -> Command {
    // A small range is made present at once, which saves the host's own fault.
    let populate = if present { sys::MAP_POPULATE } else { 0 };
    Command {
        address,
        length,
        rights,
        flags: (sys::MAP_SHARED | sys::MAP_FIXED | populate) as u32,
        offset: frame * PAGE,
    }
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
        let held = self.held(found.table, found.index);
        if matches!(held, Held::Live(_)) {
            // It should not have faulted. Start again from none.
            self.evict(slot);
        }
        self.learn(found.table, held, target(found.entry));
        let first = address & !(span(found.level) - 1);
        self.touch(&found, found.index, rights);
        let protection = protection(rights);
        if found.level > 1 {
            let map = map(first, LARGE_SIZE, protection, target(found.entry), false);
            self.queue_answer(slot, map);
            return true;
        }
        let parked = held == Held::Parked(target(found.entry));
        let mut count = 1;
        while count < AHEAD && found.index + count < 512 {
            let index = found.index + count;
            let entry = self.entry(found.table, index);
            let frame = target(entry);
            let held = self.held(found.table, index);
            let fits = if parked {
                held == Held::Parked(frame)
            } else {
                !matches!(held, Held::Live(_)) && frame == target(found.entry) + count
            };
            let same = is_leaf(entry, 1)
                && frame < self.frames
                && fits
                && found.leaf_rights(entry) == rights;
            if !same {
                break;
            }
            self.touch(&found, index, rights);
            count += 1;
        }
        let answer = if parked {
            Command {
                address: first,
                length: count * PAGE,
                rights: protection,
                flags: PROTECT,
                offset: 0,
            }
        } else {
            map(first, count * PAGE, protection, target(found.entry), true)
        };
        self.queue_answer(slot, answer);
        true
    }

    /// The same for a page that faulted, was handed to the kernel and may be accessible since.
    pub(crate) fn map_again(&mut self, slot: usize, address: u64, error: u64) {
        let found = self.find(slot, address);
        if found.level > 2 || !self.is_live(found.table, found.index) {
            self.map_in(slot, address, error);
        }
    }

    /// Has the process follow a change of the leaf for `address` from `old`.
    pub(crate) fn follow(&mut self, slot: usize, address: u64, table: u64, index: u64, old: u64) {
        let Held::Live(frame) = self.held(table, index) else {
            return;
        };
        let found = self.find(slot, address);
        let rights = found.leaf_rights(found.entry);
        let bits = bit::ACCESSED
            | if rights & bit::WRITABLE != 0 {
                bit::DIRTY
            } else {
                0
            };
        let usable = found.table == table
            && found.level == 1
            && found.is_leaf()
            && target(found.entry) < self.frames
            && rights & bit::USER != 0
            && found.entry & bits == bits;
        if !usable {
            self.revoke(slot, address, table, index);
        } else if target(found.entry) != frame {
            self.hold(table, index, Held::Live(target(found.entry)));
            let map = map(address, PAGE, protection(rights), target(found.entry), true);
            self.queue_map(slot, map);
        } else if rights != found.leaf_rights(old) {
            self.queue_protect(slot, address, protection(rights));
        }
    }

    /// Takes a leaf's page from the process.
    pub(crate) fn revoke(&mut self, slot: usize, address: u64, table: u64, index: u64) {
        let Held::Live(frame) = self.held(table, index) else {
            return;
        };
        let level = self.frame(table).level;
        let entry = self.entry(table, index);
        let stays = is_leaf(entry, level) && target(entry) == frame;
        if level == 1 && (stays || self.returns(table)) {
            self.hold(table, index, Held::Parked(frame));
            self.queue_protect(slot, address, 0);
        } else {
            self.hold(table, index, Held::Gone(frame));
            self.queue_unmap(slot, address, span(level));
        }
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
        self.hold(found.table, index, Held::Live(target(entry)));
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
