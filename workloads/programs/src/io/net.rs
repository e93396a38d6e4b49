//! `net_rr` and `net_stream`: frames to a peer, as [`abi::net`] says.
//!
//! SIZE is the frame's body in words of 8 bytes. Frames are laid out before the window, and only
//! their sequence numbers change in it. Slots below [`SENT`] hold frames to send, the others are the
//! machine's to receive into.
//!
//! One iteration of `net_rr` is a frame out and its echo back; of `net_stream`, a frame out. A
//! stream's window ends with the peer's summary, so every frame has arrived in it.
//!
//! [`Peer`] is the other side's logic, for whoever has a socket, and for the oracle.

use super::{Io, SLOT_WORDS, timed};
use crate::{Group, Platform, Refusal, Ring, Workload, fold, workload::Program};
use abi::net::{ETHERTYPE, HEADER, LEAST, PEER, kind};

/// Most words of a body: what a frame of 1514 bytes holds.
pub const MOST: u64 = 186;
/// Slots that hold frames to send.
pub const SENT: u64 = 64;
/// Frames that are handed to the device at once.
const BATCH: u64 = 16;

pub(crate) const ECHO: Workload = Workload {
    name: "net_rr",
    group: Group::Io,
    ring: Ring::Kernel,
    size: 5,
    iterations: 100,
    operation: "a frame of SIZE words out, its echo back",
    program: Program::Io(Io::Echo),
};
pub(crate) const STREAM: Workload = Workload {
    name: "net_stream",
    group: Group::Io,
    ring: Ring::Kernel,
    size: MOST,
    iterations: 256,
    operation: "a frame of SIZE words out; at the end the peer says what arrived",
    program: Program::Io(Io::Stream),
};

/// Why a machine without a network refuses.
pub const NO_CARD: &str = "this machine has no network card";
/// What is wrong when nothing arrives.
pub const NO_ANSWER: &str = "no frame arrives within two seconds";

const NO_PEER: &str = "the peer does not answer as it should";

/// Bytes of a frame with that many words of body.
#[inline(always)]
fn bytes(words: u64) -> u64 {
    let bytes = HEADER as u64 + 8 * words;
    if bytes < LEAST as u64 {
        LEAST as u64
    } else {
        bytes
    }
}

/// Word `word` of every body.
#[inline(always)]
fn body(word: u64) -> u64 {
    crate::mix(0x6672_616d_6500_0000, word)
}

/// The second word of a frame: the rest of the source's address, type, kind and length.
#[inline(always)]
fn tags(station: u64, kind: u8, words: u64) -> u64 {
    station >> 16 & 0xffff_ffff
        | u64::from(ETHERTYPE.swap_bytes()) << 32
        | u64::from(kind) << 48
        | words << 56
}

/// Lays out the frames to send, for bodies of `words`, from `station`. An application's part.
fn lay_out(arena: &mut [u64], words: u64, station: u64) -> u64 {
    let [a, b, c, d, e, f] = PEER;
    let destination = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
    for frame in arena.chunks_mut(SLOT_WORDS as usize).take(SENT as usize) {
        for word in &mut *frame {
            *word = 0;
        }
        if let [first, second, _sequence, rest @ ..] = frame {
            *first = destination | station << 48;
            *second = tags(station, kind::ECHO, words);
            for (place, word) in (0..words).zip(rest) {
                *word = body(place);
            }
        }
    }
    0
}

/// Sends the frame in slot 0 with that kind and number; returns the slot of the answer, which is
/// of the next kind.
#[inline(always)]
fn exchange<P: Platform>(
    platform: &mut P,
    words: u64,
    kind: u8,
    sequence: u64,
) -> Result<u64, Refusal> {
    let station = platform.station();
    platform.poke(1, tags(station, kind, words));
    platform.poke(2, sequence);
    platform.transmit(0, 1, bytes(words))?;
    loop {
        let (slot, length) = platform.receive()?;
        let first = slot * SLOT_WORDS;
        let answer = platform.peek(first + 1) >> 32;
        let expected = tags(0, kind + 1, 0) >> 32;
        if length >= LEAST as u64
            && answer & 0xff_ffff == expected
            && platform.peek(first + 2) == sequence
        {
            return Ok(slot);
        }
        // Somebody else's frame, or an answer that came too late for an earlier run.
    }
}

pub(super) fn prepare<P: Platform>(platform: &mut P, io: Io, words: u64) -> Result<(), Refusal> {
    let station = platform.station();
    platform.compute(lay_out, words, station)?;
    let slot = exchange(platform, words, kind::ECHO, u64::MAX)?;
    for word in [0, words - 1] {
        if platform.peek(slot * SLOT_WORDS + 3 + word) != body(word) {
            return Err(Refusal::Broken(NO_PEER));
        }
    }
    if io == Io::Stream {
        exchange(platform, words, kind::OPEN, 0)?;
        for slot in 0..SENT {
            platform.poke(slot * SLOT_WORDS + 1, tags(station, kind::DATA, words));
        }
    }
    Ok(())
}

#[inline(always)]
pub(super) fn echoes<P: Platform>(
    platform: &mut P,
    words: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    let mut place = 0;
    for sequence in 0..iterations {
        let slot = timed(platform, |platform| {
            exchange(platform, words, kind::ECHO, sequence)
        })?;
        sum = fold(sum, platform.peek(slot * SLOT_WORDS + 2));
        sum = fold(sum, platform.peek(slot * SLOT_WORDS + 3 + place));
        place += 1;
        if place == words {
            place = 0;
        }
    }
    Ok(sum)
}

#[inline(always)]
pub(super) fn stream<P: Platform>(
    platform: &mut P,
    words: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let length = bytes(words);
    let mut sequence = 0;
    while sequence < iterations {
        let left = iterations - sequence;
        let count = if left < BATCH { left } else { BATCH };
        let first = sequence % SENT;
        for frame in 0..count {
            platform.poke((first + frame) * SLOT_WORDS + 2, sequence + frame);
        }
        platform.transmit(first, count, length)?;
        sequence += count;
    }
    let slot = exchange(platform, words, kind::CLOSE, iterations)?;
    let arrived = platform.peek(slot * SLOT_WORDS + 3);
    if arrived != iterations {
        return Err(Refusal::Device {
            what: "frames that the peer has not received:",
            code: iterations.wrapping_sub(arrived),
        });
    }
    Ok(platform.peek(slot * SLOT_WORDS + 4))
}

/// The other side of the workloads: frames in, answers out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peer {
    count: u64,
    sum: u64,
}

impl Peer {
    /// Takes a frame. If it has an answer, `frame` becomes that, and its length is returned. The
    /// buffer is to hold [`LEAST`] bytes at least.
    pub fn answer(&mut self, frame: &mut [u8], length: usize) -> Option<usize> {
        let words = usize::from(*frame.get(15)?);
        let end = HEADER + 8 * words;
        let whole = frame.get(..length)?;
        if end > length || whole.get(12..14)? != ETHERTYPE.to_be_bytes() {
            return None;
        }
        let sequence = word(whole, 16)?;
        let mut length = length;
        let kind = match *whole.get(14)? {
            kind::ECHO => kind::ECHOED,
            kind::OPEN => {
                *self = Peer::default();
                kind::OPENED
            }
            kind::DATA => {
                let body = (HEADER..end).step_by(8).filter_map(|at| word(whole, at));
                let sum = body.fold(sequence, u64::wrapping_add);
                self.count += 1;
                self.sum = fold(self.sum, sum);
                return None;
            }
            kind::CLOSE => {
                *frame.get_mut(15)? = 2;
                frame
                    .get_mut(24..32)?
                    .copy_from_slice(&self.count.to_le_bytes());
                frame
                    .get_mut(32..40)?
                    .copy_from_slice(&self.sum.to_le_bytes());
                length = LEAST;
                kind::SUMMARY
            }
            _ => return None,
        };
        *frame.get_mut(14)? = kind;
        let (to, from) = frame.get_mut(..12)?.split_at_mut(6);
        to.copy_from_slice(from);
        from.copy_from_slice(&PEER);
        Some(length)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, sequence: u64, words: u8) -> [u8; LEAST] {
        let mut frame = [0; LEAST];
        frame[..6].copy_from_slice(&PEER);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        frame[14] = kind;
        frame[15] = words;
        frame[16..24].copy_from_slice(&sequence.to_le_bytes());
        frame[24..32].copy_from_slice(&body(0).to_le_bytes());
        frame
    }

    #[test]
    fn the_peer_echoes_to_the_sender() {
        let mut bytes = frame(kind::ECHO, 7, 1);
        assert_eq!(Peer::default().answer(&mut bytes, LEAST), Some(LEAST));
        let mut expected = frame(kind::ECHOED, 7, 1);
        expected[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        expected[6..12].copy_from_slice(&PEER);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn the_summary_tells_what_arrived() {
        let mut peer = Peer::default();
        let mut send = |kind, sequence| {
            let mut bytes = frame(kind, sequence, 1);
            peer.answer(&mut bytes, LEAST)
                .map(|_| (word(&bytes, 24).unwrap(), word(&bytes, 32).unwrap()))
        };
        send(kind::DATA, 99);
        assert!(send(kind::OPEN, 0).is_some());
        for sequence in 0..5 {
            assert_eq!(send(kind::DATA, sequence), None);
        }
        let sum = (0..5).fold(0, |sum, n| fold(sum, body(0).wrapping_add(n)));
        assert_eq!(send(kind::CLOSE, 5), Some((5, sum)));
    }

    #[test]
    fn strange_frames_have_no_answer() {
        let mut peer = Peer::default();
        let good = frame(kind::ECHO, 1, 4);
        for (at, byte) in [
            (12, 0x08),
            (13, 0),
            (14, 0),
            (14, 2),
            (14, 99),
            (15, 5),
            (15, 255),
        ] {
            let mut bytes = good;
            bytes[at] = byte;
            assert_eq!(peer.answer(&mut bytes, LEAST), None, "{at} {byte}");
        }
        for length in 0..LEAST {
            let mut bytes = good;
            assert!(length >= 56 || peer.answer(&mut bytes, length).is_none());
            let mut cut = good;
            let _ = peer.answer(&mut cut[..length], length);
        }
        assert_eq!(peer.answer(&mut good.clone(), usize::MAX), None);
    }
}
