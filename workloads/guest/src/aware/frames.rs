//! Frames of guest memory, and how the kernel reaches them: through the direct map.
//!
//! Invariant: a frame of the pool is all zero but for its first word, so that it can become a
//! table or a page at once: who returns a frame clears what was written to it.

use abi::hypercall::{StartInfo, layout};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A frame as words.
pub(super) type Frame = [AtomicU64; 512];

/// A frame's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(pub(super) u64);

impl Number {
    /// Its content.
    pub(super) fn words(self) -> &'static Frame {
        // SAFETY: numbers come from the pool, from the reserve or from an entry that this kernel
        // has written: all are frames of guest memory, which the host maps here. What else reads
        // and writes them (user mode, the host) does so as atomics allow.
        unsafe { &*((layout::DIRECT_MAP + self.0 * layout::PAGE) as *const Frame) }
    }
}

/// First frame never given out.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// End of the frames.
static END: AtomicU64 = AtomicU64::new(0);
/// The first frame that was given back, plus 1; each holds the next in its first word.
static FREE: AtomicU64 = AtomicU64::new(0);

/// Takes note of the memory. Before any other function of this module.
pub(super) fn set_up(info: &StartInfo) {
    NEXT.store(info.first_free_frame, Relaxed);
    END.store(info.frames, Relaxed);
}

/// Frames never given out.
pub(super) fn left() -> u64 {
    END.load(Relaxed).saturating_sub(NEXT.load(Relaxed))
}

/// `count` frames one after another, the first one's number a multiple of `align`. They are
/// never given back. `None` if there are not as many.
pub(super) fn reserve(count: u64, align: u64) -> Option<Number> {
    let first = NEXT.load(Relaxed).next_multiple_of(align);
    let end = first.checked_add(count)?;
    if end > END.load(Relaxed) {
        return None;
    }
    NEXT.store(end, Relaxed);
    Some(Number(first))
}

/// A frame of the pool, all zero.
pub(super) fn take() -> Number {
    let free = FREE.load(Relaxed);
    if free == 0 {
        // The caller of `set_up` has seen that there is more memory than this kernel ever takes.
        return reserve(1, 1).expect("no frame is left");
    }
    let number = Number(free - 1);
    let next = &number.words()[0];
    FREE.store(next.load(Relaxed), Relaxed);
    next.store(0, Relaxed);
    number
}

/// Gives a frame back.
pub(super) fn give(number: Number) {
    number.words()[0].store(FREE.load(Relaxed), Relaxed);
    FREE.store(number.0 + 1, Relaxed);
}
