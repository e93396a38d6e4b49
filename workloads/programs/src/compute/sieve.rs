//! `sieve`: Eratosthenes over bytes. Strided stores, short inner loops.

use super::nothing;
use crate::{Group, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "sieve",
    group: Group::Compute,
    ring: Ring::User,
    size: 65_536,
    iterations: 100,
    operation: "primes below SIZE, one byte per number",
    program: Program::Compute {
        words: |size| size.checked_add(7).map(|bytes| bytes / 8),
        limit: u64::MAX,
        prepare: nothing,
        run,
    },
};

#[inline(never)]
fn run(arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let mut sum = 0;
    for iteration in 0..iterations {
        // A limit that changes with each iteration, so that no two are alike.
        let limit = size.saturating_sub(iteration % 16).max(1) as usize;
        for word in arena.iter_mut().take(limit.div_ceil(8)) {
            *word = 0x0101_0101_0101_0101;
        }
        let bytes = arena.len() * 8;
        // SAFETY: the same memory, exclusively borrowed; u8 has no alignment and no invalid value.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(arena.as_mut_ptr().cast::<u8>(), bytes) };
        let Some(prime) = bytes.get_mut(..limit) else {
            return 0;
        };
        let mut number = 2;
        while number * number < limit {
            if prime[number] != 0 {
                let mut multiple = number * number;
                while let Some(flag) = prime.get_mut(multiple) {
                    *flag = 0;
                    multiple += number;
                }
            }
            number += 1;
        }
        let mut last = 0;
        let mut count = 0;
        for (number, &flag) in prime.iter().enumerate().skip(2) {
            if flag != 0 {
                last = number as u64;
                count += 1;
            }
        }
        sum = mix(mix(sum, count), last);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_primes_below_a_million() {
        let mut arena = alloc::vec![0; 125_000];
        assert_eq!(run(&mut arena, 1_000_000, 1), mix(mix(0, 78_498), 999_983));
    }
}
