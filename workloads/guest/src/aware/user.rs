//! User mode: a way in, what runs there, and what comes back.
//!
//! What runs there lies in the section `.utext` or in the crate `programs`: nothing else of the
//! image is mapped in a user process.

use super::{space::PROBES, upcalls};
use abi::hypercall::{Registers, layout};
use core::arch::asm;
use programs::{
    Kernel, Refusal,
    micro::PAGE_WORDS,
    nano::{
        divzero::{self, Divisions},
        pgfault::{self, Touches},
        syscall::{self, Syscalls},
    },
};

/// System call: the kernel's answer to an argument.
pub(super) const ANSWER: u64 = layout::SYSCALL_FIRST;
/// System call: the application has ended with this value.
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
    safe fn aware_enter(registers: &Registers) -> Ended;
}

/// Calls `kernel` in the current space, with `words` words from `arena` on, which user mode may
/// access as the kernel does, and a stack that ends at `stack`.
#[inline]
pub(super) fn call(
    kernel: Kernel,
    stack: u64,
    (arena, words): (u64, u64),
    size: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut registers = Registers {
        rip: user_call as *const () as u64,
        // Bit 1 is always set; interrupts are on.
        rflags: 0x202,
        cs: layout::USER_CS.into(),
        ss: layout::USER_SS.into(),
        ..Registers::default()
    };
    // As after a call: 8 below a multiple of 16.
    registers.gpr[4] = stack - 8;
    // rdi, rsi, rdx, rcx, r8, in encoding order.
    let arguments = [kernel as usize as u64, arena, words, size, iterations];
    for (register, argument) in [7, 6, 2, 1, 8].into_iter().zip(arguments) {
        registers.gpr[register] = argument;
    }
    let ended = aware_enter(&registers);
    if ended.entered == 0 {
        return Err(Refusal::Broken("the host does not enter user mode"));
    }
    match upcalls::fault() {
        Some(fault) => Err(Refusal::Fault(fault)),
        None => Ok(ended.value),
    }
}

/// Where `call` enters user mode.
#[unsafe(link_section = ".utext")]
extern "C" fn user_call(
    kernel: *const (),
    arena: *mut u64,
    words: usize,
    size: u64,
    iterations: u64,
) -> ! {
    // SAFETY: `call` passes a function of that type, and memory that is mapped for user mode and
    // that nothing else uses meanwhile.
    let kernel = unsafe { core::mem::transmute::<*const (), Kernel>(kernel) };
    // SAFETY: as above.
    let arena = unsafe { core::slice::from_raw_parts_mut(arena, words) };
    let sum = kernel(arena, size, iterations);
    loop {
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
