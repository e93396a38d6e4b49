//! `divzero`: a divide error, taken and returned from past the division.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "divzero",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "division by zero, handler that skips it",
    program: Program::Nano(Operation::DivZero),
};

#[inline(always)]
pub(super) fn faults<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.divide_by_zero());
    }
    sum
}
