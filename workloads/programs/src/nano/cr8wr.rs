//! `cr8wr`: the task priority is written with a changing value. Settling reads the last one back.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "cr8wr",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "mov to CR8 of a changing value",
    program: Program::Nano(Operation::Cr8Write),
};

#[inline(always)]
pub(super) fn writes<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for index in 0..iterations {
        platform.set_priority(index & 15);
    }
    iterations
}
