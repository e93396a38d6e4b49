//! Living blocks by their keys: chains through the blocks themselves.
//!
//! A key is longer than most of what else is known of a block, so it is kept in one place: the table holds
//! the numbers of the first block of each chain, and blocks name the next.
//!
//! Code runs on where it is, so blocks that are close have their chains close: what is looked for next is in
//! the host's caches already.
//!
//! Invariant: of blocks with the same key, the one entered last is in its chain and no other.

use std::hash::BuildHasher;

use super::{Block, Key, Mix};

/// Bytes of code that share a chain if nothing else differs, as a power of two.
const NEAR: u32 = 2;

/// Numbers of living blocks.
pub(super) struct Index {
    /// One more than the first block's number, or 0. There are a power of two of them.
    heads: Vec<u32>,
    /// Blocks in chains, or more.
    entered: usize,
}

impl Index {
    /// With room for so many.
    pub(super) fn new(blocks: usize) -> Index {
        Index {
            heads: vec![0; blocks.next_power_of_two()],
            entered: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.heads.fill(0);
        self.entered = 0;
    }

    /// Where the chain of `key` begins.
    fn chain(&self, key: &Key) -> usize {
        let page = Key {
            virt: key.virt & !0xfff,
            phys: key.phys & !0xfff,
            ..*key
        };
        let hash = std::hash::BuildHasherDefault::<Mix>::default().hash_one(page);
        // The low bits of a product say little.
        let near = (key.phys & 0xfff) >> NEAR;
        ((hash >> 32) as usize ^ near as usize) & (self.heads.len() - 1)
    }

    /// The block for `key`.
    pub(super) fn find(&self, key: &Key, blocks: &[Block]) -> Option<u32> {
        let mut at = self.heads[self.chain(key)].checked_sub(1);
        while let Some(number) = at {
            let block = &blocks[number as usize];
            if block.key == *key {
                return Some(number);
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

    fn put(&mut self, number: u32, blocks: &mut [Block]) -> Option<u32> {
        let chain = self.chain(&blocks[number as usize].key);
        let first = std::mem::replace(&mut self.heads[chain], number + 1).checked_sub(1);
        blocks[number as usize].next = first;
        let (mut before, mut at) = (number, first);
        while let Some(old) = at {
            let next = blocks[old as usize].next;
            if blocks[old as usize].key == blocks[number as usize].key {
                blocks[before as usize].next = next;
                return Some(old);
            }
            (before, at) = (old, next);
        }
        None
    }

    /// Makes room for twice as many; all living blocks before `number` are entered again.
    #[cold]
    fn grow(&mut self, number: u32, blocks: &mut [Block]) {
        self.heads = vec![0; 2 * self.heads.len()];
        self.entered = 0;
        for old in 0..number {
            if blocks[old as usize].alive {
                self.put(old, blocks);
                self.entered += 1;
            }
        }
    }

    /// Takes a block out, if it is in.
    pub(super) fn remove(&mut self, number: u32, blocks: &mut [Block]) {
        let chain = self.chain(&blocks[number as usize].key);
        let next = blocks[number as usize].next;
        let Some(head) = self.heads[chain].checked_sub(1) else {
            return;
        };
        if head == number {
            self.heads[chain] = next.map_or(0, |next| next + 1);
            return;
        }
        let mut at = head as usize;
        while let Some(after) = blocks[at].next {
            if after == number {
                blocks[at].next = next;
                return;
            }
            at = after as usize;
        }
    }
}
