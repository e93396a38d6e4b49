//! What the vCPUs of one VM know about each other's use of a page of RAM: one word each.
//!
//! | bits | what |
//! |---|---|
//! | 0 to 15 | holders: vCPUs with code translated from the page |
//! | 16 to 31 | writers: vCPUs that may write to it without telling anybody, by a write TLB |
//! | 32 to 63 | lines: which 128 bytes of it code was translated from |
//!
//! Holders and writers exclude each other, in the sense of [`crate::vm`]: [`claim`](Pages::claim)
//! fails once there is a holder, and whoever [enters](Pages::enter) learns of the writers and waits
//! until each has given the page up. One word, so whichever of the two comes second sees the first.
//!
//! Lines tell a write to code from a write beside it. They are set before the code's bytes are
//! looked at for the last time, and a writer looks at them after its bytes are in memory: one of the
//! two sees the other. They go when the last holder goes.
//!
//! A vCPU without company pays plain loads and stores, and its window, which may show all of memory,
//! claims nothing: it is looked through when a page becomes code.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine_core::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Bit of a vCPU, by its number.
pub(crate) type Set = u16;

const WRITERS: u32 = 16;
const LINES: u32 = 32;
/// Bytes of a line, as a power of two.
const LINE: u32 = 7;

/// Bytes of a chunk.
const CHUNK: u64 = 2 << 20;

/// One word per page of RAM.
pub(crate) struct Pages {
    regions: Vec<Region>,
    alone: bool,
}

struct Region {
    start: u64,
    words: Box<[AtomicU64]>,
    /// One for each chunk: it has held code.
    chunks: Box<[AtomicBool]>,
}

/// What there was when a page was entered.
pub(crate) struct Entered {
    /// The vCPU wasn't a holder.
    pub new: bool,
    /// Who may be writing to it unseen.
    pub writers: Set,
}

impl Pages {
    pub(crate) fn new(ram: &GuestRam, alone: bool) -> Pages {
        let regions = ram.iter().map(|region| {
            let words = Box::new_zeroed_slice(region.len().div_ceil(4096) as usize);
            let chunks = region.len().div_ceil(CHUNK);
            Region {
                start: region.start_addr().0,
                // SAFETY: zero is a valid `AtomicU64`. Untouched, the words cost no memory.
                words: unsafe { words.assume_init() },
                chunks: (0..chunks).map(|_| AtomicBool::new(false)).collect(),
            }
        });
        Pages {
            regions: regions.collect(),
            alone,
        }
    }

    fn word(&self, phys: u64) -> Option<&AtomicU64> {
        self.regions.iter().find_map(|region| {
            let page = phys.checked_sub(region.start)? >> 12;
            region.words.get(page as usize)
        })
    }

    fn chunk(&self, phys: u64) -> Option<&AtomicBool> {
        self.regions.iter().find_map(|region| {
            let chunk = phys.checked_sub(region.start)? / CHUNK;
            region.chunks.get(chunk as usize)
        })
    }

    fn load(&self, phys: u64) -> u64 {
        self.word(phys)
            .map_or(0, |word| word.load(Ordering::SeqCst))
    }

    fn set(&self, word: &AtomicU64, bits: u64) -> u64 {
        if self.alone {
            let old = word.load(Ordering::Relaxed);
            word.store(old | bits, Ordering::Relaxed);
            old
        } else {
            word.fetch_or(bits, Ordering::SeqCst)
        }
    }

    /// Makes `me` a holder of the page at `phys`.
    pub(crate) fn enter(&self, phys: u64, me: usize) -> Entered {
        if let Some(chunk) = self.chunk(phys) {
            chunk.store(true, Ordering::Relaxed);
        }
        let old = self
            .word(phys)
            .map_or(1 << me, |word| self.set(word, 1 << me));
        Entered {
            new: old & 1 << me == 0,
            writers: (old >> WRITERS) as Set,
        }
    }

    /// Ends it.
    pub(crate) fn leave(&self, phys: u64, me: usize) {
        let Some(word) = self.word(phys) else { return };
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            let left = old & !(1 << me);
            let lines = if left as Set == 0 { u32::MAX } else { 0 };
            Some(left & !(u64::from(lines) << LINES))
        });
    }

    /// True if anybody has code from the page at `phys`.
    pub(crate) fn is_code(&self, phys: u64) -> bool {
        self.load(phys) as Set != 0
    }

    /// True if `me` has code from the page at `phys`, or is about to.
    pub(crate) fn holds(&self, phys: u64, me: usize) -> bool {
        self.word(phys).is_none() || self.load(phys) >> me & 1 == 1
    }

    /// Makes `me` a writer of the page at `phys`. Refused if it holds code: each write has to be
    /// told then.
    pub(crate) fn claim(&self, phys: u64, me: usize) -> bool {
        let Some(word) = self.word(phys) else {
            return true;
        };
        let claim = 1 << (WRITERS as usize + me);
        let seen = word.load(Ordering::SeqCst);
        // A page of code and data is written often: no use in troubling its holders each time.
        if seen as Set != 0 {
            return false;
        }
        seen & claim != 0 || self.set(word, claim) as Set == 0
    }

    /// Most bytes to be claimed at once.
    pub(crate) fn most_at_once(&self) -> u64 {
        if self.alone { u64::MAX } else { CHUNK }
    }

    /// [Claims](Pages::claim) all pages from `phys` on, but for those that it answers, which hold code.
    /// An only vCPU claims none.
    pub(crate) fn claim_all(&self, phys: u64, bytes: u64, me: usize) -> Vec<u64> {
        let mut code = Vec::new();
        let mut at = phys;
        while at < phys + bytes {
            let chunk_end = (at / CHUNK + 1) * CHUNK;
            let end = chunk_end.min(phys + bytes);
            let held = |chunk: &AtomicBool| chunk.load(Ordering::Relaxed);
            if !self.alone {
                code.extend(
                    (at..end)
                        .step_by(4096)
                        .filter(|&page| !self.claim(page, me)),
                );
            } else if self.chunk(at).is_some_and(held) {
                code.extend((at..end).step_by(4096).filter(|&page| self.is_code(page)));
            }
            at = end;
        }
        code
    }

    /// Takes back a claim. Only for `me` to do, after nothing of it is left.
    pub(crate) fn disclaim(&self, phys: u64, me: usize) {
        let Some(word) = self.word(phys) else { return };
        word.fetch_and(!(1 << (WRITERS as usize + me)), Ordering::SeqCst);
    }

    /// Notes that code was made from `len` bytes at `phys`, which lie in one page. True if that is
    /// news: they have to be read again then.
    pub(crate) fn watch(&self, phys: u64, len: u64) -> bool {
        let lines = lines(phys, len);
        self.word(phys)
            .is_some_and(|word| !self.set(word, lines) & lines != 0)
    }

    /// Who has code from any of `len` bytes at `phys`, which lie in one page, as far as lines tell.
    pub(crate) fn watchers(&self, phys: u64, len: u64) -> Set {
        let word = self.load(phys);
        if word & lines(phys, len) == 0 {
            0
        } else {
            word as Set
        }
    }
}

/// Lines of `len` bytes at `phys`, in their place in the word.
fn lines(phys: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = (phys & 0xfff) >> LINE;
    let last = ((phys & 0xfff) + len - 1).min(0xfff) >> LINE;
    let count = last - first + 1;
    (u64::MAX >> (64 - count)) << (first + u64::from(LINES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> Pages {
        let ram = engine_core::memory::create(1).expect("a MiB");
        Pages::new(&ram, false)
    }

    #[test]
    fn a_page_of_code_can_not_be_claimed() {
        let pages = pages();
        assert!(pages.claim(0x1234, 3));
        assert!(pages.claim(0x1000, 5));
        assert_eq!(pages.enter(0x1fff, 0).writers, 1 << 3 | 1 << 5);
        assert!(!pages.claim(0x1000, 3));
        pages.disclaim(0x1000, 3);
        assert_eq!(pages.enter(0x1000, 1).writers, 1 << 5);
        assert!(!pages.enter(0x1000, 1).new);
        assert_eq!(pages.claim_all(0, 0x4000, 2), [0x1000]);
        pages.leave(0x1000, 0);
        assert!(pages.is_code(0x1000));
        pages.leave(0x1000, 1);
        assert!(pages.claim(0x1000, 3));
        // Memory that isn't RAM holds no code.
        assert!(pages.claim(1 << 40, 0));
    }

    #[test]
    fn lines_tell_code_from_data_beside_it_until_the_last_holder_leaves() {
        let pages = pages();
        pages.enter(0x2000, 0);
        assert!(pages.watch(0x207f, 2));
        assert!(!pages.watch(0x2000, 256));
        pages.enter(0x2000, 1);
        assert_eq!(pages.watchers(0x20f8, 8), 3);
        assert_eq!(pages.watchers(0x2100, 8), 0);
        assert_eq!(pages.watchers(0x2000, 4096), 3);
        pages.leave(0x2000, 0);
        assert_eq!(pages.watchers(0x2000, 1), 2);
        pages.leave(0x2000, 1);
        pages.enter(0x2000, 1);
        assert_eq!(pages.watchers(0x2000, 4096), 0);
        assert!(pages.watch(0x2fff, 1));
        assert_eq!(pages.watchers(0x2f80, 1), 2);
    }
}
