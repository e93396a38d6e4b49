//! `sort`: quicksort of pseudo-random words. Branches that can't be predicted, and a call stack.

use super::{Random, nothing};
use crate::{Group, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "sort",
    group: Group::Compute,
    ring: Ring::User,
    size: 8192,
    iterations: 40,
    operation: "SIZE words filled with pseudo-random numbers and sorted",
    program: Program::Compute {
        words: Some,
        limit: u64::MAX,
        prepare: nothing,
        run,
    },
};

/// Below this length insertion sort is faster.
const SHORT: usize = 16;

#[inline(never)]
fn run(arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let Some(words) = arena.get_mut(..size as usize) else {
        return 0;
    };
    let mut random = Random::new(0x736f_7274);
    let mut sum = 0;
    for _ in 0..iterations {
        for word in words.iter_mut() {
            *word = random.next();
        }
        quicksort(words);
        // The order is part of the sum: an unsorted array gives another one.
        for (index, &word) in words.iter().enumerate().step_by(61) {
            sum = mix(sum, word ^ index as u64);
        }
    }
    sum
}

#[inline(never)]
fn quicksort(mut words: &mut [u64]) {
    // Recursion into the smaller part only: the stack stays logarithmic.
    while words.len() > SHORT {
        let middle = partition(words);
        let (left, right) = words.split_at_mut(middle);
        let (smaller, larger) = if left.len() < right.len() {
            (left, right)
        } else {
            (right, left)
        };
        quicksort(smaller);
        words = larger;
    }
    for end in 1..words.len() {
        let value = words[end];
        let mut at = end;
        while at > 0 && words[at - 1] > value {
            words[at] = words[at - 1];
            at -= 1;
        }
        words[at] = value;
    }
}

/// Hoare's partition around the median of three: everything before the result is at most the
/// pivot, everything from it on at least. Neither part is empty.
#[inline(always)]
fn partition(words: &mut [u64]) -> usize {
    let (first, middle, last) = (words[0], words[words.len() / 2], words[words.len() - 1]);
    let pivot = first.min(middle).max(first.max(middle).min(last));
    let (mut low, mut high) = (0, words.len() - 1);
    loop {
        while words[low] < pivot {
            low += 1;
        }
        while words[high] > pivot {
            high -= 1;
        }
        if low >= high {
            // 0 only if the first element were the one smallest, which a median of three never is.
            return low.max(1);
        }
        words.swap(low, high);
        low += 1;
        high -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_every_pattern() {
        let patterns: [fn(u64) -> u64; 6] = [
            |i| i,
            |i| u64::MAX - i,
            |_| 7,
            |i| i % 3,
            |i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            |i| i ^ 0x55,
        ];
        for pattern in patterns {
            for length in 0..200 {
                let mut words: alloc::vec::Vec<u64> = (0..length).map(pattern).collect();
                let mut expected = words.clone();
                expected.sort_unstable();
                quicksort(&mut words);
                assert_eq!(words, expected, "length {length}");
            }
        }
    }
}
