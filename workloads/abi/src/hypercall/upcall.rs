//! How the host enters the guest kernel: the frame of an upcall.

/// A register file of user mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15: in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS; only bits that user mode can change are taken, IF reads as set.
    pub rflags: u64,
    /// [`layout::USER_CS`](super::layout::USER_CS).
    pub cs: u64,
    /// [`layout::USER_SS`](super::layout::USER_SS).
    pub ss: u64,
}

/// Why an entry of the kernel is called.
pub mod cause {
    /// A system call of user mode.
    pub const SYSCALL: u64 = 0;
    /// An exception of user mode (`ring` 3) or of the kernel (`ring` 0).
    pub const EXCEPTION: u64 = 1;
    /// An event became deliverable in user mode.
    pub const EVENT: u64 = 2;
}

/// What an upcall tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct UpcallFrame {
    /// A [`cause`].
    pub cause: u64,
    /// 3 or 0.
    pub ring: u64,
    /// Root frame of the space that was left; 0 for ring 0.
    pub space: u64,
    /// Number of the system call.
    pub number: u64,
    /// Arguments of the system call.
    pub arguments: [u64; 6],
    /// Exception vector.
    pub vector: u64,
    /// Error code (SDM 3A 4.7 for page faults), 0 where the vector has none.
    pub error: u64,
    /// Address of a page fault.
    pub address: u64,
    /// Registers; after a system call only `rip` is valid.
    pub registers: Registers,
}

/// An entry point of the kernel for upcalls.
pub type Entry = unsafe extern "C" fn(frame: *mut UpcallFrame) -> !;
