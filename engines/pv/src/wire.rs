//! What the three parties of one guest share: addresses, descriptor numbers, page layouts.
//!
//! This file is compiled into the VMM (V), the monitor (in K) and the stub (in U), so it needs no
//! `std` and holds no behaviour. Nothing in a page that K or U can write is trusted by V.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each of the three programs uses a part of it, and only one is checked"
)]

use core::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};

use crate::hypercall::layout::MAX_SPACES;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Addresses in K. The guest kernel's segments lie below 2^46, the direct map from there on.
pub mod k {
    use super::{PAGE, SLOT_SIZE};
    use crate::hypercall::layout::MAX_SPACES;

    /// `StartInfo`, read-only.
    pub const START_INFO: u64 = 0x6000_0000_0000;
    /// `SharedInfo`.
    pub const SHARED_INFO: u64 = START_INFO + PAGE;
    /// `ConsoleRing`.
    pub const CONSOLE: u64 = START_INFO + 2 * PAGE;
    /// [`super::Ledger`].
    pub const LEDGER: u64 = START_INFO + 3 * PAGE;
    /// [`super::Plan`], read-only.
    pub const PLAN: u64 = START_INFO + 4 * PAGE;
    /// Bytes of all these.
    pub const SHARED_SIZE: u64 = 6 * PAGE;
    /// The slots of all user processes.
    pub const SLOTS: u64 = 0x6100_0000_0000;
    /// Bytes of all slots.
    pub const SLOTS_SIZE: u64 = SLOT_SIZE * MAX_SPACES as u64;
    /// The monitor's record of every frame.
    pub const FRAMES: u64 = 0x6200_0000_0000;
    /// The monitor's record of what is mapped in user processes.
    pub const MAPPED: u64 = 0x6300_0000_0000;
    /// The upcall frame, and after it the boot stack of the guest kernel.
    pub const UPCALL_FRAME: u64 = 0x6400_0000_0000;
    /// Bytes of both.
    pub const BOOT_SIZE: u64 = 5 * PAGE;
    /// The monitor; its first page is the hypercall page.
    pub const MONITOR: u64 = 0x6800_0000_0000;
    /// The monitor ends below.
    pub const MONITOR_END: u64 = MONITOR + 0x100_0000;
    /// End of user addresses on the host.
    pub const TASK_END: u64 = 0x7fff_ffff_f000;
}

/// Addresses in U. Everything below 2^46 is the guest's.
pub mod u {
    /// The gate: the one page of code that stays.
    pub const GATE: u64 = 0x7000_0000_0000;
    /// Bytes of the gate.
    pub const GATE_SIZE: u64 = 4096;
    /// What the kernel reports as instruction pointer of a notification by the gate.
    pub const GATE_NOTIFIED: u64 = GATE + 0x42;
    /// [`super::Commands`], read-only to U: first page of its slot.
    pub const COMMANDS: u64 = 0x7000_0001_0000;
    /// The signal stack: the rest of its slot.
    pub const SIGNAL_STACK: u64 = COMMANDS + 4096;
    /// Bytes of the signal stack.
    pub const SIGNAL_STACK_SIZE: u64 = super::SLOT_SIZE - 4096;
    /// The rest of the stub, which only the zygote keeps.
    pub const STUB: u64 = 0x7000_1000_0000;
}

/// Bytes of a user process's slot: commands and signal stack.
pub const SLOT_SIZE: u64 = 8 * PAGE;

/// Descriptors of K.
pub mod k_fd {
    /// The shared pages; closed before the guest runs.
    pub const SHARED: i32 = 3;
    /// Guest memory.
    pub const RAM: i32 = 4;
    /// The slots; closed before the guest runs.
    pub const SLOTS: i32 = 5;
    /// Notifications of the user processes.
    pub const LISTENER: i32 = 6;
    /// V wakes K.
    pub const WAKE: i32 = 7;
    /// K rings V.
    pub const BELL: i32 = 8;
    /// The one-shot timer.
    pub const TIMER: i32 = 9;
    /// To hand K's own listener to V; closed before the guest runs.
    pub const SOCKET: i32 = 10;
    /// Process descriptor of the user process in slot 0; others follow.
    pub const PROCESS: i32 = 64;
}

/// Descriptors of the zygote and of U.
pub mod u_fd {
    /// The slots; closed in U before guest code runs.
    pub const SLOTS: i32 = 3;
    /// Orders of V; closed in U before guest code runs.
    pub const SOCKET: i32 = 4;
    /// The filter of U; closed in U before guest code runs.
    pub const PLAN: i32 = 5;
    /// Guest memory, in the zygote.
    pub const MEMORY: i32 = 6;
    /// Guest memory, the one descriptor of U: of no use without the process's key.
    pub const RAM: i32 = 0;
}

/// System call numbers by which the gate notifies K; from elsewhere they are guest system calls.
pub mod gate {
    /// `(signal, frame)`: a signal was delivered.
    pub const SIGNAL: u64 = 0x5f00;
    /// `(0, failures, key)`: commands were carried out, and some failed; a new process is there.
    pub const DONE: u64 = 0x5f01;
    /// First number that notifies.
    pub const FIRST: u64 = 0x5000;
    /// First number after those that notify.
    pub const END: u64 = 0x6000;
}

/// System call numbers by which K calls V and waits for the answer.
pub mod vmm {
    /// `(slot)`: makes a user process; its process id.
    pub const SPACE_CREATE: u64 = 0x6000;
    /// `(slot)`: ends it.
    pub const SPACE_DESTROY: u64 = 0x6001;
    /// `(value)`: a mark.
    pub const MARK: u64 = 0x6002;
    /// `(code)`: the guest ends.
    pub const SHUTDOWN: u64 = 0x6003;
    /// The guest crashed; the ledger says where.
    pub const CRASH: u64 = 0x6004;
    /// Take all console output.
    pub const CONSOLE: u64 = 0x6005;
    /// The limit of exits is reached.
    pub const LIMIT: u64 = 0x6006;
    /// First number after these.
    pub const END: u64 = 0x6007;
}

/// One step of the gate.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Command {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
    /// PROT_ bits.
    pub rights: u32,
    /// MAP_ flags to map, 0 to unmap, [`PROTECT`] to change rights.
    pub flags: u32,
    /// Offset in guest memory.
    pub offset: u64,
}

/// A command that changes rights; negative for the gate.
pub const PROTECT: u32 = 1 << 31;

/// Commands that fit.
pub const COMMANDS: usize = 126;

/// The page that U reads and K writes. The gate's assembly knows the offsets.
#[derive(Debug)]
#[repr(C)]
pub struct Commands {
    /// Where the commands end: bytes from the start of the page.
    pub end: u32,
    /// Unused.
    pub unused: u32,
    /// Address of the signal frame to return by, plus 8.
    pub frame: u64,
    /// Bit 0: set FS base; bit 1: set GS base.
    pub bases: u32,
    /// Unused.
    pub reserved: u32,
    /// FS base.
    pub fs: u64,
    /// GS base.
    pub gs: u64,
    /// 0; the process's key in a control of the attack tests.
    pub key: u64,
    /// Unused.
    pub padding: [u64; 2],
    /// The commands.
    pub entries: [Command; COMMANDS],
}

/// A segment of the guest kernel.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// Where the kernel wants it, page-aligned.
    pub address: u64,
    /// Bytes, whole pages.
    pub length: u64,
    /// First byte in guest memory.
    pub offset: u64,
    /// PROT_ bits.
    pub rights: u64,
}

/// Segments that a guest kernel may have.
pub const SEGMENTS: usize = 16;
/// Instructions that a filter may have.
pub const FILTER: usize = 160;

/// A seccomp filter: instructions as the kernel takes them.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Filter {
    /// Instructions.
    pub length: u64,
    /// Code, jumps and operand of each.
    pub program: [u64; FILTER],
}

/// What K's monitor is told, in two pages.
#[derive(Debug)]
#[repr(C)]
pub struct Plan {
    /// Bytes of guest memory.
    pub ram: u64,
    /// Entry of the guest kernel.
    pub entry: u64,
    /// Number of segments.
    pub segments: u64,
    /// The guest kernel's segments.
    pub segment: [Segment; SEGMENTS],
    /// The filter that sends K's calls to V.
    pub calls: Filter,
    /// The filter that keeps K to its list.
    pub jail: Filter,
    /// [`relax`] bits: for controls of attack tests only.
    pub relax: u64,
}

/// What the zygote is told.
#[derive(Debug)]
#[repr(C)]
pub struct StubPlan {
    /// The filter that sends U's notifications to K.
    pub calls: Filter,
    /// The filter that keeps U to its list.
    pub jail: Filter,
    /// Instructions of the jail whose operands are the low and the high half of the process's key; 0 if
    /// it has no key (a control of the attack tests).
    pub key: [u64; 2],
    /// [`relax`] bits: for controls of attack tests only.
    pub relax: u64,
}

/// Defences that a control of an attack test removes. 0 outside such tests.
pub mod relax {
    /// The process's key lies on its command page.
    pub const SHOW_KEY: u64 = 1 << 0;
    /// The command page is writable to U.
    pub const COMMANDS_WRITABLE: u64 = 1 << 1;
    /// The zygote's mappings and vDSO stay in U.
    pub const KEEP_MAPPINGS: u64 = 1 << 2;
    /// The monitor believes notifications whoever sends them and whatever they say.
    pub const TRUST_NOTIFICATIONS: u64 = 1 << 3;
    /// The monitor does not check frames and tables.
    pub const TRUST_TABLES: u64 = 1 << 4;
    /// The monitor does not check pointers.
    pub const TRUST_POINTERS: u64 = 1 << 5;
    /// U keeps all slots mapped.
    pub const ALL_SLOTS: u64 = 1 << 6;
    /// The monitor leaves signal frames as the process wrote them.
    pub const RAW_FRAMES: u64 = 1 << 7;
}

/// Upcalls and faults that are counted, by index in [`Ledger::events`].
pub mod event {
    /// System calls handed to the kernel.
    pub const SYSCALL: usize = 0;
    /// Events handed to the kernel.
    pub const EVENT: usize = 1;
    /// Failsafe upcalls.
    pub const FAILSAFE: usize = 2;
    /// Faults that the monitor answered by mapping.
    pub const SHADOW_FAULT: usize = 3;
    /// Preemptions of user code.
    pub const PREEMPT: usize = 4;
    /// Doorbells.
    pub const DOORBELL: usize = 5;
    /// Times that a user process was let go on with mappings to remove.
    pub const SHOOTDOWN: usize = 6;
    /// Times that a user process had too many mappings and lost them all.
    pub const EVICTION: usize = 7;
    /// Number of these.
    pub const COUNT: usize = 8;
}

/// What the monitor counts and V reads, and the words by which both find each other.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Ledger {
    /// Hypercalls by number.
    pub calls: [AtomicU64; 64],
    /// Exceptions handed to the kernel, by vector.
    pub exceptions: [AtomicU64; 32],
    /// [`event`]s.
    pub events: [AtomicU64; event::COUNT],
    /// Calls that left the guest's process, upcalls and faults.
    pub exits: AtomicU64,
    /// `exits` at which K calls `vmm::LIMIT`.
    pub limit: AtomicU64,
    /// Slot of the user process that runs, plus one; 0 while the kernel runs.
    pub running: AtomicU32,
    /// Not 0 while K sleeps on its wake descriptor.
    pub asleep: AtomicU32,
    /// Why the guest crashed: a [`crash`] code.
    pub crash: AtomicU64,
    /// Details of the crash.
    pub detail: [AtomicI64; 4],
    /// Registers at the crash: 16 general ones in encoding order, rip, rflags.
    pub registers: [AtomicU64; 18],
}

/// Why a guest crashed.
pub mod crash {
    /// An exception of the kernel without an entry: detail is vector, error, address.
    pub const EXCEPTION: u64 = 1;
    /// An upcall without an entry or stack: detail is cause, vector.
    pub const NO_ENTRY: u64 = 2;
    /// The monitor failed: detail is a line number.
    pub const MONITOR: u64 = 3;
    /// A host system call of the monitor failed: detail is number and error.
    pub const HOST: u64 = 4;
    /// A user process broke its signal state and there is no failsafe entry.
    pub const SIGNAL_STATE: u64 = 5;
}

const _: () = assert!(size_of::<Ledger>() == PAGE as usize);
const _: () = assert!(size_of::<Plan>() <= 2 * PAGE as usize);
const _: () = assert!(size_of::<StubPlan>() <= PAGE as usize);
const _: () = assert!(size_of::<Commands>() == PAGE as usize);
const _: () = assert!(MAX_SPACES <= 64);
