//! System registers where translated code reaches them, and what it needs to act on them alone.
//!
//! Rust code owns all of this; translated code and the stubs of [`crate::transitions`] read it and
//! write [`Cpu`], whenever what they find here says that the common case is at hand. Everything
//! that these caches say is checked against guest memory before it is used: a gate or a
//! descriptor counts only if its bytes are still those that Rust code has judged.
//!
//! Invariant: [`Shortcuts::enabled`] is 0 unless the jump caches hold what 64-bit code finds at
//! both privileges under the control registers as they stand, and nothing is being debugged.

use std::ops::{Deref, DerefMut};

use engine_core::Segment;

use crate::{cpu::Cpu, invalidation::Invalidation, system::null_stack};

/// The jump cache of ring 0 is that of 64-bit code.
pub(crate) const KERNEL: u32 = 1;
/// The jump cache of ring 3 is that of 64-bit code with IOPL 0 and without alignment checks.
pub(crate) const USER: u32 = 2;
/// EFER.SCE.
pub(crate) const SYSCALLS: u32 = 4;

/// Vectors with a remembered gate.
pub(crate) const GATES: usize = 32;
/// Remembered CPUID leaves.
pub(crate) const LEAVES: usize = 64;

/// What stubs have counted, by index into [`Shortcuts::counts`].
pub(crate) mod count {
    pub(crate) const FAULTS: usize = 0;
    pub(crate) const CPUID: usize = 1;
    pub(crate) const CONTROL: usize = 2;
    pub(crate) const MSR: usize = 3;
    pub(crate) const INVLPG: usize = 4;
    pub(crate) const ALL: usize = 5;
}

/// A return by iret that Rust code has made from ring 0 to 64-bit code: its descriptors, and what
/// they load.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Return {
    /// Selectors as 64-bit numbers; none is as large as the one that means nothing is known.
    pub cs_selector: u64,
    pub cs_raw: u64,
    pub ss_selector: u64,
    pub ss_raw: u64,
    pub cs: Segment,
    pub ss: Segment,
}

/// A gate to 64-bit code in ring 0 that Rust code has gone through.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gate {
    /// The gate's bytes; no gate is all zeros.
    pub low: u64,
    pub high: u64,
    /// The code segment's descriptor.
    pub cs_raw: u64,
    pub target: u64,
    pub cs: Segment,
    /// Stack of the TSS by offset in it; 0 for that of the privilege.
    pub stack: u64,
}

/// A CPUID leaf without subleaves, at [`Leaf::index`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Leaf {
    pub leaf: u32,
    unused: u32,
    /// EAX, EBX, ECX, EDX.
    pub values: [u32; 4],
    unused_too: [u32; 2],
}

impl Leaf {
    /// Where a leaf belongs.
    pub(crate) fn index(leaf: u32) -> usize {
        (leaf ^ leaf >> 26) as usize % LEAVES
    }

    pub(crate) fn new(leaf: u32, values: [u32; 4]) -> Leaf {
        Leaf {
            leaf,
            values,
            ..Leaf::default()
        }
    }
}

/// What lets translated code act without the runtime.
#[repr(C)]
pub(crate) struct Shortcuts {
    /// [`KERNEL`], [`USER`], [`SYSCALLS`].
    pub enabled: u32,
    /// A return to ring 3 has data segments to drop.
    pub drops: u32,
    /// Somebody asked for the task priority since `run` last returned: an interrupt waits for it to
    /// fall, so writing CR8 has to end the run.
    pub priority_matters: u32,
    /// Code of ring 0 and of ring 3 wants the vector registers, which aren't in the host's.
    pub due: [u32; 2],
    /// Error code of the exception under way.
    pub error: u32,
    pub counts: [u64; count::ALL],
    /// Registers that a stub has borrowed.
    pub save: [u64; 6],
    /// CS and SS of syscall.
    pub syscall: [Segment; 2],
    /// CS and SS of sysret to 64-bit code.
    pub sysret: [Segment; 2],
    /// SS of an interrupt that comes from ring 3.
    pub null: Segment,
    /// To ring 0 and to ring 3.
    pub returns: [Return; 2],
    pub gates: [Gate; GATES],
    pub leaves: [Leaf; LEAVES],
}

/// Everything at its fixed address.
#[repr(C)]
pub(crate) struct Privileged {
    pub cpu: Cpu,
    pub shortcuts: Shortcuts,
    pub invalidation: Invalidation,
}

const _: () = assert!(size_of::<Segment>() == 16 && size_of::<Leaf>() == 32);

impl Shortcuts {
    /// Nothing is known and nothing allowed.
    pub(crate) fn new() -> Shortcuts {
        let unknown = Return {
            cs_selector: u64::MAX,
            ..Return::default()
        };
        Shortcuts {
            enabled: 0,
            drops: 0,
            priority_matters: 0,
            due: [0; 2],
            error: 0,
            counts: [0; count::ALL],
            save: [0; 6],
            syscall: Default::default(),
            sysret: Default::default(),
            null: null_stack(0, 0),
            returns: [unknown; 2],
            gates: [Gate::default(); GATES],
            // An index that isn't the leaf's own: no leaf is found.
            leaves: std::array::from_fn(|index| Leaf::new(index as u32 ^ 1, [0; 4])),
        }
    }
}

/// A value that lives in the arena.
pub(crate) struct Placed<T>(*mut T);

impl<T> Placed<T> {
    /// Puts `value` at `place`.
    ///
    /// # Safety
    /// `place` is writable, aligned, outlives the result, and nobody else's, translated code aside,
    /// which doesn't run while Rust code uses the value.
    pub(crate) unsafe fn new(place: *mut T, value: T) -> Self {
        // SAFETY: the caller's promise.
        unsafe { place.write(value) };
        Placed(place)
    }
}

impl<T> Deref for Placed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: as promised to `new`.
        unsafe { &*self.0 }
    }
}

impl<T> DerefMut for Placed<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as promised to `new`.
        unsafe { &mut *self.0 }
    }
}
