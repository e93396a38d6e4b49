//! Translated blocks: where they are, what links to them, what kills them.
//!
//! A block is known by the guest-virtual and guest-physical address of its first byte and its
//! [`Mode`]. Its code is placed by bumping a pointer; a killed block's code stays where it is, since
//! it may be running, until the whole cache is emptied. That happens only when something is about
//! to be translated, so never while translated code waits to be resumed.
//!
//! What leads from one to another is in `links`; what is known of blocks, sites and marks lies in lists (`list`,
//! `block`, `kept`), found by `index` and `modes`; `bounces` has the bodies of writes that are to come back.
//!
//! Invariant: code and what is known of it take no more than the size of the cache, but for one block's.

mod block;
mod bounces;
mod index;
mod kept;
mod links;
mod list;
mod modes;

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, Hasher},
    io,
    num::NonZeroU32,
};

use iced_x86::{Encoder, Instruction};

use block::Numbers;
pub(crate) use block::{Block, Key};
use bounces::Bounces;
pub(crate) use bounces::{BODY, Slot};
use index::Index;
use kept::{Base, Kept, KeptMark, KeptPort, Wide};
use list::List;
use modes::Modes;

use crate::{
    arena::Arena,
    checks::Outside,
    cpu::Bits,
    decode::{
        self, Code, Decoded, Forms, Mode, Short,
        leaf::{Leaf, Reader},
    },
    lower::{self, Layout, Lowered, Place},
    mmu::Mmu,
    pages::Set,
    site::{Homes, Mark, Port, Site},
    tlb::{BANKS, Span},
};

/// Integer keys need mixing, not protection from collisions by design: a guest that makes its own
/// lookups slow has slowed itself.
#[derive(Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

impl From<Short> for Refusal {
    fn from(short: Short) -> Refusal {
        match short {
            Short::Crosses => Refusal::Crosses,
            Short::More => Refusal::More,
        }
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Targets that links may no longer lead to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dropped {
    Span(Span),
    /// Ring 3's code in a bank.
    User(usize),
    /// A bank's code.
    Bank(usize),
    All,
}

/// Guest code to translate.
pub(crate) struct Source<'a> {
    pub key: Key,
    pub second: Option<u64>,
    pub bytes: &'a [u8],
    /// Guest instruction pointer of the first byte.
    pub ip: u64,
    /// Bytes of the page behind `bytes` that are code as well.
    pub more: usize,
    /// Code elsewhere.
    pub leaves: &'a Reader<'a>,
}

/// Why nothing was translated.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The first instruction needs bytes of the next page.
    Crosses,
    /// More of the page has to be seen.
    More,
    /// It goes through code of this page, which hasn't been [entered](Cache::enter).
    Leans(u64),
    /// A bug: the text names the instruction.
    Bug(String),
}

/// Every translated block of one vCPU.
pub(crate) struct Cache {
    layout: Layout,
    start: u64,
    next: u64,
    end: u64,
    blocks: List<Block>,
    sites: List<Kept>,
    system: List<Instruction>,
    marks: List<KeptMark>,
    leaves: List<Leaf>,
    wide: Wide,
    modes: Modes,
    bounces: Bounces,
    index: Index,
    by_page: Map<u64, Vec<u32>>,
    /// The page entered last, by its number, if it hasn't been left.
    recent: Option<u64>,
    /// Blocks whose accesses look up for themselves, because sharing didn't pay.
    apart: HashSet<Key, BuildHasherDefault<Mix>>,
    /// Accesses of blocks that go around the window, because it wasn't for them.
    outside: Map<Key, Outside>,
    /// Accesses of living blocks that the window was not for, and how many there were.
    missed: Map<u32, (u8, Outside)>,
    /// Linked sites whose target lies in another page, or reaches into one, by the number of that page: for each
    /// [jump cache](crate::tlb::jump_index), with which they are dropped.
    across: [Map<u64, Vec<u32>>; 2 * BANKS],
    encoder: Encoder,
    /// Buffers of the block before, empty or overwritten.
    lowered: Lowered,
    decoded: Decoded,
    forms: Forms,
    /// Times the whole cache was emptied for lack of room.
    pub emptied: u64,
    /// Guesses are never unmade, for tests that show what that is good for.
    pub keep_guesses: bool,
}

/// Room that any block fits into: 64 instructions with their slow paths.
const BLOCK_ROOM: u64 = 48 * 1024;

impl Cache {
    /// A cache that places code from `start` on.
    ///
    /// # Errors
    /// The host has no room for it.
    pub(crate) fn new(arena: &Arena, layout: Layout, start: u64) -> io::Result<Cache> {
        let bounces = Bounces::new(start.next_multiple_of(64), arena.code_bytes());
        let start = bounces.end();
        let bytes = arena.code_bytes();
        // All of them together are bounded by that, but for what is known of one block.
        let room = bytes + BLOCK_ROOM as usize;
        Ok(Cache {
            layout,
            start,
            next: start,
            end: arena.code() + arena.code_bytes() as u64,
            blocks: List::new(room)?,
            sites: List::new(room)?,
            system: List::new(room)?,
            marks: List::new(room)?,
            leaves: List::new(room)?,
            wide: Wide::default(),
            modes: Modes::default(),
            bounces,
            index: Index::new(bytes / 2048, room)?,
            by_page: Map::default(),
            recent: None,
            apart: HashSet::default(),
            outside: Map::default(),
            missed: Map::default(),
            across: Default::default(),
            encoder: Encoder::new(64),
            lowered: Lowered::default(),
            decoded: Decoded::default(),
            forms: Forms::new(),
            emptied: 0,
            keep_guesses: false,
        })
    }

    /// Smallest size that holds the stubs and one block.
    pub(crate) const MINIMUM: usize = 64 * 1024;

    pub(crate) fn site(&self, index: usize) -> Site {
        let kept = &self.sites[index];
        kept.site(self.base(kept.block), &self.wide)
    }

    /// Homes and port of a site that is an `in` or `out`, without a look at anything else.
    #[inline]
    pub(crate) fn port(&self, index: usize) -> Option<(Homes, Port)> {
        self.sites.get(index)?.port()
    }

    /// The port alone.
    #[inline]
    pub(crate) fn kept_port(&self, index: usize) -> Option<&KeptPort> {
        self.sites.get(index)?.kept_port()
    }

    /// What the places and instruction pointers of a block's sites are relative to.
    fn base(&self, block: u32) -> Base {
        Base::of(self.block(block), self.mode(block))
    }

    /// The mode that a block was made for.
    pub(crate) fn mode(&self, block: u32) -> &Mode {
        self.modes.mode(self.block(block).mode)
    }

    /// What a block is known by.
    fn key(&self, block: u32) -> Key {
        Key {
            virt: self.block(block).virt,
            phys: self.block(block).phys,
            mode: *self.mode(block),
        }
    }

    /// Code that a block goes through besides its own.
    pub(crate) fn leaf(&self, block: u32) -> Option<&Leaf> {
        let number = self.block(block).leaf?;
        Some(&self.leaves[number.get() as usize - 1])
    }

    pub(crate) fn block(&self, index: u32) -> &Block {
        &self.blocks[index as usize]
    }

    pub(crate) fn system(&self, index: u32) -> Instruction {
        self.system[index as usize]
    }

    /// Living blocks by their numbers, oldest first.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u32, &Block)> {
        let all = (0..).zip(&*self.blocks);
        all.filter(|(_, block)| block.alive)
    }

    /// The block for `key`.
    pub(crate) fn find(&self, key: &Key) -> Option<u32> {
        let mode = self.modes.find(&key.mode)?;
        self.index.find(key, mode, &self.blocks)
    }

    /// The mark that covers the host address `rip`, and its block's number.
    pub(crate) fn mark(&self, rip: u64) -> Option<(Mark, u32)> {
        let rip = self.in_line(rip).unwrap_or(rip);
        let index = self
            .blocks
            .partition_point(|block| block.code() <= rip)
            .checked_sub(1)?;
        let block = &self.blocks[index];
        let offset = (rip - block.code()) as u32;
        if offset >= block.code_len() {
            return None;
        }
        let marks = &self.marks[block.marks()];
        let at = marks
            .partition_point(|mark| u32::from(mark.offset) <= offset)
            .checked_sub(1)?;
        let index = index as u32;
        Some((marks[at].mark(self.base(index), &self.wide), index))
    }

    /// True if the next translation would empty the cache.
    pub(crate) fn full(&self) -> bool {
        self.end.saturating_sub(self.next + self.known()) < BLOCK_ROOM
    }

    /// Bytes of what is known of the code, more or less.
    fn known(&self) -> u64 {
        /// A page's entry, and its list with a block or two.
        const PAGE: usize = 96;
        let lists = self.blocks.bytes()
            + self.sites.bytes()
            + self.system.bytes()
            + self.marks.bytes()
            + self.leaves.bytes()
            + self.index.bytes();
        let maps = self.modes.bytes() + PAGE * self.by_page.len();
        (lists + self.wide.bytes() + maps) as u64
    }

    /// Throws everything away.
    pub(crate) fn empty(&mut self, mmu: &mut Mmu) {
        for &page in self.by_page.keys() {
            mmu.leave(page << 12);
        }
        self.next = self.start;
        self.blocks.clear();
        self.sites.clear();
        self.system.clear();
        self.marks.clear();
        self.leaves.clear();
        self.wide.clear();
        self.modes.clear();
        self.bounces.clear();
        self.index.clear();
        self.by_page.clear();
        self.recent = None;
        self.across.iter_mut().for_each(Map::clear);
        self.apart.clear();
        self.outside.clear();
        self.missed.clear();
        mmu.jumps.iter().for_each(|jumps| jumps.flush());
        self.emptied += 1;
    }

    /// Code from the page around `phys` is about to be translated. Answers who else may be writing to
    /// it unseen: they have to be waited for.
    pub(crate) fn enter(&mut self, phys: u64, mmu: &mut Mmu) -> Set {
        self.by_page.entry(phys >> 12).or_default();
        self.recent = Some(phys >> 12);
        mmu.enter(phys)
    }

    /// True if the page around `phys` is the one [entered](Cache::enter) last: most code is translated from where
    /// the code before it was. Where there is one vCPU, entering it once more changes nothing.
    #[inline]
    pub(crate) fn just_entered(&self, phys: u64) -> bool {
        self.recent == Some(phys >> 12)
    }

    /// Translates and enters one block. The cache must not be [`full`](Cache::full), and its pages
    /// have been [entered](Cache::enter).
    ///
    /// # Errors
    /// See [`Refusal`].
    pub(crate) fn translate(&mut self, source: &Source<'_>, arena: &Arena) -> Result<u32, Refusal> {
        let Source {
            key,
            second,
            bytes,
            ip,
            more,
            leaves,
        } = *source;
        let mode = Mode {
            single: key.mode.single || second.is_some(),
            ..key.mode
        };
        let code = Code {
            bytes,
            ip,
            more,
            leaves,
        };
        decode::decode(code, mode, &mut self.forms, &mut self.decoded)?;
        let leaf = self.decoded.leaf.map(|leaf| leaf.phys);
        if let Some(leaf) = leaf
            && !self.by_page.contains_key(&(leaf >> 12))
        {
            return Err(Refusal::Leans(leaf));
        }
        let number = self.blocks.len() as u32;
        let place = Place {
            ip,
            base: self.next,
            block: number,
            first_site: self.sites.len(),
            first_system: self.system.len(),
            groups: !self.apart.contains(&key),
            outside: self.outside.get(&key).copied().unwrap_or_default(),
        };
        lower::lower(
            &self.decoded,
            bytes,
            mode,
            place,
            &self.layout,
            &mut self.encoder,
            &mut self.lowered,
        )
        .map_err(Refusal::Bug)?;
        let lowered = &mut self.lowered;
        let length = lowered.code.code().len() as u64;
        if length > (self.end - self.next).min(BLOCK_ROOM) {
            return Err(Refusal::Bug(format!("a block of {length} bytes")));
        }
        arena.populate(self.next + length);
        arena.write_code(self.next, lowered.code.code());
        let leaves = &mut self.leaves;
        let leaf_number = self.decoded.leaf.and_then(|leaf| {
            leaves.push(leaf);
            NonZeroU32::new(leaves.len() as u32)
        });
        let numbers = Numbers {
            mode: self.modes.number(&key.mode),
            leaf: leaf_number,
            first_mark: self.marks.len(),
        };
        // Straight to its place: a copy would wait for all that was written before it.
        self.blocks.push(Block::new(
            &key,
            numbers,
            second,
            self.next,
            lowered,
            &self.decoded,
        ));
        let base = Base {
            code: self.next,
            ip: source.ip,
            long: mode.bits == Bits::Bits64,
        };
        debug_assert_eq!(
            base,
            Base::of(&self.blocks[number as usize], &key.mode),
            "a block is where it is known"
        );
        for site in &lowered.sites {
            self.sites.push(Kept::new(site, base, &mut self.wide));
        }
        for mark in &lowered.marks {
            self.marks.push(KeptMark::new(mark, base, &mut self.wide));
        }
        lowered
            .system
            .drain(..)
            .for_each(|instr| self.system.push(instr));
        let replaced = self.index.enter(number, &mut self.blocks);
        self.next = (self.next + length).next_multiple_of(16);
        if let Some(old) = replaced {
            self.unlink_incoming(old, arena);
        }
        let other = leaf.filter(|leaf| leaf >> 12 != key.phys >> 12);
        for page in [Some(key.phys), second, other].into_iter().flatten() {
            self.by_page.entry(page >> 12).or_default().push(number);
        }
        Ok(number)
    }

    /// Notes that a shared lookup of `block` could not succeed. A block that keeps doing that is
    /// thrown away, to be translated without.
    pub(crate) fn strike(&mut self, block: u32, arena: &Arena, mmu: &Mmu) {
        /// A stack frame now and then crosses a page; a device or a page with code always fails.
        const STRIKES: u8 = 32;
        let found = &mut self.blocks[block as usize];
        found.strikes = found.strikes.saturating_add(1);
        if found.strikes != STRIKES {
            return;
        }
        self.apart.insert(self.key(block));
        self.discard(block, arena, mmu);
    }

    /// Notes that the window was not for an access in `missed`, of `block`. A block where that keeps happening is thrown away, to be translated with other ways for
    /// them.
    pub(crate) fn miss(&mut self, block: u32, missed: Outside, arena: &Arena, mmu: &Mmu) {
        /// A stray pointer now and then is no reason to slow its instruction down for good.
        const MISSES: u8 = 8;
        let (misses, of) = self.missed.entry(block).or_default();
        *misses = misses.saturating_add(1);
        of.sum |= missed.sum;
        of.tlb |= missed.tlb;
        of.head |= missed.head;
        if *misses != MISSES || !self.blocks[block as usize].alive {
            return;
        }
        let of = *of;
        self.outside.entry(self.key(block)).or_default().fail(of);
        self.discard(block, arena, mmu);
    }

    /// Throws one block away. Its pages stay entered.
    pub(crate) fn discard(&mut self, block: u32, arena: &Arena, mmu: &Mmu) {
        self.index.remove(block, &mut self.blocks);
        let found = &mut self.blocks[block as usize];
        found.alive = false;
        found.leave_jumps(mmu);
        self.unlink_incoming(block, arena);
    }

    /// Kills the blocks made from any of `len` bytes at `phys`. Returns how many there were.
    pub(crate) fn kill(&mut self, phys: u64, len: u64, arena: &Arena, mmu: &mut Mmu) -> usize {
        let mut killed = 0;
        self.recent = None;
        for page in phys >> 12..=(phys + len - 1) >> 12 {
            let Some(mut numbers) = self.by_page.remove(&page) else {
                continue;
            };
            numbers.retain(|&number| {
                let block = &self.blocks[number as usize];
                if !block.alive {
                    return false;
                }
                let start = block.phys;
                let first = (4096 - (start & 0xfff)).min(block.watched.into());
                let overlaps = |from: u64, length: u64| {
                    length != 0 && from < phys + len && phys < from + length
                };
                let hit = overlaps(start, first)
                    || block
                        .second()
                        .is_some_and(|second| overlaps(second, u64::from(block.watched) - first))
                    || (self.leaf(number)).is_some_and(|leaf| overlaps(leaf.phys, leaf.len.into()));
                if hit {
                    self.discard(number, arena, mmu);
                    killed += 1;
                }
                !hit
            });
            if numbers.is_empty() {
                mmu.leave(page << 12);
            } else {
                self.by_page.insert(page, numbers);
            }
        }
        killed
    }
}
