//! `divzero`: a divide error, taken and returned from past the division. Where an application
//! takes the errors, the loop is [`divisions`].

use super::Operation;
use crate::{Group, Platform, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "divzero",
    group: Group::Nano,
    ring: Ring::Kernel,
    size: 1,
    iterations: 2000,
    operation: "division by zero, handler that skips it",
    program: Program::Nano(Operation::DivZero),
};

#[inline(always)]
pub(crate) fn faults<P: Platform>(platform: &mut P, iterations: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..iterations {
        sum = fold(sum, platform.divide_by_zero());
    }
    sum
}

/// An application's way to divide by zero.
pub trait Divisions {
    /// Divides by zero once.
    fn divide(&mut self);
}

/// The loop of an application, which has its own count: the handler's is settled.
#[inline(always)]
pub fn divisions(machine: &mut impl Divisions, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        machine.divide();
        sum = fold(sum, index + 1);
    }
    sum
}
