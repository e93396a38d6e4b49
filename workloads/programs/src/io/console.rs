//! `console`: lines of SIZE bytes to the console that the protocol is spoken on.
//!
//! A line is [`abi::DATA`], SIZE bytes of [`byte()`], and a newline. The guest folds what it sends;
//! a host folds what it has received with [`Received`], and finds the checksum of `done` if and only
//! if it has received that.

use super::{Io, timed};
use crate::{Group, Platform, Refusal, Ring, Workload, fold, workload::Program};

/// Most bytes of a line.
pub const MOST: u64 = 254;

pub(crate) const WORKLOAD: Workload = Workload {
    name: "console",
    group: Group::Io,
    ring: Ring::Kernel,
    size: 62,
    iterations: 20,
    operation: "a line of SIZE bytes and two more to the console",
    program: Program::Io(Io::Console),
};

/// The byte in that column of that line, both from 0: printable, none of them a space.
#[inline(always)]
pub fn byte(line: u64, column: u64) -> u8 {
    b'!' + (line.wrapping_mul(31).wrapping_add(column.wrapping_mul(7)) % 94) as u8
}

#[inline(always)]
pub(super) fn lines<P: Platform>(
    platform: &mut P,
    size: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for line in 0..iterations {
        let mut text = [0; MOST as usize + 2];
        let Some(text) = text.get_mut(..size as usize + 2) else {
            break;
        };
        if let [first, body @ .., last] = &mut *text {
            *first = abi::DATA;
            for (column, slot) in (0..).zip(body) {
                *slot = byte(line, column);
                sum = fold(sum, (*slot).into());
            }
            *last = b'\n';
        }
        timed(platform, |platform| platform.send_line(text))?;
    }
    Ok(sum)
}

/// What a host has received of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    sum: u64,
}

impl Received {
    /// Takes a line that starts with [`abi::DATA`], without its newline.
    pub fn line(&mut self, line: &[u8]) {
        for &byte in line.iter().skip(1) {
            self.sum = fold(self.sum, byte.into());
        }
    }

    /// The checksum that the guest's `done` carries if this is all of what it sent.
    pub fn checksum(&self) -> u64 {
        // As Io::conclude does: nothing is verified later, and closing leaves 0.
        fold(fold(self.sum, 0), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_received_gives_the_checksum() {
        let text = |line| {
            let mut text = alloc::vec![abi::DATA];
            text.extend((0..WORKLOAD.size).map(|column| byte(line, column)));
            text
        };
        let mut received = Received::default();
        for line in 0..5 {
            received.line(&text(line));
        }
        assert_eq!(received.checksum(), crate::oracle(&WORKLOAD, 0, 5).unwrap());
        let mut twice = Received::default();
        for line in [0, 1, 1, 2, 3] {
            twice.line(&text(line));
        }
        assert_ne!(twice.checksum(), received.checksum());
    }

    #[test]
    fn bytes_are_printable() {
        for line in 0..200 {
            assert!((0..MOST).all(|column| byte(line, column).is_ascii_graphic()));
        }
    }
}
