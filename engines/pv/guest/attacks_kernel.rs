//! Attacks from the kernel, as those from user mode: `safe` if it was refused, `reached` if not.

use core::arch::asm;

use crate::attacks::{PROBES, VA, arm, verdict, verdict_of_call, watchdog};
use crate::h::layout::PAGE;
use crate::h::{Call, MmuUpdate, console_io, mmuext};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("attack-kernel-calls", kernel_calls),
    ("attack-kernel-getppid", || {
        verdict_of_call(unsafe { host(110, [0; 6]) })
    }),
    ("attack-kernel-answer", kernel_answer),
    ("attack-kernel-vmm", kernel_vmm),
    ("attack-kernel-kill", kernel_kill),
    ("attack-kernel-table", kernel_table),
    ("attack-kernel-pointer", kernel_pointer),
    ("attack-kernel-ring", || unsafe {
        let ring = &*(info().console as *const crate::h::ConsoleRing);
        ring.output_producer
            .store(u32::MAX, core::sync::atomic::Ordering::SeqCst);
        hc(Call::ConsoleIo, [console_io::FLUSH, 0, 0, 0, 0]);
    }),
    ("attack-kernel-ledger", kernel_ledger),
    ("attack-kernel-limit", kernel_limit),
    ("attack-kernel-stack", || unsafe {
        asm!("mov rsp, 8", "push rax", "hlt", options(noreturn));
    }),
];

unsafe fn host(number: u64, arguments: [u64; 6]) -> i64 {
    let result: i64;
    let [a, b, c, d, e, f] = arguments;
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
            in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _);
    }
    result
}

fn kernel_calls() {
    for number in 0..=600 {
        // sched_yield and rt_sigreturn are allowed as they are; the latter would be the end of it.
        if number == 15 || number == 24 || PROBES.contains(&number) {
            continue;
        }
        for argument in [0, 3, 4, u64::MAX] {
            let arguments = [argument, 1, argument, argument, argument, argument];
            let result = unsafe { host(number, arguments) };
            if result != -38 {
                tell("reached", number as i64);
                return;
            }
        }
    }
    verdict(false);
}

/// Answers notifications that do not exist.
fn kernel_answer() {
    for id in [0, 1, 2, 77, u64::MAX] {
        let answer = [id, 0, 0];
        let at = &raw const answer as u64;
        expect(
            "answer",
            unsafe { host(16, [6, 0xc018_2101, at, 0, 0, 0]) },
            -2,
        );
    }
    // Let the system call run after all, as a hostile kernel would (the CONTINUE flag).
    new_space();
    start_user(user_null, 0);
    verdict(false);
}

/// Calls V with arguments that make no sense.
fn kernel_vmm() {
    for slot in [64, 1000, u64::MAX] {
        expect(
            "create",
            unsafe { host(0x6000, [slot, 0, 0, 0, 0, 0]) },
            -22,
        );
        expect("destroy", unsafe { host(0x6001, [slot, 0, 0, 0, 0, 0]) }, 0);
    }
    expect(
        "create",
        unsafe { host(0x6000, [63, 0, 0, 0, 0, 0]) }.signum(),
        1,
    );
    expect("again", unsafe { host(0x6000, [63, 0, 0, 0, 0, 0]) }, -16);
    expect("destroy", unsafe { host(0x6001, [63, 0, 0, 0, 0, 0]) }, 0);
    expect("mark", unsafe { host(0x6002, [99, 0, 0, 0, 0, 0]) }, 0);
    expect("beyond", unsafe { host(0x6007, [0; 6]) }, -38);
    verdict(false);
}

/// Signals whatever it has a descriptor of, and whoever it guesses.
fn kernel_kill() {
    new_space();
    for fd in 0..64 {
        expect("pidfd", unsafe { host(424, [fd, 10, 0, 0, 0, 0]) }, -38);
    }
    expect(
        "kill by pidfd",
        unsafe { host(424, [64, 9, 0, 0, 0, 0]) },
        -38,
    );
    expect("kill", unsafe { host(62, [1, 9, 0, 0, 0, 0]) }, -38);
    expect("tgkill", unsafe { host(234, [1, 1, 9, 0, 0, 0]) }, -38);
    verdict(false);
}

/// Maps a page table writable into user mode.
fn kernel_table() {
    let root = new_root();
    let leaf = table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    let request = MmuUpdate {
        entry: leaf * PAGE,
        value: leaf * PAGE | P | W | U,
    };
    verdict(hc(Call::MmuUpdate, [&raw const request as u64, 1, 0, 0, 0]) == 0);
}

/// Has the monitor read its own memory out on the console.
fn kernel_pointer() {
    let result = hc(
        Call::ConsoleIo,
        [console_io::WRITE, 8, 0x6800_0000_1000, 0, 0],
    );
    verdict(result >= 0);
}

/// Writes nonsense over what V reads, and has V use it.
fn kernel_ledger() {
    for index in 0..512 {
        unsafe {
            (0x6000_0000_3000 as *mut u64)
                .add(index)
                .write_volatile(!0 - index as u64 * 0x101)
        };
    }
    watchdog();
    arm(1_000_000);
    hc(Call::Mark, [1, 0, 0, 0, 0]);
    hc(Call::Mark, [2, 0, 0, 0, 0]);
    hc(Call::SchedOp, [crate::h::sched::BLOCK, 0, 0, 0, 0]);
    verdict(false);
}

/// Lifts the limit of exits that the monitor keeps, and calls V for ever.
fn kernel_limit() {
    unsafe { (0x6000_0000_3000 as *mut u64).add(105).write_volatile(!0) };
    loop {
        hc(Call::Mark, [1, 0, 0, 0, 0]);
        hc(Call::Mark, [2, 0, 0, 0, 0]);
    }
}
