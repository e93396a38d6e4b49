//! `pgfault`: a page fault in ring 0, taken, mended and returned from.
//!
//! One iteration is the read that faults, the handler that writes the page-table entry, the read
//! again, and the loop's own unmapping (store and invlpg) that makes the next read fault.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "pgfault",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "read of a page that is not present, handler that maps it, unmapping, invlpg",
    program: Program::Nano(Operation::PageFault),
};

#[inline(always)]
pub(super) fn faults<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.page_fault());
    }
    sum
}
