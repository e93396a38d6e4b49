//! Console input on its way from the host to the guest: a bounded queue.
//!
//! The pump thread fills it and the UART empties it. When it is full the pump stops reading, so
//! a host that sends more than the guest takes is held back by its own pipe.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes the queue takes before the pump stops reading.
pub const CAPACITY: usize = 64 * 1024;

/// Queue of console input.
#[derive(Debug, Default)]
pub struct Input {
    queue: Mutex<VecDeque<u8>>,
    length: AtomicUsize,
    ended: AtomicBool,
    /// The pump waits for room.
    starved: AtomicBool,
    /// A paravirtual console takes the input, and the UART gets none.
    claimed: AtomicBool,
}

impl Input {
    /// A queue that holds `bytes` and gets no more.
    pub fn closed(bytes: &[u8]) -> Self {
        let input = Input::default();
        input.push(bytes);
        input.end();
        input
    }

    /// Bytes that wait.
    #[inline]
    pub fn len(&self) -> usize {
        self.length.load(Ordering::Acquire)
    }

    /// True when nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when nothing waits and nothing will ever come.
    pub fn exhausted(&self) -> bool {
        // In this order: `ended` is set after the last push.
        self.ended.load(Ordering::Acquire) && self.is_empty()
    }

    /// Appends bytes. The pump keeps to [`CAPACITY`]; a queue filled beforehand need not.
    pub fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.extend(bytes);
        self.length.store(queue.len(), Ordering::Release);
    }

    /// Gives the input to a paravirtual console, or back to the UART.
    pub fn claim(&self, claimed: bool) {
        self.claimed.store(claimed, Ordering::Release);
    }

    /// True while a paravirtual console takes the input.
    #[inline]
    pub fn claimed(&self) -> bool {
        self.claimed.load(Ordering::Acquire)
    }

    /// No byte follows.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Room left; zero tells the taker to wake the pump.
    pub(super) fn room(&self) -> usize {
        let room = CAPACITY.saturating_sub(self.len());
        if room == 0 {
            self.starved.store(true, Ordering::SeqCst);
            // The taker may have made room between the look and the store.
            return CAPACITY.saturating_sub(self.len());
        }
        room
    }

    /// Fills `into` from the front. Answers with the number of bytes and whether the pump waits for room.
    pub fn take(&self, into: &mut [u8]) -> (usize, bool) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let count = into.len().min(queue.len());
        for (slot, byte) in into.iter_mut().zip(queue.drain(..count)) {
            *slot = byte;
        }
        self.length.store(queue.len(), Ordering::SeqCst);
        (
            count,
            count > 0 && self.starved.swap(false, Ordering::SeqCst),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_the_end_follows_the_last() {
        let input = Input::closed(b"abc");
        assert!(!input.exhausted());
        let mut two = [0; 2];
        assert_eq!(input.take(&mut two), (2, false));
        assert_eq!(&two, b"ab");
        assert_eq!(input.take(&mut two), (1, false));
        assert!(input.exhausted());
    }

    #[test]
    fn a_full_queue_asks_for_a_wake_up() {
        let input = Input::default();
        input.push(&vec![0; CAPACITY]);
        assert_eq!(input.room(), 0);
        assert_eq!(input.take(&mut [0; 1]), (1, true));
        assert_eq!(input.room(), 1);
    }
}
