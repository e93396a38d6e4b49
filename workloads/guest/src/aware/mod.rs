//! The `aware` flavour: a kernel that knows it runs without privilege, and asks its host by
//! hypercall where the `unaware` one executes privileged instructions.
//!
//! # Boot flow
//!
//! 1. The host enters `aware_entry` (asm.s) in 64-bit mode, as a process, on a boot stack, with
//!    [`StartInfo`] in `rdi`. There is nothing to switch on: memory is mapped, rights are set.
//! 2. `upcalls` registers the entries by which the host comes back, `space` builds the first
//!    address space of user mode and hands its tables over.
//! 3. The console says `ready`, and the session runs until `quit`, or until its input ends.
//!
//! # Memory map of user mode
//!
//! | virtual | what | rights |
//! |---|---|---|
//! | as linked, from 1 MiB | programs: text, constants | RX, R |
//! | 0x1a_0000 + up to 256 KiB | own pages of a space beside the first | RW |
//! | 0x1f_f000 + 4 KiB | stack there | RW |
//! | 0x4000_0000 + up to 64 MiB | arena, in the first space | RW |
//! | 0x7fa0_0000 + up to 1 MiB | the storm's pages, mapped at their first touch | RW |
//! | below 0x7fe0_0000, 256 KiB | stack of the first space | RW |
//! | 0x7fe0_0000 + 256 KiB | 64 probe pages | R |
//!
//! The kernel is not mapped there at all: it is another process.

pub(crate) mod bus;
mod console;
pub mod crash;
mod devices;
mod events;
mod frames;
mod hypercall;
mod machine;
mod space;
mod tables;
mod upcalls;
mod user;

use abi::hypercall::{StartInfo, VERSION};
use console::{Input, Ring};
use core::arch::global_asm;
use devices::Devices;
use machine::Machine;
use programs::session::{self, Console, LINE, Next};
use space::First;

global_asm!(include_str!("asm.s"));

/// The flavour's name in the greeting.
const FLAVOUR: &str = "aware";

/// First Rust code, called by asm.s.
#[unsafe(no_mangle)]
extern "C" fn aware_start(info: &StartInfo) -> ! {
    if info.magic != StartInfo::MAGIC {
        // Whoever this is, there is no hypercall page to complain through.
        // SAFETY: ends this process.
        unsafe { core::arch::asm!("ud2", options(noreturn)) };
    }
    hypercall::set_up(info);
    if info.version != VERSION {
        hypercall::shutdown(1);
    }
    crash::set_up(info);
    events::set_up(info);
    frames::set_up(info);
    let mut console = Ring::new(info);
    if let Err(errno) = upcalls::set_up() {
        crash::host_refuses("the kernel's entries", errno);
    }
    let mut machine = match First::new(info) {
        Ok(first) => {
            bus::set_up(info, first.arena.0 * abi::hypercall::layout::PAGE);
            // SAFETY: this function is entered once.
            Machine::new(first, unsafe { Devices::new(info) })
        }
        Err(reason) => {
            session::fail(&mut console, reason);
            console.flush();
            hypercall::shutdown(1)
        }
    };
    session::greet(&mut console, FLAVOUR);
    let length = info.command_line_length as usize;
    let command_line = info.command_line.get(..length).unwrap_or_default();
    let ordered = session::answer_command_line(&mut console, &mut machine, command_line);
    let code = match ordered {
        Some(ran) => u8::from(!ran),
        None => serve(&mut console, &mut machine),
    };
    console.flush();
    hypercall::shutdown(code)
}

/// Answers lines until `quit`, and returns its code, or until input ends.
fn serve(console: &mut Ring, machine: &mut Machine) -> u8 {
    let mut buffer = [0; LINE];
    loop {
        match console.line(&mut buffer) {
            Input::Ended => return 0,
            Input::TooLong => session::fail(console, "a line is longer than 256 bytes"),
            Input::Line(line) => match session::answer(console, machine, line) {
                Next::Go { ran: _ } => {}
                Next::Quit(code) => return code,
            },
        }
    }
}
