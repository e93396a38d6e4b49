//! The console: two rings of bytes shared with the host, and a doorbell.
//!
//! Output is announced at the end of each line, and flushed, which waits for the host, before a
//! window opens. Waiting for input sleeps: an idle guest burns no processor time.

use super::{events, hypercall};
use abi::hypercall::{ConsoleRing, StartInfo, evtchn};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use programs::session::{Console, LINE};

/// The console.
pub(super) struct Ring {
    ring: &'static ConsoleRing,
    /// Input was taken that the host has not been told of: it may wait for room.
    taken: bool,
}

/// What came instead of a line.
pub(super) enum Input<'a> {
    /// A line, without its end.
    Line(&'a [u8]),
    /// A line longer than the buffer.
    TooLong,
    /// No more input.
    Ended,
}

impl Ring {
    /// The console that the host speaks of.
    pub(super) fn new(info: &StartInfo) -> Self {
        // SAFETY: the host maps the ring there for as long as the guest runs; all of it is atomic.
        let ring = unsafe { &*(info.console as *const ConsoleRing) };
        Ring { ring, taken: false }
    }

    fn receive(&mut self) -> Option<u8> {
        loop {
            let consumer = self.ring.input_consumer.load(Relaxed);
            if consumer != self.ring.input_producer.load(Acquire) {
                let place = consumer as usize % self.ring.input.len();
                let byte = self.ring.input[place].load(Relaxed);
                let next = consumer.wrapping_add(1);
                self.ring.input_consumer.store(next, Release);
                self.taken = true;
                return Some(byte);
            }
            if self.ring.input_ended.load(Acquire) != 0 {
                // What arrived before the end was said is taken first.
                if consumer == self.ring.input_producer.load(Acquire) {
                    return None;
                }
                continue;
            }
            self.wait(|ring| {
                consumer == ring.input_producer.load(Acquire) && ring.input_ended.load(Acquire) == 0
            });
        }
    }

    /// Sleeps until the host raises the console's port, unless `vain` no longer holds.
    fn wait(&mut self, vain: impl Fn(&ConsoleRing) -> bool) {
        if self.taken {
            self.taken = false;
            let _ = hypercall::doorbell();
        }
        // First the bit, then the ring: an event between the two is not lost, since it sets the bit.
        events::clear(evtchn::CONSOLE_PORT);
        if vain(self.ring) {
            let _ = hypercall::poll(1 << evtchn::CONSOLE_PORT);
        }
    }

    /// Waits for a line.
    pub(super) fn line<'a>(&mut self, buffer: &'a mut [u8; LINE]) -> Input<'a> {
        let mut length: usize = 0;
        loop {
            let Some(byte) = self.receive() else {
                return Input::Ended;
            };
            if byte == b'\n' {
                return match buffer.get(..length) {
                    Some(line) => Input::Line(line),
                    None => Input::TooLong,
                };
            }
            if let Some(slot) = buffer.get_mut(length) {
                *slot = byte;
            }
            length = length.saturating_add(1);
        }
    }

    fn send(&mut self, byte: u8) {
        let producer = self.ring.output_producer.load(Relaxed);
        let full = |ring: &ConsoleRing| {
            let used = producer.wrapping_sub(ring.output_consumer.load(Acquire));
            used as usize >= ring.output.len()
        };
        while full(self.ring) {
            self.ring.output_wanted.store(1, Release);
            let _ = hypercall::doorbell();
            self.wait(full);
        }
        self.ring.output_wanted.store(0, Relaxed);
        let place = producer as usize % self.ring.output.len();
        self.ring.output[place].store(byte, Relaxed);
        let next = producer.wrapping_add(1);
        self.ring.output_producer.store(next, Release);
    }
}

impl Console for Ring {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.send(byte);
            if byte == b'\n' {
                let _ = hypercall::doorbell();
            }
        }
    }

    fn flush(&mut self) {
        let _ = hypercall::flush_console();
    }

    #[inline(always)]
    fn mark(&mut self, value: u8) {
        let _ = hypercall::mark(value);
    }

    #[inline(always)]
    fn cycles(&mut self) -> u64 {
        crate::cpu::time_stamp()
    }
}
