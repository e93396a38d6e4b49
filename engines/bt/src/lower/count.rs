//! Counting what translated code does by itself, where a run asks for it.
//!
//! A branch that is linked and an access whose lookup hits never reach the runtime, which is why
//! they are fast and why nobody sees them. With [`Options::count_paths`](crate::Options) each of
//! them adds one to a slot of the context first. A counting run is slower and is never timed; the
//! counters of an ordinary run are the callouts alone.
//!
//! What this does not do: count in the runtime, or touch a register or a flag of the guest.

use dynasmrt::{DynasmApi, dynasm};
use std::mem::offset_of;

use super::Lower;
use crate::context::Context;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Path {
    /// A direct branch, or the end of a block that goes on behind it.
    Direct,
    /// An indirect branch or a return.
    Indirect,
    /// A memory access by way of the software TLB.
    Lookup,
    /// A memory access that shares the lookup of one before it.
    Shared,
    /// An instruction's accesses through the window.
    Window,
}

impl Path {
    /// Every path, in the order of the slots.
    pub(crate) const ALL: [Path; 5] = [
        Path::Direct,
        Path::Indirect,
        Path::Lookup,
        Path::Shared,
        Path::Window,
    ];

    /// Its name among the counters.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Path::Direct => "direct-branch",
            Path::Indirect => "indirect-branch",
            Path::Lookup => "software-access",
            Path::Shared => "shared-access",
            Path::Window => "window-access",
        }
    }
}

impl Lower<'_> {
    /// Adds one to the slot of `path`, if this run counts.
    pub(super) fn count(&mut self, path: Path) {
        if !self.layout.counting {
            return;
        }
        let slot = self.layout.slot(offset_of!(Context, paths)) + 8 * path as i32;
        let keep = self.layout.slot(offset_of!(Context, counting_rax));
        // lea leaves the flags alone.
        dynasm!(self.asm
            ; .arch x64
            ; mov [keep], rax
            ; mov rax, [slot]
            ; lea rax, [rax + 1]
            ; mov [slot], rax
            ; mov rax, [keep]
        );
    }
}
