//! Reception (DP8390D 4.0): which frames are wanted, and the ring they go to.
//!
//! The ring is made of pages of 256 bytes between PSTART and PSTOP. A frame goes to the page CURR,
//! behind four bytes of header (status, next page, length), and wraps at the end. The guest frees
//! pages by moving BNRY on.

use super::memory::{END, PACKETS};
use super::{Ne2000, interrupt};
use crate::devices::Action;
use crate::net::{LONGEST, Received, SHORTEST};

/// Receive configuration.
const ACCEPT_BROADCAST: u8 = 0x04;
const ACCEPT_MULTICAST: u8 = 0x08;
const PROMISCUOUS: u8 = 0x10;
const MONITOR: u8 = 0x20;

/// Receive status, and the first byte of a header.
const RECEIVED_OK: u8 = 0x01;
const MULTICAST: u8 = 0x20;

const HEADER: usize = 4;
/// The frame's checksum, for which the chip leaves room.
const CHECKSUM: usize = 4;
const PAGE: usize = 256;

/// Frames taken from the host before the guest goes on.
const BURST: usize = 256;

/// The ring, in bytes of the card's memory.
#[derive(Clone, Copy)]
struct Ring {
    start: u16,
    stop: u16,
    current: u16,
    boundary: u16,
}

impl Ring {
    /// Bytes from the next page to the one that the guest has not read yet.
    fn free(&self) -> u16 {
        if self.current < self.boundary {
            self.boundary - self.current
        } else {
            // Equal is empty: a full ring never gets that far.
            (self.stop - self.start) - (self.current - self.boundary)
        }
    }
}

impl Ne2000 {
    /// The receive ring; None if the registers describe none in packet memory.
    fn ring(&self) -> Option<Ring> {
        let start = u16::from(self.start) << 8;
        let stop = u16::from(self.stop) << 8;
        if start < PACKETS || stop > END || start >= stop {
            return None;
        }
        // A pointer outside of the ring stands for its start, as after a wrap.
        let inside = |page: u8| {
            let at = u16::from(page) << 8;
            if (start..stop).contains(&at) {
                at
            } else {
                start
            }
        };
        Some(Ring {
            start,
            stop,
            current: inside(self.current),
            boundary: inside(self.boundary),
        })
    }

    /// Takes frames from the backend as long as there is room for the longest.
    pub(super) fn receive_all(&mut self) -> Action {
        for _ in 0..BURST {
            let ring = self.ring().filter(|_| self.running());
            let room = usize::from(ring.map_or(u16::MAX, |ring| ring.free()));
            // One page stays free: a full ring would look empty.
            if room < HEADER + LONGEST + CHECKSUM + PAGE {
                return Action::Hold;
            }
            match self.backend.receive(&mut self.frame[..]) {
                Received::Frame(count) => match ring.filter(|_| self.wanted()) {
                    Some(ring) => self.store_frame(ring, count),
                    None => self.dropped.receive_dropped += 1,
                },
                Received::Nothing => break,
                // Nothing more to wait for.
                Received::Gone => return Action::Hold,
            }
        }
        Action::None
    }

    /// Whether the frame is for this card.
    fn wanted(&self) -> bool {
        let config = self.receive_config;
        let to = &self.frame[..6];
        if config & MONITOR != 0 {
            false
        } else if config & PROMISCUOUS != 0 {
            true
        } else if to == [0xff; 6] {
            config & ACCEPT_BROADCAST != 0
        } else if to[0] & 1 != 0 {
            let index = multicast_index(to);
            config & ACCEPT_MULTICAST != 0
                && self.multicast[usize::from(index >> 3)] & 1 << (index & 7) != 0
        } else {
            to == self.physical
        }
    }

    fn store_frame(&mut self, ring: Ring, count: usize) {
        // The line pads short frames.
        if count < SHORTEST {
            self.frame[count..SHORTEST].fill(0);
        }
        let count = count.max(SHORTEST);
        let total = HEADER + count;
        let mut next = usize::from(ring.current) + (total + CHECKSUM).next_multiple_of(PAGE);
        if next >= ring.stop.into() {
            next -= usize::from(ring.stop - ring.start);
        }
        self.receive_status = RECEIVED_OK;
        if self.frame[0] & 1 != 0 {
            self.receive_status |= MULTICAST;
        }
        let header = [
            self.receive_status,
            (next >> 8) as u8,
            total as u8,
            (total >> 8) as u8,
        ];
        let mut at = ring.current;
        for mut part in [&header[..], &self.frame[..count]] {
            while !part.is_empty() {
                let room = usize::from(ring.stop - at).min(part.len());
                let (now, later) = part.split_at(room);
                self.memory.write(at, room).copy_from_slice(now);
                part = later;
                at += room as u16;
                if at == ring.stop {
                    at = ring.start;
                }
            }
        }
        self.current = (next >> 8) as u8;
        self.raise(interrupt::RECEIVED);
    }
}

/// The upper six bits of the CRC-32 of an address, most significant bit first.
fn multicast_index(address: &[u8]) -> u8 {
    let mut crc = u32::MAX;
    for &byte in address {
        for bit in 0..8 {
            let carry = crc >> 31 ^ u32::from(byte >> bit & 1);
            crc <<= 1;
            if carry != 0 {
                crc ^= 0x04c1_1db7;
            }
        }
    }
    (crc >> 26) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multicast_hashes_agree_with_the_reflected_form_of_the_same_crc() {
        for address in [
            [0x33, 0x33, 0, 0, 0, 1],
            [1, 0, 0x5e, 0, 0, 0xfb],
            [0xff; 6],
        ] {
            let mut crc = u32::MAX;
            for byte in address {
                crc ^= u32::from(byte);
                for _ in 0..8 {
                    crc = crc >> 1 ^ if crc & 1 != 0 { 0xedb8_8320 } else { 0 };
                }
            }
            let reflected = (crc.reverse_bits() >> 26) as u8;
            assert_eq!(multicast_index(&address), reflected);
        }
    }
}
