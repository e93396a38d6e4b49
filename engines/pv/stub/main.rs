//! The stub: the zygote of user processes, and the gate that stays in each.
//!
//! The zygote is executed once per guest. It installs the filter that sends guest system calls to
//! K, hands the listener to V and forks a user process for each slot that V orders. A user process
//! maps its slot, closes every descriptor but guest memory's, draws a key and puts it into its jail,
//! unmaps all but gate and slot, shuts the jail and notifies K that it is there (gate.s). It is V's child, not the zygote's (CLONE_PARENT), so that
//! V can wait for it and it dies with V.
//!
//! Exit codes above 0 name the step that failed; V turns them into a message.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

use abi::hypercall;

#[path = "../monitor/sys.rs"]
#[allow(dead_code, reason = "shared with the monitor, which uses the rest")]
mod sys;
#[path = "../src/wire.rs"]
mod wire;

use sys::nr;
use wire::{SLOT_SIZE, StubPlan, relax, u, u_fd};

global_asm!(include_str!("gate.s"));
global_asm!(include_str!("../../../workloads/guest/image/mem.s"));
global_asm!(
    ".pushsection .text",
    ".globl _start",
    "_start:",
    "lea rsp, [rip + stub_stack + 0x4000]",
    "xor ebp, ebp",
    "call {start}",
    "hlt",
    ".popsection",
    ".pushsection .bss",
    ".balign 16",
    "stub_stack: .zero 0x4000",
    ".popsection",
    start = sym start,
);

unsafe extern "C" {
    fn gate_signal();
    fn gate_restorer();
    fn gate_close(keep: u64, key: u64) -> !;
}

/// Where the zygote maps its plan.
const PLAN: u64 = u::STUB + 0x1000_0000;

/// SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGUSR1, SIGSEGV
const SIGNALS: [u64; 6] = [4, 5, 7, 8, 10, 11];
const SS_AUTODISARM: u64 = 1 << 31;
const PR_SET_PDEATHSIG: u64 = 1;
const SIGKILL: u64 = 9;
const SIGCHLD: u64 = 17;
const CLONE_PARENT: u64 = 0x8000;

extern "C" fn start() -> ! {
    // SAFETY: nothing is mapped there yet.
    if !unsafe { sys::map(PLAN, 4096, sys::PROT_READ, sys::MAP_SHARED, u_fd::PLAN, 0) } {
        sys::exit(1);
    }
    // SAFETY: just mapped; V filled it before this process started and leaves it alone.
    let plan = unsafe { &*(PLAN as *const StubPlan) };
    let flags = SS_AUTODISARM;
    if !sys::drop_capabilities() || !sys::signal_stack(u::SIGNAL_STACK, u::SIGNAL_STACK_SIZE, flags)
    {
        sys::exit(2);
    }
    for signal in SIGNALS {
        if !sys::handle(
            signal,
            gate_signal as *const () as u64,
            gate_restorer as *const () as u64,
        ) {
            sys::exit(3);
        }
    }
    let Some(calls) = plan.calls.program.get(..plan.calls.length as usize) else {
        sys::exit(4);
    };
    let listener = sys::filter(calls, true);
    if listener < 0 {
        sys::exit(5);
    }
    if !sys::send_descriptor(u_fd::SOCKET, listener as i32, 1) {
        sys::exit(6);
    }
    // Only K may answer.
    // SAFETY: closes a descriptor of this function's own.
    unsafe {
        sys::call(
            nr::CLOSE_RANGE,
            [listener as u64, listener as u64, 0, 0, 0, 0],
        )
    };
    serve(plan)
}

/// Forks a user process for each slot that V names, and answers with its process id.
fn serve(plan: &StubPlan) -> ! {
    // SAFETY: has no arguments.
    let parent = unsafe { sys::call(nr::GETPPID, [0; 6]) };
    loop {
        let mut slot = 0u32;
        let socket = u_fd::SOCKET as u64;
        // SAFETY: `slot` is writable for the duration of the call.
        let read = unsafe { sys::call(nr::READ, [socket, &raw mut slot as u64, 4, 0, 0, 0]) };
        if read != 4 {
            sys::exit(0);
        }
        // SAFETY: an ordinary fork: the child runs on its own copy of this stack.
        let pid = unsafe { sys::call(nr::CLONE, [CLONE_PARENT | SIGCHLD, 0, 0, 0, 0, 0]) };
        if pid == 0 {
            become_user(plan, slot, parent);
        }
        // SAFETY: `pid` is readable for the duration of the call.
        unsafe { sys::call(nr::WRITE, [socket, &raw const pid as u64, 8, 0, 0, 0]) };
    }
}

fn become_user(plan: &StubPlan, slot: u32, parent: i64) -> ! {
    // SAFETY: plain numbers.
    if unsafe { sys::call(nr::PRCTL, [PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0]) } != 0 {
        sys::exit(10);
    }
    // V may have died before the line above.
    // SAFETY: has no arguments.
    if unsafe { sys::call(nr::GETPPID, [0; 6]) } != parent {
        sys::exit(11);
    }
    // The gate runs with every signal blocked; entering user code unblocks them.
    let every = u64::MAX;
    // SAFETY: `every` is readable for the duration of the call.
    if unsafe { sys::call(nr::SIGPROCMASK, [0, &raw const every as u64, 0, 8, 0, 0]) } != 0 {
        sys::exit(14);
    }
    let offset = u64::from(slot) * SLOT_SIZE;
    let writable = sys::PROT_READ | sys::PROT_WRITE;
    let rights = if plan.relax & relax::COMMANDS_WRITABLE == 0 {
        sys::PROT_READ
    } else {
        writable
    };
    let slots = u_fd::SLOTS;
    // SAFETY: these addresses are free in the zygote.
    let mapped = unsafe {
        sys::map(u::COMMANDS, 4096, rights, sys::MAP_SHARED, slots, offset)
            && sys::map(
                u::SIGNAL_STACK,
                u::SIGNAL_STACK_SIZE,
                writable,
                sys::MAP_SHARED,
                slots,
                offset + 4096,
            )
    };
    if !mapped {
        sys::exit(12);
    }
    if plan.relax & relax::ALL_SLOTS != 0 {
        // SAFETY: free; the attack test's guest knows the address.
        unsafe {
            sys::map(
                u::GATE - 0x1000_0000,
                16 * SLOT_SIZE,
                writable,
                sys::MAP_SHARED,
                slots,
                0,
            )
        };
    }
    let key = draw_key();
    place_jail(plan, key);
    // SAFETY: plain numbers; nothing here owns a descriptor any more.
    let closed = unsafe {
        let target = u_fd::RAM as u64;
        let every = u64::from(u32::MAX);
        sys::call(nr::DUP2, [u_fd::MEMORY as u64, target, 0, 0, 0, 0]) == target as i64
            && sys::call(nr::CLOSE_RANGE, [target + 1, every, 0, 0, 0, 0]) == 0
    };
    if !closed {
        sys::exit(13);
    }
    // SAFETY: never returns, so that it may unmap this code and stack.
    unsafe { gate_close(plan.relax & relax::KEEP_MAPPINGS, key) }
}

/// A key that nobody can guess: 62 bits, so that it is not taken for an error number.
fn draw_key() -> u64 {
    let mut key = 0u64;
    // SAFETY: `key` is writable for the duration of the call.
    if unsafe { sys::call(nr::GETRANDOM, [&raw mut key as u64, 8, 0, 0, 0, 0]) } != 8 {
        sys::exit(15);
    }
    key >> 2
}

/// Puts the jail, with the key in it, where it outlives the zygote's mappings: struct sock_fprog, then
/// its code. The gate wipes it.
fn place_jail(plan: &StubPlan, key: u64) {
    let length = (plan.jail.length as usize).min(plan.jail.program.len());
    let words = u::SIGNAL_STACK as *mut u64;
    // SAFETY: the signal stack is mapped and its first page is larger than any filter.
    unsafe {
        words.write(length as u64);
        words.add(1).write(u::SIGNAL_STACK + 16);
        for (index, instruction) in plan.jail.program.iter().take(length).enumerate() {
            // The operand is the high half of an instruction.
            let operand = match plan.key.map(|place| place != 0 && place == index as u64) {
                [true, _] => key << 32,
                [_, true] => key >> 32 << 32,
                [false, false] => 0,
            };
            words.add(2 + index).write(*instruction | operand);
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    sys::exit(99)
}
