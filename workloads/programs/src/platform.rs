//! What a workload may ask of its machine.

use crate::{
    Refusal,
    micro::Micro,
    nano::{Operation, divzero, pgfault, ptemod},
};

/// A compute kernel: arena, size, iterations; returns a checksum.
///
/// It uses nothing but its arguments, never panics, and may be called with any size that
/// [`crate::Workload::words`] says the arena holds.
pub type Kernel = fn(arena: &mut [u64], size: u64, iterations: u64) -> u64;

/// A machine, as a workload sees it: memory, and one method for each privileged operation.
///
/// Every operation method does exactly one operation, and returns what the operation returned or
/// changed where it returns anything. Implementations inline to the bare instruction.
pub trait Platform {
    /// Words (8 bytes each) of memory that [`Platform::compute`] hands to a kernel.
    fn arena_words(&self) -> u64;

    /// Calls a kernel as an application: in ring 3 where the machine has rings.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the kernel faults.
    fn compute(&mut self, kernel: Kernel, size: u64, iterations: u64) -> Result<u64, Refusal>;

    /// Brings the machine into the state that the operation starts from (documented at each
    /// [`Operation`]) and tries it once.
    ///
    /// # Errors
    /// The machine has no such operation, or the trial showed that it does not work.
    fn arm(&mut self, operation: Operation) -> Result<(), Refusal>;

    /// Ends a series of operations; returns what they left behind, as documented at each
    /// [`Operation`].
    fn settle(&mut self, operation: Operation) -> u64;

    /// Runs [`crate::nano::syscall::calls`] as an application, with the machine's own
    /// [`crate::nano::syscall::Syscalls`].
    ///
    /// # Errors
    /// [`Refusal::Fault`] when a call faults.
    fn syscalls(&mut self, iterations: u64) -> Result<u64, Refusal>;

    /// Calls the host for nothing; returns what it answers, which is 0.
    fn hypercall(&mut self) -> u64;

    /// Reads the UART's scratch register.
    fn port_in(&mut self) -> u8;

    /// Writes the UART's scratch register.
    fn port_out(&mut self, value: u8);

    /// EDX of CPUID leaf 1.
    fn cpuid(&mut self) -> u32;

    /// Loads CR3 with the value it has.
    fn reload_root(&mut self);

    /// Invalidates the translation of the probe page.
    fn invalidate(&mut self);

    /// Reads the probe page while it is not present; the page-fault handler maps it to frame A and
    /// counts. The page is unmapped and invalidated again. Returns the word read plus the count.
    fn page_fault(&mut self) -> u64;

    /// [`Platform::page_fault`] that many times, folded. A machine whose faults an application takes
    /// does it all with [`pgfault::touches`] there.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults elsewhere.
    #[inline(always)]
    fn page_faults(&mut self, iterations: u64) -> Result<u64, Refusal>
    where
        Self: Sized,
    {
        Ok(pgfault::faults(self, iterations))
    }

    /// Divides by zero; the handler skips the instruction and counts. Returns the count.
    fn divide_by_zero(&mut self) -> u64;

    /// [`Platform::divide_by_zero`] that many times, folded. A machine whose faults an application
    /// takes does it all with [`divzero::divisions`] there.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults elsewhere.
    #[inline(always)]
    fn divide_errors(&mut self, iterations: u64) -> Result<u64, Refusal>
    where
        Self: Sized,
    {
        Ok(divzero::faults(self, iterations))
    }

    /// Calls a function that returns three times `value` plus one.
    fn call_return(&mut self, value: u64) -> u64;

    /// Writes the task priority (CR8), 0 to 15.
    fn set_priority(&mut self, value: u64);

    /// Points the probe page's entry at frame A (even) or B (odd), and invalidates nothing.
    fn modify_entry(&mut self, which: u64);

    /// [`Platform::modify_entry`] that many times, with 0, 1, 2 and so on. A machine that changes
    /// entries in batches does so here, and leaves the state that single changes would leave.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when an application that reads through the entries faults.
    #[inline(always)]
    fn modify_entries(&mut self, iterations: u64) -> Result<u64, Refusal>
    where
        Self: Sized,
    {
        Ok(ptemod::stores(self, iterations))
    }

    /// Masks interrupts and unmasks them again.
    fn mask_unmask(&mut self);

    /// Brings the machine into the state that the act starts from (documented at each [`Micro`])
    /// and tries it once. What an earlier run that faulted has left behind is given back first.
    ///
    /// # Errors
    /// The machine has no address spaces, or the trial showed that they do not work.
    fn set_up(&mut self, micro: Micro, size: u64) -> Result<(), Refusal>;

    /// Gives back what [`Platform::set_up`] took; returns what the acts left behind, as documented
    /// at each [`Micro`].
    fn take_down(&mut self, micro: Micro) -> u64;

    /// Switches to the address space of that number, from 0, and calls
    /// [`crate::micro::ctxsw::step`] as an application there.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults.
    fn switch(&mut self, space: u64) -> Result<u64, Refusal>;

    /// Calls [`crate::micro::pfstorm::storm`] as an application, on pages of which none is mapped.
    /// The page-fault handler maps the frame of the storm's fault number N, which starts with
    /// [`crate::micro::pfstorm::tag`] of N, and counts. The pages are unmapped again.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults elsewhere.
    fn storm(&mut self, pages: u64, round: u64) -> Result<u64, Refusal>;

    /// Creates an address space with `pages` pages that start with
    /// [`crate::micro::aspace::content`], calls [`crate::micro::aspace::visit`] as an application
    /// there, and destroys the space.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults.
    fn space(&mut self, pages: u64, life: u64) -> Result<u64, Refusal>;
}
