//! The two pages that string instructions copy from and to, and what is read of them.

use crate::mix;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Words of a page.
const WORDS: usize = 512;

/// A page that a string instruction reads and one that it writes: statics of a guest, so they change
/// through shared references.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Pages {
    source: [AtomicU64; WORDS],
    target: [AtomicU64; WORDS],
}

impl Pages {
    /// Pages of zeros.
    #[allow(clippy::new_without_default, reason = "for statics")]
    pub const fn new() -> Self {
        Pages {
            source: [const { AtomicU64::new(0) }; WORDS],
            target: [const { AtomicU64::new(0) }; WORDS],
        }
    }

    /// A source of its own content in each word, and a target of zeros.
    pub fn start(&self) {
        for (index, (source, target)) in (0..).zip(self.source.iter().zip(&self.target)) {
            source.store(mix(0x7061_6765_0000_0000, index), Relaxed);
            target.store(0, Relaxed);
        }
    }

    /// Changes the first and the last word of the source, has `copy` copy all of it to the target,
    /// and reads the same words there.
    #[inline(always)]
    pub fn copied(&self, value: u64, copy: impl FnOnce(*const AtomicU64, *const AtomicU64)) -> u64 {
        self.source[0].store(value, Relaxed);
        self.source[WORDS - 1].store(!value, Relaxed);
        copy(self.source.as_ptr(), self.target.as_ptr());
        self.ends()
    }

    /// Has `fill` fill the target, and reads its first and its last word.
    #[inline(always)]
    pub fn filled(&self, fill: impl FnOnce(*const AtomicU64)) -> u64 {
        fill(self.target.as_ptr());
        self.ends()
    }

    #[inline(always)]
    fn ends(&self) -> u64 {
        let first = self.target[0].load(Relaxed);
        let last = self.target[WORDS - 1].load(Relaxed);
        first.wrapping_mul(5).wrapping_add(last)
    }

    /// Every word of the target, folded.
    pub fn settled(&self) -> u64 {
        let words = self.target.iter().map(|word| word.load(Relaxed));
        words.fold(0, mix)
    }

    /// Copies in plain software.
    #[cfg(any(feature = "oracle", test))]
    pub(crate) fn copy(&self, value: u64) -> u64 {
        self.copied(value, |_, _| {
            for (source, target) in self.source.iter().zip(&self.target) {
                target.store(source.load(Relaxed), Relaxed);
            }
        })
    }

    /// Fills in plain software.
    #[cfg(any(feature = "oracle", test))]
    pub(crate) fn fill(&self, value: u64) -> u64 {
        self.filled(|_| {
            self.target
                .iter()
                .for_each(|target| target.store(value, Relaxed));
        })
    }
}
