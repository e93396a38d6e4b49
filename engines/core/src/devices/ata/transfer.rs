//! Data between the backing and the data register.
//!
//! A command moves sectors in DRQ blocks: the host sees DRQ, moves one block through the data
//! register, and an interrupt says that the next one is ready or that the command is over. The
//! backing is asked for many sectors at once; only when that fails, sector by sector, so that what
//! comes before a bad sector is still moved and the error names the sector (6.2, "the first sector
//! in error").
//!
//! Invariant: `at <= block_end <= length <= buffer.len()`.

use super::{Ata, error, status};
use crate::buffer::Buffer;
use crate::storage::SECTOR;

/// Bytes asked of the backing at once.
const AHEAD: usize = 64 * 1024;
const SECTOR_BYTES: usize = SECTOR as usize;

/// Which way data goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Direction {
    /// No command has data to move.
    #[default]
    None,
    /// To the guest, from the backing.
    Read,
    /// To the guest, from nowhere else (IDENTIFY DEVICE).
    Answer,
    /// From the guest.
    Write,
}

/// A data transfer under way.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    direction: Direction,
    /// Sectors on their way.
    buffer: Vec<u8>,
    /// Bytes of `buffer` in use.
    length: usize,
    /// What of it was moved.
    at: usize,
    /// Where the DRQ block under way ends.
    block_end: usize,
    /// Bytes of a DRQ block.
    block: usize,
    /// Sector that `buffer` begins with.
    first: u64,
    /// Sectors of the command from there on.
    left: u64,
    /// Sector to fail at, and what with, when everything before it was moved.
    bad: Option<(u64, u8)>,
}

impl Transfer {
    pub(super) fn stop(&mut self) {
        self.direction = Direction::None;
        self.length = 0;
        self.at = 0;
        self.block_end = 0;
        self.bad = None;
    }

    fn begin(&mut self, direction: Direction, first: u64, count: u64, block: u8) {
        self.stop();
        self.buffer.resize(AHEAD, 0);
        self.direction = direction;
        self.first = first;
        self.left = count;
        self.block = usize::from(block) * SECTOR_BYTES;
    }

    /// Bytes of the piece that `buffer` takes next.
    fn piece(&self) -> usize {
        (self.left.min((AHEAD / SECTOR_BYTES) as u64)) as usize * SECTOR_BYTES
    }

    fn next_block(&mut self) {
        self.block_end = self.length.min(self.at + self.block);
    }
}

impl Ata {
    /// Starts to move `count` sectors from `first` on to the guest.
    pub(super) fn start_read(&mut self, first: u64, count: u64, block: u8) {
        self.transfer.begin(Direction::Read, first, count, block);
        self.fill();
    }

    /// Starts to take `count` sectors for `first` and on from the guest. The first block is asked
    /// for without an interrupt (9.6, PIO data-out).
    pub(super) fn start_write(&mut self, first: u64, count: u64, block: u8) {
        self.transfer.begin(Direction::Write, first, count, block);
        self.transfer.length = self.transfer.piece();
        self.transfer.next_block();
        self.status = status::DRDY | status::DSC | status::DRQ;
    }

    /// Hands the guest one sector of our own.
    pub(super) fn start_answer(&mut self, sector: &[u8; SECTOR_BYTES]) {
        self.transfer.begin(Direction::Answer, 0, 1, 1);
        self.transfer.buffer[..SECTOR_BYTES].copy_from_slice(sector);
        self.transfer.length = SECTOR_BYTES;
        self.block_ready();
    }

    /// The next block can be moved.
    fn block_ready(&mut self) {
        self.transfer.next_block();
        self.status = status::DRDY | status::DSC | status::DRQ;
        self.set_interrupt(true);
    }

    /// Everything was moved.
    pub(super) fn finish(&mut self) {
        self.transfer.stop();
        self.status = status::DRDY | status::DSC;
        self.set_interrupt(true);
    }

    /// Reads the next piece from the backing.
    fn fill(&mut self) {
        let transfer = &mut self.transfer;
        if let Some((sector, code)) = transfer.bad {
            return self.fail_at(sector, code);
        }
        let wanted = transfer.piece();
        let first = transfer.first;
        let buffer = &mut transfer.buffer[..wanted];
        let whole = self.storage.read_at(first * SECTOR, &[Buffer::new(buffer)]);
        transfer.length = wanted;
        if whole.is_err() {
            transfer.length = 0;
            for (sector, bytes) in (first..).zip(buffer.chunks_exact_mut(SECTOR_BYTES)) {
                let part = [Buffer::new(bytes)];
                if self.storage.read_at(sector * SECTOR, &part).is_err() {
                    transfer.bad = Some((sector, error::UNC));
                    break;
                }
                transfer.length += SECTOR_BYTES;
            }
        }
        transfer.at = 0;
        if transfer.length == 0 {
            let sector = transfer.first;
            return self.fail_at(sector, error::UNC);
        }
        self.block_ready();
    }

    /// Bytes up to the end of the DRQ block that the guest is to write; None if it is to write none.
    pub(super) fn unnoticed(&self) -> Option<usize> {
        let transfer = &self.transfer;
        let writes = transfer.direction == Direction::Write && self.status & status::DRQ != 0;
        writes.then(|| transfer.block_end - transfer.at)
    }

    /// Writes what the guest has given. False if that failed, and the command with it.
    fn drain(&mut self) -> bool {
        let transfer = &mut self.transfer;
        let first = transfer.first;
        let bytes = &mut transfer.buffer[..transfer.length];
        if self
            .storage
            .write_at(first * SECTOR, &[Buffer::new(bytes)])
            .is_ok()
        {
            return true;
        }
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
            let part = [Buffer::new(bytes)];
            if self.storage.write_at(sector * SECTOR, &part).is_err() {
                self.fail_at(sector, error::ABRT);
                return false;
            }
        }
        true
    }

    /// The piece in the buffer was moved: on to the next, or to the end of the command.
    fn piece_done(&mut self) {
        match self.transfer.direction {
            Direction::None => {}
            Direction::Answer => {
                // The last block of data-in commands is not followed by an interrupt (9.5).
                self.transfer.stop();
                self.status = status::DRDY | status::DSC;
            }
            Direction::Read => {
                self.advance_piece();
                if self.transfer.left > 0 {
                    self.fill();
                } else {
                    let last = self.transfer.first - 1;
                    self.set_sector(last);
                    self.transfer.stop();
                    self.status = status::DRDY | status::DSC;
                }
            }
            Direction::Write => {
                if !self.drain() {
                    return;
                }
                self.advance_piece();
                if self.transfer.left > 0 {
                    self.transfer.length = self.transfer.piece();
                    self.transfer.at = 0;
                    return self.block_ready();
                }
                let last = self.transfer.first - 1;
                if !self.write_cache && self.storage.flush().is_err() {
                    return self.fail_at(last, error::ABRT);
                }
                self.set_sector(last);
                self.finish();
            }
        }
    }

    fn advance_piece(&mut self) {
        let sectors = (self.transfer.length / SECTOR_BYTES) as u64;
        self.transfer.first += sectors;
        self.transfer.left -= sectors;
    }

    /// The guest has moved a part of the block; true while there is data to move.
    fn moved(&mut self, count: usize) {
        let transfer = &mut self.transfer;
        transfer.at += count;
        if transfer.at < transfer.block_end {
            return;
        }
        if transfer.at < transfer.length {
            self.block_ready();
        } else {
            self.piece_done();
        }
    }

    /// The guest reads the data register.
    pub(super) fn data_out(&mut self, mut data: &mut [u8]) {
        while !data.is_empty() {
            let transfer = &self.transfer;
            let ours = matches!(transfer.direction, Direction::Read | Direction::Answer);
            if !ours || self.status & status::DRQ == 0 {
                return;
            }
            let count = data.len().min(transfer.block_end - transfer.at);
            let (now, rest) = data.split_at_mut(count);
            now.copy_from_slice(&transfer.buffer[transfer.at..][..count]);
            data = rest;
            self.moved(count);
        }
    }

    /// The guest writes the data register.
    pub(super) fn data_in(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let transfer = &mut self.transfer;
            if transfer.direction != Direction::Write || self.status & status::DRQ == 0 {
                return;
            }
            let count = data.len().min(transfer.block_end - transfer.at);
            let at = transfer.at;
            transfer.buffer[at..at + count].copy_from_slice(&data[..count]);
            data = &data[count..];
            self.moved(count);
        }
    }
}
