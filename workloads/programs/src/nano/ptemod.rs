//! `ptemod`: a page-table entry is changed between two frames, with no flush in between. Settling
//! invalidates the page and reads through the entry written last.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "ptemod",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "store that changes a page-table entry, without a flush",
    program: Program::Nano(Operation::PteMod),
};

#[inline(always)]
pub(crate) fn stores<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for index in 0..iterations {
        platform.modify_entry(index);
    }
    iterations
}
