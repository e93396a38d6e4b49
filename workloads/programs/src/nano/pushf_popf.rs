//! `pushf_popf`: the flags go to the stack and come back. In between the carry is inverted, so a
//! popf that restores nothing gives another checksum.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "pushf_popf",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "pushfq, popfq",
    program: Program::Nano(Operation::PushfPopf),
};

#[inline(always)]
pub(super) fn pairs<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        // 1 for the iteration, so that a clear carry counts too.
        sum = fold(sum, platform.keep_carry(index) + 1);
    }
    sum
}
