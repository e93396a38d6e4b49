//! The bus of virtio devices for an aware kernel: a page shared with the host, and its doorbell. See
//! [`abi::device`].
//!
//! What lies in the image has its own address as guest-physical one: the host places segments where
//! they say. The arena is elsewhere: [`arena_word`].

use super::{events, hypercall};
use crate::virtio::{MOST, Queue, feature};
use abi::{
    device::{Device, Page, answer, order},
    hypercall::{StartInfo, evtchn, feature::DEVICES, layout},
};
use core::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use programs::io::histogram::Scale;

/// Where the page is; 0 without one.
static PAGE: AtomicU64 = AtomicU64::new(0);
/// Guest-physical address of the arena.
static ARENA: AtomicU64 = AtomicU64::new(0);
/// Who sleeps is woken now and then.
static WATCHED: AtomicBool = AtomicBool::new(false);

/// How often, in ns.
const WATCH: u64 = 500_000_000;

/// Takes note of where the page and the arena are. Before any other function of this module.
pub(super) fn set_up(info: &StartInfo, arena: u64) {
    if info.features & DEVICES != 0 {
        PAGE.store(layout::DIRECT_MAP + info.devices * layout::PAGE, Relaxed);
    }
    ARENA.store(arena, Relaxed);
}

/// Guest-physical address of a word of the arena.
#[inline(always)]
pub(crate) fn arena_word(word: u64) -> u64 {
    ARENA.load(Relaxed) + 8 * word
}

fn page() -> Option<&'static Page> {
    let address = PAGE.load(Relaxed);
    // SAFETY: the host keeps that frame for the page, which is made of atomics.
    (address != 0).then(|| unsafe { &*(address as *const Page) })
}

/// A device of the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transport {
    device: &'static Device,
}

impl Transport {
    /// The device with that ID.
    pub(crate) fn find(id: u32) -> Option<Self> {
        let devices = page()?.devices.iter();
        let mut devices = devices.filter(|device| device.id.load(Relaxed) == id);
        devices.next().map(|device| Transport { device })
    }

    /// Chooses what the device offers of `wanted`, which includes VERSION_1; `None` without that.
    pub(crate) fn begin(self, wanted: u64) -> Option<u64> {
        let features = self.device.offered.load(Relaxed) & wanted;
        self.device.accepted.store(features, Relaxed);
        (features & feature::VERSION_1 != 0).then_some(features)
    }

    /// A word of the device's own configuration.
    pub(crate) fn configuration(self, word: u64) -> u32 {
        let word = self.device.configuration.get(word as usize);
        word.map_or(0, |word| word.load(Relaxed))
    }

    /// Makes a queue in `page`, which is this queue's for good; `None` if the device has none.
    pub(crate) fn queue(self, index: u32, page: u64, features: u64) -> Option<Queue> {
        let place = self.device.queues.get(index as usize)?;
        let size = place.most.load(Relaxed).min(MOST.into());
        // A power of two (2.7).
        let size = 1 << size.checked_ilog2()?;
        let queue = Queue::new(page, size as u16, features & feature::EVENT_INDEX != 0);
        place.size.store(size, Relaxed);
        place.descriptors.store(queue.descriptors(), Relaxed);
        place.driver.store(queue.driver_area(), Relaxed);
        place.device.store(queue.device_area(), Relaxed);
        Some(queue)
    }

    /// Lets the device work; false if it does not take features or queues.
    pub(crate) fn start(self) -> bool {
        self.order(order::START) == answer::DONE
    }

    /// Stops the device.
    pub(crate) fn stop(self) {
        self.order(order::STOP);
    }

    fn order(self, order: u32) -> u32 {
        self.device.answer.store(0, Relaxed);
        self.device.order.store(order, Release);
        let _ = hypercall::doorbell();
        wait(|| self.device.answer.load(Acquire) != 0);
        self.device.answer.load(Relaxed)
    }

    /// The one doorbell is every queue's.
    #[inline(always)]
    pub(crate) fn notify(self, _queue: u32) {
        let _ = hypercall::doorbell();
    }
}

/// Sleeps until `done`.
#[inline(always)]
pub(crate) fn wait(mut done: impl FnMut() -> bool) {
    loop {
        // First the bit, then the look: an event between the two is not lost.
        events::clear(evtchn::CONSOLE_PORT);
        if done() {
            return;
        }
        let mut ports = 1 << evtchn::CONSOLE_PORT;
        if WATCHED.load(Relaxed) {
            events::clear(TIMER_PORT);
            let _ = hypercall::set_timer(events::system_time() + WATCH);
            ports |= 1 << TIMER_PORT;
        }
        let _ = hypercall::poll(ports);
    }
}

/// The timer's port, which the host fixes; see `start_watch`.
const TIMER_PORT: u64 = 0;

/// Wakes who sleeps now and then, so that it can see how long.
pub(crate) fn start_watch() {
    let port = hypercall::event_channel(evtchn::BIND_VIRQ, evtchn::VIRQ_TIMER);
    WATCHED.store(port == Ok(TIMER_PORT), Relaxed);
}

/// Ends [`start_watch`].
pub(crate) fn stop_watch() {
    if WATCHED.swap(false, Relaxed) {
        let _ = hypercall::stop_timer();
        let _ = hypercall::event_channel(evtchn::CLOSE, TIMER_PORT);
    }
}

/// Ticks that a frame may take.
pub(crate) fn patience() -> u64 {
    let scale = events::rate().and_then(Scale::new);
    scale.map_or(1 << 33, |scale| scale.ticks(2_000_000_000))
}

/// Reads a word of the arena, which the kernel sees through the direct map.
#[inline(always)]
pub(super) fn peek(word: u64) -> u64 {
    // SAFETY: a frame of guest memory; devices and user mode use it besides, while this code waits
    // for them.
    unsafe { ((layout::DIRECT_MAP + arena_word(word)) as *const u64).read_volatile() }
}

/// Writes a word of the arena.
#[inline(always)]
pub(super) fn poke(word: u64, value: u64) {
    // SAFETY: as above.
    unsafe { ((layout::DIRECT_MAP + arena_word(word)) as *mut u64).write_volatile(value) };
}
