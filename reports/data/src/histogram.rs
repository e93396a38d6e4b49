//! How long requests took: counts by range of nanoseconds, and percentiles read from them.
//!
//! Invariant: ranges stand in the order of their upper ends, no two are the same, and none is
//! without values. Ranges of different machines may overlap, because their clocks' ticks are of
//! different length.

/// Values from `low` to `high`, both among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Least value in ns.
    pub low: u64,
    /// Greatest value in ns.
    pub high: u64,
    /// How many values.
    pub count: u64,
}

/// Counts by range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    ranges: Vec<Range>,
}

impl Histogram {
    /// Adds the values of a range.
    pub fn add(&mut self, range: Range) {
        if range.count == 0 {
            return;
        }
        let key = |range: &Range| (range.high, range.low);
        match self.ranges.binary_search_by_key(&key(&range), key) {
            Ok(place) => self.ranges[place].count += range.count,
            Err(place) => self.ranges.insert(place, range),
        }
    }

    /// Adds all values of another histogram.
    pub fn merge(&mut self, other: &Histogram) {
        for range in &other.ranges {
            self.add(*range);
        }
    }

    /// The ranges, by upper end.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// How many values there are.
    pub fn total(&self) -> u64 {
        self.ranges.iter().map(|range| range.count).sum()
    }

    /// The value that `share` of all values do not exceed: the upper end of the range that holds it,
    /// so that it is never given too low. Share 1 is the greatest value. `None` without values.
    pub fn percentile(&self, share: f64) -> Option<u64> {
        let total = self.total();
        let rank = ((share * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        self.ranges.iter().find_map(|range| {
            seen += range.count;
            (seen >= rank).then_some(range.high)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(ranges: &[(u64, u64, u64)]) -> Histogram {
        let mut histogram = Histogram::default();
        for &(low, high, count) in ranges {
            histogram.add(Range { low, high, count });
        }
        histogram
    }

    #[test]
    fn percentiles_are_upper_ends_of_the_range_that_holds_the_rank() {
        let latencies = histogram(&[(10, 19, 98), (20, 29, 1), (500, 510, 1)]);
        for (share, value) in [
            (0.0, 19),
            (0.5, 19),
            (0.98, 19),
            (0.985, 29),
            (0.99, 29),
            (0.991, 510),
            (1.0, 510),
        ] {
            assert_eq!(latencies.percentile(share), Some(value), "{share}");
        }
        assert_eq!(Histogram::default().percentile(0.5), None);
    }

    #[test]
    fn merging_adds_counts_of_the_same_range_and_keeps_overlapping_ones() {
        let mut all = histogram(&[(10, 19, 2)]);
        all.merge(&histogram(&[(10, 19, 3), (12, 18, 1), (0, 5, 0)]));
        let expected = histogram(&[(12, 18, 1), (10, 19, 5)]);
        assert_eq!(all, expected);
        assert_eq!(all.total(), 6);
        assert_eq!(all.ranges()[0].high, 18);
    }
}
