//! `int3`: a breakpoint, taken and returned from. Where an application takes the breakpoints, the
//! loop is [`breakpoints`].

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "int3",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "int3, handler that counts, iret",
    program: Program::Nano(Operation::Int3),
};

#[inline(always)]
pub(crate) fn traps<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.breakpoint());
    }
    sum
}

/// An application's way to take a breakpoint.
pub trait Breakpoints {
    /// Takes one breakpoint.
    fn hit(&mut self);
}

/// The loop of an application, which has its own count: the handler's is settled.
#[inline(always)]
pub fn breakpoints(machine: &mut impl Breakpoints, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        machine.hit();
        sum = fold(sum, index + 1);
    }
    sum
}
