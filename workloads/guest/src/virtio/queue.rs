//! A split virtqueue, the driver's side (virtio 1.2, 2.7).
//!
//! Whoever uses it decides which descriptors it uses for what: the queue itself keeps none. The rings
//! lie in one page: descriptors, then the driver's ring, then the device's.
//!
//! Interrupts are off but while [`Queue::wait`] halts. With EVENT_IDX that is said by an index that the
//! device does not pass: the one before the last entry that was seen.

use super::bus::{self, Transport};
use core::sync::atomic::{
    AtomicU16, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};

/// Largest queue: its three parts fit a page.
pub(crate) const MOST: u16 = 128;

/// The device writes this descriptor's memory.
pub(crate) const WRITE: u16 = 2;
/// The chain goes on.
pub(crate) const NEXT: u16 = 1;
/// The memory holds a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// Offsets of the rings in the page, for the largest queue.
const DRIVER: u64 = 16 * MOST as u64;
const DEVICE: u64 = DRIVER + 512;

/// The driver wants no interrupts (without EVENT_IDX).
const NO_INTERRUPT: u16 = 1;
/// The device wants no notifications (without EVENT_IDX).
const NO_NOTIFY: u16 = 1;

/// Looks at the used ring before halting.
const LOOKS: u32 = 100;

/// A descriptor's place in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor(pub(crate) u64);

impl Descriptor {
    /// Sets the address, and leaves the rest.
    #[inline(always)]
    pub(crate) fn set_address(self, address: u64) {
        word64(self.0).store(address, Relaxed);
    }

    /// Sets all.
    #[inline(always)]
    pub(crate) fn set(self, address: u64, length: u32, flags: u16, next: u16) {
        self.set_address(address);
        let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        word64(self.0 + 8).store(rest, Relaxed);
    }
}

fn word64(address: u64) -> &'static AtomicU64 {
    // SAFETY: memory of the image or of the arena that is a queue's; the device uses it besides.
    unsafe { &*(address as *const AtomicU64) }
}

fn word32(address: u64) -> &'static AtomicU32 {
    // SAFETY: as above.
    unsafe { &*(address as *const AtomicU32) }
}

fn word16(address: u64) -> &'static AtomicU16 {
    // SAFETY: as above.
    unsafe { &*(address as *const AtomicU16) }
}

/// A queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queue {
    page: u64,
    size: u16,
    event_index: bool,
    /// The index of the next entry to be offered, and of those that the device was told of.
    offered: u16,
    told: u16,
    /// The index of the next entry that comes back.
    seen: u16,
}

impl Queue {
    /// A queue in a page, which it clears. `size` is a power of two, at most [`MOST`].
    pub(crate) fn new(page: u64, size: u16, event_index: bool) -> Self {
        for word in (0..4096).step_by(8) {
            word64(page + word).store(0, Relaxed);
        }
        let queue = Queue {
            page,
            size,
            event_index,
            offered: 0,
            told: 0,
            seen: 0,
        };
        queue.want_no_interrupt();
        queue
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.page
    }

    pub(crate) fn driver_area(&self) -> u64 {
        self.page + DRIVER
    }

    pub(crate) fn device_area(&self) -> u64 {
        self.page + DEVICE
    }

    /// Number of descriptors and entries.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// A descriptor of the queue's own table.
    #[inline(always)]
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        Descriptor(self.page + 16 * u64::from(index & (self.size - 1)))
    }

    /// Offers the chain that starts with a descriptor.
    #[inline(always)]
    pub(crate) fn offer(&mut self, head: u16) {
        let place = u64::from(self.offered & (self.size - 1));
        word16(self.driver_area() + 4 + 2 * place).store(head, Relaxed);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Makes what was offered visible, and notifies the device if it wants that.
    #[inline(always)]
    pub(crate) fn publish(&mut self, transport: Transport, index: u32) {
        word16(self.driver_area() + 2).store(self.offered, Release);
        // The device either sees the index, or has said before that it wants to be told (2.7.13.4).
        fence(SeqCst);
        let offered = self.offered.wrapping_sub(self.told);
        let wanted = if self.event_index {
            let event = self.device_area() + 4 + 8 * u64::from(self.size);
            let event = word16(event).load(Relaxed);
            self.offered.wrapping_sub(event).wrapping_sub(1) < offered
        } else {
            word16(self.device_area()).load(Relaxed) & NO_NOTIFY == 0
        };
        self.told = self.offered;
        if wanted {
            transport.notify(index);
        }
    }

    /// Takes the next chain that has come back: its head and the bytes written.
    #[inline(always)]
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        if !self.ready(1) {
            return None;
        }
        let place = u64::from(self.seen & (self.size - 1));
        let entry = self.device_area() + 4 + 8 * place;
        let head = word32(entry).load(Relaxed) as u16;
        let length = word32(entry + 4).load(Relaxed);
        self.seen = self.seen.wrapping_add(1);
        if self.event_index {
            self.want_no_interrupt();
        }
        Some((head, length))
    }

    /// True if that many chains have come back that were not taken.
    #[inline(always)]
    fn ready(&self, chains: u16) -> bool {
        let used = word16(self.device_area() + 2).load(Acquire);
        used.wrapping_sub(self.seen) >= chains
    }

    #[inline(always)]
    fn want_no_interrupt(&self) {
        if self.event_index {
            self.set_event(self.seen.wrapping_sub(1));
        } else {
            word16(self.driver_area()).store(NO_INTERRUPT, Relaxed);
        }
    }

    #[inline(always)]
    fn set_event(&self, index: u16) {
        let event = self.driver_area() + 4 + 2 * u64::from(self.size);
        word16(event).store(index, Relaxed);
    }

    /// Waits until that many chains have come back: by looking for a moment, then halted. With a
    /// limit, in ticks and to be noticed by somebody else's interrupt, false when that has passed.
    #[inline(always)]
    pub(crate) fn wait(&self, chains: u16, limit: Option<u64>) -> bool {
        for _ in 0..LOOKS {
            if self.ready(chains) {
                return true;
            }
            crate::cpu::pause();
        }
        if self.event_index {
            self.set_event(self.seen.wrapping_add(chains - 1));
        } else {
            word16(self.driver_area()).store(0, Relaxed);
        }
        // The device either sees that, or its entry is seen below (2.7.10).
        fence(SeqCst);
        let start = crate::cpu::time_stamp();
        let mut ready = false;
        bus::wait(|| {
            ready = self.ready(chains);
            ready || limit.is_some_and(|limit| crate::cpu::time_stamp().wrapping_sub(start) > limit)
        });
        self.want_no_interrupt();
        ready
    }

    /// Waits without interrupts: for last words.
    #[cfg(feature = "hybrid")]
    pub(crate) fn look(&self, chains: u16) {
        /// About a second.
        const MOST: u32 = 100_000_000;
        let _ = (0..MOST).any(|_| self.ready(chains));
    }
}
