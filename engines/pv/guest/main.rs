//! The guest of this crate's tests: one scenario per run, named by the command line.
#![no_std]
#![no_main]

use abi::hypercall as h;
use core::arch::global_asm;
use core::panic::PanicInfo;

use h::StartInfo;

mod attacks;
mod attacks_kernel;
mod attacks_revoked;
mod cost;
mod errors;
mod floods;
mod kernel;
mod scenes;
mod scenes_memory;
mod user;

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

extern "C" fn start(info: &'static StartInfo) -> ! {
    kernel::init(info);
    let name = kernel::command();
    for (known, scene) in scenes::ALL
        .iter()
        .chain(scenes_memory::ALL)
        .chain(errors::ALL)
        .chain(floods::ALL)
        .chain(cost::ALL)
        .chain(attacks::ALL)
        .chain(attacks_kernel::ALL)
        .chain(attacks_revoked::ALL)
    {
        if *known == name {
            scene();
            kernel::shutdown(0);
        }
    }
    kernel::say("no such scenario\n");
    kernel::shutdown(98)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    kernel::say("panic\n");
    kernel::tell("line", info.location().map_or(0, |at| at.line().into()));
    kernel::shutdown(99)
}
