//! `rep_movsb`: a page is copied by one string instruction. The source changes with each iteration;
//! settling folds the whole target.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "rep_movsb",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "rep movsb of 4 KiB",
    program: Program::Nano(Operation::RepMovsb),
};

#[inline(always)]
pub(super) fn copies<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        sum = fold(sum, platform.copy_page(index));
    }
    sum
}
