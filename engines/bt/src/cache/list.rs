//! Lists that grow with every block.
//!
//! A list that doubles is copied each time, and every page that it ever fills is a fault. Address space is set
//! aside for as much as a code cache of that size is likely to need, which costs nothing until it is used, and
//! the host is asked for pages some at a time.

use std::ops::{Deref, DerefMut};

/// Bytes that the host is asked for at once.
const STEP: usize = 64 << 10;
const PAGE: usize = 4096;

/// A list that is appended to.
pub(super) struct List<T> {
    items: Vec<T>,
    /// Bytes from its first item on that have pages.
    populated: usize,
}

impl<T> List<T> {
    /// With address space for so many items, if the host has that.
    pub(super) fn new(likely: usize) -> List<T> {
        let mut items = Vec::new();
        // It grows as others do, then.
        let _ = items.try_reserve_exact(likely);
        List {
            items,
            populated: 0,
        }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, item: T) {
        self.prepare(1);
        self.items.push(item);
    }

    /// Moves `others` to the end.
    pub(super) fn append(&mut self, others: &mut Vec<T>) {
        self.prepare(others.len());
        self.items.append(others);
    }

    /// Forgets everything, but keeps the memory.
    pub(super) fn clear(&mut self) {
        self.items.clear();
    }

    #[inline]
    fn prepare(&mut self, more: usize) {
        let end = (self.items.len() + more) * size_of::<T>();
        if end > self.populated {
            self.populate(end);
        }
    }

    /// Sees to pages up to `end` bytes, and some more, where address space was set aside.
    #[cold]
    fn populate(&mut self, end: usize) {
        let start = self.items.as_ptr() as usize;
        let from = (start + self.populated).next_multiple_of(PAGE);
        let room = start + self.items.capacity() * size_of::<T>();
        let upto = (start + end + STEP).min(room) & !(PAGE - 1);
        if from < upto {
            // SAFETY: pages of the list's own allocation are brought in; nothing in them changes. A host
            // that can't do it has them fault.
            unsafe { libc::madvise(from as *mut _, upto - from, libc::MADV_POPULATE_WRITE) };
        }
        // A list that is full moves, and has pages then.
        self.populated = if start + end > room {
            usize::MAX
        } else {
            upto.max(start + end) - start
        };
    }
}

impl<T> Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_what_it_was_given_within_and_beyond_its_space() {
        for likely in [0, 10, 100_000] {
            let mut list = List::new(likely);
            for round in 0..2 {
                for number in 0..50_000u64 {
                    list.push(number);
                    list.append(&mut vec![!number; 2]);
                }
                assert_eq!(list.len(), 150_000, "round {round}");
                let same = list
                    .chunks(3)
                    .zip(0..)
                    .all(|(chunk, number)| chunk == [number, !number, !number]);
                assert!(same, "{likely} in round {round}");
                list.clear();
            }
        }
    }
}
