//! Root of the `hybrid` image: the kernel library, plus what only a whole program may define.
#![no_std]
#![no_main]

use core::{arch::global_asm, panic::PanicInfo};

// Names the library, so that it is linked: the linker finds pvh_entry in it.
use guest as _;

global_asm!(include_str!("mem.s"));

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    guest::crash::panicked(info)
}
