//! Living blocks by their keys: chains through the blocks themselves.
//!
//! A key is longer than most of what else is known of a block, so it is kept in one place: the table holds
//! the numbers of the first block of each chain, and blocks name the next.
//!
//! Code runs on where it is, so blocks that are close have their chains close: what is looked for next is in
//! the host's caches already.
//!
//! Invariant: of blocks with the same key, the one entered last is in its chain and no other.

use std::{hash::BuildHasher, io};

use super::{Block, Key, Mix, kept::NONE, list::List};

/// Bytes of code that share a chain if nothing else differs, as a power of two.
const NEAR: u32 = 2;

/// Numbers of living blocks.
pub(super) struct Index {
    /// The first block's number, or [`NONE`]. There are a power of two of them.
    heads: List<u32>,
    /// Blocks in chains, or more.
    entered: usize,
}

impl Index {
    /// With chains for so many blocks, which may become as many as fit into `room` bytes.
    ///
    /// # Errors
    /// As [`List::new`].
    pub(super) fn new(blocks: usize, room: usize) -> io::Result<Index> {
        let mut heads = List::new(room)?;
        heads.extend_to(blocks.next_power_of_two(), NONE);
        Ok(Index { heads, entered: 0 })
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.bytes()
    }

    pub(super) fn clear(&mut self) {
        self.heads.fill(NONE);
        self.entered = 0;
    }

    /// Where the chain of a block for these addresses and this mode begins.
    fn chain(&self, virt: u64, phys: u64, mode: u32) -> usize {
        let page = (virt & !0xfff, phys & !0xfff, mode);
        let hash = std::hash::BuildHasherDefault::<Mix>::default().hash_one(page);
        // The low bits of a product say little.
        let near = (phys & 0xfff) >> NEAR;
        ((hash >> 32) as usize ^ near as usize) & (self.heads.len() - 1)
    }

    /// The block for `key`, whose mode has the number `mode`.
    pub(super) fn find(&self, key: &Key, mode: u32, blocks: &[Block]) -> Option<u32> {
        let mut at = self.heads[self.chain(key.virt, key.phys, mode)];
        while at != NONE {
            let block = &blocks[at as usize];
            if block.virt == key.virt && block.phys == key.phys && block.mode == mode {
                return Some(at);
            }
            at = block.next;
        }
        None
    }

    /// Enters block `number`. Answers the block that it takes the place of.
    pub(super) fn enter(&mut self, number: u32, blocks: &mut [Block]) -> Option<u32> {
        if self.entered == self.heads.len() {
            self.grow(number, blocks);
        }
        self.entered += 1;
        self.put(number, blocks)
    }

    fn chain_of(&self, block: &Block) -> usize {
        self.chain(block.virt, block.phys, block.mode)
    }

    fn put(&mut self, number: u32, blocks: &mut [Block]) -> Option<u32> {
        let block = blocks[number as usize];
        let chain = self.chain_of(&block);
        let first = std::mem::replace(&mut self.heads[chain], number);
        blocks[number as usize].next = first;
        let (mut before, mut at) = (number, first);
        while at != NONE {
            let old = &blocks[at as usize];
            let next = old.next;
            if old.virt == block.virt && old.phys == block.phys && old.mode == block.mode {
                blocks[before as usize].next = next;
                return Some(at);
            }
            (before, at) = (at, next);
        }
        None
    }

    /// Makes room for twice as many; all living blocks before `number` are entered again.
    #[cold]
    fn grow(&mut self, number: u32, blocks: &mut [Block]) {
        self.clear();
        self.heads.extend_to(2 * self.heads.len(), NONE);
        for old in 0..number {
            if blocks[old as usize].alive {
                self.put(old, blocks);
                self.entered += 1;
            }
        }
    }

    /// Takes a block out, if it is in.
    pub(super) fn remove(&mut self, number: u32, blocks: &mut [Block]) {
        let chain = self.chain_of(&blocks[number as usize]);
        let next = blocks[number as usize].next;
        let mut at = self.heads[chain];
        if at == number {
            self.heads[chain] = next;
            return;
        }
        while at != NONE {
            let after = blocks[at as usize].next;
            if after == number {
                blocks[at as usize].next = next;
                return;
            }
            at = after;
        }
    }
}
