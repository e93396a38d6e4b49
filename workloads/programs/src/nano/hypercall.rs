//! `hypercall`: a call of the host that does nothing. Only a guest that knows of its host has one.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "hypercall",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "hypercall that does nothing and answers 0",
    program: Program::Nano(Operation::Hypercall),
};

#[inline(always)]
pub(super) fn calls<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        // 1 for the iteration, so that one that answers 0 still counts.
        sum = fold(sum, platform.hypercall().wrapping_add(1));
    }
    sum
}
