//! Ring 3: a way in, and what comes back.
//!
//! What runs there lies in the section `.utext` or in the crate `programs`: all other code is
//! the kernel's, and faults when ring 3 executes it.

use crate::traps::{enter_user, last};
use core::arch::asm;
use programs::{
    Fault, Kernel, Ring,
    nano::syscall::{self, Syscalls},
};

unsafe extern "C" {
    static user_return: u8;
}

/// Vector of an invalid opcode, by which ring 3 says that it is done.
const INVALID_OPCODE: u8 = 6;

/// Calls `kernel` in ring 3, with `words` words from `arena` on, which ring 3 may read and write.
pub(crate) fn call(
    kernel: Kernel,
    arena: u64,
    words: u64,
    size: u64,
    iterations: u64,
) -> Result<u64, Fault> {
    let ended = enter_user(kernel as usize as u64, arena, words, size, iterations);
    debug_assert_eq!((ended.value, ended.trapped), (0, 1));
    let (fault, rax) = last();
    if fault.ring == Ring::User
        && fault.vector == INVALID_OPCODE
        && fault.rip == (&raw const user_return) as u64
    {
        Ok(rax)
    } else {
        Err(fault)
    }
}

/// Where `enter_user` enters ring 3. It goes back by a fault, since that works on every engine.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".utext")]
extern "C" fn user_call(
    kernel: u64,
    arena: *mut u64,
    words: usize,
    size: u64,
    iterations: u64,
) -> ! {
    // SAFETY: `call` passes a function of that type, and an arena that is mapped for ring 3 and
    // used by nothing else while this runs. user_return ends this function with its value in rax.
    unsafe {
        let kernel = core::mem::transmute::<*const (), Kernel>(kernel as *const ());
        let arena = core::slice::from_raw_parts_mut(arena, words);
        let sum = kernel(arena, size, iterations);
        asm!("jmp user_return", in("rax") sum, options(noreturn));
    }
}

struct Instruction;

impl Syscalls for Instruction {
    #[inline(always)]
    fn syscall(&mut self, argument: u64) -> u64 {
        let answer;
        // SAFETY: the kernel's entry changes nothing but rax; the instruction itself rcx and r11.
        unsafe {
            asm!("syscall", out("rax") answer, in("rdi") argument, out("rcx") _, out("r11") _,
                options(nostack));
        }
        answer
    }
}

/// The syscall workload's loop, as a kernel of ring 3.
#[unsafe(link_section = ".utext")]
#[inline(never)]
pub(crate) fn syscalls(_arena: &mut [u64], _size: u64, iterations: u64) -> u64 {
    syscall::calls(&mut Instruction, iterations)
}
