//! `pgfault`: a page fault in ring 0, taken, mended and returned from.
//!
//! One iteration is the read that faults, the handler that writes the page-table entry, the read
//! again, and the loop's own unmapping (store and invlpg) that makes the next read fault. Where an
//! application takes the faults, the loop is [`touches`].

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
pub(crate) fn faults<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.page_fault());
    }
    sum
}

/// An application's way to touch pages that are not present.
pub trait Touches {
    /// Reads the first word of a page that is not present, and sees that the page of the next call
    /// is not present either.
    fn touch(&mut self, index: u64) -> u64;
}

/// The loop of an application, which has its own count: the handler's is settled.
#[inline(always)]
pub fn touches(machine: &mut impl Touches, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        let count = index + 1;
        sum = fold(sum, machine.touch(index).wrapping_add(count));
    }
    sum
}
