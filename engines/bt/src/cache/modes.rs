//! The modes that blocks are made for, by number: hardly any are in use at once, and one is as large as all
//! else that is known of a block.
//!
//! Invariant: a mode has one number until the list is cleared.

use std::cell::Cell;

use super::Map;
use crate::decode::Mode;

#[derive(Default)]
pub(super) struct Modes {
    list: Vec<Mode>,
    numbers: Map<Mode, u32>,
    /// Number of the mode asked for last.
    last: Cell<u32>,
}

impl Modes {
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.numbers.clear();
    }

    /// What they take, list and table.
    pub(super) fn bytes(&self) -> usize {
        4 * size_of::<Mode>() * self.list.len()
    }

    pub(super) fn mode(&self, number: u32) -> &Mode {
        &self.list[number as usize]
    }

    /// The number of `mode`, if it has one.
    #[inline]
    pub(super) fn find(&self, mode: &Mode) -> Option<u32> {
        let last = self.last.get();
        if self.list.get(last as usize) == Some(mode) {
            return Some(last);
        }
        let number = *self.numbers.get(mode)?;
        self.last.set(number);
        Some(number)
    }

    /// The number of `mode`, which it has from now on.
    #[inline]
    pub(super) fn number(&mut self, mode: &Mode) -> u32 {
        if let Some(number) = self.find(mode) {
            return number;
        }
        let number = self.list.len() as u32;
        self.list.push(*mode);
        self.numbers.insert(*mode, number);
        number
    }
}
