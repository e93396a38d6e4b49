//! Guests that end at once, or that never end and ask for something all the time.

use core::arch::asm;

use crate::h::{Call, evtchn, mmuext, vcpu_op};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("exit", || shutdown(0)),
    ("exit-code", || shutdown(7)),
    ("halt", || {
        hc(Call::SetTrapTable, [0; 5]);
        unsafe { asm!("mov eax, 0x1234", "hlt", out("eax") _) };
    }),
    ("host-exit", host_exit),
    ("flood-console", || {
        for line in 0.. {
            tell("line", line);
        }
    }),
    ("flood-doorbell", || {
        loop {
            hc(
                Call::EventChannelOp,
                [evtchn::SEND, evtchn::CONSOLE_PORT, 0, 0, 0],
            );
        }
    }),
    ("flood-marks", || {
        loop {
            hc(Call::Mark, [1, 0, 0, 0, 0]);
            hc(Call::Mark, [2, 0, 0, 0, 0]);
        }
    }),
    ("flood-timer", || {
        loop {
            hc(
                Call::VcpuOp,
                [vcpu_op::SET_SINGLESHOT_TIMER, 0, now(), 0, 0],
            );
        }
    }),
    ("flood-spaces", || {
        let root = new_root();
        loop {
            expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
            expect("unpin", ext(mmuext::UNPIN_TABLE, root), 0);
        }
    }),
    ("flood-syscalls", || {
        new_space();
        let mut stopped = start_user(user_null, 0);
        loop {
            stopped.call(nr::NULL);
            stopped = resume(0);
        }
    }),
    ("flood-faults", || {
        new_space();
        let mut stopped = start_user(user_read, 0x4000_0000);
        loop {
            stopped.exception(14);
            stopped = retry();
        }
    }),
    ("flood-errors", || {
        loop {
            for call in Call::ALL {
                let ends = matches!(call, Call::SchedOp | Call::Iret | Call::ConsoleIo);
                if !ends {
                    hc(*call, [u64::MAX; 5]);
                }
            }
        }
    }),
];

/// The host's own exit calls are not K's to make; what they leave is a guest that goes on.
fn host_exit() {
    for number in [60u64, 231] {
        let result: i64;
        unsafe {
            asm!("syscall", inlateout("rax") number as i64 => result, in("rdi") 0,
                out("rcx") _, out("r11") _);
        }
        expect("exit", result, -38);
    }
    say("alive\n");
}
