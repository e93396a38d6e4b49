//! `in`: a port read. The scratch register holds [`VALUE`], so every read must return it.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "in",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "read of the UART's scratch register",
    program: Program::Nano(Operation::In),
};

/// What the scratch register holds while `in` runs.
pub const VALUE: u8 = 0x5a;

#[inline(always)]
pub(super) fn reads<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.port_in().into());
    }
    sum
}
