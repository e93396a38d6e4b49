//! User mode: a way in, what runs there, and what comes back.
//!
//! What runs there lies in the section `.utext` or in the crate `programs`: nothing else of the
//! image is mapped in a user process.

use super::{frames::Number, space::PROBES, upcalls};
use abi::hypercall::{Registers, iret, layout};
use core::{arch::asm, cell::Cell, sync::atomic::Ordering::Relaxed};
use programs::{
    Kernel, Refusal,
    micro::PAGE_WORDS,
    nano::{
        divzero::{self, Divisions},
        int3::{self, Breakpoints},
        pgfault::{self, Touches},
        syscall::{self, Syscalls},
    },
};

/// System call: the kernel's answer to an argument.
pub(super) const ANSWER: u64 = layout::SYSCALL_FIRST;
/// System call: the application has ended with this value. Returns when there is another job.
pub(super) const LEAVE: u64 = layout::SYSCALL_FIRST + 1;
/// System call: takes all probe pages away.
pub(super) const UNMAP: u64 = layout::SYSCALL_FIRST + 2;

/// How `aware_enter` came back.
#[repr(C)]
struct Ended {
    /// What the application returned, or the hypercall's error.
    value: u64,
    /// 1 if user mode was entered.
    entered: u64,
}

unsafe extern "C" {
    safe fn aware_enter(form: u64, argument: u64) -> Ended;
}

/// What an application is to do: written by the kernel at the end of its stack.
#[repr(C)]
#[derive(Clone, Copy)]
struct Job {
    kernel: u64,
    arena: u64,
    words: u64,
    size: u64,
    iterations: u64,
    /// Keeps the stack below aligned to 16.
    unused: u64,
}

/// The user process of a space. Its application waits in the system call [`LEAVE`] between jobs, as
/// a process does that was switched away from; taking up the next is a switch, not a start.
#[derive(Debug)]
pub(super) struct Process {
    /// Last frame of its stack, and where that ends.
    stack: Number,
    stack_end: u64,
    waiting: Cell<bool>,
}

impl Process {
    /// A process that has never run.
    pub(super) fn new(stack: Number, stack_end: u64) -> Self {
        Process {
            stack,
            stack_end,
            waiting: Cell::new(false),
        }
    }

    /// Calls `kernel` in this process, whose space is the current one, with `words` words from `arena`
    /// on, which user mode may access as the kernel does.
    #[inline]
    pub(super) fn call(
        &self,
        kernel: Kernel,
        (arena, words): (u64, u64),
        size: u64,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        let job = [kernel as usize as u64, arena, words, size, iterations];
        let place = PAGE_WORDS - size_of::<Job>() / 8;
        for (slot, word) in self.stack.words().iter().skip(place).zip(job) {
            slot.store(word, Relaxed);
        }
        let ended = if self.waiting.get() {
            aware_enter(iret::RESUME, 0)
        } else {
            let job = self.stack_end - size_of::<Job>() as u64;
            let mut registers = Registers {
                rip: user_call as *const () as u64,
                // Bit 1 is always set; interrupts are on.
                rflags: 0x202,
                cs: layout::USER_CS.into(),
                ss: layout::USER_SS.into(),
                ..Registers::default()
            };
            // rsp as after a call: 8 below a multiple of 16. rdi is the argument.
            registers.gpr[4] = job - 8;
            registers.gpr[7] = job;
            aware_enter(iret::START, &raw const registers as u64)
        };
        self.waiting.set(false);
        if ended.entered == 0 {
            return Err(Refusal::Broken("the host does not enter user mode"));
        }
        match upcalls::fault() {
            Some(fault) => Err(Refusal::Fault(fault)),
            None => {
                self.waiting.set(true);
                Ok(ended.value)
            }
        }
    }
}

/// Where a process starts.
#[unsafe(link_section = ".utext")]
unsafe extern "C" fn user_call(job: *const Job) -> ! {
    loop {
        // SAFETY: the kernel has written a job there, with a function of that type, and memory that is
        // mapped for user mode and that nothing else uses while it runs.
        let (kernel, arena, job) = unsafe {
            let job = job.read_volatile();
            let kernel = core::mem::transmute::<*const (), Kernel>(job.kernel as *const ());
            let words = job.words as usize;
            let arena = core::slice::from_raw_parts_mut(job.arena as *mut u64, words);
            (kernel, arena, job)
        };
        let sum = kernel(arena, job.size, job.iterations);
        system_call(LEAVE, sum);
    }
}

#[inline(always)]
fn system_call(number: u64, argument: u64) -> u64 {
    let answer;
    // SAFETY: the kernel changes nothing but rax; the instruction itself rcx and r11.
    unsafe {
        asm!("syscall", inout("rax") number => answer, in("rdi") argument, out("rcx") _,
            out("r11") _, options(nostack));
    }
    answer
}

struct Application<'a> {
    arena: &'a mut [u64],
}

impl Syscalls for Application<'_> {
    #[inline(always)]
    fn syscall(&mut self, argument: u64) -> u64 {
        system_call(ANSWER, argument)
    }
}

impl Touches for Application<'_> {
    /// Goes from one probe page to the next, and has all taken away when it comes round.
    #[inline(always)]
    fn touch(&mut self, index: u64) -> u64 {
        let page = index % PROBES;
        if page == 0 && index != 0 {
            system_call(UNMAP, 0);
        }
        match self.arena.get(page as usize * PAGE_WORDS) {
            // SAFETY: a reference is readable. Volatile, since the read itself is what is measured.
            Some(word) => unsafe { (&raw const *word).read_volatile() },
            None => 0,
        }
    }
}

impl Divisions for Application<'_> {
    #[inline(always)]
    fn divide(&mut self) {
        // SAFETY: the kernel skips the instruction, whose length of 2 bytes it knows.
        unsafe {
            asm!("div ecx", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _,
                options(nostack));
        }
    }
}

impl Breakpoints for Application<'_> {
    #[inline(always)]
    fn hit(&mut self) {
        // SAFETY: the kernel counts and comes back.
        unsafe { asm!("int3", options(nostack)) };
    }
}

/// The loop of the syscall workload.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn syscalls(arena: &mut [u64], _size: u64, iterations: u64) -> u64 {
    syscall::calls(&mut Application { arena }, iterations)
}

/// The loop of the pgfault workload; arena is the probe pages.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn touches(arena: &mut [u64], _size: u64, iterations: u64) -> u64 {
    pgfault::touches(&mut Application { arena }, iterations)
}

/// The loop of the divzero workload.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn divisions(arena: &mut [u64], _size: u64, iterations: u64) -> u64 {
    divzero::divisions(&mut Application { arena }, iterations)
}

/// The loop of the int3 workload.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn breakpoints(arena: &mut [u64], _size: u64, iterations: u64) -> u64 {
    int3::breakpoints(&mut Application { arena }, iterations)
}

/// The first word of the arena.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn peek(arena: &mut [u64], _size: u64, _iterations: u64) -> u64 {
    arena.first().copied().unwrap_or_default()
}

/// Whether each page of the arena starts with the word of frame B where its bit of `bits` is set, and
/// with that of frame A where it is clear.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(super) fn shows(arena: &mut [u64], bits: u64, _iterations: u64) -> u64 {
    let mut right = 1;
    for (page, words) in arena.chunks(PAGE_WORDS).enumerate() {
        let expected = if bits >> page & 1 == 0 {
            programs::nano::WORD_A
        } else {
            programs::nano::WORD_B
        };
        if words.first() != Some(&expected) {
            right = 0;
        }
    }
    right
}
