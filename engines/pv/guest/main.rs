//! The guest of this crate's tests: one scenario per run, named by the command line.
#![no_std]
#![no_main]

use abi::hypercall::{self as h, Call, StartInfo};
use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("../../../workloads/guest/image/mem.s"));
global_asm!(
    ".pushsection .note.Trapline, \"a\", @note",
    ".balign 4",
    ".long 9, 8, 1",
    ".asciz \"Trapline\"",
    ".balign 4",
    ".long 1, 0",
    ".popsection",
    ".pushsection .text",
    ".globl _start",
    "_start: jmp {start}",
    ".popsection",
    start = sym start,
);

mod kernel;

extern "C" fn start(info: &'static StartInfo) -> ! {
    kernel::init(info);
    kernel::say("hello\n");
    kernel::shutdown(0)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    kernel::say("panic\n");
    kernel::shutdown(99)
}
