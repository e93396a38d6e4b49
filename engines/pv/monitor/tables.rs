//! The guest's page tables: which frame is a table, who maps what writable.
//!
//! Every frame has a [`Frame`] record. A frame is either ordinary, with a count of the leaf entries
//! that map it writable, or a table of one level, in one space, at one place of it; never both. So a
//! table is linked from exactly one entry, and its first address is known.
//!
//! Invariant: the records say what the entries of all pinned trees say, for as long as the kernel
//! changes them by hypercall. A kernel that writes to them directly breaks its own books only:
//! everything here checks bounds again when it reads an entry.

use crate::State;
use crate::held::Held;
use crate::hypercall::errno::{EBUSY, EINVAL};
use crate::hypercall::layout::{DIRECT_MAP, USER_END, USER_START};
use crate::memory::Errno;
use crate::wire::{PAGE, k, relax};

/// Bits of an entry (SDM 3A 4.5).
pub(crate) mod bit {
    pub(crate) const PRESENT: u64 = 1;
    pub(crate) const WRITABLE: u64 = 1 << 1;
    pub(crate) const USER: u64 = 1 << 2;
    pub(crate) const ACCESSED: u64 = 1 << 5;
    pub(crate) const DIRTY: u64 = 1 << 6;
    pub(crate) const LARGE: u64 = 1 << 7;
    pub(crate) const NO_EXECUTE: u64 = 1 << 63;
}

/// Bits 12 to 51: the address.
const ADDRESS: u64 = ((1 << 52) - 1) & !(PAGE - 1);
/// Bits 52 to 62, which must be zero.
const RESERVED: u64 = 0x7ff << 52;
/// Bytes of a large leaf.
pub(crate) const LARGE_SIZE: u64 = 2 << 20;

/// What the monitor knows of a frame. All zero is an ordinary frame that nobody maps writable.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Frame {
    /// 0 for an ordinary frame, else the table's level.
    pub(crate) level: u8,
    /// Slot of the table's space.
    pub(crate) slot: u8,
    /// Pages of the table that came back with the frame that they had, one after another.
    pub(crate) returns: u8,
    /// Leaf entries that map it writable.
    writable: u32,
    /// First address that the table translates.
    pub(crate) address: u64,
    /// The space's epoch for which the table's record holds: see `held`.
    pub(crate) epoch: u32,
}

/// Bytes that an entry of a table of `level` translates.
pub(crate) const fn span(level: u8) -> u64 {
    PAGE << (9 * (level as u64 - 1))
}

/// The frame number in an entry.
pub(crate) const fn target(entry: u64) -> u64 {
    (entry & ADDRESS) / PAGE
}

/// Whether an entry of a table of `level` is present and translates by itself.
pub(crate) const fn is_leaf(entry: u64, level: u8) -> bool {
    entry & bit::PRESENT != 0 && (level == 1 || entry & bit::LARGE != 0)
}

impl State {
    /// The record of a frame of the guest.
    pub(crate) fn frame(&self, number: u64) -> &'static mut Frame {
        assert!(number < self.frames);
        // SAFETY: one record per frame was mapped, zeroed; one thread, and no reference is kept
        // across a use of another one to the same frame.
        unsafe { &mut *(k::FRAMES as *mut Frame).add(number as usize) }
    }

    fn place(&self, table: u64, index: u64) -> *mut u64 {
        assert!(table < self.frames && index < 512);
        (DIRECT_MAP + table * PAGE + index * 8) as *mut u64
    }

    pub(crate) fn entry(&self, table: u64, index: u64) -> u64 {
        // SAFETY: in the direct map of guest memory.
        unsafe { self.place(table, index).read_volatile() }
    }

    pub(crate) fn store(&self, table: u64, index: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.place(table, index).write_volatile(value) }
    }

    /// Checks a present entry of a table of `level` for `address`, and answers whether it is a leaf.
    fn check(&self, entry: u64, level: u8, address: u64) -> Result<bool, Errno> {
        let leaf = is_leaf(entry, level);
        let frames = if leaf && level == 2 { 512 } else { 1 };
        let number = target(entry);
        let well = entry & RESERVED == 0
            && address < USER_END
            && address + span(level) > USER_START
            && (level > 1 || address >= USER_START)
            && number
                .checked_add(frames)
                .is_some_and(|end| end <= self.frames)
            && (!leaf || level <= 2)
            && (frames == 1 || number.is_multiple_of(512) && address >= USER_START);
        if well { Ok(leaf) } else { Err(-EINVAL) }
    }

    /// Takes a leaf into the books.
    fn take_leaf(&mut self, entry: u64, level: u8) -> Result<(), Errno> {
        if entry & bit::WRITABLE == 0 {
            return Ok(());
        }
        let frames = span(level) / PAGE;
        let first = target(entry);
        let busy = |number| self.frame(number).level != 0;
        if self.relax & relax::TRUST_TABLES == 0 && (first..first + frames).any(busy) {
            return Err(-EBUSY);
        }
        for number in first..first + frames {
            self.frame(number).writable += 1;
        }
        Ok(())
    }

    /// Takes a leaf out of the books.
    fn drop_leaf(&mut self, entry: u64, level: u8) {
        if entry & bit::WRITABLE == 0 {
            return;
        }
        let first = target(entry);
        for number in first..(first + span(level) / PAGE).min(self.frames) {
            let frame = self.frame(number);
            frame.writable = frame.writable.saturating_sub(1);
        }
    }

    /// Takes what an entry says into the books: a leaf, or a table with all below it.
    fn take(&mut self, slot: usize, entry: u64, level: u8, address: u64) -> Result<(), Errno> {
        if entry & bit::PRESENT == 0 {
            return Ok(());
        }
        if self.check(entry, level, address)? {
            self.take_leaf(entry, level)
        } else {
            self.take_table(slot, target(entry), level - 1, address)
        }
    }

    /// Makes a frame a table, with all that is below it; undoes what was done if anything is bad.
    pub(crate) fn take_table(
        &mut self,
        slot: usize,
        table: u64,
        level: u8,
        address: u64,
    ) -> Result<(), Errno> {
        let frame = self.frame(table);
        if self.relax & relax::TRUST_TABLES == 0 && (frame.level != 0 || frame.writable != 0) {
            return Err(-EBUSY);
        }
        frame.level = level;
        frame.slot = slot as u8;
        frame.address = address;
        frame.epoch = 0;
        frame.returns = 0;
        for index in 0..512 {
            let entry = self.entry(table, index);
            let at = address + index * span(level);
            if let Err(error) = self.take(slot, entry, level, at) {
                for index in 0..index {
                    self.drop_entry(self.entry(table, index), level);
                }
                self.frame(table).level = 0;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes what an entry says out of the books, and out of the process.
    fn drop_entry(&mut self, entry: u64, level: u8) {
        if entry & bit::PRESENT == 0 {
        } else if is_leaf(entry, level) {
            self.drop_leaf(entry, level);
        } else {
            self.drop_table(target(entry), level - 1);
        }
    }

    /// Makes a table an ordinary frame, with all that is below it.
    pub(crate) fn drop_table(&mut self, table: u64, level: u8) {
        // A kernel that wrote to its tables directly may have put anything here.
        if table >= self.frames || self.frame(table).level != level {
            return;
        }
        self.unmap_leaves(table);
        for index in 0..512 {
            self.drop_entry(self.entry(table, index), level);
        }
        self.frame(table).level = 0;
    }

    /// Queues the unmapping of everything that a table's own leaves have mapped.
    fn unmap_leaves(&mut self, table: u64) {
        let Frame {
            slot,
            level,
            address,
            epoch,
            ..
        } = *self.frame(table);
        if level > 2 || epoch != self.spaces[usize::from(slot)].epoch {
            return;
        }
        for index in 0..512 {
            let held = self.held(table, index);
            if matches!(held, Held::Live(_) | Held::Parked(_)) {
                self.hold(table, index, Held::Nothing);
                self.queue_unmap(slot.into(), address + index * span(level), span(level));
            }
        }
    }

    /// Changes an entry of a table of a pinned tree.
    ///
    /// # Errors
    /// EINVAL and EBUSY, negated; nothing has changed then.
    pub(crate) fn change(&mut self, table: u64, index: u64, value: u64) -> Result<(), Errno> {
        let Frame {
            level,
            slot,
            address,
            ..
        } = *self.frame(table);
        let slot = usize::from(slot);
        let at = address + index * span(level);
        let old = self.entry(table, index);
        if old == value {
            return Ok(());
        }
        let linked = |entry: u64| entry & bit::PRESENT != 0 && !is_leaf(entry, level);
        if linked(old) && linked(value) && target(old) == target(value) {
            // The same table with other rights.
            self.check(value, level, at)?;
            self.queue_unmap(slot, at, span(level));
            self.forget_below(target(value), level - 1);
        } else {
            self.take(slot, value, level, at)?;
            self.drop_entry(old, level);
        }
        self.store(table, index, value);
        if level <= 2 {
            self.follow(slot, at, table, index, old);
        }
        Ok(())
    }

    /// Notes that nothing below a table is mapped any more.
    fn forget_below(&mut self, table: u64, level: u8) {
        if table >= self.frames || self.frame(table).level != level {
            return;
        }
        if level <= 2 {
            self.frame(table).epoch = 0;
        }
        if level > 1 {
            for index in 0..512 {
                let entry = self.entry(table, index);
                if entry & bit::PRESENT != 0 && !is_leaf(entry, level) {
                    self.forget_below(target(entry), level - 1);
                }
            }
        }
    }

    /// The table of a space that holds the leaf for `address`, and the index there; the last table
    /// that exists and its level if there is none.
    pub(crate) fn find(&self, slot: usize, address: u64) -> Found {
        let mut table = self.spaces[slot].root;
        let mut rights = bit::WRITABLE | bit::USER;
        for level in [4, 3, 2, 1] {
            let index = address / span(level) % 512;
            let entry = self.entry(table, index);
            let next = target(entry);
            let below = entry & bit::PRESENT != 0
                && !is_leaf(entry, level)
                && next < self.frames
                && self.frame(next).level == level - 1
                && usize::from(self.frame(next).slot) == slot;
            if !below {
                return Found {
                    table,
                    level,
                    index,
                    entry,
                    rights,
                };
            }
            rights =
                rights & entry & (bit::WRITABLE | bit::USER) | (rights | entry) & bit::NO_EXECUTE;
            table = next;
        }
        unreachable!("level 1 has nothing below")
    }
}

/// Where a walk of the tables ended.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) table: u64,
    pub(crate) level: u8,
    pub(crate) index: u64,
    pub(crate) entry: u64,
    /// Writable and user if all tables above say so; no-execute if one does.
    pub(crate) rights: u64,
}
