//! The guest's unwanted ends: one line on the console, then code 1.

use super::{console::Ring, hypercall, hypercall::Errno};
use abi::hypercall::{StartInfo, UpcallFrame};
use core::{
    panic::PanicInfo,
    sync::atomic::{AtomicPtr, Ordering::Relaxed},
};
use programs::{
    Piece::{Decimal, Hex, Text},
    session::{Console, say},
};

/// What the host said at entry, to find the console by; null before, and while crashing.
static INFO: AtomicPtr<StartInfo> = AtomicPtr::new(core::ptr::null_mut());

/// Takes note of the console.
pub(super) fn set_up(info: &StartInfo) {
    INFO.store((&raw const *info).cast_mut(), Relaxed);
}

/// A console for last words; a crash while crashing ends without.
fn begin() -> Ring {
    let info = INFO.swap(core::ptr::null_mut(), Relaxed);
    if info.is_null() {
        hypercall::shutdown(1);
    }
    // SAFETY: `set_up` stored a reference to what the host keeps for as long as the guest runs.
    Ring::new(unsafe { &*info })
}

fn end(mut console: Ring) -> ! {
    console.write(b"\n");
    console.flush();
    hypercall::shutdown(1)
}

/// An exception of the kernel itself.
pub(super) fn fault(frame: &UpcallFrame) -> ! {
    let mut console = begin();
    let registers = &frame.registers;
    for (name, value) in [
        ("failed kernel fault: vector ", frame.vector),
        (" error ", frame.error),
        (" rip ", registers.rip),
        (" address ", frame.address),
        (" rflags ", registers.rflags),
        (" rsp ", registers.gpr[4]),
    ] {
        say(&mut console, Text(name));
        say(&mut console, Hex(value));
    }
    end(console)
}

/// A hypercall failed that must not fail.
#[cold]
pub(super) fn host_refuses(what: &'static str, errno: Errno) -> ! {
    let mut console = begin();
    say(&mut console, Text("failed kernel: the host refuses "));
    say(&mut console, Text(what));
    say(&mut console, Text(": error "));
    say(&mut console, Decimal(errno.0 as u64));
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
