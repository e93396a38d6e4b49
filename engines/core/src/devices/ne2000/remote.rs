//! Remote DMA (DP8390D 7.0): the data port moves bytes between the guest and the card's memory.
//!
//! The address register runs on, and wraps from the end of the receive ring to its start; the count
//! runs down, and its end is an interrupt. Whole runs are copied at once.

use super::{Ne2000, interrupt};

/// Data configuration: the port is 16 bits wide.
const WORDS: u8 = 0x01;

/// Bytes that one item of `size` moves: two or four of a wide port, one of a narrow one.
fn step(words: bool, size: usize) -> usize {
    if words { size.max(2) } else { 1 }
}

impl Ne2000 {
    /// Bytes from the address on that can be moved without a look at anything: up to the end of
    /// the ring or of the count, in whole items.
    fn run(&self, item: usize) -> usize {
        let stop = u16::from(self.stop) << 8;
        let until = |end: u16| usize::from(end - self.remote_address);
        let room = if self.remote_address < stop {
            until(stop)
        } else {
            0x1_0000 - usize::from(self.remote_address)
        };
        let run = room.min(self.remote_count.into());
        // What is left of an odd count, or of an odd address, goes as one item.
        (run - run % item).max(item)
    }

    /// The address and the count go on by `count` bytes.
    fn advance(&mut self, count: usize) {
        self.remote_address = self.remote_address.wrapping_add(count as u16);
        if self.remote_address == u16::from(self.stop) << 8 {
            self.remote_address = u16::from(self.start) << 8;
        }
        let left = usize::from(self.remote_count).saturating_sub(count);
        self.remote_count = left as u16;
        if left == 0 {
            self.raise(interrupt::REMOTE_DONE);
        }
    }

    pub(super) fn remote_read(&mut self, size: usize, data: &mut [u8]) {
        let words = self.data_config & WORDS != 0;
        let item = step(words, size);
        if item != size {
            // A width that the port was not set up for: each item moves what the port moves.
            for data in data.chunks_exact_mut(size) {
                if self.remote_count == 0 {
                    return;
                }
                let count = size.min(item);
                self.fetch(&mut data[..count]);
                self.advance(item);
            }
            return;
        }
        let mut rest = data;
        while !rest.is_empty() && self.remote_count > 0 {
            let count = self.run(item).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            self.fetch(now);
            rest = later;
            self.advance(count);
        }
    }

    /// Bytes of memory; where there is none, `data` stays as it is.
    fn fetch(&self, data: &mut [u8]) {
        let found = self.memory.read(self.remote_address, data.len());
        data[..found.len()].copy_from_slice(found);
    }

    pub(super) fn remote_write(&mut self, size: usize, data: &[u8]) {
        let words = self.data_config & WORDS != 0;
        let item = step(words, size);
        if item != size {
            for data in data.chunks_exact(size) {
                if self.remote_count == 0 {
                    return;
                }
                self.store(&data[..size.min(item)]);
                self.advance(item);
            }
            return;
        }
        let mut rest = data;
        while !rest.is_empty() && self.remote_count > 0 {
            let count = self.run(item).min(rest.len());
            let (now, later) = rest.split_at(count);
            self.store(now);
            rest = later;
            self.advance(count);
        }
    }

    fn store(&mut self, data: &[u8]) {
        let room = self.memory.write(self.remote_address, data.len());
        let count = room.len();
        room.copy_from_slice(&data[..count]);
    }
}
