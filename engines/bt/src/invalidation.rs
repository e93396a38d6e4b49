//! What translated code needs to know to execute invlpg by itself, at a fixed address.
//!
//! It removes a page from the software TLBs, and begins a new epoch, which is as much as what Rust code
//! has remembered of translations asks for. Where more may hang on the address, it leaves for the
//! runtime: on a page that code was fetched from, in a large page, in the window.
//!
//! Invariant: a page with targets of links or in a jump cache, the page of the code that runs, and a
//! page within an entry that maps more than 4 KiB are marked here; so may others be.

use std::cell::Cell;

/// Marks for 4 KiB pages, by number.
pub(crate) const PAGES: usize = 4096;
/// Marks for 2 MiB regions, by number.
pub(crate) const REGIONS: usize = 512;
/// A region's bytes, as a power of two.
pub(crate) const REGION: u32 = 21;

/// See above.
#[repr(C)]
pub(crate) struct Invalidation {
    /// Changes with every invalidation, and is never 0.
    pub epoch: Cell<u64>,
    /// Some of `shown` is set.
    shows: Cell<bool>,
    /// Page has code: the bit of each jump cache.
    pub code: [Cell<u8>; PAGES],
    /// Region has a large page.
    pub large: [Cell<u8>; REGIONS],
    /// Region is in the window, or part of it.
    pub shown: [Cell<u8>; REGIONS],
}

impl Invalidation {
    pub(crate) fn new() -> Invalidation {
        Invalidation {
            epoch: Cell::new(1),
            shows: Cell::new(false),
            code: [const { Cell::new(0) }; PAGES],
            large: [const { Cell::new(0) }; REGIONS],
            shown: [const { Cell::new(0) }; REGIONS],
        }
    }

    /// Begins a new epoch.
    pub(crate) fn next_epoch(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }

    /// Code for this jump cache is fetched from the page around `address`.
    pub(crate) fn mark_code(&self, address: u64, jumps: usize) {
        let mark = &self.code[(address >> 12) as usize % PAGES];
        mark.set(mark.get() | 1 << jumps);
    }

    /// Nothing in this jump cache counts any more.
    pub(crate) fn forget_code(&self, jumps: usize) {
        for mark in &self.code {
            mark.set(mark.get() & !(1 << jumps));
        }
    }

    /// An entry maps all of this.
    pub(crate) fn mark_large(&self, start: u64, bytes: u64) {
        mark(&self.large, start, bytes);
    }

    /// The window may come to show any of this.
    pub(crate) fn mark_shown(&self, start: u64, bytes: u64) {
        self.shows.set(true);
        mark(&self.shown, start, bytes);
    }

    /// The window shows nothing.
    pub(crate) fn forget_shown(&self) {
        if self.shows.replace(false) {
            self.shown.iter().for_each(|mark| mark.set(0));
        }
    }

    /// No large page counts any more.
    pub(crate) fn forget_large(&self) {
        self.large.iter().for_each(|mark| mark.set(0));
    }
}

/// Marks the regions of a naturally aligned range.
fn mark(regions: &[Cell<u8>; REGIONS], start: u64, bytes: u64) {
    let first = start >> REGION;
    for number in 0..(bytes >> REGION).clamp(1, REGIONS as u64) {
        regions[(first + number) as usize % REGIONS].set(1);
    }
}
