//! `invlpg`: one translation is invalidated (SDM 3A 4.10.4.1). The probe page's entry is changed
//! before the first one, so a machine that flushes nothing settles with the old frame's word.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "invlpg",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "invlpg of one page",
    program: Program::Nano(Operation::Invlpg),
};

#[inline(always)]
pub(super) fn invalidations<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for _ in 0..iterations {
        platform.invalidate();
    }
    iterations
}
