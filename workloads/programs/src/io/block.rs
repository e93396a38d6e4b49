//! `blk_*`: 4 KiB requests to a disk, sequential or random, read or write, one at a time or in
//! batches of 32.
//!
//! SIZE is the span in blocks. Reads ask for blocks below [`MOST`], whose words [`content`] gives and
//! which whoever provides the disk has written there; writes go to the blocks from [`MOST`] on, so
//! that they spoil no later read. A disk of [`DISK_BLOCKS`] holds every size.
//!
//! Request number N uses slot N modulo [`SLOTS`]. In the window the first and the last word of each
//! read are folded, and each write is stamped there with its block and number. After the window all
//! words of the last 256 reads are folded; of writes, the disk is flushed, and the blocks of the
//! last 256 are read back and folded. A batch is 32 requests in flight at once; it ends when all
//! of them have. Its time counts as one value of the histogram.

use super::{SLOT_WORDS, SLOTS, timed};
use crate::{Group, Platform, Refusal, Ring, Workload, fold, mix, workload::Program};

/// Largest span, in blocks; the first block that is written.
pub const MOST: u64 = 8192;
/// Blocks of a disk that holds every span: the first half is read, the second written.
pub const DISK_BLOCKS: u64 = 2 * MOST;
/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 8 * SLOT_WORDS;
/// Most requests in flight.
pub const DEPTH: usize = 32;

/// Why a machine without a disk refuses.
pub const NO_DISK: &str = "this machine has no disk";
/// Why a disk that can't be written refuses.
pub const READ_ONLY: &str = "the disk is read-only";
/// Why a disk that takes one request at a time refuses.
pub const NO_DEPTH: &str = "the device has no queue depth";
/// What is wrong with a disk that does not hold the span.
pub const TOO_SMALL: &str = "the disk is smaller than the span";

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// Which block follows which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The next one.
    Sequential,
    /// Any; each once before any comes again.
    Random,
}

/// A use of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Which way data goes.
    pub direction: Direction,
    /// Which block follows which.
    pub order: Order,
    /// Requests in flight, 1 to [`DEPTH`].
    pub depth: usize,
}

const fn workload(
    name: &'static str,
    operation: &'static str,
    direction: Direction,
    order: Order,
    depth: usize,
) -> Workload {
    Workload {
        name,
        group: Group::Io,
        ring: Ring::Kernel,
        size: 4096,
        iterations: 256,
        operation,
        program: Program::Io(super::Io::Block(Block {
            direction,
            order,
            depth,
        })),
    }
}

pub(crate) const SEQREAD: Workload = workload(
    "blk_seqread",
    "a read of 4 KiB, one after another over SIZE blocks",
    Direction::Read,
    Order::Sequential,
    1,
);
pub(crate) const SEQWRITE: Workload = workload(
    "blk_seqwrite",
    "a write of 4 KiB, one after another over SIZE blocks",
    Direction::Write,
    Order::Sequential,
    1,
);
pub(crate) const RANDREAD: Workload = workload(
    "blk_randread",
    "a read of 4 KiB anywhere in SIZE blocks",
    Direction::Read,
    Order::Random,
    1,
);
pub(crate) const RANDWRITE: Workload = workload(
    "blk_randwrite",
    "a write of 4 KiB anywhere in SIZE blocks",
    Direction::Write,
    Order::Random,
    1,
);
pub(crate) const SEQREAD32: Workload = workload(
    "blk_seqread32",
    "as blk_seqread, in batches of 32 in flight at once",
    Direction::Read,
    Order::Sequential,
    DEPTH,
);
pub(crate) const SEQWRITE32: Workload = workload(
    "blk_seqwrite32",
    "as blk_seqwrite, in batches of 32 in flight at once",
    Direction::Write,
    Order::Sequential,
    DEPTH,
);
pub(crate) const RANDREAD32: Workload = workload(
    "blk_randread32",
    "as blk_randread, in batches of 32 in flight at once",
    Direction::Read,
    Order::Random,
    DEPTH,
);
pub(crate) const RANDWRITE32: Workload = workload(
    "blk_randwrite32",
    "as blk_randwrite, in batches of 32 in flight at once",
    Direction::Write,
    Order::Random,
    DEPTH,
);

/// Word `word` of block `block` of the half that is read.
#[inline(always)]
pub fn content(block: u64, word: u64) -> u64 {
    mix(mix(0x626c_6f63_6b00_0000, block), word)
}

/// A block of the half that is read, for whoever writes the disk.
#[inline]
pub fn whole(block: u64) -> [u64; SLOT_WORDS as usize] {
    core::array::from_fn(|word| content(block, word as u64))
}

/// What a write to `block` leaves in its first word; the last word is the complement.
#[inline(always)]
fn stamp(block: u64, number: u64) -> u64 {
    mix(mix(0x7374_616d_7000_0000, block), number)
}

impl Block {
    /// First block of the span.
    #[inline(always)]
    fn base(self) -> u64 {
        match self.direction {
            Direction::Read => 0,
            Direction::Write => MOST,
        }
    }

    /// The block behind the last one of the span.
    #[inline(always)]
    pub fn end(self, span: u64) -> u64 {
        self.base() + span
    }

    /// Block of request `number`.
    #[inline(always)]
    fn block(self, span: u64, number: u64) -> u64 {
        let place = number % span;
        self.base()
            + match self.order {
                Order::Sequential => place,
                Order::Random => scatter(place, span),
            }
    }

    /// Requests of the batch that starts with request `number`: no block twice, since the order
    /// inside a batch is the device's.
    #[inline(always)]
    fn batch(self, span: u64, number: u64, iterations: u64) -> usize {
        let left = iterations - number;
        let round = span - number % span;
        let depth = self.depth as u64;
        let most = if left < round { left } else { round };
        (if most < depth { most } else { depth }) as usize
    }
}

impl Block {
    /// Batches of a run. Written so that it costs a host no more than a division: rounds over the
    /// span are all alike.
    #[inline]
    pub(crate) fn batches(self, span: u64, iterations: u64) -> u64 {
        let depth = self.depth as u64;
        iterations / span * span.div_ceil(depth) + (iterations % span).div_ceil(depth)
    }
}

/// A permutation of `0..span`: steps that can be undone on the next power of two, repeated until
/// the place lies inside (cycle walking).
#[inline(always)]
fn scatter(place: u64, span: u64) -> u64 {
    let mask = span.next_power_of_two() - 1;
    let half = mask.count_ones().div_ceil(2);
    let mut place = place;
    loop {
        place = place
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(0x2545)
            & mask;
        place ^= place >> half;
        place = place.wrapping_mul(0xd6e8_feb8_6659_fd93) & mask;
        place ^= place >> half;
        if place < span {
            return place;
        }
    }
}

/// Lays `slots` slots out as they are before a write is stamped. An application's part.
fn lay_out(arena: &mut [u64], slots: u64, _iterations: u64) -> u64 {
    let words = slots.saturating_mul(SLOT_WORDS);
    for (place, word) in (0..words).zip(arena) {
        *word = content(!0, place);
    }
    0
}

/// Fills `slots` slots with what no block holds. An application's part.
fn wipe(arena: &mut [u64], slots: u64, _iterations: u64) -> u64 {
    let words = slots.saturating_mul(SLOT_WORDS);
    for (_, word) in (0..words).zip(arena) {
        *word = 0x6e6f_7468_696e_6700;
    }
    0
}

/// Folds all words of `slots` slots. An application's part.
fn audit(arena: &mut [u64], slots: u64, _iterations: u64) -> u64 {
    let words = slots.saturating_mul(SLOT_WORDS);
    let mut sum = 0;
    for (_, word) in (0..words).zip(arena) {
        sum = mix(sum, *word);
    }
    sum
}

pub(super) fn prepare<P: Platform>(
    platform: &mut P,
    block: Block,
    _span: u64,
    _iterations: u64,
) -> Result<(), Refusal> {
    platform.compute(wipe, SLOTS, 1)?;
    platform.transfer(Direction::Read, &[0], 0)?;
    if platform.peek(0) != content(0, 0)
        || platform.peek(SLOT_WORDS - 1) != content(0, SLOT_WORDS - 1)
    {
        return Err(Refusal::Broken(
            "the disk does not hold the content that reads are verified against",
        ));
    }
    if block.direction == Direction::Write {
        platform.compute(lay_out, SLOTS, 1)?;
    }
    Ok(())
}

#[inline(always)]
pub(super) fn requests<P: Platform>(
    platform: &mut P,
    block: Block,
    span: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    let mut number = 0;
    let mut blocks = [0; DEPTH];
    while number < iterations {
        let count = block.batch(span, number, iterations);
        let Some(blocks) = blocks.get_mut(..count) else {
            break;
        };
        for (request, slot) in (number..).zip(&mut *blocks) {
            *slot = block.block(span, request);
            if block.direction == Direction::Write {
                let first = request % SLOTS * SLOT_WORDS;
                let stamp = stamp(*slot, request);
                platform.poke(first, stamp);
                platform.poke(first + SLOT_WORDS - 1, !stamp);
                sum = fold(sum, *slot);
            }
        }
        timed(platform, |platform| {
            platform.transfer(block.direction, blocks, number % SLOTS)
        })?;
        if block.direction == Direction::Read {
            for (request, _) in (number..).zip(&*blocks) {
                let first = request % SLOTS * SLOT_WORDS;
                sum = fold(sum, platform.peek(first));
                sum = fold(sum, platform.peek(first + SLOT_WORDS - 1));
            }
        }
        number += count as u64;
    }
    Ok(sum)
}

pub(super) fn verify<P: Platform>(
    platform: &mut P,
    block: Block,
    span: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let last = if iterations < SLOTS {
        iterations
    } else {
        SLOTS
    };
    if block.direction == Direction::Write {
        platform.flush_disk()?;
        platform.compute(wipe, SLOTS, 1)?;
        let first = iterations - last;
        let mut done = 0;
        while done < last {
            let count = block.batch(span, first + done, iterations);
            let mut blocks = [0; DEPTH];
            let Some(blocks) = blocks.get_mut(..count) else {
                break;
            };
            for (request, slot) in (first + done..).zip(&mut *blocks) {
                *slot = block.block(span, request);
            }
            platform.transfer(Direction::Read, blocks, done)?;
            done += count as u64;
        }
    }
    platform.compute(audit, last, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn random_order_visits_every_block_once() {
        for span in [1, 2, 3, 7, 31, 32, 33, 1000, 4096, MOST] {
            let mut visited: Vec<u64> = (0..span).map(|place| scatter(place, span)).collect();
            let moved = (0..span)
                .zip(&visited)
                .filter(|(place, block)| place != *block)
                .count();
            assert!(span < 31 || moved as u64 > span / 2, "{span}");
            visited.sort_unstable();
            assert!(visited.into_iter().eq(0..span), "{span}");
        }
    }

    #[test]
    fn batches_cover_all_requests_and_no_block_twice() {
        for span in [1, 5, 32, 33, 100] {
            for order in [Order::Sequential, Order::Random] {
                let block = Block {
                    direction: Direction::Write,
                    order,
                    depth: DEPTH,
                };
                let (mut number, mut batches) = (0, 0);
                while number < 333 {
                    let count = block.batch(span, number, 333) as u64;
                    batches += 1;
                    assert!((1..=DEPTH as u64).contains(&count));
                    let mut blocks: Vec<u64> = (number..number + count)
                        .map(|n| block.block(span, n))
                        .collect();
                    assert!(blocks.iter().all(|b| (MOST..MOST + span).contains(b)));
                    blocks.sort_unstable();
                    blocks.dedup();
                    assert_eq!(blocks.len() as u64, count);
                    number += count;
                }
                assert_eq!(number, 333);
                assert_eq!(block.batches(span, 333), batches);
            }
        }
    }
}
