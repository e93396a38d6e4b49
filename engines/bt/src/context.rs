//! The state that translated code and the runtime share.
//!
//! A [`Context`] lives at a fixed address below 2 GiB, so that translated code reaches every slot
//! by an absolute 32-bit displacement without giving up a register. While the guest runs, its
//! general registers, vector registers and arithmetic flags are in the host's own; the slots here
//! hold them whenever Rust code runs.

use crate::lower::Path;

/// One slot per host register number, plus everything that an exit must say.
///
/// Invariant: translated code writes only the slots named here; nothing else in the process is
/// reachable from it except guest RAM through the software TLB and the window.
#[repr(C, align(64))]
pub(crate) struct Context {
    /// Guest general registers in encoding order; raw: a spilled register's value is in `spill`.
    pub gpr: [u64; 16],
    /// True values of registers that translated code has borrowed as scratch.
    pub spill: [u64; 16],
    /// Arithmetic flags and DF, as the host's RFLAGS held them at the exit.
    pub flags: u64,
    /// `lahf; seto al` image: AH the low flags, bit 0 of AL the overflow flag.
    pub lazy_flags: u64,
    /// Target of an indirect branch.
    pub target: u64,
    /// Effective address of the access that missed.
    pub ea: u64,
    /// Which site left translated code.
    pub site: u64,
    /// Host address to enter at, and the slot of the last indirect jump.
    pub resume: u64,
    /// Host stack pointer while the guest runs.
    pub host_rsp: u64,
    /// RFLAGS.IF at its place in RFLAGS: a slot of its own, so that cli and sti are one store.
    pub interrupt_flag: u64,
    /// RFLAGS.DF at its place in RFLAGS, as the host's flags have it while the guest runs: to load it
    /// here costs a fraction of what pushing the flags does.
    pub direction: u64,
    /// RFLAGS.IF's bit if somebody wants to hear when an interrupt can be taken: code that has enabled
    /// them leaves.
    pub window_wanted: u64,
    /// Bases of es, cs, ss, ds, fs, gs.
    pub segment_base: [u64; 6],
    /// Guest MXCSR while Rust runs.
    pub mxcsr: u32,
    /// Host MXCSR while the guest runs.
    pub host_mxcsr: u32,
    /// The vCPU whose code runs, while it may call out ([`crate::callout`]); 0 if it may not.
    pub owner: u64,
    /// Function that callouts call.
    pub callee: u64,
    /// Base registers of accesses through the window are below this.
    pub window_limit: u64,
    /// And index registers below this.
    pub index_limit: u64,
    /// A change to ring 3 by translated code itself needs RSP to be no more than this.
    pub stack_limit: u64,
    /// What the signal handler met, if the site is [`HOST_FAULT`].
    pub fault: HostFault,
    /// Guest XMM registers while Rust runs.
    pub xmm: Aligned<[[u64; 2]; 16]>,
    /// Bits 128 to 255 of the YMM registers while Rust runs, if `upper` says so.
    pub ymm_high: Aligned<[[u64; 2]; 16]>,
    /// 1 if `ymm_high` holds something, 0 if the upper halves are all zero.
    pub upper: u32,
    /// 1 while the guest's vector registers and MXCSR are in the host's; else they are here.
    pub live: u32,
    /// 1 if the guest has enabled AVX: only then can it see the upper halves.
    pub avx: u32,
    /// Times that translated code took each of [`Path`]'s ways, if it counts.
    pub paths: [u64; Path::ALL.len()],
    /// RAX while a slot of `paths` changes.
    pub counting_rax: u64,
    /// Stand-in for memory that translated code may not touch directly. Its alignment keeps the
    /// low address bits of the access, which alignment-checking instructions look at.
    pub bounce: Aligned<[u8; BOUNCE_BYTES]>,
    /// x87 and MMX state, as fxsave64 stores it, while it isn't in the host's registers.
    pub x87: Aligned<[u8; 512]>,
}

impl Context {
    /// Writes the low `size` bytes of a register; 4 bytes clear the rest, as instructions do.
    #[inline]
    pub(crate) fn set_gpr_sized(&mut self, number: usize, value: u64, size: u32) {
        let slot = &mut self.gpr[number];
        let whole = match size {
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
        // Volatile, or the compiler stores but the bytes that change, and the load of all eight with which
        // translated code goes on waits until they have left the store buffer.
        // SAFETY: a reference.
        unsafe { std::ptr::write_volatile(slot, whole) };
    }
}

/// Largest single access (fxsave: 512 bytes) plus the offset that keeps its alignment.
pub(crate) const BOUNCE_BYTES: usize = 512 + 64;

/// Value of [`Context::site`] after a host signal.
pub(crate) const HOST_FAULT: u64 = u64::MAX;

/// A host signal that translated code took.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HostFault {
    /// SIGSEGV, SIGFPE, SIGILL, SIGBUS or SIGTRAP.
    pub signal: i32,
    /// Number of the exception that the host's CPU took.
    pub vector: u8,
    /// si_code.
    pub code: i32,
    /// Host address of the instruction.
    pub rip: u64,
    /// si_addr.
    pub address: u64,
    /// Page faults: the error code.
    pub error: u32,
}

/// Cache-line alignment for what SSE instructions and the bounce rule need.
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub T);

/// RFLAGS bits that live in the host's flags while the guest runs: CF PF AF ZF SF DF OF.
pub(crate) const NATIVE_FLAGS: u64 = 0xcd5;

/// RFLAGS arithmetic bits as [`Context::lazy_flags`] keeps them.
pub(crate) fn flags_from_lazy(lazy: u64) -> u64 {
    (lazy >> 8 & 0xd5) | (lazy & 1) << 11
}
