//! Compute workloads: an application's work in an arena of 64-bit words.
//!
//! Each kernel is `#[inline(never)]` and not generic, so that it is compiled exactly once, into
//! this crate's object. Data is a function of constants alone: two runs give the same checksum.

pub(crate) mod alu;
pub(crate) mod chase;
pub(crate) mod fib;
pub(crate) mod indirect;
pub(crate) mod sieve;
pub(crate) mod sort;
pub(crate) mod sse_matmul;

/// A kernel for workloads that have nothing to lay out.
#[inline(never)]
pub(crate) fn nothing(_arena: &mut [u64], _size: u64, _iterations: u64) -> u64 {
    0
}

/// A kernel that writes one word in each 4 KiB of the first `words`, so that first-touch faults
/// (of a host's demand paging, or of shadow page tables) stay outside the window.
#[inline(never)]
pub(crate) fn touch(arena: &mut [u64], words: u64, _iterations: u64) -> u64 {
    let Some(used) = arena.get_mut(..words as usize) else {
        return 0;
    };
    for word in used.iter_mut().step_by(512) {
        *word = 1;
    }
    words
}

/// xorshift64* (Vigna 2016): the pseudo-random numbers of all workloads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A stream; seeds differ per workload and are never 0.
    pub(crate) const fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// The next number.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, by multiplication (Lemire 2019) without rejection: the tiny bias
    /// does not matter here.
    #[inline(always)]
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
