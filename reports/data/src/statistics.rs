//! Median, bootstrap interval and the random numbers behind it.
//!
//! The interval is the percentile bootstrap of the median (Efron 1979): resample with
//! replacement, take the median, keep the 2.5 % and 97.5 % quantiles. The generator is SplitMix64
//! (Steele, Lea, Flood 2014), so that a seed gives the same interval everywhere and for ever.

/// Resamples behind every interval.
pub const RESAMPLES: usize = 10_000;

/// A small deterministic generator: SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that yields the same sequence for the same seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; the bias is at most bound / 2^64.
    ///
    /// # Panics
    /// If `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "no number is below 0");
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }
}

/// A generator of a key's own: FNV-1a of the key, mixed into the seed. So an interval does not depend
/// on which others are computed.
pub fn keyed(seed: u64, key: &[&str]) -> Rng {
    let hash = key
        .join("\0")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    Rng::new(seed ^ hash)
}

/// The median; the mean of the two middle values for an even number. `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    median_of(&mut sorted)
}

/// As [`median`], reordering `values` instead of copying them.
fn median_of(values: &mut [f64]) -> Option<f64> {
    let middle = values.len() / 2;
    if values.is_empty() {
        return None;
    }
    let even = values.len().is_multiple_of(2);
    let (below, &mut upper, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    if !even {
        return Some(upper);
    }
    let lower = below.iter().copied().max_by(f64::total_cmp)?;
    // Halved first: the sum of two large values may overflow.
    Some(lower / 2.0 + upper / 2.0)
}

/// 95 % interval of the median of `values`. `None` for fewer than two values: one value says
/// nothing about spread.
pub fn median_interval(values: &[f64], rng: &mut Rng) -> Option<(f64, f64)> {
    if values.len() < 2 {
        return None;
    }
    let mut draw = vec![0.0; values.len()];
    interval(|| {
        resample(values, &mut draw, rng);
        median_of(&mut draw)
    })
}

/// 95 % interval of median(`numerator`) / median(`denominator`), both resampled independently.
/// `None` if either has fewer than two values or a resampled denominator is not positive.
pub fn ratio_interval(numerator: &[f64], denominator: &[f64], rng: &mut Rng) -> Option<(f64, f64)> {
    if numerator.len() < 2 || denominator.len() < 2 {
        return None;
    }
    let mut above = vec![0.0; numerator.len()];
    let mut below = vec![0.0; denominator.len()];
    interval(|| {
        resample(numerator, &mut above, rng);
        resample(denominator, &mut below, rng);
        let ratio = median_of(&mut above)? / median_of(&mut below).filter(|&d| d > 0.0)?;
        ratio.is_finite().then_some(ratio)
    })
}

fn resample(values: &[f64], draw: &mut [f64], rng: &mut Rng) {
    for slot in draw {
        *slot = values[rng.below(values.len())];
    }
}

fn interval(mut statistic: impl FnMut() -> Option<f64>) -> Option<(f64, f64)> {
    let mut results = (0..RESAMPLES)
        .map(|_| statistic())
        .collect::<Option<Vec<f64>>>()?;
    results.sort_unstable_by(f64::total_cmp);
    let tail = RESAMPLES / 40;
    Some((results[tail], results[RESAMPLES - 1 - tail]))
}

/// Geometric mean of positive values; `None` without values or if one is not positive.
pub fn geomean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|&v| v.is_nan() || v <= 0.0) {
        return None;
    }
    let mean = values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64;
    Some(mean.exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_nothing() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[f64::MAX, f64::MAX]), Some(f64::MAX));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn splitmix_matches_its_reference_sequence() {
        // First outputs for seed 1234567 of the reference implementation (prng.di.unimi.it/splitmix64.c).
        let mut rng = Rng::new(1234567);
        assert_eq!(rng.next_u64(), 6457827717110365317);
        assert_eq!(rng.next_u64(), 3203168211198807973);
    }

    #[test]
    fn one_value_has_no_interval() {
        assert_eq!(median_interval(&[5.0], &mut Rng::new(1)), None);
    }

    #[test]
    fn interval_narrows_as_samples_grow() {
        let mut rng = Rng::new(7);
        let mut draw = |n: usize| -> Vec<f64> { (0..n).map(|_| rng.below(1000) as f64).collect() };
        let (few, many) = (draw(8), draw(800));
        let width = |values: &[f64]| {
            let (low, high) = median_interval(values, &mut Rng::new(1)).unwrap();
            high - low
        };
        assert!(width(&many) < width(&few) / 3.0);
    }

    #[test]
    fn geomean_refuses_zero() {
        assert_eq!(geomean(&[1.0, 0.0]), None);
        assert!((geomean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-12);
    }
}
