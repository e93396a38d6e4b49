//! `empty`: nothing at all. Its window is the cost of the window, which is subtracted from others.

use crate::{Group, Ring, Workload, workload::Program};

/// What every run of it returns.
pub(crate) const CHECKSUM: u64 = 0x656d_7074_7900_0000;

pub(crate) const WORKLOAD: Workload = Workload {
    name: "empty",
    group: Group::Empty,
    ring: Ring::Kernel,
    size: 1,
    iterations: 1,
    operation: "nothing, however many iterations are asked for",
    program: Program::Empty,
};
