//! The guest's ends: asked for, or by a fault of the kernel itself.

use crate::{console::Terminal, cpu, traps::Frame};
use core::{
    panic::PanicInfo,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};
use programs::{
    Piece::{Decimal, Hex, Text},
    session::{Console, say},
};

unsafe extern "C" {
    safe fn triple_fault() -> !;
}

/// Set by the first crash: a crash while crashing ends without words.
static CRASHING: AtomicBool = AtomicBool::new(false);

/// Ends the guest. A VMM that does not know the exit port sees a triple fault.
pub(crate) fn exit(code: u8) -> ! {
    cpu::port_out(abi::port::EXIT, code);
    triple_fault()
}

fn begin() -> Terminal {
    if CRASHING.swap(true, Relaxed) {
        triple_fault();
    }
    Terminal::last_words()
}

fn end(mut console: Terminal) -> ! {
    console.write(b"\n");
    console.flush();
    exit(1)
}

/// A fault of the kernel that nobody asked for: one line, then the end.
pub(crate) fn fault(frame: &Frame, address: u64) -> ! {
    let mut console = begin();
    let registers = [
        ("failed kernel fault: vector ", frame.vector),
        (" error ", frame.error),
        (" rip ", frame.rip),
        (" address ", address),
        (" cs ", frame.cs),
        (" rflags ", frame.rflags),
        (" rsp ", frame.rsp),
        (" rax ", frame.rax),
        (" rcx ", frame.rcx),
        (" rdx ", frame.rdx),
        (" rbx ", frame.rbx),
        (" rbp ", frame.rbp),
        (" rsi ", frame.rsi),
        (" rdi ", frame.rdi),
        (" r8 ", frame.r8),
        (" r9 ", frame.r9),
        (" r10 ", frame.r10),
        (" r11 ", frame.r11),
        (" r12 ", frame.r12),
        (" r13 ", frame.r13),
        (" r14 ", frame.r14),
        (" r15 ", frame.r15),
    ];
    for (name, value) in registers {
        say(&mut console, Text(name));
        say(&mut console, Hex(value));
    }
    end(console)
}

/// A panic: says where, without the message, whose formatting the kernel stays away from.
pub fn panicked(info: &PanicInfo<'_>) -> ! {
    let mut console = begin();
    console.write(b"failed kernel panic");
    if let Some(location) = info.location() {
        console.write(b" at ");
        console.write(location.file().as_bytes());
        console.write(b":");
        say(&mut console, Decimal(location.line().into()));
    }
    end(console)
}
