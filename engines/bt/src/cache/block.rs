//! One translated block, and what it is known by.
//!
//! There are as many of these as blocks, so they are kept small: the code cache lies below 2 GiB, and no
//! block has as much as 64 KiB of code.

use std::hash::{Hash, Hasher};
use std::num::NonZeroU32;
use std::ops::Range;

use super::kept::NONE;
use crate::{
    checks::Levels,
    cpu::Bits,
    decode::{Decoded, Mode},
    lower::Lowered,
    mmu::Mmu,
};

/// What a block is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub virt: u64,
    pub phys: u64,
    pub mode: Mode,
}

impl Hash for Key {
    /// Few modes are in use at once: the common difference between them is enough.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.virt ^ self.phys.rotate_left(24));
        let Mode {
            user, single, bank, ..
        } = self.mode;
        state.write_u8(u8::from(user) | u8::from(single) << 1 | bank << 2);
    }
}

/// One translated block.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub virt: u64,
    pub phys: u64,
    /// Physical address of the second page, if an instruction crosses into it.
    second: u64,
    pub needs: Levels,
    /// Number of its mode.
    pub(super) mode: u32,
    /// Host address of its first byte.
    code: u32,
    /// Where its marks are in the cache's list.
    first_mark: u32,
    marks: u16,
    code_len: u16,
    entry: u16,
    inner_entry: u16,
    lazy_entry: u16,
    pub guest_len: u16,
    /// Guest bytes that a write must not change unseen.
    pub watched: u16,
    pub alive: bool,
    /// Shared lookups that could not succeed.
    pub strikes: u8,
    /// Instruction pointers have 64 bits.
    long: bool,
    /// Of one instruction, to be looked for anew each time.
    pub(super) single: bool,
    /// Jump cache that leads to it.
    jumps: u8,
    /// Code that it goes through besides its own, in the cache's list.
    pub(super) leaf: Option<NonZeroU32>,
    /// The first of the sites whose branch is linked to this block, or [`NONE`].
    pub(super) incoming: u32,
    /// The next block in its chain of the index, or [`NONE`].
    pub(super) next: u32,
}

const _: () = assert!(size_of::<Block>() == 80);

/// Where in the cache's lists what is known of a block is.
#[derive(Clone, Copy)]
pub(super) struct Numbers {
    pub mode: u32,
    pub leaf: Option<NonZeroU32>,
    pub first_mark: usize,
}

/// No physical address.
const NOWHERE: u64 = u64::MAX;

impl Block {
    /// What `lowered` has made of `decoded`, placed at `code`; its mode and its leaf have these numbers, and its
    /// marks are in the cache's list from `first_mark` on.
    #[inline(always)]
    pub(super) fn new(
        key: &Key,
        numbers: Numbers,
        second: Option<u64>,
        code: u64,
        lowered: &Lowered,
        decoded: &Decoded,
    ) -> Block {
        Block {
            virt: key.virt,
            phys: key.phys,
            second: second.unwrap_or(NOWHERE),
            needs: lowered.needs,
            mode: numbers.mode,
            code: code as u32,
            first_mark: numbers.first_mark as u32,
            marks: lowered.marks.len() as u16,
            code_len: lowered.code.code().len() as u16,
            entry: lowered.entry as u16,
            inner_entry: lowered.inner_entry as u16,
            lazy_entry: lowered.lazy_entry as u16,
            guest_len: decoded.len as u16,
            watched: decoded.watched as u16,
            alive: true,
            strikes: 0,
            long: key.mode.bits == Bits::Bits64,
            single: key.mode.single,
            jumps: key.mode.jumps() as u8,
            leaf: numbers.leaf,
            incoming: NONE,
            next: NONE,
        }
    }

    pub(super) fn marks(&self) -> Range<usize> {
        let first = self.first_mark as usize;
        first..first + usize::from(self.marks)
    }

    pub(crate) fn second(&self) -> Option<u64> {
        (self.second != NOWHERE).then_some(self.second)
    }

    /// Host address of its first byte.
    pub(crate) fn code(&self) -> u64 {
        self.code.into()
    }

    pub(crate) fn code_len(&self) -> u32 {
        self.code_len.into()
    }

    /// Host address to enter it at.
    pub(crate) fn entry(&self) -> u64 {
        self.code() + u64::from(self.entry)
    }

    /// Host address to enter it at with registers at the levels that it [`needs`](Block::needs).
    pub(crate) fn inner_entry(&self) -> u64 {
        self.code() + u64::from(self.inner_entry)
    }

    /// Host address for who comes with the flags in `Context::lazy_flags`.
    pub(crate) fn lazy_entry(&self) -> u64 {
        self.code() + u64::from(self.lazy_entry)
    }

    /// Host address for indirect branches of code that uses the window.
    pub(crate) fn checked_entry(&self) -> Option<u64> {
        (self.entry != 0).then(|| self.code())
    }

    /// It may be linked to and stand in a jump cache. The page after the last of narrower code may be
    /// the first.
    pub(crate) fn links(&self) -> bool {
        self.second == NOWHERE || self.long
    }

    /// No indirect branch may lead to it any more.
    pub(super) fn leave_jumps(&self, mmu: &Mmu) {
        let jumps = &mmu.jumps[usize::from(self.jumps)];
        jumps.remove(self.virt, self.checked_entry());
    }
}
