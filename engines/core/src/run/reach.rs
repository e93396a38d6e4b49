//! How a vCPU's thread reaches the machine: the one that runs the only vCPU owns it, each of several
//! takes a lock between leaving its guest and entering it again.

use std::ops::DerefMut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Machine;

/// Access to the machine for a while.
pub(super) trait Reach {
    /// Access while this is held.
    type Hold<'a>: DerefMut<Target = Machine>
    where
        Self: 'a;

    /// Waits until the machine is this thread's.
    fn hold(&mut self) -> Self::Hold<'_>;
}

/// The machine of one vCPU.
pub(super) struct Sole<'m>(pub(super) &'m mut Machine);

impl Reach for Sole<'_> {
    type Hold<'a>
        = &'a mut Machine
    where
        Self: 'a;

    #[inline]
    fn hold(&mut self) -> &mut Machine {
        self.0
    }
}

/// The machine of several vCPUs, as one of them reaches it.
pub(super) struct Shared {
    pub(super) machine: Arc<Mutex<Machine>>,
    pub(super) cpu: usize,
}

impl Reach for Shared {
    type Hold<'a> = MutexGuard<'a, Machine>;

    fn hold(&mut self) -> MutexGuard<'_, Machine> {
        // A thread that panicked has ended the run, which the others still have to see.
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.irqchip.lapics.set_current(self.cpu);
        machine
    }
}
