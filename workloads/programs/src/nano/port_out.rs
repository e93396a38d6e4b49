//! `out`: a port write, of a changing value. Settling reads the last one back.

use super::Operation;
use crate::{Group, Platform, Ring, Workload, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "out",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "write of the UART's scratch register",
    program: Program::Nano(Operation::Out),
};

#[inline(always)]
pub(super) fn writes<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    for index in 0..iterations {
        platform.port_out(index as u8);
    }
    iterations
}
