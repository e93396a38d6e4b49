//! Software TLBs and jump caches: the tables that translated code looks into.
//!
//! Both are direct-mapped arrays of 16-byte entries, `(key, host)`, at fixed addresses:
//!
//! - TLB: one for reads and one for writes, for supervisor and for user accesses, in each bank, because
//!   the privilege and the bank a block runs in are known when it is translated. `key` is the page's guest-virtual
//!   address and `host` the address of its first byte here. A hit is `ea - key <= 4096 - size`,
//!   one unsigned compare that also catches accesses that cross the page.
//! - Jump cache: guest-virtual branch target to host address of its block, one table for each
//!   privilege.
//!
//! An empty entry `i` holds a key whose own index is `i ^ 1`. An address with index `i` can't
//! match it, so no separate valid bit is tested, and no address, canonical or not, can hit it.
//!
//! Filled entries are remembered, so a flush costs as much as was used.

/// Entries of one software TLB: 16 MiB of reach.
pub(crate) const TLB_ENTRIES: usize = 4096;
/// Bytes of one software TLB.
pub(crate) const TLB_BYTES: usize = TLB_ENTRIES * 16;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;
/// Entries of one jump cache. A booting Linux is no faster with twice as many.
pub(crate) const JUMP_ENTRIES: usize = 16384;
/// Bytes of one jump cache.
pub(crate) const JUMP_BYTES: usize = JUMP_ENTRIES * 16;

/// Sets of software TLBs, jump caches and links: translated code belongs to one of them and leads to no other.
///
/// Page-table isolation loads CR3 at every change of privilege, and what is mapped at either value lacks
/// most of the other's code. Systems tell the two apart by bit 11 of the PCID (Linux
/// arch/x86/mm/tlb.c, FreeBSD sys/amd64/include/pmap.h), and so do the banks: what is known of one
/// half's code waits while the other's runs, and is compared with the tables when it comes back, unless the
/// system says that nothing has changed.
pub(crate) const BANKS: usize = 2;

/// Index of a jump cache in the arena.
pub(crate) fn jump_index(bank: usize, user: bool) -> usize {
    bank * 2 + usize::from(user)
}

/// Software TLBs of a bank.
pub(crate) const TLB_KINDS: usize = 4;

/// Which of its bank's a software TLB is.
pub(crate) fn tlb_kind(user: bool, write: bool) -> usize {
    usize::from(user) * 2 + usize::from(write)
}

/// Index of a software TLB in the arena.
pub(crate) fn tlb_index(bank: usize, kind: usize) -> usize {
    bank * TLB_KINDS + kind
}

use std::cell::Cell;

use crate::dispatch::Targets;

/// A naturally aligned range of guest-virtual addresses: what one page-table entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub start: u64,
    pub bytes: u64,
}

impl Span {
    /// The page of this size around `address`.
    pub(crate) fn around(address: u64, bytes: u64) -> Span {
        Span {
            start: address & !(bytes - 1),
            bytes,
        }
    }

    pub(crate) fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.start) < self.bytes
    }
}

/// A set of pages that may say yes for one that isn't in it.
#[derive(Default)]
pub(crate) struct Pages([Cell<u64>; 8]);

impl Pages {
    fn bit(&self, address: u64) -> (&Cell<u64>, u64) {
        let page = address >> 12;
        let hash = page ^ page >> 9 ^ page >> 18;
        (&self.0[(hash >> 6 & 7) as usize], 1 << (hash & 63))
    }

    pub(crate) fn add(&self, address: u64) {
        let (word, bit) = self.bit(address);
        word.set(word.get() | bit);
    }

    pub(crate) fn may_hold(&self, address: u64) -> bool {
        let (word, bit) = self.bit(address);
        word.get() & bit != 0
    }

    /// True if it may hold a page of `span`.
    fn may_meet(&self, span: Span) -> bool {
        if span.bytes == 4096 {
            self.may_hold(span.start)
        } else {
            self.0.iter().any(|word| word.get() != 0)
        }
    }

    pub(crate) fn clear(&self) {
        self.0.iter().for_each(|word| word.set(0));
    }
}

/// Has the host provide the pages of a table at once: one by one they would cost a fault each.
pub(crate) fn bring_in(address: usize, bytes: usize) {
    let start = address & !0xfff;
    let end = (address + bytes).next_multiple_of(0x1000);
    // SAFETY: nothing in the pages changes, whosever they are. A host that can't do it has them fault.
    unsafe {
        let advice = libc::MADV_POPULATE_WRITE;
        libc::madvise(start as *mut _, end - start, advice);
    }
}

#[repr(C)]
struct Entry {
    key: u64,
    host: u64,
}

/// A direct-mapped table with entries of `1 << SHIFT` bytes of guest address each.
pub(crate) struct Table<const SHIFT: u32, const ENTRIES: usize> {
    entries: *mut Entry,
    filled: Filled,
    /// Entries to be filled before all pages are brought in.
    few: Cell<u32>,
}

/// Entries that are filled one by one before a table gets all of its pages. Many never hold more: with page-table
/// isolation, one half of the address spaces has little kernel code, and the other has no code of programs.
const FEW: u32 = 32;

/// Marks of a table: each stands for as many entries as it takes.
const MARKS: usize = 64 * 64;

/// Which marks of a table may hold something: one bit each, and one for each word of those.
struct Filled {
    words: [Cell<u64>; 64],
    summary: Cell<u64>,
}

impl Filled {
    fn new() -> Filled {
        Filled {
            words: [const { Cell::new(0) }; 64],
            summary: Cell::new(0),
        }
    }

    fn add(&self, index: usize) {
        let word = &self.words[index >> 6 & 63];
        word.set(word.get() | 1 << (index & 63));
        self.summary
            .set(self.summary.get() | 1 << (index >> 6 & 63));
    }

    /// Every index, which is forgotten if `forget`.
    fn each(&self, forget: bool, mut act: impl FnMut(usize)) {
        let mut summary = self.summary.get();
        while summary != 0 {
            let number = summary.trailing_zeros() as usize;
            summary &= summary - 1;
            let mut word = self.words[number].get();
            if forget {
                self.words[number].set(0);
            }
            while word != 0 {
                act(number << 6 | word.trailing_zeros() as usize);
                word &= word - 1;
            }
        }
        if forget {
            self.summary.set(0);
        }
    }
}

const _: () = assert!(TLB_ENTRIES.is_multiple_of(MARKS) && JUMP_ENTRIES.is_multiple_of(MARKS));

/// A software TLB.
pub(crate) type Tlb = Table<12, TLB_ENTRIES>;

/// A jump cache, and the table of [`crate::dispatch`] for those who use it.
pub(crate) struct JumpCache {
    entries: Table<0, JUMP_ENTRIES>,
    /// The pages that a target was entered for since the last flush: most invalidations concern pages
    /// that hold none.
    pages: Pages,
    /// Pages that code behind a target depends on besides its own.
    leaves: Pages,
    targets: Option<Targets>,
}

impl JumpCache {
    /// Takes over [`JUMP_BYTES`] at `address`.
    ///
    /// # Safety
    /// As for [`Table::new`].
    pub(crate) unsafe fn new(address: usize) -> JumpCache {
        JumpCache {
            // SAFETY: the caller's promise.
            entries: unsafe { Table::new(address) },
            pages: Pages::default(),
            leaves: Pages::default(),
            targets: None,
        }
    }

    /// Sees to memory before it is needed.
    pub(crate) fn populate(&self) {
        self.entries.populate();
    }

    /// Keeps a table of checked entries as well.
    pub(crate) fn set_targets(&mut self, targets: Targets) {
        self.targets = Some(targets);
    }

    /// To be called before code runs that looks into the table of checked entries.
    #[inline]
    pub(crate) fn prepare_targets(&self) {
        if let Some(targets) = &self.targets {
            targets.prepare();
        }
    }

    /// Enters a block: where to enter it with flags in the context, and its checked entry if it has
    /// one.
    pub(crate) fn fill(&self, target: u64, entry: u64, checked: Option<u64>) {
        self.entries.fill(target, entry);
        self.pages.add(target);
        if let (Some(targets), Some(checked)) = (&self.targets, checked) {
            targets.fill(target, checked);
        }
    }

    /// A block is entered that depends on the page around `address` as well.
    pub(crate) fn lean_on(&self, address: u64) {
        self.leaves.add(address);
    }

    /// Where the block at `target` is entered; None as well if it could have a checked entry but has
    /// none in the table, for code that looks there.
    pub(crate) fn get(&self, target: u64, checked: bool) -> Option<u64> {
        let missing = |targets: &Targets| checked && !targets.holds(target);
        let known = !self.targets.as_ref().is_some_and(missing);
        self.entries.get(target).filter(|_| known)
    }

    /// Forgets the block at `target`.
    pub(crate) fn remove(&self, target: u64, checked: Option<u64>) {
        self.entries.remove(target);
        if let (Some(targets), Some(checked)) = (&self.targets, checked) {
            targets.remove(target, checked);
        }
    }

    /// Forgets every target.
    pub(crate) fn flush(&self) {
        self.entries.flush();
        self.pages.clear();
        self.leaves.clear();
        if let Some(targets) = &self.targets {
            targets.flush();
        }
    }

    /// Forgets the targets in `span`.
    pub(crate) fn remove_span(&self, span: Span) {
        if self.leaves.may_meet(span) {
            // Whose they are is not known here.
            return self.flush();
        }
        let before = span.start.wrapping_sub(4096);
        if span.bytes == 4096 && !self.pages.may_hold(span.start) && !self.pages.may_hold(before) {
            return;
        }
        // An instruction that begins before it may end in it.
        self.entries.remove_span(Span {
            start: span.start.wrapping_sub(LONGEST - 1),
            bytes: span.bytes + LONGEST - 1,
        });
        // The other table doesn't know whose its entries are.
        if let Some(targets) = &self.targets {
            targets.flush();
        }
    }
}

impl<const SHIFT: u32, const ENTRIES: usize> Table<SHIFT, ENTRIES> {
    /// Takes over `ENTRIES * 16` writable bytes of zeroes at `address`, which outlive the table. They need no
    /// memory until they are [filled](Table::fill).
    ///
    /// # Safety
    /// The memory belongs to this table alone, translated code aside, and stays mapped.
    pub(crate) unsafe fn new(address: usize) -> Self {
        let table = Table {
            entries: address as *mut Entry,
            filled: Filled::new(),
            few: Cell::new(FEW),
        };
        table.clear(0);
        table
    }

    /// Has the host provide all of its pages.
    #[cold]
    pub(crate) fn populate(&self) {
        self.few.set(0);
        bring_in(self.entries as usize, ENTRIES * size_of::<Entry>());
    }

    #[cold]
    fn one_more(&self) {
        self.few.set(self.few.get() - 1);
        if self.few.get() == 0 {
            self.populate();
        }
    }

    const GROUP: usize = ENTRIES / MARKS;

    /// The entries that a mark stands for.
    fn group(mark: usize) -> std::ops::Range<usize> {
        mark * Self::GROUP..(mark + 1) * Self::GROUP
    }

    fn index(key: u64) -> usize {
        (key >> SHIFT) as usize & (ENTRIES - 1)
    }

    /// The key of the entry that is so many bytes from the first.
    pub(crate) fn key_at(&self, offset: u64) -> u64 {
        let index = (offset as usize / size_of::<Entry>()) & (ENTRIES - 1);
        // SAFETY: index < ENTRIES and the table owns its memory.
        unsafe { (*self.entries.add(index)).key }
    }

    /// Empties an entry: its key is one that belongs elsewhere, which 0 is for all but the first.
    fn clear(&self, index: usize) {
        let key = if index == 0 { 1 << SHIFT } else { 0 };
        // SAFETY: index < ENTRIES and the table owns its memory.
        unsafe { *self.entries.add(index) = Entry { key, host: 0 } };
    }

    /// Enters `key -> host`. `key` has its low SHIFT bits clear.
    pub(crate) fn fill(&self, key: u64, host: u64) {
        if self.few.get() != 0 {
            self.one_more();
        }
        let index = Self::index(key);
        // SAFETY: index < ENTRIES.
        unsafe { *self.entries.add(index) = Entry { key, host } };
        self.filled.add(index / Self::GROUP);
    }

    /// What `key` maps to.
    pub(crate) fn get(&self, key: u64) -> Option<u64> {
        // SAFETY: index < ENTRIES.
        let entry = unsafe { &*self.entries.add(Self::index(key)) };
        (entry.key == key).then_some(entry.host)
    }

    /// A key that maps to `host`.
    pub(crate) fn key_of(&self, host: u64) -> Option<u64> {
        let mut found = None;
        self.filled.each(false, |group| {
            for index in Self::group(group) {
                // SAFETY: index < ENTRIES.
                let entry = unsafe { &*self.entries.add(index) };
                if entry.host == host && Self::index(entry.key) == index {
                    found = Some(entry.key);
                }
            }
        });
        found
    }

    /// Empties every entry.
    pub(crate) fn flush(&self) {
        self.filled.each(true, |group| {
            Self::group(group).for_each(|index| self.clear(index));
        });
    }

    /// Empties the entry for `key`, if it holds it.
    pub(crate) fn remove(&self, key: u64) {
        if self.get(key).is_some() {
            self.clear(Self::index(key));
        }
    }

    /// Empties the entries for keys in `span`.
    pub(crate) fn remove_span(&self, span: Span) {
        let filled = |index: &usize| {
            // SAFETY: index < ENTRIES.
            let key = unsafe { (*self.entries.add(*index)).key };
            span.contains(key) && Self::index(key) == *index
        };
        self.filled.each(false, |group| {
            (Self::group(group).filter(filled)).for_each(|index| self.clear(index));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_entry_matches_no_address_of_its_index() {
        let mut memory = vec![0u128; TLB_ENTRIES];
        // SAFETY: the vector outlives the table and nobody else uses it.
        let tlb = unsafe { Tlb::new(memory.as_mut_ptr() as usize) };
        for page in [0u64, 1, 0x7fff_ffff_f000 >> 12, u64::MAX >> 12] {
            assert_eq!(tlb.get(page << 12), None);
        }
        tlb.fill(0x5000, 0x1234);
        assert_eq!(tlb.get(0x5000), Some(0x1234));
        tlb.remove(0x5000);
        assert_eq!(tlb.get(0x5000), None);
        tlb.fill(0, 1);
        tlb.flush();
        assert_eq!(tlb.get(0), None);
    }
}
