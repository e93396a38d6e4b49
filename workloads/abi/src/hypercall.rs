//! The hypercall ABI of the `aware` flavour: what a deprivileged guest kernel and its host agree on.
//!
//! The guest kernel runs natively without privilege and asks where an unaware kernel would execute
//! privileged instructions. Names and numbers are Xen's where Xen has the call (Xen public/xen.h),
//! so that what is known of Xen PV guests holds here; differences are said at each call. The largest
//! one: operands that Xen passes in a small structure travel in registers here.
//!
//! # Calling
//!
//! A hypercall is a call into the hypercall page: entry `nr` lies at
//! `StartInfo::hypercall_page + 32 * nr` and takes up to five `u64` by the System V C convention
//! ([`call`]). The result is an `i64`: negative values are an [`errno`] negated, others belong to
//! the call. All pointers are virtual addresses of the kernel and must lie, with everything they
//! point at, in memory that the kernel may read (or write, for results): else -EFAULT, and nothing
//! was done. A call that fails changes nothing, but for batches, which say how far they came, and
//! [`Call::UpdateVaMapping`] of several pages.
//! There is one vCPU.
//!
//! # Tiers
//!
//! What a call costs is said by its [`Tier`], from T0 (never leaves the guest) to T3 (the VMM).
//!
//! # Memory
//!
//! Guest memory is `StartInfo::frames` frames of 4 KiB, numbered from 0; a frame's address is its
//! number times 4096, without holes. The kernel sees all of it at [`layout::DIRECT_MAP`], and its own
//! segments besides at the virtual addresses that its image names, with the rights named there.
//!
//! User address spaces are ordinary four-level tables (SDM 3A 4.5) in guest frames, with frame
//! numbers of the guest in their entries. A space is named by the frame of its root. The kernel
//! builds the tables through the direct map, and pins the root ([`mmuext::PIN_L4_TABLE`]): that
//! checks the whole tree and creates the space. From then on its tables change by [`Call::MmuUpdate`]
//! and [`Call::UpdateVaMapping`] alone (a write through the direct map is seen at the next flush
//! at the latest, unchecked). Rules for every entry, else -EINVAL:
//!
//! - user addresses end at [`layout::USER_END`]: root entries from there on stay empty, and so does
//!   everything below [`layout::USER_START`];
//! - the frame number is below `StartInfo::frames`;
//! - bits 52 to 62 are zero; tables above the leaf are present, writable, user, without no-execute
//!   or not: rights are those of all levels together;
//! - a leaf in level 2 (2 MiB) is allowed, aligned; one in level 3 is not;
//! - a frame that is a table of a pinned space is mapped nowhere writable, and is a table in one
//!   place only: -EBUSY.
//!
//! The host sets accessed and dirty bits no later than the first access; it may set them early for
//! neighbours that it maps ahead of their use. Kernel addresses are not part of these tables.
//!
//! # Entering user mode and being entered
//!
//! [`Call::Iret`] enters user mode in the current space, and returns only on error. User mode ends
//! with an upcall: the host calls the registered entry on the stack of [`Call::StackSwitch`], with
//! `rdi` pointing at an [`UpcallFrame`] that is valid until the next iret. An entry has the type
//! [`Entry`] and never returns. Upcalls set `SharedInfo::upcall_mask`, iret clears it.
//!
//! - a system call (`syscall` with `rax` from [`layout::SYSCALL_FIRST`] to [`layout::SYSCALL_LAST`])
//!   enters the syscall callback. Its registers stay with the user process; only number, arguments
//!   (`rdi`, `rsi`, `rdx`, `r10`, `r8`, `r9`) and `rip` are told. [`iret::RESUME`] continues it with
//!   a value in `rax`; `rcx` and `r11` are lost, as by the instruction. Any other number gives
//!   the program -ENOSYS in `rax` and does not reach the kernel;
//! - an exception enters the trap table's entry for its vector, with error code, address and all
//!   registers. [`iret::RESUME_FRAME`] continues it with the registers as the kernel left them. A
//!   vector without an entry, and an exception that the kernel itself takes without an entry,
//!   crash the guest;
//! - an event that becomes deliverable enters the event callback; continue as after an exception.
//!
//! An exception of the kernel itself enters the same trap table with `ring` 0, and a frame of its
//! own on the interrupted stack, below its red zone; [`iret::KERNEL`] continues it.
//!
//! The FPU and vector registers belong to the user process; the kernel need not save them. Each
//! space holds one register file: entering it with [`iret::START`] replaces the former one, so
//! threads that share a space are switched with [`vcpu_op::GET_REGISTERS`] and [`iret::START`].
//!
//! # Events
//!
//! 64 ports, as bits in [`SharedInfo`]. Raising port p sets bit p of `pending`; if bit p of `mask`
//! is clear it sets `upcall_pending` also. The host interrupts user mode then, or ends a
//! [`sched::BLOCK`]. It never interrupts the kernel: a kernel that unmasks tests `upcall_pending`
//! itself and calls its own handler, which costs no exit at all. The handler clears `upcall_pending`
//! first, then takes bits of `pending & !mask`. All ports start masked, `upcall_mask` starts set.

mod shared;
mod upcall;

pub use shared::{Clock, ConsoleRing, SharedInfo, Start, StartInfo};
pub use upcall::{Entry, Registers, UpcallFrame, cause};

/// Version of this ABI. An image names the version it wants in its note; see [`note`].
pub const VERSION: u32 = 1;

/// The ELF note (`PT_NOTE`) that makes an image an `aware` one: name `Trapline`, type 1,
/// descriptor: the wanted [`VERSION`] as little-endian `u32`, then a `u32` of [`feature`] bits without
/// which the image can't run.
pub mod note {
    /// Name of the note, its terminating zero included.
    pub const NAME: &[u8; 9] = b"Trapline\0";
    /// Type of the note.
    pub const TYPE: u32 = 1;
}

/// Bits of [`StartInfo::features`].
pub mod feature {
    /// [`super::Call::SetSegmentBase`] works (the host lets user mode write FS and GS base).
    pub const SEGMENT_BASE: u32 = 1 << 0;
    /// Level-2 leaves (2 MiB) are taken.
    pub const LARGE_PAGES: u32 = 1 << 1;
    /// Accessed and dirty bits are kept.
    pub const ACCESSED_DIRTY: u32 = 1 << 2;
    /// [`super::StartInfo::devices`] names a frame: see the ABI's `device`.
    pub const DEVICES: u32 = 1 << 3;
}

/// Addresses and numbers that do not change from host to host.
pub mod layout {
    /// Bytes of a frame.
    pub const PAGE: u64 = 4096;
    /// First user address that can be mapped.
    pub const USER_START: u64 = 0x1_0000;
    /// User addresses end here; the kernel's own segments do too.
    pub const USER_END: u64 = 1 << 46;
    /// All guest memory, in the kernel: frame n lies at `DIRECT_MAP + n * PAGE`.
    pub const DIRECT_MAP: u64 = 1 << 46;
    /// First number of a guest system call.
    pub const SYSCALL_FIRST: u64 = 0x5000;
    /// Last number of a guest system call.
    pub const SYSCALL_LAST: u64 = 0x5eff;
    /// Bytes between two entries of the hypercall page.
    pub const CALL_STRIDE: u64 = 32;
    /// The code segment selector of the kernel (Xen's FLAT_KERNEL_CS64).
    pub const KERNEL_CS: u16 = 0xe033;
    /// The stack segment selector of the kernel.
    pub const KERNEL_SS: u16 = 0xe02b;
    /// The code segment selector of user mode.
    pub const USER_CS: u16 = 0x33;
    /// The stack segment selector of user mode.
    pub const USER_SS: u16 = 0x2b;
    /// Spaces that can exist at a time.
    pub const MAX_SPACES: usize = 64;
}

/// What a call costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Tier {
    /// Stays in the guest's own process and makes no host system call.
    T0,
    /// Makes a host system call of its own: 0.2 to 0.6 us.
    T1,
    /// Switches between kernel and user process: 3 to 6 us.
    T2,
    /// Posts to the VMM (0.3 us) or waits for its answer (5 us and more).
    T3,
}

impl Tier {
    /// The name used in csv and report.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::T0 => "T0",
            Tier::T1 => "T1",
            Tier::T2 => "T2",
            Tier::T3 => "T3",
        }
    }
}

/// Errors of hypercalls, as positive numbers; calls return them negated.
pub mod errno {
    /// Not allowed to a guest, ever.
    pub const EPERM: i64 = 1;
    /// No such vCPU, space or port.
    pub const ENOENT: i64 = 2;
    /// A batch longer than [`super::MAX_BATCH`].
    pub const E2BIG: i64 = 7;
    /// The host has no memory or process left.
    pub const ENOMEM: i64 = 12;
    /// A pointer leaves the kernel's memory, or is not aligned to what it points at.
    pub const EFAULT: i64 = 14;
    /// The frame or space is in another use.
    pub const EBUSY: i64 = 16;
    /// A value that the call's documentation does not allow.
    pub const EINVAL: i64 = 22;
    /// All ports or spaces are taken.
    pub const ENOSPC: i64 = 28;
    /// No such call or command.
    pub const ENOSYS: i64 = 38;
}

/// The largest count of any batch ([`Call::MmuUpdate`], [`Call::MmuextOp`], [`Call::Multicall`]).
pub const MAX_BATCH: u64 = 4096;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal, $tier:ident;)*) => {
        /// The hypercalls. Arguments are named in their order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Call { $($(#[$doc])* $name = $number),* }

        impl Call {
            /// Every call, in the order of its number.
            pub const ALL: &[Call] = &[$(Call::$name),*];

            /// The name in csv and report.
            pub const fn name(self) -> &'static str {
                match self { $(Call::$name => $text),* }
            }

            /// The tier of the call when it has the most to do; see its documentation.
            pub const fn tier(self) -> Tier {
                match self { $(Call::$name => Tier::$tier),* }
            }

            /// The call with this number.
            pub const fn from_number(number: u64) -> Option<Call> {
                match number { $($number => Some(Call::$name),)* _ => None }
            }
        }
    };
}

calls! {
    /// `(entries: *const TrapEntry)`: sets the entries of exceptions, up to one whose address is 0;
    /// at most 32. A null pointer clears the table. T0.
    ///
    /// EFAULT: wild pointer, or entry point outside the kernel's executable segments. EINVAL: vector
    /// above 31, or no end after 32 entries. EPERM: selector other than [`layout::KERNEL_CS`].
    SetTrapTable = 0, "set_trap_table", T0;
    /// `(requests: *const MmuUpdate, count, done: *mut u64)`: changes entries of pinned tables. `done`
    /// (may be null) gets the number of requests that were carried out. Stops at the first bad one.
    /// Every change holds in every space before the call returns: no user instruction runs after it on
    /// what an entry was before. T0; what a user process holds of old entries is taken from it on
    /// its way back into user mode, which makes its next iret dearer, once for all calls before it.
    ///
    /// EFAULT, E2BIG. EINVAL: unknown command, unaligned entry, a frame that is no pinned table, or
    /// an entry against the rules. EBUSY: the frame is a table, or it is mapped writable and is to
    /// become a table.
    MmuUpdate = 1, "mmu_update", T0;
    /// `(ss, rsp)`: the stack for upcalls from user mode. T0.
    ///
    /// EPERM: selector other than [`layout::KERNEL_SS`]. EINVAL: `rsp` not a multiple of 16. EFAULT:
    /// the 16 bytes below `rsp` are not the kernel's to write.
    StackSwitch = 3, "stack_switch", T0;
    /// `(event, failsafe, syscall)`: entries for events and system calls. `failsafe` (may be 0) is
    /// entered with vector 8 when a user process has corrupted its own signal state: its registers are
    /// lost, only START continues it; without one the guest crashes. T0.
    ///
    /// EFAULT: an address outside the kernel's executable segments.
    SetCallbacks = 4, "set_callbacks", T0;
    /// `(set)`: 0 or 1. Accepted for the interface's sake: FPU state is kept per space. T0.
    ///
    /// EINVAL: any other value.
    FpuTaskswitch = 5, "fpu_taskswitch", T0;
    /// `(calls: *mut MulticallEntry, count)`: makes calls in order and stores each result. Not allowed
    /// inside: iret, multicall, sched_op (their result is -EPERM). Tier of its most expensive call.
    ///
    /// EFAULT, E2BIG.
    Multicall = 13, "multicall", T3;
    /// `(va, value, flags, count)`: changes the leaf entries of `count` (0 means 1) pages from `va` on in
    /// the current space. For a present `value` the frame number goes up by one per page. Tables
    /// down to level 1 must exist. `flags` as Xen's UVMF: 0 or [`uvmf`] bits; changes hold on return
    /// whatever they are. T0, as mmu_update.
    ///
    /// It stops at the first page that fails: the entries of the pages before it stay changed, with
    /// INVLPG carried out for them, those from it on are as they were, and TLB_FLUSH is not done. What
    /// does not depend on the page (`va`, `flags`, `count`, a current space) is checked before any.
    ///
    /// EINVAL: `va` unaligned or not a user address, no table there, or an entry against the rules.
    /// EBUSY as mmu_update. E2BIG. ENOENT: no current space.
    UpdateVaMapping = 14, "update_va_mapping", T0;
    /// `(command, count, buffer)`: see [`console_io`]. WRITE and FLUSH wait for the VMM: T3; READ: T0.
    ConsoleIo = 18, "console_io", T3;
    /// `(form, argument)`: see [`iret`]. Enters user mode; returns only with an error. T2.
    ///
    /// ENOENT: no current space. EINVAL: unknown form, bad selector, `rip` or `rsp` not a user
    /// address, or a form that does not match how the space was left. EFAULT: wild pointer.
    Iret = 23, "iret", T2;
    /// `(command, vcpu, argument)`: see [`vcpu_op`]. ENOENT for any vCPU but 0.
    VcpuOp = 24, "vcpu_op", T1;
    /// `(which, base)`: see [`segment`]. The user bases are those of the current space and take effect
    /// with the next iret. T0, and a part of the next iret.
    ///
    /// EINVAL: unknown register, or a base that is not canonical. ENOENT: no current space. ENOSYS:
    /// without [`feature::SEGMENT_BASE`].
    SetSegmentBase = 25, "set_segment_base", T0;
    /// `(operations: *const MmuextOp, count, done: *mut u64)`: see [`mmuext`]. Stops at the first
    /// bad one; `done` as in mmu_update.
    MmuextOp = 26, "mmuext_op", T3;
    /// `(command, argument)`: see [`sched`].
    SchedOp = 29, "sched_op", T1;
    /// `(command, argument)`: see [`evtchn`].
    EventChannelOp = 32, "event_channel_op", T1;
    /// `(value)`: [`crate::mark`] values, 1 opens and 2 closes the measured window; both wait for the
    /// VMM. T3.
    ///
    /// EINVAL: any other value.
    Mark = 48, "trapline_mark", T3;
}

/// An entry of [`Call::SetTrapTable`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TrapEntry {
    /// Exception vector, 0 to 31.
    pub vector: u8,
    /// Unused, 0.
    pub flags: u8,
    /// [`layout::KERNEL_CS`].
    pub cs: u16,
    /// Unused, 0.
    pub reserved: u32,
    /// The entry point; 0 ends the table.
    pub address: u64,
}

/// A request of [`Call::MmuUpdate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MmuUpdate {
    /// Guest-physical address of the entry, with a [`mmu`] command in its low three bits.
    pub entry: u64,
    /// The new entry.
    pub value: u64,
}

/// Commands of [`MmuUpdate::entry`].
pub mod mmu {
    /// Stores the value.
    pub const NORMAL_PT_UPDATE: u64 = 0;
    /// Stores the value but keeps accessed and dirty bits that the old entry has.
    pub const PT_UPDATE_PRESERVE_AD: u64 = 2;
}

/// Flags of [`Call::UpdateVaMapping`].
pub mod uvmf {
    /// Nothing more than the entry's own translation.
    pub const INVLPG: u64 = 2;
    /// All of the space's translations.
    pub const TLB_FLUSH: u64 = 1;
}

/// An operation of [`Call::MmuextOp`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MmuextOp {
    /// A [`mmuext`] command.
    pub command: u32,
    /// Unused, 0.
    pub reserved: u32,
    /// Frame number or virtual address, as the command says.
    pub argument: u64,
}

/// Commands of [`MmuextOp`].
pub mod mmuext {
    /// Argument: frame of a root. Checks and types the tree and creates the space. T3.
    ///
    /// EINVAL: a bad entry anywhere. EBUSY: a frame of the tree is a table already, or is mapped
    /// writable. ENOSPC: [`super::layout::MAX_SPACES`] exist. ENOMEM: the host has no process left.
    pub const PIN_L4_TABLE: u32 = 3;
    /// Argument: frame of a pinned root. Destroys the space; its tables become ordinary frames. If it
    /// was the current space, there is none. T3.
    ///
    /// EINVAL: not a pinned root.
    pub const UNPIN_TABLE: u32 = 4;
    /// Argument: frame of a pinned root. Makes its space current and flushes all its translations, as a
    /// load of CR3 does. T0.
    ///
    /// EINVAL: not a pinned root.
    pub const NEW_BASEPTR: u32 = 5;
    /// Flushes all translations of the current space (ENOENT without one). T0.
    pub const TLB_FLUSH_LOCAL: u32 = 6;
    /// Argument: user address. Flushes its translation in the current space. T0.
    ///
    /// EINVAL: not a user address. ENOENT: no current space.
    pub const INVLPG_LOCAL: u32 = 7;
    /// Flushes all translations of all spaces. T0.
    pub const TLB_FLUSH_ALL: u32 = 10;
    /// Argument: user address. Flushes its translation in all spaces. T0.
    pub const INVLPG_ALL: u32 = 11;
    /// Argument: frame of a pinned root. Makes its space current and flushes nothing. T0.
    ///
    /// EINVAL: not a pinned root.
    pub const NEW_USER_BASEPTR: u32 = 15;
}

/// An entry of [`Call::Multicall`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MulticallEntry {
    /// Number of the call.
    pub call: u64,
    /// Its result.
    pub result: i64,
    /// Its arguments; the last one is unused.
    pub arguments: [u64; 6],
}

/// Commands of [`Call::ConsoleIo`].
pub mod console_io {
    /// `(WRITE, count, buffer)`: appends bytes to the output ring and waits until the host has taken all
    /// of them. Returns `count`. EFAULT, E2BIG (above 4096).
    pub const WRITE: u64 = 0;
    /// `(READ, count, buffer)`: takes bytes that wait in the input ring. Returns their number. EFAULT.
    pub const READ: u64 = 1;
    /// `(FLUSH, 0, 0)`: waits until the host has taken everything in the output ring.
    pub const FLUSH: u64 = 2;
}

/// Forms of [`Call::Iret`].
pub mod iret {
    /// Argument: `*const Registers`. A whole register file, with a fresh FPU. Always possible.
    pub const START: u64 = 0;
    /// Argument: the value for `rax`. Continues a system call.
    pub const RESUME: u64 = 1;
    /// Argument: 0, or `*const Registers` that may lie in the upcall frame. Continues after an
    /// exception or event, with the frame's registers as they are now.
    pub const RESUME_FRAME: u64 = 2;
    /// Argument: `*const UpcallFrame` with `ring` 0. Continues the kernel after its own exception. T0.
    pub const KERNEL: u64 = 3;
    /// Argument unused. Continues the current space however it was left: a system call with the
    /// result it was last given by [`super::vcpu_op::SET_RESULT`] (0 if none), anything else as
    /// [`RESUME_FRAME`] with its own registers. What a scheduler uses.
    pub const CONTINUE: u64 = 4;
}

/// Commands of [`Call::VcpuOp`].
pub mod vcpu_op {
    /// Argument: absolute system time in ns at which [`super::evtchn::VIRQ_TIMER`] is raised, once.
    /// Replaces an earlier one; a time gone by raises it at once. T1.
    pub const SET_SINGLESHOT_TIMER: u64 = 8;
    /// No timer any more. T1.
    pub const STOP_SINGLESHOT_TIMER: u64 = 9;
    /// Argument: `*mut Registers`. The registers of the current space, however it was left. T2 after a
    /// system call, else T0. EINVAL: the space never ran.
    pub const GET_REGISTERS: u64 = 64;
    /// Argument: the value that the pending system call of the current space will return when
    /// continued by [`super::iret::CONTINUE`]. T0. EINVAL: not in a system call.
    pub const SET_RESULT: u64 = 65;
}

/// Registers of [`Call::SetSegmentBase`].
pub mod segment {
    /// FS base of user mode.
    pub const FS: u64 = 0;
    /// GS base of user mode.
    pub const GS_USER: u64 = 1;
    /// GS base of the kernel.
    pub const GS_KERNEL: u64 = 2;
}

/// Commands of [`Call::SchedOp`].
pub mod sched {
    /// Lets the host run something else. T1.
    pub const YIELD: u64 = 0;
    /// Clears `upcall_mask` and sleeps until `upcall_pending` is set. T1 (T0 if it is set already).
    pub const BLOCK: u64 = 1;
    /// Argument: 0 is success, anything else the failure code (32 bits). Does not return. T3.
    pub const SHUTDOWN: u64 = 2;
    /// Argument: bits of ports. Sleeps until one of them is pending, masked or not; `upcall_mask` stays.
    /// A timeout is a timer port among them. T1 (T0 if one is pending already). EINVAL: no port.
    pub const POLL: u64 = 3;
}

/// Commands of [`Call::EventChannelOp`], ports and virtual interrupts.
pub mod evtchn {
    /// Argument: a VIRQ. Returns its port; the same one when bound already. T0.
    ///
    /// EINVAL: no such VIRQ. ENOSPC.
    pub const BIND_VIRQ: u64 = 1;
    /// Argument: a port that was bound. T0. EINVAL.
    pub const CLOSE: u64 = 3;
    /// Argument: a port. The console's port: rings the VMM's doorbell, T3 (posts, does not wait). A port
    /// of `BIND_IPI`: raises it, T0. EINVAL: any other port.
    pub const SEND: u64 = 4;
    /// Argument: the vCPU, 0. Returns a new port that `SEND` raises. T0. ENOENT, ENOSPC.
    pub const BIND_IPI: u64 = 7;
    /// Argument: a port. Clears its mask bit; if it is pending, sets `upcall_pending`. T0. EINVAL.
    pub const UNMASK: u64 = 9;

    /// Virtual interrupt of the one-shot timer.
    pub const VIRQ_TIMER: u64 = 0;
    /// The console's port, bound from the start: raised when input arrives, when it has ended, and
    /// when output that the guest waits for (see `ConsoleRing::output_wanted`) has drained.
    pub const CONSOLE_PORT: u64 = 1;
    /// Number of ports.
    pub const PORTS: u64 = 64;
}

/// Makes a hypercall.
///
/// # Safety
/// `page` is [`StartInfo::hypercall_page`]; this code runs as the guest kernel, with what the call
/// needs at the addresses it names.
#[inline]
pub unsafe fn call(page: u64, call: Call, arguments: [u64; 5]) -> i64 {
    type Entry = unsafe extern "C" fn(u64, u64, u64, u64, u64) -> i64;
    let address = page + layout::CALL_STRIDE * call as u64;
    // SAFETY: the hypercall page holds a function of this type at each entry (the caller's promise).
    let entry: Entry = unsafe { core::mem::transmute(address as *const ()) };
    let [a, b, c, d, e] = arguments;
    // SAFETY: the caller's promise.
    unsafe { entry(a, b, c, d, e) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_by_their_number_and_names_are_unique() {
        for call in Call::ALL {
            assert_eq!(Call::from_number(*call as u64), Some(*call));
            let same = Call::ALL.iter().filter(|other| other.name() == call.name());
            assert_eq!(same.count(), 1, "{}", call.name());
        }
        assert_eq!(Call::from_number(2), None);
    }

    #[test]
    fn shared_structures_fit_their_pages() {
        assert!(size_of::<SharedInfo>() <= 4096);
        assert_eq!(size_of::<ConsoleRing>(), 4096);
        assert!(size_of::<StartInfo>() <= 4096);
        assert_eq!(size_of::<TrapEntry>(), 16);
        assert_eq!(size_of::<MmuUpdate>(), 16);
        assert_eq!(size_of::<MmuextOp>(), 16);
        assert_eq!(size_of::<MulticallEntry>(), 64);
    }
}
