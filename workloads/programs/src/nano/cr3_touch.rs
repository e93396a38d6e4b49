//! `cr3_touch`: CR3 is loaded with the value it has, and the probe page is read: what a flush costs
//! whoever goes on. The probe page's entry is changed before the first reload, so a machine that
//! flushes nothing reads the old frame's word.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "cr3_touch",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "mov to CR3 of the value it has, then a read of one page",
    program: Program::Nano(Operation::Cr3Touch),
};

#[inline(always)]
pub(super) fn touches<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.reload_and_touch());
    }
    sum
}
