//! `callret`: a call and a return in ring 0, where a translator has to find its own way back.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "callret",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "call and return in ring 0",
    program: Program::Nano(Operation::CallRet),
};

#[inline(always)]
pub(super) fn calls<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = platform.call_return(sum);
    }
    sum
}
