//! `chase`: a walk along pointers in an order that no prefetcher guesses. Latency of loads, and
//! of whatever stands between a guest's address and its memory.

use super::Random;
use crate::{Group, Ring, Workload, mix, workload::Program};

/// Steps of one iteration.
const STEPS: u64 = 8192;

pub(crate) const WORKLOAD: Workload = Workload {
    name: "chase",
    group: Group::Compute,
    ring: Ring::User,
    // 4 MiB.
    size: 524_288,
    iterations: 100,
    operation: "8192 dependent loads along a random cycle through SIZE words",
    program: Program::Compute {
        words: Some,
        limit: u64::MAX,
        prepare,
        run,
    },
};

/// Sattolo's algorithm: a random permutation that is one single cycle.
#[inline(never)]
fn prepare(arena: &mut [u64], size: u64, _iterations: u64) -> u64 {
    let Some(words) = arena.get_mut(..size as usize) else {
        return 0;
    };
    for (index, word) in words.iter_mut().enumerate() {
        *word = index as u64;
    }
    let mut random = Random::new(0x0063_6861_7365);
    for index in (1..words.len()).rev() {
        let other = random.below(index as u64) as usize;
        words.swap(index, other);
    }
    size
}

#[inline(never)]
fn run(arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let Some(words) = arena.get(..size as usize) else {
        return 0;
    };
    let mut sum = 0;
    let mut at = 0;
    for _ in 0..iterations {
        for _ in 0..STEPS {
            let Some(&next) = words.get(at as usize) else {
                return 0;
            };
            at = next;
        }
        // The iteration count goes in, so that a tiny cycle that returns to its start still counts.
        sum = mix(sum, at.wrapping_add(1));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cycle_visits_every_word() {
        for size in 1..100 {
            let mut arena = alloc::vec![0; size];
            prepare(&mut arena, size as u64, 1);
            let mut at = 0;
            for step in 1..=size {
                at = arena[at] as usize;
                assert_eq!(at == 0, step == size, "size {size}");
            }
        }
    }
}
