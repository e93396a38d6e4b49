//! Page tables of user mode: built in frames, handed over by pinning their root.
//!
//! Before [`Tree::pin`] the kernel writes entries through the direct map; afterwards they change by
//! hypercall. Tables are never shared between trees: the host takes a frame as a table in one place.

use super::{
    frames::{self, Number},
    hypercall::{self, Errno},
};
use abi::hypercall::mmuext;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Entry bits (SDM 3A 4.5).
pub(super) const PRESENT: u64 = 1;
pub(super) const WRITABLE: u64 = 2;
pub(super) const USER: u64 = 4;
/// Accessed and dirty: set from the start, since nothing here looks at them. So the host need not
/// wait for an access before it follows a change.
const USED: u64 = 0x60;
pub(super) const LARGE: u64 = 0x80;
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// A bit that is the kernel's own: the frame goes back to the pool with the tree.
const OWNED: u64 = 1 << 9;
/// The bits that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Rights of ring 3's text.
pub(super) const TEXT: u64 = PRESENT | USER | USED;
/// Rights of its constants.
pub(super) const CONSTANTS: u64 = PRESENT | USER | USED | NO_EXECUTE;
/// Rights of its data.
pub(super) const DATA: u64 = PRESENT | WRITABLE | USER | USED | NO_EXECUTE;

/// The leaf's level.
const PAGE_LEVEL: u32 = 1;
const LARGE_LEVEL: u32 = 2;
const ROOT_LEVEL: u32 = 4;

/// The tables of one address space.
#[derive(Debug)]
pub(super) struct Tree {
    /// Frame of the root, which names the space.
    pub(super) root: Number,
}

/// An entry for a frame.
pub(super) fn entry(frame: Number, rights: u64) -> u64 {
    frame.0 << 12 | rights
}

fn frame_of(entry: u64) -> Number {
    Number((entry & ADDRESS) >> 12)
}

impl Tree {
    /// An empty tree.
    pub(super) fn new() -> Self {
        Tree {
            root: frames::take(),
        }
    }

    /// The entry for `address` at `level`, 1 for pages; tables on the way are made.
    fn slot(&self, address: u64, level: u32) -> &'static AtomicU64 {
        let mut table = self.root;
        let mut at = ROOT_LEVEL;
        loop {
            let index = (address >> (12 + 9 * (at - 1))) as usize % 512;
            let slot = &table.words()[index];
            if at == level {
                return slot;
            }
            let value = slot.load(Relaxed);
            table = if value == 0 {
                let table = frames::take();
                slot.store(entry(table, PRESENT | WRITABLE | USER), Relaxed);
                table
            } else {
                frame_of(value)
            };
            at -= 1;
        }
    }

    /// The entry of a page.
    pub(super) fn page(&self, address: u64) -> &'static AtomicU64 {
        self.slot(address, PAGE_LEVEL)
    }

    /// Maps `count` pages to frames one after another.
    pub(super) fn map(&self, address: u64, first: Number, count: u64, rights: u64) {
        for index in 0..count {
            let frame = Number(first.0 + index);
            self.page(address + (index << 12))
                .store(entry(frame, rights), Relaxed);
        }
    }

    /// As [`Tree::map`], in pages of 2 MiB; `first` and `address` are aligned to that.
    pub(super) fn map_large(&self, address: u64, first: Number, count: u64, rights: u64) {
        for index in 0..count {
            let frame = Number(first.0 + index * 512);
            self.slot(address + (index << 21), LARGE_LEVEL)
                .store(entry(frame, rights | LARGE), Relaxed);
        }
    }

    /// Maps a page of the pool for data, which goes back with the tree. Returns it.
    pub(super) fn map_owned(&self, address: u64) -> Number {
        let frame = frames::take();
        self.page(address)
            .store(entry(frame, DATA | OWNED), Relaxed);
        frame
    }

    /// Hands the tables over: the space exists.
    pub(super) fn pin(&self) -> Result<(), Errno> {
        hypercall::mmuext(mmuext::PIN_L4_TABLE, self.root.0).map(|_| ())
    }

    /// Ends the space, and gives its tables and pages back.
    pub(super) fn destroy(self) -> Result<(), Errno> {
        let unpinned = hypercall::mmuext(mmuext::UNPIN_TABLE, self.root.0).map(|_| ());
        give_back(self.root, ROOT_LEVEL);
        unpinned
    }
}

/// Gives a table back, and what it alone leads to.
fn give_back(table: Number, level: u32) {
    for slot in table.words() {
        let value = slot.load(Relaxed);
        if value == 0 {
            continue;
        }
        slot.store(0, Relaxed);
        if level > LARGE_LEVEL || level == LARGE_LEVEL && value & LARGE == 0 {
            give_back(frame_of(value), level - 1);
        } else if value & OWNED != 0 {
            frames::give(frame_of(value));
        }
    }
    frames::give(table);
}
