//! What is known of the guest's address spaces: the entries that translations were made from.
//!
//! A processor drops its translations at a load of CR3, since the tables may have changed. This keeps,
//! for each of the last few roots, where in guest memory the entries of each translation lie and what
//! they were. Whether they still are is a few loads and comparisons, against a walk for each
//! translation; a translation whose entries are all the same is what a walk would find now, accessed
//! and dirty bits set, so it may be in a TLB (SDM 3A 4.10.2.3).
//!
//! [`Upper`] is what a paging-structure cache holds (SDM 3A 4.10.3): the entries that lead to the table
//! with the last one, and the rights that they give together. Walks begin there. One is used until the
//! epoch changes, which an invalidation of whatever address does (SDM 3A 4.10.4.1), and then only if its
//! entries are what they were.
//!
//! This file reads entries again and decides nothing about rights.
//!
//! Invariant: an [`Origin`] with the current space's tag names entries that gave its translation when it
//! was made, and an upper that isn't given to others while a record refers to it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::DIRTY;
use crate::tlb::BANKS;

/// Spaces that are remembered.
const SPACES: usize = 16;
/// Uppers of a space.
const UPPERS: usize = 64;
/// Regions of a space that are found by their address.
const REGIONS: usize = 32;
/// Records of a space: 64 for each TLB.
const RECORDS: usize = 256;
/// Loads of a root after which its records are forgotten, to be those of what is in use then.
const AGE: u32 = 256;

/// No region: a number that no address has.
const NOWHERE: u64 = u64::MAX;

/// The last entry of a translation, and what the others are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// Which space, as it was when; 0 if nothing is known.
    tag: u32,
    upper: u8,
    /// Host address of the entry, and what it was.
    at: u64,
    value: u64,
}

impl Origin {
    pub(super) const NONE: Origin = Origin {
        tag: 0,
        upper: 0,
        at: 0,
        value: 0,
    };
}

/// The way to a table with last entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Upper {
    /// Level of the table, 1 for that of 4 KiB pages, and its guest-physical address.
    pub level: u32,
    pub table: u64,
    /// Writable and user bits that all entries have.
    pub rights: u64,
    pub executable: bool,
    /// Host addresses of the entries and what they were, from the root's on.
    pub above: [(u64, u64); 3],
    pub count: usize,
}

impl Upper {
    /// No entries, yet.
    pub(super) fn root(level: u32, table: u64, rights: u64) -> Upper {
        Upper {
            level,
            table,
            rights,
            executable: true,
            above: [(0, 0); 3],
            count: 0,
        }
    }

    /// True if the entries are what they were.
    pub(super) fn holds(&self, wide: bool) -> bool {
        let above = &self.above[..self.count];
        above.iter().all(|&(at, value)| load(at, wide) == value)
    }
}

/// An entry of a TLB.
#[derive(Clone, Copy)]
pub(super) struct Record {
    pub key: u64,
    pub host: u64,
    pub phys: u64,
    /// Which of a bank's TLBs.
    pub tlb: usize,
    origin: Origin,
}

/// An upper by the address that it is for.
#[derive(Clone, Copy)]
struct Region {
    number: u64,
    epoch: u64,
    upper: u8,
}

const NO_REGION: Region = Region {
    number: NOWHERE,
    epoch: 0,
    upper: 0,
};

/// One address space.
struct Space {
    root: u64,
    tag: u32,
    /// When it was last entered.
    entered: u64,
    loads: u32,
    uppers: [Upper; UPPERS],
    /// One bit for each that is in use.
    live: u64,
    regions: [Region; REGIONS],
    records: Box<[Record; RECORDS]>,
    recorded: [u64; RECORDS / 64],
    /// For supervisor and for user code, and which list each belongs to.
    code: [(u64, Vec<Origin>); 2 * BANKS],
}

/// The spaces of one vCPU.
pub(super) struct Spaces {
    spaces: Vec<Space>,
    current: usize,
    next_tag: u32,
    entered: u64,
    /// Entries have 8 bytes, and a table 512 of them.
    wide: bool,
    /// The bank in use, and the root that the TLBs of each are for.
    bank: usize,
    held: [Option<u64>; BANKS],
    /// A bank's TLBs may hold what no record of that root's tells.
    pub loose: [bool; BANKS],
}

/// What a check of the current space has found.
pub(super) struct Checked {
    good: u64,
    wide: bool,
}

/// Reads the entry at a host address again. Atomic because a guest's other CPUs may change it.
fn load(at: u64, wide: bool) -> u64 {
    if wide {
        // SAFETY: whoever made the record has read an aligned entry in RAM there, and RAM stays.
        unsafe { &*(at as *const AtomicU64) }.load(Ordering::Relaxed)
    } else {
        // SAFETY: as above.
        u64::from(unsafe { &*(at as *const AtomicU32) }.load(Ordering::Relaxed))
    }
}

impl Origin {
    /// True if the last entry is what it was; for anything but writes, dirty or not.
    fn holds(&self, wide: bool, write: bool) -> bool {
        let care = if write { u64::MAX } else { !DIRTY };
        (load(self.at, wide) ^ self.value) & care == 0
    }
}

impl Space {
    fn forget(&mut self, tag: u32) {
        self.tag = tag;
        self.live = 0;
        self.regions = [NO_REGION; REGIONS];
        self.recorded = [0; RECORDS / 64];
        self.code = Default::default();
    }
}

impl Spaces {
    pub(super) fn new() -> Spaces {
        Spaces {
            spaces: Vec::new(),
            current: 0,
            next_tag: 1,
            entered: 0,
            wide: true,
            bank: 0,
            held: [None; BANKS],
            loose: [true; BANKS],
        }
    }

    fn region(&self, address: u64) -> u64 {
        address >> if self.wide { 21 } else { 22 }
    }

    /// Forgets all of it: what entries mean may have changed.
    pub(super) fn forget(&mut self) {
        self.spaces.clear();
        self.loose = [true; BANKS];
    }

    /// Forgets the entries of TLBs, of every space.
    pub(super) fn forget_records(&mut self) {
        for space in &mut self.spaces {
            space.recorded = [0; RECORDS / 64];
        }
    }

    /// Makes the space below `root` the current one, in `bank`.
    pub(super) fn enter(&mut self, root: u64, wide: bool, bank: usize) {
        self.bank = bank;
        self.entered += 1;
        if self.wide != wide {
            self.forget();
            self.wide = wide;
        }
        let current = self.spaces.get(self.current);
        if current.is_none_or(|space| space.root != root) {
            let known = self.spaces.iter().position(|space| space.root == root);
            self.current = known.unwrap_or_else(|| self.begin(root));
        }
        if self.held[bank] != Some(root) {
            self.held[bank] = Some(root);
            self.loose[bank] = true;
        }
        // There is one set of records for both.
        for other in (0..BANKS).filter(|&other| other != bank) {
            self.loose[other] |= self.held[other] == Some(root);
        }
        let space = &mut self.spaces[self.current];
        space.entered = self.entered;
        space.loads = space.loads.wrapping_add(1);
        if space.loads.is_multiple_of(AGE) {
            space.recorded = [0; RECORDS / 64];
            self.loose[bank] = true;
        }
    }

    /// The number of a space for `root`, with nothing in it.
    fn begin(&mut self, root: u64) -> usize {
        let tag = self.next_tag;
        self.next_tag = after(tag);
        if self.spaces.len() < SPACES {
            let upper = Upper::root(0, 0, 0);
            let record = Record {
                key: 0,
                host: 0,
                phys: 0,
                tlb: 0,
                origin: Origin::NONE,
            };
            self.spaces.push(Space {
                root,
                tag,
                entered: 0,
                loads: 0,
                uppers: [upper; UPPERS],
                live: 0,
                regions: [NO_REGION; REGIONS],
                records: Box::new([record; RECORDS]),
                recorded: [0; RECORDS / 64],
                code: Default::default(),
            });
            return self.spaces.len() - 1;
        }
        let oldest = (0..SPACES).min_by_key(|&number| self.spaces[number].entered);
        let oldest = oldest.unwrap_or(0);
        let space = &mut self.spaces[oldest];
        for (held, loose) in self.held.iter().zip(&mut self.loose) {
            *loose |= *held == Some(space.root);
        }
        space.forget(tag);
        space.root = root;
        space.loads = 0;
        oldest
    }

    fn at_root(&mut self, root: u64) -> Option<&mut Space> {
        let space = self.spaces.get_mut(self.current);
        space.filter(|space| space.root == root)
    }

    /// The way from `root` to the last entry for `address`, if it is known and as it was, and its number.
    pub(super) fn upper(&mut self, root: u64, address: u64, epoch: u64) -> Option<(u8, &Upper)> {
        let (number, wide) = (self.region(address), self.wide);
        let space = self.at_root(root)?;
        let region = &mut space.regions[slot(number)];
        if region.number != number {
            return None;
        }
        let upper = &space.uppers[usize::from(region.upper)];
        if region.epoch != epoch {
            if !upper.holds(wide) {
                *region = NO_REGION;
                return None;
            }
            region.epoch = epoch;
        }
        Some((region.upper, upper))
    }

    /// Remembers the way that a walk from the root has taken, and answers its number.
    pub(super) fn learn(
        &mut self,
        root: u64,
        wide: bool,
        address: u64,
        epoch: u64,
        upper: Upper,
    ) -> u8 {
        if self.wide != wide || self.at_root(root).is_none() {
            self.enter(root, wide, self.bank);
        }
        let number = self.region(address);
        let space = &mut self.spaces[self.current];
        let known = each(space.live).find(|&index| space.uppers[index] == upper);
        let index = known.unwrap_or_else(|| {
            if space.live == u64::MAX {
                let tag = self.next_tag;
                self.next_tag = after(tag);
                space.forget(tag);
                self.loose = [true; BANKS];
            }
            (!space.live).trailing_zeros() as usize
        });
        space.live |= 1 << index;
        space.uppers[index] = upper;
        space.regions[slot(number)] = Region {
            number,
            epoch,
            upper: index as u8,
        };
        index as u8
    }

    /// What a translation through upper `index` of the current space, with a last entry at the host
    /// address `at`, is known by.
    pub(super) fn origin(&self, index: u8, at: u64, value: u64) -> Origin {
        Origin {
            tag: self.spaces[self.current].tag,
            upper: index,
            at,
            value,
        }
    }

    /// Notes an entry of a TLB.
    pub(super) fn record(&mut self, tlb: usize, key: u64, host: u64, phys: u64, origin: Origin) {
        let space = self.spaces.get_mut(self.current);
        let Some(space) = space.filter(|space| space.tag == origin.tag) else {
            self.loose[self.bank] = true;
            return;
        };
        let page = key >> 12;
        let index = (page ^ page >> 6 ^ page >> 12) as usize & 63;
        let (word, index) = (&mut space.recorded[tlb], tlb << 6 | index);
        let bit = 1 << (index & 63);
        let record = &mut space.records[index];
        // What it replaces stays in the TLB.
        self.loose[self.bank] |= *word & bit != 0 && record.key != key;
        *word |= bit;
        *record = Record {
            key,
            host,
            phys,
            tlb,
            origin,
        };
    }

    /// Looks at all uppers of the current space.
    pub(super) fn check(&self) -> Checked {
        let space = &self.spaces[self.current];
        let wide = self.wide;
        let good = each(space.live).filter(|&index| space.uppers[index].holds(wide));
        Checked {
            good: good.fold(0, |good, index| good | 1 << index),
            wide,
        }
    }

    /// True if every upper is as it was.
    pub(super) fn complete(&self, checked: &Checked) -> bool {
        self.spaces[self.current].live == checked.good
    }

    /// Tells each record, and whether it still holds; those that don't are forgotten, and the uppers
    /// that don't.
    pub(super) fn settle(&mut self, checked: &Checked, mut tell: impl FnMut(&Record, bool)) {
        let space = &mut self.spaces[self.current];
        for (number, word) in space.recorded.iter_mut().enumerate() {
            for index in each(*word) {
                let record = &space.records[number << 6 | index];
                let holds = checked.holds(&record.origin, record.tlb & 1 == 1);
                if !holds {
                    *word &= !(1 << index);
                }
                tell(record, holds);
            }
        }
        if space.live != checked.good {
            for region in &mut space.regions {
                if checked.good >> region.upper & 1 == 0 {
                    *region = NO_REGION;
                }
            }
            for (_, code) in &mut space.code {
                for origin in code {
                    if checked.good >> origin.upper & 1 == 0 {
                        *origin = Origin::NONE;
                    }
                }
            }
            space.live = checked.good;
        }
    }

    /// True if page `index` of the list of code numbered `list` is known to be as it was.
    pub(super) fn same_code(
        &self,
        checked: &Checked,
        code: usize,
        list: u64,
        index: usize,
    ) -> bool {
        let space = &self.spaces[self.current];
        let (known, code) = &space.code[code];
        *known == list
            && (code.get(index))
                .is_some_and(|origin| origin.tag == space.tag && checked.holds(origin, false))
    }

    /// Notes where page `index` of a list of code was found.
    pub(super) fn note_code(&mut self, code: usize, list: u64, index: usize, origin: Origin) {
        let Some(space) = self.spaces.get_mut(self.current) else {
            return;
        };
        let (known, code) = &mut space.code[code];
        if *known != list {
            *known = list;
            code.clear();
        }
        if code.len() <= index {
            code.resize(index + 1, Origin::NONE);
        }
        code[index] = origin;
    }
}

impl Checked {
    fn holds(&self, origin: &Origin, write: bool) -> bool {
        self.good >> origin.upper & 1 == 1 && origin.holds(self.wide, write)
    }
}

/// The tag after `tag`; 0 is none.
fn after(tag: u32) -> u32 {
    tag.checked_add(1).unwrap_or(1)
}

fn slot(region: u64) -> usize {
    (region ^ region >> 5 ^ region >> 9) as usize % REGIONS
}

/// The numbers of the bits that are set.
fn each(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let index = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(index)
    })
}
