//! The guest kernel: entry, page tables, traps, drivers; one flavour of it for each way to reach the
//! machine. What follows is the `unaware` one; the other is [`aware`].
//!
//! A kernel as small as the measurements allow: one processor, few address spaces, no interrupts, no
//! allocation but of frames. It greets on the console, answers the protocol of [`abi`] line by line,
//! runs compute workloads in ring 3 and privileged operations in ring 0.
//!
//! # Boot flow
//!
//! 1. The VMM enters `pvh_entry` (asm/entry.s) in 32-bit protected mode, paging off, `ebx` pointing
//!    to `hvm_start_info` (Xen docs/misc/pvh.pandoc).
//! 2. `pvh_entry` loads the GDT, CR4, the static boot tables, EFER and CR0, jumps to 64-bit code,
//!    takes the kernel stack and calls `kernel_start`
//!    ([`unaware`]).
//! 3. `traps` fills IDT and TSS, [`unaware`] masks the PICs and sets up the UART, `memory`
//!    finds the arena in the memory map and replaces the boot tables' rights by W^X ones.
//! 4. The console says `ready`, and the session runs until `quit`.
//!
//! Ring 0 is short on purpose: one engine emulates it at about a microsecond per instruction. So
//! tables are static where they can be, and nothing is cleared that the loader has cleared.
//!
//! # Memory map
//!
//! | virtual | physical | what | ring 3 |
//! |---|---|---|---|
//! | 0 - 1 MiB | same | the VMM's start info and command line; page 0 not present | - |
//! | 1 MiB - 2 MiB | same | this image; 4 KiB pages, rights by section | programs: text RX, rodata R |
//! | 2 MiB - 1 GiB | same | all other memory, 2 MiB pages, RW NX | - |
//! | 0x4000_0000 + up to 64 MiB | from 6 MiB | arena, 2 MiB pages, RW NX | RW |
//! | 0x7fa0_0000 + up to 1 MiB | 4 MiB - 5 MiB | the storm's pages, mapped one by one at their first touch, RW NX | RW |
//! | 0x7fc0_0000 + 2 MiB | 2 MiB - 4 MiB | stack of ring 3, one 2 MiB page, RW NX | RW |
//! | 0x7fe0_0000 + 4 KiB | one of two frames in the image | probe page | - |
//! | 0xfea0_0000 + 6 MiB | same | device memory, uncached, RW NX | - |
//! | 0x8000_0000 + up to 256 KiB | from the pool, 5 MiB - 6 MiB | own pages of a space, beside the first one, RW NX | RW |
//!
//! # Rules
//!
//! - No SSE in ring 0: the engine that emulates it knows few SSE instructions, and ring 3's XMM
//!   registers survive a trap without being saved. The image build switches SSE off for this
//!   crate; code that comes precompiled (formatting in `core`) must not be reached.
//! - `core` is compiled with a red zone, so every vector has an IST stack.
#![no_std]

// Each flavour is a feature, so that an image is built with its own alone.

// A test binary of this crate is an ordinary position-independent process: it holds the modules
// that are plain logic. The rest needs the linker script and a bare machine, and is tested by
// booting the image.
#[cfg(all(not(test), feature = "unaware", not(feature = "hybrid")))]
mod ata;
#[cfg(all(not(test), feature = "aware"))]
pub mod aware;
#[cfg(all(not(test), feature = "privileged"))]
mod clock;
#[cfg(all(not(test), feature = "privileged"))]
pub mod console;
#[cfg(not(test))]
#[cfg_attr(
    not(feature = "privileged"),
    allow(dead_code, reason = "an aware kernel uses few of the instructions")
)]
mod cpu;
#[cfg(all(not(test), feature = "privileged"))]
pub mod crash;
#[cfg(all(not(test), feature = "privileged"))]
mod devices;
#[cfg(all(not(test), feature = "privileged"))]
mod interrupts;
#[cfg(all(not(test), feature = "privileged"))]
mod memory;
#[cfg(all(not(test), feature = "privileged"))]
mod nano;
#[cfg(all(not(test), feature = "unaware", not(feature = "hybrid")))]
mod ne2000;
#[cfg(all(not(test), feature = "privileged"))]
mod spaces;
#[cfg(feature = "privileged")]
pub mod start_info;
#[cfg(all(not(test), feature = "privileged"))]
mod timers;
#[cfg(all(not(test), feature = "privileged"))]
mod traps;
#[cfg(all(not(test), feature = "privileged"))]
pub mod unaware;
#[cfg(all(not(test), feature = "privileged"))]
mod user;
#[cfg(all(not(test), any(feature = "hybrid", feature = "aware")))]
mod virtio;
