//! How long requests took: counts by range, cheap enough to record inside the window.
//!
//! Values are ticks of whatever clock the machine has. 32 ranges for each power of two, so a range
//! is at most 1/32 of its lower end wide; below 64 every value has its own. [`Scale`] turns ticks into
//! nanoseconds, after the window.

/// Ranges for each power of two, as a power of two.
const FINE: u32 = 5;
/// Values from here on count as the greatest.
const BEYOND: u64 = 1 << 40;
/// Number of ranges.
const RANGES: usize = ((40 - FINE as usize) << FINE) + (1 << FINE);

/// Counts by range.
#[derive(Debug)]
pub struct Histogram {
    counts: [u32; RANGES],
    total: u64,
    least: u64,
    most: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// No values. All zeros, so that a static one takes no room in an image.
    pub const fn new() -> Self {
        Histogram {
            counts: [0; RANGES],
            total: 0,
            least: 0,
            most: 0,
        }
    }

    /// Forgets all values.
    #[inline]
    pub fn clear(&mut self) {
        for count in &mut self.counts {
            *count = 0;
        }
        self.total = 0;
        self.least = 0;
        self.most = 0;
    }

    /// Takes one value.
    #[inline]
    pub fn record(&mut self, ticks: u64) {
        let ticks = if ticks < BEYOND { ticks } else { BEYOND - 1 };
        if let Some(count) = self.counts.get_mut(index(ticks)) {
            *count = count.wrapping_add(1);
        }
        if ticks < self.least || self.total == 0 {
            self.least = ticks;
        }
        if ticks > self.most {
            self.most = ticks;
        }
        self.total += 1;
    }

    /// Number of values.
    #[inline]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Least and greatest value, in ticks; `None` without values.
    #[inline]
    pub fn extremes(&self) -> Option<(u64, u64)> {
        (self.total != 0).then_some((self.least, self.most))
    }

    /// Calls `sink` with the first and last value and the count of each range that holds values,
    /// in nanoseconds. Ranges that are the same nanoseconds become one.
    #[inline]
    pub fn ranges(&self, scale: Scale, mut sink: impl FnMut(u64, u64, u64)) {
        let mut pending: Option<(u64, u64, u64)> = None;
        for (range, &count) in self.counts.iter().enumerate() {
            if count == 0 {
                continue;
            }
            let low = scale.nanoseconds(first(range));
            let high = scale.nanoseconds(first(range + 1) - 1);
            pending = Some(match pending {
                Some((start, end, sum)) if low <= end => (
                    start,
                    if high > end { high } else { end },
                    sum + u64::from(count),
                ),
                Some((start, end, sum)) => {
                    sink(start, end, sum);
                    (low, high, count.into())
                }
                None => (low, high, count.into()),
            });
        }
        if let Some((start, end, sum)) = pending {
            sink(start, end, sum);
        }
    }
}

/// The range of a value below [`BEYOND`].
#[inline(always)]
fn index(ticks: u64) -> usize {
    let shift = (63 - (ticks | 1 << FINE).leading_zeros()) - FINE;
    ((u64::from(shift) << FINE) + (ticks >> shift)) as usize
}

/// The first value of a range.
#[inline]
fn first(range: usize) -> u64 {
    let range = range as u64;
    if range < 2 << FINE {
        return range;
    }
    let shift = (range >> FINE) - 1;
    ((range & ((1 << FINE) - 1)) + (1 << FINE)) << shift
}

/// Turns ticks into nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// 2^32 times the nanoseconds of a tick.
    multiplier: u64,
}

impl Scale {
    /// For a clock of that many ticks a second, 1 MHz to 1 THz; `None` for others.
    #[inline]
    pub fn new(hertz: u64) -> Option<Self> {
        (1_000_000..=1_000_000_000_000)
            .contains(&hertz)
            .then(|| Scale {
                multiplier: (1_000_000_000 << 32) / hertz,
            })
    }

    /// Nanoseconds of that many ticks.
    #[inline]
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.multiplier)) >> 32) as u64
    }

    /// Ticks of that many nanoseconds, fewer than 2^32.
    #[inline]
    pub fn ticks(self, nanoseconds: u64) -> u64 {
        (nanoseconds << 32) / self.multiplier
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn every_value_lies_in_its_range() {
        let near = (0..40).flat_map(|power| (-3..=3i64).map(move |off| (1i64 << power) + off));
        for value in (0..5000).chain(near).chain([(1 << 40) - 1]) {
            let Ok(value) = u64::try_from(value) else {
                continue;
            };
            let range = index(value);
            assert!(range < RANGES, "{value}");
            assert!((first(range)..first(range + 1)).contains(&value), "{value}");
            let width = first(range + 1) - first(range);
            assert!(width == 1 || width * 32 <= first(range), "{value}");
        }
    }

    fn ranges(histogram: &Histogram, hertz: u64) -> Vec<(u64, u64, u64)> {
        let mut all = Vec::new();
        histogram.ranges(Scale::new(hertz).unwrap(), |low, high, count| {
            all.push((low, high, count));
        });
        all
    }

    #[test]
    fn counts_add_up_and_ranges_ascend_without_overlap() {
        let mut histogram = Histogram::new();
        for value in (0..100_000).chain([u64::MAX]) {
            histogram.record(value);
        }
        for hertz in [1_000_000, 1_000_000_000, 2_400_000_000, 7_123_456_789] {
            let ranges = ranges(&histogram, hertz);
            assert_eq!(ranges.iter().map(|range| range.2).sum::<u64>(), 100_001);
            assert!(ranges.iter().all(|range| range.0 <= range.1));
            assert!(ranges.is_sorted_by(|one, next| one.1 < next.0));
        }
        assert_eq!(histogram.extremes(), Some((0, (1 << 40) - 1)));
        histogram.clear();
        assert_eq!((histogram.total(), histogram.extremes()), (0, None));
        assert!(ranges(&histogram, 1_000_000_000).is_empty());
    }

    #[test]
    fn ticks_and_nanoseconds_are_inverse() {
        for hertz in [1_000_000, 1_000_000_000, 2_450_000_000] {
            let scale = Scale::new(hertz).unwrap();
            assert_eq!(
                scale
                    .nanoseconds(scale.ticks(1_000_000))
                    .abs_diff(1_000_000)
                    * 1000
                    / 1_000_000,
                0
            );
            assert_eq!(scale.ticks(1_000_000).abs_diff(hertz / 1000), 0);
        }
        assert!(Scale::new(0).is_none());
    }
}
