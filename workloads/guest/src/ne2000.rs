//! An NE2000 network card at port 0x300, line 9 (National Semiconductor DP8390D data sheet).
//!
//! As an operating system's driver: 16-bit remote DMA by string instructions, interrupts for frames
//! that arrive and frames that have been sent. The card's memory is 16 KiB: six pages hold the frame
//! to send, the rest is the ring of received ones.

use crate::{
    clock, cpu,
    interrupts::{self, Trigger},
    memory, timers,
};
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
use programs::{
    Refusal,
    io::{SLOT_WORDS, net},
};

/// The card's line.
pub(crate) const LINE: u8 = 9;

const BASE: u16 = 0x300;
const COMMAND: u16 = BASE;
/// Page 0.
const PAGE_START: u16 = BASE + 1;
const PAGE_STOP: u16 = BASE + 2;
const BOUNDARY: u16 = BASE + 3;
const SEND_PAGE: u16 = BASE + 4;
const SEND_COUNT: u16 = BASE + 5;
const STATUS: u16 = BASE + 7;
const REMOTE_ADDRESS: u16 = BASE + 8;
const REMOTE_COUNT: u16 = BASE + 10;
const RECEIVE_CONFIGURATION: u16 = BASE + 12;
const SEND_CONFIGURATION: u16 = BASE + 13;
const DATA_CONFIGURATION: u16 = BASE + 14;
const INTERRUPT_MASK: u16 = BASE + 15;
/// Page 1.
const ADDRESS: u16 = BASE + 1;
const CURRENT: u16 = BASE + 7;
const MULTICAST: u16 = BASE + 8;

const DATA: u16 = BASE + 0x10;
const RESET: u16 = BASE + 0x1f;

/// Commands: stop, start, send; remote read, write, none; page 1.
const STOP: u8 = 1;
const START: u8 = 2;
const SEND: u8 = 4;
const READ: u8 = 8;
const WRITE: u8 = 0x10;
const NO_DMA: u8 = 0x20;
const PAGE_1: u8 = 0x40;

/// Interrupt status: received, sent, errors of both, ring overrun; remote DMA done; reset.
const SENT: u8 = 2;
const SEND_ERROR: u8 = 8;
const WANTED: u8 = 0x1f;
const DMA_DONE: u8 = 0x40;
const IN_RESET: u8 = 0x80;

/// Pages of 256 bytes in the card's memory.
const FIRST_SENT: u8 = 0x40;
const FIRST_RECEIVED: u8 = 0x46;
const END: u8 = 0x80;

/// What interrupts have reported, until it is taken.
static REPORTED: AtomicU8 = AtomicU8::new(0);

/// Takes the causes back, until there are none: the line is edge-triggered, and one that a frame keeps
/// high, arrived between reading the causes and taking them back, would never rise again.
pub(crate) fn acknowledge() {
    loop {
        let causes = cpu::port_in(STATUS) & WANTED;
        if causes == 0 {
            break;
        }
        cpu::port_out(STATUS, causes);
        REPORTED.store(REPORTED.load(Relaxed) | causes, Relaxed);
    }
}

/// The card.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Card {
    /// Its address, first byte lowest.
    pub(crate) station: u64,
    /// Page of the next frame to take.
    next: u8,
    /// Ticks that a frame may take to arrive.
    patience: u64,
}

/// Looks at the status until `bits` are set; false after a while.
fn poll(bits: u8) -> bool {
    const MOST: u32 = 1_000_000;
    (0..MOST).any(|_| cpu::port_in(STATUS) & bits != 0)
}

/// Starts a remote DMA.
#[inline(always)]
fn remote(direction: u8, address: u16, bytes: u16) {
    cpu::port_out(STATUS, DMA_DONE);
    cpu::port_out(REMOTE_COUNT, bytes as u8);
    cpu::port_out(REMOTE_COUNT + 1, (bytes >> 8) as u8);
    cpu::port_out(REMOTE_ADDRESS, address as u8);
    cpu::port_out(REMOTE_ADDRESS + 1, (address >> 8) as u8);
    cpu::port_out(COMMAND, START | direction);
}

/// Reads the card's memory.
///
/// # Safety
/// `bytes` bytes from `to` on, an even number, can be written, and nobody else uses them.
#[inline(always)]
unsafe fn read(address: u16, to: u64, bytes: u16) {
    remote(READ, address, bytes);
    // SAFETY: the caller's contract.
    unsafe { cpu::ports_in(DATA, to, u64::from(bytes) / 2) };
}

impl Card {
    /// Finds the card, starts it, and opens its line.
    pub(crate) fn open() -> Result<Self, Refusal> {
        const NO_CARD: Refusal = Refusal::Unsupported(net::NO_CARD);
        interrupts::set_up();
        cpu::port_out(RESET, cpu::port_in(RESET));
        if cpu::port_in(STATUS) == 0xff || !poll(IN_RESET) {
            return Err(NO_CARD);
        }
        for (port, value) in [
            (COMMAND, STOP | NO_DMA),
            // 16 bits, no loopback, FIFO threshold 8 bytes.
            (DATA_CONFIGURATION, 0x49),
            (REMOTE_COUNT, 0),
            (REMOTE_COUNT + 1, 0),
            (INTERRUPT_MASK, 0),
            (STATUS, 0xff),
            // Monitor, loopback: nothing comes and goes until all is set.
            (RECEIVE_CONFIGURATION, 0x20),
            (SEND_CONFIGURATION, 2),
        ] {
            cpu::port_out(port, value);
        }
        // The address PROM has each byte twice; an NE2000 is known by two letters W behind it.
        let mut prom = [0u16; 16];
        // SAFETY: 32 bytes of this function's own.
        unsafe { read(0, (&raw mut prom) as u64, 32) };
        if prom[14] as u8 != b'W' {
            return Err(NO_CARD);
        }
        let station = (0..6).fold(0, |station, byte| {
            station | u64::from(prom[byte] & 0xff) << (8 * byte)
        });
        for (port, value) in [
            (PAGE_START, FIRST_RECEIVED),
            (BOUNDARY, END - 1),
            (PAGE_STOP, END),
            (COMMAND, STOP | NO_DMA | PAGE_1),
            (CURRENT, FIRST_RECEIVED),
        ] {
            cpu::port_out(port, value);
        }
        for byte in 0..6 {
            cpu::port_out(ADDRESS + byte, (station >> (8 * byte)) as u8);
        }
        for byte in 0..8 {
            cpu::port_out(MULTICAST + byte, 0);
        }
        for (port, value) in [
            (COMMAND, START | NO_DMA),
            (STATUS, 0xff),
            (SEND_CONFIGURATION, 0),
            // Own address and broadcasts.
            (RECEIVE_CONFIGURATION, 4),
            (INTERRUPT_MASK, WANTED),
        ] {
            cpu::port_out(port, value);
        }
        REPORTED.store(0, Relaxed);
        timers::start_watch();
        interrupts::unmask(LINE, Trigger::Edge);
        Ok(Card {
            station,
            next: FIRST_RECEIVED,
            patience: clock::scale().map_or(1 << 33, |scale| scale.ticks(2_000_000_000)),
        })
    }

    /// Stops the card.
    pub(crate) fn close(&self) {
        cpu::port_out(INTERRUPT_MASK, 0);
        cpu::port_out(COMMAND, STOP | NO_DMA);
        interrupts::mask(LINE);
        timers::stop_watch();
    }

    /// Waits until an interrupt has reported one of `causes`, or patience ends.
    #[inline(always)]
    fn wait(&self, causes: u8) -> bool {
        let start = cpu::time_stamp();
        let mut found = false;
        interrupts::wait(None, || {
            found = REPORTED.load(Relaxed) & causes != 0;
            found || cpu::time_stamp().wrapping_sub(start) > self.patience
        });
        found
    }

    /// See [`programs::Platform::transmit`]. The card takes one frame at a time.
    #[inline(always)]
    pub(crate) fn transmit(&self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        let length = (bytes as u16).next_multiple_of(2);
        for slot in slot..slot + count {
            let address = memory::arena_word(slot * SLOT_WORDS);
            remote(WRITE, u16::from(FIRST_SENT) << 8, length);
            // SAFETY: a slot of the arena.
            unsafe { cpu::ports_out(DATA, address, u64::from(length) / 2) };
            if !poll(DMA_DONE) {
                return Err(Refusal::Broken("the card takes no data"));
            }
            let sent = SENT | SEND_ERROR;
            REPORTED.store(REPORTED.load(Relaxed) & !sent, Relaxed);
            cpu::port_out(SEND_PAGE, FIRST_SENT);
            cpu::port_out(SEND_COUNT, bytes as u8);
            cpu::port_out(SEND_COUNT + 1, (bytes >> 8) as u8);
            cpu::port_out(COMMAND, START | SEND | NO_DMA);
            let ended = self.wait(sent);
            if !ended || REPORTED.load(Relaxed) & SEND_ERROR != 0 {
                return Err(Refusal::Device {
                    what: "the frame is not sent, the card reports",
                    code: REPORTED.load(Relaxed).into(),
                });
            }
        }
        Ok(())
    }

    /// See [`programs::Platform::receive`].
    #[inline(always)]
    pub(crate) fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        loop {
            // What arrives from here on is reported again.
            REPORTED.store(REPORTED.load(Relaxed) & (SENT | SEND_ERROR), Relaxed);
            cpu::port_out(COMMAND, START | NO_DMA | PAGE_1);
            let current = cpu::port_in(CURRENT);
            cpu::port_out(COMMAND, START | NO_DMA);
            if current != self.next {
                break;
            }
            if !self.wait(WANTED & !(SENT | SEND_ERROR)) {
                return Err(Refusal::Broken(net::NO_ANSWER));
            }
        }
        // Status, next page, length with these four bytes.
        let mut head = [0u16; 2];
        let start = u16::from(self.next) << 8;
        // SAFETY: 4 bytes of this function's own.
        unsafe { read(start, (&raw mut head) as u64, 4) };
        let next = (head[0] >> 8) as u8;
        let length = head[1].wrapping_sub(4);
        if !(FIRST_RECEIVED..END).contains(&next) || !(1..=2048).contains(&length) {
            return Err(Refusal::Broken("the card's ring makes no sense"));
        }
        let address = memory::arena_word(net::SENT * SLOT_WORDS);
        // SAFETY: a slot of the arena, of 4096 bytes. The card wraps at the ring's end by itself.
        unsafe { read(start + 4, address, length.next_multiple_of(2)) };
        self.next = next;
        // The boundary stays one page behind, so that a full ring is not an empty one.
        let boundary = if next == FIRST_RECEIVED { END } else { next } - 1;
        cpu::port_out(BOUNDARY, boundary);
        Ok((net::SENT, length.into()))
    }
}
