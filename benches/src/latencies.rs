//! A guest's histogram while its lines arrive; their grammar stands in [`abi`].
//!
//! Invariant: a [`Histogram`] leaves here only if its ranges ascend without overlap, its counts add
//! up to what was announced, and its exact ends lie within the first and the last range.

use reports_data::Histogram;
use reports_data::histogram::Range;

/// A histogram whose lines are arriving.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    total: u64,
    least: u64,
    most: u64,
    ranges: Vec<Range>,
}

impl Latencies {
    /// Reads the rest of a line `latency`.
    pub(crate) fn open(rest: &str) -> Option<Latencies> {
        let [total, least, most] = numbers(rest)?;
        (total > 0 && least <= most).then(|| Latencies {
            total,
            least,
            most,
            ranges: Vec::new(),
        })
    }

    /// Reads the rest of a line `bucket`; `None` if it has no place here.
    pub(crate) fn take(&mut self, rest: &str) -> Option<()> {
        let [low, high, count] = numbers(rest)?;
        let ascends = self.ranges.last().is_none_or(|last| last.high < low);
        let has_place = low <= high && count > 0 && ascends;
        has_place.then(|| self.ranges.push(Range { low, high, count }))
    }

    /// All of it; `None` if the counts don't add up or the ends lie outside of their ranges.
    pub(crate) fn close(mut self) -> Option<Histogram> {
        let mut ranges = self.ranges.iter();
        let total = ranges.try_fold(0u64, |sum, range| sum.checked_add(range.count))?;
        let holds = |range: &Range, value| range.low <= value && value <= range.high;
        let (first, last) = (self.ranges.first()?, self.ranges.last()?);
        if total != self.total || !holds(first, self.least) || !holds(last, self.most) {
            return None;
        }
        self.ranges.first_mut()?.low = self.least;
        self.ranges.last_mut()?.high = self.most;
        let mut histogram = Histogram::default();
        for range in self.ranges {
            histogram.add(range);
        }
        Some(histogram)
    }
}

/// Exactly that many decimal numbers.
fn numbers<const N: usize>(text: &str) -> Option<[u64; N]> {
    let numbers: Option<Vec<u64>> = text.split(' ').map(|word| word.parse().ok()).collect();
    numbers?.try_into().ok()
}
