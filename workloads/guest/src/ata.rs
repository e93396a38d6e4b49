//! An ATA disk by programmed I/O: primary channel, first drive (ATA/ATAPI-6, clauses 8 and 9).
//!
//! As an operating system's PIO driver: commands are interrupt-driven, and the status is polled only
//! before a write's first data, for which there is no interrupt (9.6). Data moves by string
//! instructions of 16-bit words. A request is one command of 8 sectors; where the disk can, READ and
//! WRITE MULTIPLE move all 8 for one interrupt, else each sector has its own.
//!
//! The channel has one command at a time, so there is no queue.

use crate::{
    clock, cpu,
    interrupts::{self, Trigger},
    memory,
};
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
use programs::{
    Refusal,
    io::{BLOCK_BYTES, Block, Direction, SLOT_WORDS, SLOTS, block},
};

/// The channel's line.
pub(crate) const LINE: u8 = 14;

const DATA: u16 = 0x1f0;
const ERROR: u16 = 0x1f1;
const COUNT: u16 = 0x1f2;
const LBA_LOW: u16 = 0x1f3;
const LBA_MID: u16 = 0x1f4;
const LBA_HIGH: u16 = 0x1f5;
const DEVICE: u16 = 0x1f6;
const COMMAND: u16 = 0x1f7;
/// Alternate status: reading it leaves the interrupt pending. Device control when written.
const CONTROL: u16 = 0x3f6;

const BUSY: u8 = 0x80;
const FAULT: u8 = 0x20;
const REQUEST: u8 = 8;
const FAILED: u8 = 1;

/// Device register: drive 0, LBA, and the bits that were always 1.
const DRIVE_0: u8 = 0xe0;

const READ_SECTORS: u8 = 0x20;
const WRITE_SECTORS: u8 = 0x30;
const READ_MULTIPLE: u8 = 0xc4;
const WRITE_MULTIPLE: u8 = 0xc5;
const SET_MULTIPLE: u8 = 0xc6;
const FLUSH_CACHE: u8 = 0xe7;
const IDENTIFY: u8 = 0xec;

/// Sectors of a block.
const SECTORS: u64 = BLOCK_BYTES / 512;

/// The status that the last interrupt found.
static STATUS: AtomicU8 = AtomicU8::new(0);

/// Reads the status, which takes the interrupt back (clause 7.15).
pub(crate) fn acknowledge() {
    STATUS.store(cpu::port_in(COMMAND), Relaxed);
}

/// The disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    /// Sectors that move for one interrupt: 1 or [`SECTORS`].
    chunk: u64,
}

/// Polls the alternate status until `done`; `None` after a while.
fn poll(done: impl Fn(u8) -> bool) -> Option<u8> {
    /// Some seconds, even at the speed of real ports.
    const MOST: u32 = 10_000_000;
    (0..MOST).find_map(|_| Some(cpu::port_in(CONTROL)).filter(|&status| done(status)))
}

fn idle(status: u8) -> bool {
    status & BUSY == 0
}

impl Disk {
    /// Finds the disk and opens its line.
    pub(crate) fn open(block: Block, span: u64) -> Result<Self, Refusal> {
        clock::set_up();
        interrupts::set_up();
        let (chunk, sectors) = find().ok_or(Refusal::Unsupported(block::NO_DISK))?;
        if block.depth > 1 {
            return Err(Refusal::Unsupported(block::NO_DEPTH));
        }
        if sectors / SECTORS < block.end(span) {
            return Err(Refusal::Broken(block::TOO_SMALL));
        }
        // Interrupts on. What identification left pending is taken back.
        cpu::port_out(CONTROL, 0);
        cpu::port_in(COMMAND);
        interrupts::unmask(LINE, Trigger::Edge);
        let disk = Disk { chunk };
        disk.try_interrupt()?;
        Ok(disk)
    }

    /// Closes the line.
    pub(crate) fn close(&self) {
        interrupts::mask(LINE);
    }

    /// Sees that a command interrupts, before one is waited for without limit.
    fn try_interrupt(&self) -> Result<(), Refusal> {
        let before = interrupts::taken(LINE);
        self.command(FLUSH_CACHE, 0, 0);
        let limit = clock::scale().map_or(1 << 36, |scale| scale.ticks(4_000_000_000));
        if interrupts::wait(Some(limit), || interrupts::taken(LINE) != before) {
            return Ok(());
        }
        self.close();
        Err(Refusal::Broken("the disk does not interrupt"))
    }

    #[inline(always)]
    fn command(&self, command: u8, sector: u64, count: u8) {
        cpu::port_out(COUNT, count);
        cpu::port_out(LBA_LOW, sector as u8);
        cpu::port_out(LBA_MID, (sector >> 8) as u8);
        cpu::port_out(LBA_HIGH, (sector >> 16) as u8);
        // Every span lies far below 2^28 sectors.
        cpu::port_out(DEVICE, DRIVE_0 | (sector >> 24 & 15) as u8);
        cpu::port_out(COMMAND, command);
    }

    /// Waits for the interrupt after `before`; checks the status that it found.
    #[inline(always)]
    fn wait(&self, before: u64, data: bool) -> Result<(), Refusal> {
        interrupts::wait(None, || {
            interrupts::taken(LINE) != before && idle(STATUS.load(Relaxed))
        });
        check(STATUS.load(Relaxed), data)
    }

    /// See [`programs::Platform::transfer`].
    #[inline(always)]
    pub(crate) fn transfer(
        &self,
        direction: Direction,
        blocks: &[u64],
        slot: u64,
    ) -> Result<(), Refusal> {
        for (slot, &block) in (slot..).zip(blocks) {
            let address = memory::arena_word(slot % SLOTS * SLOT_WORDS);
            match direction {
                Direction::Read => self.read(block, address)?,
                Direction::Write => self.write(block, address)?,
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn read(&self, block: u64, address: u64) -> Result<(), Refusal> {
        let command = if self.chunk == 1 {
            READ_SECTORS
        } else {
            READ_MULTIPLE
        };
        let mut taken = interrupts::taken(LINE);
        self.command(command, block * SECTORS, SECTORS as u8);
        let mut sector = 0;
        while sector < SECTORS {
            self.wait(taken, true)?;
            taken = interrupts::taken(LINE);
            // SAFETY: a slot of the arena; ring 3 does not run meanwhile.
            unsafe { cpu::ports_in(DATA, address + 512 * sector, 256 * self.chunk) };
            sector += self.chunk;
        }
        Ok(())
    }

    #[inline(always)]
    fn write(&self, block: u64, address: u64) -> Result<(), Refusal> {
        let command = if self.chunk == 1 {
            WRITE_SECTORS
        } else {
            WRITE_MULTIPLE
        };
        let mut taken = interrupts::taken(LINE);
        self.command(command, block * SECTORS, SECTORS as u8);
        // No interrupt announces the first data.
        check(poll(idle).unwrap_or(BUSY), true)?;
        let mut sector = 0;
        while sector < SECTORS {
            // SAFETY: a slot of the arena.
            unsafe { cpu::ports_out(DATA, address + 512 * sector, 256 * self.chunk) };
            sector += self.chunk;
            self.wait(taken, sector < SECTORS)?;
            taken = interrupts::taken(LINE);
        }
        Ok(())
    }

    /// See [`programs::Platform::flush_disk`].
    pub(crate) fn flush(&self) -> Result<(), Refusal> {
        let taken = interrupts::taken(LINE);
        self.command(FLUSH_CACHE, 0, 0);
        self.wait(taken, false)
    }
}

#[inline(always)]
fn check(status: u8, data: bool) -> Result<(), Refusal> {
    if status & (BUSY | FAULT | FAILED) == 0 && (status & REQUEST != 0) == data {
        return Ok(());
    }
    // Status in the upper byte, error register in the lower (clause 7.11).
    Err(Refusal::Device {
        what: "the ATA disk reports status and error",
        code: u64::from(status) << 8 | u64::from(cpu::port_in(ERROR)),
    })
}

/// Looks for the drive; returns the sectors that move for one interrupt, and its size in sectors.
fn find() -> Option<(u64, u64)> {
    cpu::port_out(DEVICE, DRIVE_0);
    // An empty bus reads all ones; no drive, zero.
    let status = cpu::port_in(COMMAND);
    if status == 0xff || status == 0 {
        return None;
    }
    // No interrupts while looking.
    cpu::port_out(CONTROL, 2);
    poll(idle)?;
    cpu::port_out(COMMAND, IDENTIFY);
    let status = poll(idle)?;
    if status & (FAILED | FAULT) != 0 || status & REQUEST == 0 {
        return None;
    }
    let mut words = [0u16; 256];
    // SAFETY: 256 words of this function's own.
    unsafe { cpu::ports_in(DATA, (&raw mut words) as u64, 256) };
    // Words 60 and 61: sectors that LBA reaches; word 47: most sectors of READ MULTIPLE.
    let sectors = u64::from(words[60]) | u64::from(words[61]) << 16;
    if u64::from(words[47] & 0xff) < SECTORS {
        return Some((1, sectors));
    }
    cpu::port_out(COUNT, SECTORS as u8);
    cpu::port_out(DEVICE, DRIVE_0);
    cpu::port_out(COMMAND, SET_MULTIPLE);
    let refused = poll(idle)? & FAILED != 0;
    Some((if refused { 1 } else { SECTORS }, sectors))
}
