//! What a workload may ask of its machine.

use crate::{
    Refusal,
    io::{Direction, Histogram, Io, NO_DEVICE, Timer, histogram::Scale},
    micro::Micro,
    nano::{Operation, divzero, int3, pgfault, ptemod},
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

    /// Takes a breakpoint by int3; the handler counts. Returns the count.
    fn breakpoint(&mut self) -> u64;

    /// [`Platform::breakpoint`] that many times, folded. A machine whose breakpoints an application
    /// takes does it all with [`int3::breakpoints`] there.
    ///
    /// # Errors
    /// [`Refusal::Fault`] when the application faults elsewhere.
    #[inline(always)]
    fn breakpoints(&mut self, iterations: u64) -> Result<u64, Refusal>
    where
        Self: Sized,
    {
        Ok(int3::traps(self, iterations))
    }

    /// Loads CR3 with the value it has and reads the probe page; returns the word.
    fn reload_and_touch(&mut self) -> u64;

    /// Makes the lowest bit of `value` the carry, pushes the flags, inverts the carry, pops the
    /// flags; returns the carry.
    fn keep_carry(&mut self, value: u64) -> u64;

    /// [`crate::nano::Pages::copied`] by rep movsb.
    fn copy_page(&mut self, value: u64) -> u64;

    /// [`crate::nano::Pages::filled`] with `value` by rep stosq.
    fn fill_page(&mut self, value: u64) -> u64;

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

    /// Finds the device, brings it into a known state and tries it once, with a limit of time.
    /// What follows are the uses of devices; a machine that has none keeps these methods as they
    /// are.
    ///
    /// # Errors
    /// There is no such device, by design or in this machine, or the trial showed that it does not
    /// work.
    fn open(&mut self, _io: Io, _size: u64) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Gives the device back; returns what is documented at each [`Io`].
    fn close(&mut self, _io: Io) -> u64 {
        0
    }

    /// A word of the arena. Slot N of the devices is the page from word N times
    /// [`crate::io::SLOT_WORDS`] on.
    #[inline(always)]
    fn peek(&mut self, _word: u64) -> u64 {
        0
    }

    /// Changes a word of the arena.
    #[inline(always)]
    fn poke(&mut self, _word: u64, _value: u64) {}

    /// Ticks of the clock by which requests are timed.
    #[inline(always)]
    fn ticks(&mut self) -> u64 {
        0
    }

    /// Where the times of requests are collected, if they are.
    #[inline(always)]
    fn latencies(&mut self) -> Option<&mut Histogram> {
        None
    }

    /// What a tick is, if the machine knows.
    fn scale(&self) -> Option<Scale> {
        None
    }

    /// Transfers these blocks of the disk, of a page each, from or to the slots from `slot` on, modulo
    /// [`crate::io::SLOTS`]. All requests are in flight at once; comes back when all are done.
    ///
    /// # Errors
    /// [`Refusal::Device`] with the device's own error.
    fn transfer(
        &mut self,
        _direction: Direction,
        _blocks: &[u64],
        _slot: u64,
    ) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Comes back when everything written to the disk will survive a loss of power.
    ///
    /// # Errors
    /// [`Refusal::Device`] with the device's own error.
    fn flush_disk(&mut self) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// The network card's address, its first byte the lowest.
    fn station(&mut self) -> u64 {
        0
    }

    /// Sends the frames of `count` slots from `slot` on, `bytes` long each. The slots may be changed
    /// when it comes back.
    ///
    /// # Errors
    /// [`Refusal::Device`] with the device's own error.
    fn transmit(&mut self, _slot: u64, _count: u64, _bytes: u64) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Waits for a frame; returns its slot, which keeps it until the next call, and its length.
    ///
    /// # Errors
    /// [`Refusal::Device`] when none comes, or with the device's own error.
    fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Sends a line to the console.
    ///
    /// # Errors
    /// [`Refusal::Device`] with the device's own error.
    fn send_line(&mut self, _line: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Arms the timer, halts until it has expired; records how much later than asked for. Returns
    /// the number of expiries since the timer was opened.
    ///
    /// # Errors
    /// [`Refusal::Broken`] when the timer expires before its time.
    fn expire(&mut self, _timer: Timer, _microseconds: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// As [`Platform::expire`], with the timer at hand; records up to the end of the halt.
    ///
    /// # Errors
    /// As [`Platform::expire`].
    fn wake(&mut self, _microseconds: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }

    /// Sends itself an interrupt and takes it; records the time between. Returns the number of
    /// those since opening.
    ///
    /// # Errors
    /// [`Refusal::Broken`] when it does not arrive.
    fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_DEVICE))
    }
}
