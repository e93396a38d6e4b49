//! `rep_stosq`: a page is filled by one string instruction, with another value each time. Settling
//! folds the whole page.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "rep_stosq",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "rep stosq of 4 KiB",
    program: Program::Nano(Operation::RepStosq),
};

#[inline(always)]
pub(super) fn fills<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        sum = fold(sum, platform.fill_page(index));
    }
    sum
}
