//! Deterministic random numbers: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom
//! number generators, OOPSLA 2014).

/// A generator; equal seeds yield equal sequences on every host.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True `percent` times of a hundred.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A value that carry, sign and overflow logic is sensitive to, or any.
    pub(crate) fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[0, 1, 2, u64::MAX, u64::MAX - 1]),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => self.below(256),
            4 => self.next() as i8 as i64 as u64,
            5 => self.next() as i32 as i64 as u64,
            _ => self.next(),
        }
    }

    /// Such values in all of `words`, which is a whole number of them.
    pub(crate) fn fill(&mut self, words: &mut [u8]) {
        for word in words.chunks_exact_mut(8) {
            word.copy_from_slice(&self.value().to_le_bytes());
        }
    }
}
