//! `cr3_reload`: CR3 is loaded with the value it has, which flushes every non-global translation
//! (SDM 3A 4.10.4.1). The probe page's entry is changed before the first reload, so a machine that
//! flushes nothing settles with the old frame's word.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "cr3_reload",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "mov to CR3 of the value it has",
    program: Program::Nano(Operation::Cr3Reload),
};

#[inline(always)]
pub(super) fn reloads<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for _ in 0..iterations {
        platform.reload_root();
    }
    iterations
}
