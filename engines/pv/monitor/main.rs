//! The monitor: the part of the hypervisor that lives in the guest kernel's process, K.
//!
//! It sets K up from V's plan, shuts K's jail, and then answers hypercalls and carries upcalls. It
//! runs with exactly the rights that the guest kernel has, so nothing here isolates anybody:
//! what a guest kernel can do is bounded by K's seccomp filter, by the descriptors K holds and by
//! what is mapped in K, all of which are the guest's own. The checks here give a well-meaning
//! guest exact errors, and the host's page tables their rights.
//!
//! Modules: `hypercall` (entry and dispatch), `user` (the notification transport to user
//! processes), `frame` (their registers), `tables` (guest page tables), `walk` (faults), `shootdown` (unmapping), `upcall`
//! (entering the kernel), `trap` (exceptions of the kernel), `events` (ports, time, console),
//! `memory` (pointers), `vmm` (calls to V).
//!
//! Invariant: one thread, no nesting: every hypercall and every upcall starts on an empty stack,
//! and [`state`] is borrowed once for each.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

use abi::hypercall;

mod events;
mod frame;
mod held;
mod hypercalls;
mod memory;
mod mmu;
mod shootdown;
mod spaces;
mod sys;
mod tables;
mod trap;
mod upcall;
mod user;
mod vmm;
mod walk;
#[path = "../src/wire.rs"]
mod wire;

use hypercall::layout::{DIRECT_MAP, MAX_SPACES};
use wire::{Ledger, PAGE, Plan, k, k_fd};

global_asm!(include_str!("../../../workloads/guest/image/mem.s"));
global_asm!(
    ".pushsection .text",
    ".globl _start",
    "_start:",
    "lea rsp, [rip + monitor_stack_top]",
    "xor ebp, ebp",
    "call {start}",
    "hlt",
    ".popsection",
    ".pushsection .bss",
    ".balign 4096",
    "monitor_stack: .zero 0x8000",
    ".globl monitor_stack_top",
    "monitor_stack_top:",
    "signal_stack: .zero 0x8000",
    ".popsection",
    start = sym start,
);

unsafe extern "C" {
    static signal_stack: u8;
}

/// What the monitor keeps.
pub(crate) struct State {
    pub(crate) spaces: [spaces::Space; MAX_SPACES],
    /// Slot of the current space.
    pub(crate) current: Option<usize>,
    pub(crate) kernel: upcall::Kernel,
    pub(crate) events: events::Ports,
    /// Frames of guest memory.
    pub(crate) frames: u64,
    pub(crate) relax: u64,
}

static mut STATE: State = State {
    spaces: [const { spaces::Space::FREE }; MAX_SPACES],
    current: None,
    kernel: upcall::Kernel::NONE,
    events: events::Ports::NONE,
    frames: 0,
    relax: 0,
};

/// The state, at the one place where a hypercall or an exception enters.
///
/// # Safety
/// No other reference to it is in use.
pub(crate) unsafe fn state() -> &'static mut State {
    // SAFETY: the caller's promise; there is one thread.
    unsafe { &mut *(&raw mut STATE) }
}

/// What V said.
pub(crate) fn plan() -> &'static Plan {
    // SAFETY: mapped read-only before anything calls this, and filled by V before that.
    unsafe { &*(k::PLAN as *const Plan) }
}

/// What V reads.
pub(crate) fn ledger() -> &'static Ledger {
    // SAFETY: mapped before anything calls this; all its fields are atomic.
    unsafe { &*(k::LEDGER as *const Ledger) }
}

/// Each failing step of the set-up ends the process with a code of its own.
extern "C" fn start() -> ! {
    let check = |step: u64, well: bool| {
        if !well {
            sys::exit(step);
        }
    };
    // Everything but the monitor goes: the initial stack, vDSO and VVAR.
    // SAFETY: this code runs on a stack of its own and uses nothing outside the monitor.
    check(1, unsafe {
        sys::unmap(0, k::MONITOR) && sys::unmap(k::MONITOR_END, k::TASK_END)
    });
    map_everything(check);
    // SAFETY: nothing else runs yet.
    let state = unsafe { state() };
    let plan = plan();
    state.frames = plan.ram / PAGE;
    state.relax = plan.relax;
    check(10, trap::install((&raw const signal_stack) as u64, 0x8000));
    check(11, sys::drop_capabilities());
    let filter = |filter: &'static wire::Filter| filter.program.get(..filter.length as usize);
    let (Some(calls), Some(jail)) = (filter(&plan.calls), filter(&plan.jail)) else {
        sys::exit(12);
    };
    let listener = sys::filter(calls, true);
    check(13, listener >= 0);
    check(14, sys::send_descriptor(k_fd::SOCKET, listener as i32, 1));
    let close = |first: i32, last: i32| {
        // SAFETY: closes descriptors that nothing here uses any more.
        unsafe {
            sys::call(
                sys::nr::CLOSE_RANGE,
                [first as u64, last as u64, 0, 0, 0, 0],
            )
        };
    };
    close(listener as i32, listener as i32);
    close(k_fd::SOCKET, k_fd::SOCKET);
    close(k_fd::SHARED, k_fd::SHARED);
    close(k_fd::SLOTS, k_fd::SLOTS);
    check(15, sys::filter(jail, false) == 0);
    upcall::start(plan.entry, k::UPCALL_FRAME + k::BOOT_SIZE)
}

/// Maps the shared pages, guest memory, the monitor's tables and the kernel's segments.
fn map_everything(check: impl Fn(u64, bool)) {
    use sys::{MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE};
    const RW: u64 = PROT_READ | PROT_WRITE;
    const OWN: u64 = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: all of these are addresses of wire.rs or checked by V against them, and free.
    unsafe {
        check(
            2,
            sys::map(k::START_INFO, PAGE, PROT_READ, MAP_SHARED, k_fd::SHARED, 0),
        );
        check(
            3,
            sys::map(k::SHARED_INFO, 3 * PAGE, RW, MAP_SHARED, k_fd::SHARED, PAGE),
        );
        check(
            4,
            sys::map(
                k::PLAN,
                2 * PAGE,
                PROT_READ,
                MAP_SHARED,
                k_fd::SHARED,
                4 * PAGE,
            ),
        );
        let plan = plan();
        let frames = plan.ram / PAGE;
        check(
            5,
            sys::map(k::SLOTS, k::SLOTS_SIZE, RW, MAP_SHARED, k_fd::SLOTS, 0),
        );
        check(
            6,
            sys::map(DIRECT_MAP, plan.ram, RW, MAP_SHARED, k_fd::RAM, 0),
        );
        let records = frames * size_of::<tables::Frame>() as u64;
        check(7, sys::map(k::FRAMES, records, RW, OWN, -1, 0));
        check(
            7,
            sys::map(k::MAPPED, frames * held::RECORD, RW, OWN, -1, 0),
        );
        check(8, sys::map(k::UPCALL_FRAME, k::BOOT_SIZE, RW, OWN, -1, 0));
        for segment in plan.segment.iter().take(plan.segments as usize) {
            let well = sys::map(
                segment.address,
                segment.length,
                segment.rights,
                MAP_SHARED,
                k_fd::RAM,
                segment.offset,
            );
            check(9, well);
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let line = info.location().map_or(0, |at| at.line());
    vmm::crashed(wire::crash::MONITOR, [line.into(), 0, 0, 0])
}
