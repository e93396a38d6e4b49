//! `cpuid`: leaf 1, of which only the features that every processor with long mode has are folded,
//! so that the checksum does not depend on the processor.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "cpuid",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "CPUID leaf 1",
    program: Program::Nano(Operation::Cpuid),
};

/// Bits of EDX that are set on every processor with long mode: FPU, TSC, MSR, PAE, CX8, CMOV,
/// FXSR, SSE, SSE2 (SDM 2A, CPUID; APM 3, appendix D).
pub const ALWAYS: u32 =
    1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 15 | 1 << 24 | 1 << 25 | 1 << 26;

#[inline(always)]
pub(super) fn reads<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, (platform.cpuid() & ALWAYS).into());
    }
    sum
}
