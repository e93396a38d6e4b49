//! `syscall`: from ring 3 into the kernel and back.
//!
//! The loop is an application's, so it is apart from the other operations: a machine calls
//! [`calls`] where applications run, with its own [`Syscalls`].

use super::Operation;
use crate::{Group, Ring, Workload, fold, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "syscall",
    group: Group::Nano,
    ring: Ring::User,
    size: 1,
    iterations: 2000,
    operation: "syscall from ring 3, a function of its argument, sysret",
    program: Program::Nano(Operation::Syscall),
};

/// What the kernel answers to a system call.
#[inline(always)]
pub fn answer(argument: u64) -> u64 {
    argument ^ KEY
}

/// Mixed into every answer. A guest kernel keeps it in memory that ring 3 can't read.
pub const KEY: u64 = 0x5a17_c0de_0b5e_55ed;

/// A way to make a system call.
pub trait Syscalls {
    /// Makes one call; returns [`answer`] of the argument.
    fn syscall(&mut self, argument: u64) -> u64;
}

/// The measured loop, with the machine's way to call inlined.
#[inline(always)]
pub fn calls(machine: &mut impl Syscalls, iterations: u64) -> u64 {
    let mut sum = 0;
    for index in 0..iterations {
        sum = fold(sum, machine.syscall(index));
    }
    sum
}
