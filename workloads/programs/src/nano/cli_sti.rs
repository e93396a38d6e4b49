//! `cli_sti`: interrupts are masked and unmasked. Settling says whether they are unmasked.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "cli_sti",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "cli and sti",
    program: Program::Nano(Operation::CliSti),
};

#[inline(always)]
pub(super) fn pairs<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for _ in 0..iterations {
        platform.mask_unmask();
    }
    iterations
}
