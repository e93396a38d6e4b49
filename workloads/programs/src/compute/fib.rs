//! `fib`: Fibonacci numbers by plain recursion. Calls, returns and stack traffic, nothing else.

use super::nothing;
use crate::{Group, Ring, Workload, mix, workload::Program};
use core::arch::asm;

pub(crate) const WORKLOAD: Workload = Workload {
    name: "fib",
    group: Group::Compute,
    ring: Ring::User,
    size: 20,
    iterations: 100,
    operation: "Fibonacci number SIZE by recursion (21,891 calls for 20)",
    program: Program::Compute {
        words: |_| Some(0),
        // Beyond this a single iteration takes years.
        limit: 64,
        prepare: nothing,
        run,
    },
};

#[inline(never)]
fn run(_arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = mix(sum, fib(opaque(size)));
    }
    sum
}

#[inline(never)]
fn fib(n: u64) -> u64 {
    if n < 2 {
        return n;
    }
    // Without the barrier the compiler turns the second call into a loop with an accumulator.
    fib(n - 1).wrapping_add(opaque(fib(n - 2)))
}

/// A value that the compiler knows nothing about. No instruction.
#[inline(always)]
fn opaque(mut value: u64) -> u64 {
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_sequence() {
        let numbers: alloc::vec::Vec<u64> = (0..10).map(fib).collect();
        assert_eq!(numbers, [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]);
    }
}
