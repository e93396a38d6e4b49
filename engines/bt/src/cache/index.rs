//! Living blocks by their keys: chains through the blocks themselves.
//!
//! A key is longer than most of what else is known of a block, so it is kept in one place: the table holds
//! hashes and the numbers of the first block with each, and blocks name the next.
//!
//! Invariant: of blocks with the same key, the one entered last is in its chain and no other.

use std::hash::BuildHasher;

use super::{Block, Key, Map, Mix};

/// Numbers of living blocks.
pub(super) struct Index {
    heads: Map<u64, u32>,
}

fn hash(key: &Key) -> u64 {
    std::hash::BuildHasherDefault::<Mix>::default().hash_one(key)
}

impl Index {
    /// With room for so many.
    pub(super) fn new(blocks: usize) -> Index {
        Index {
            heads: Map::with_capacity_and_hasher(blocks, Default::default()),
        }
    }

    pub(super) fn clear(&mut self) {
        self.heads.clear();
    }

    /// The block for `key`.
    pub(super) fn find(&self, key: &Key, blocks: &[Block]) -> Option<u32> {
        let mut at = self.heads.get(&hash(key)).copied();
        while let Some(number) = at {
            let block = &blocks[number as usize];
            if block.key == *key {
                return Some(number);
            }
            at = block.next;
        }
        None
    }

    /// Enters `block` as `number`. Answers the block that it takes the place of.
    pub(super) fn enter(
        &mut self,
        block: &mut Block,
        number: u32,
        blocks: &mut [Block],
    ) -> Option<u32> {
        let hash = hash(&block.key);
        block.next = self.heads.insert(hash, number);
        let (mut before, mut at) = (None, block.next);
        while let Some(old) = at {
            let next = blocks[old as usize].next;
            if blocks[old as usize].key == block.key {
                match before {
                    None => block.next = next,
                    Some(before) => blocks[before as usize].next = next,
                }
                return Some(old);
            }
            (before, at) = (Some(old), next);
        }
        None
    }

    /// Takes a block out, if it is in.
    pub(super) fn remove(&mut self, number: u32, blocks: &mut [Block]) {
        let hash = hash(&blocks[number as usize].key);
        let next = blocks[number as usize].next;
        let Some(&head) = self.heads.get(&hash) else {
            return;
        };
        if head == number {
            match next {
                None => self.heads.remove(&hash),
                Some(next) => self.heads.insert(hash, next),
            };
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
