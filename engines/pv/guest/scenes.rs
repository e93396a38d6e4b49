//! What a well-behaved guest does.

use core::sync::atomic::Ordering::SeqCst;

use crate::h::layout::PAGE;
use crate::h::{Call, Registers, cause, evtchn, iret, mmuext, sched, segment, vcpu_op};
use crate::kernel::*;
use crate::scenes_memory::{VA, leaf, map, space_with_table};
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("hello", || say("hello\n")),
    ("syscalls", syscalls),
    ("spaces", spaces),
    ("divide", divide),
    ("kernel-divide", kernel_divide),
    ("timer-user", timer_user),
    ("timer-block", timer_block),
    ("registers", registers_told),
    ("bases", bases),
    ("fork-storm", fork_storm),
    ("echo-console", echo_console),
    ("spin-kernel", || loop {}),
    ("spin-user", || {
        new_space();
        start_user(user_spin, 0);
    }),
    ("flood", || {
        loop {
            hc(Call::SchedOp, [sched::YIELD, 0, 0, 0, 0]);
        }
    }),
    ("crash", || unsafe {
        hc(Call::SetTrapTable, [0; 5]);
        (0x123_4000 as *mut u64).write_volatile(1);
    }),
    ("sleep", || {
        hc(Call::SchedOp, [sched::BLOCK, 0, 0, 0, 0]);
    }),
    ("idle", idle),
];

fn syscalls() {
    new_space();
    let mut stopped = start_user(user_echo, 41);
    for round in 0..1000 {
        let [first, second, third, fourth, fifth, sixth] = stopped.call(nr::REPORT);
        let expected = if round == 0 { 42 } else { round * 7 + 1 };
        expect("argument", first as i64, expected);
        expect(
            "others",
            (second + third * 10 + fourth * 100 + fifth * 1000) as i64,
            5432,
        );
        expect("sixth", sixth as i64, 0x1111);
        stopped = resume((round + 1) * 7);
    }
    say("ok\n");
}

fn spaces() {
    let mut roots = [0; 8];
    for (index, root) in roots.iter_mut().enumerate() {
        *root = space_with_table();
        let page = frame();
        unsafe { *word(page, 0) = 100 + index as u64 };
        expect("map", map(VA, page * PAGE | P | W | U, 1), 0);
        let [value, ..] = start_user(user_read, VA).call(nr::REPORT);
        expect("value", value as i64, 100 + index as i64);
    }
    for round in 0..20 {
        for (index, root) in roots.iter().enumerate() {
            expect("switch", ext(mmuext::NEW_USER_BASEPTR, *root), 0);
            let [value, ..] = resume(VA as i64).call(nr::REPORT);
            expect(
                "value",
                value as i64,
                100 + index as i64 + if index == 3 { round } else { 0 },
            );
            if index == 3 {
                expect(
                    "poke",
                    hc(Call::VcpuOp, [vcpu_op::SET_RESULT, 0, VA, 0, 0]),
                    0,
                );
                let [value, ..] = continue_with(iret::CONTINUE, 0).call(nr::REPORT);
                // The frame of space 3 counts rounds.
                let page = value - round as u64;
                expect("same", page as i64, 103);
                let at = unsafe { *word(leaf(*root), VA / PAGE % 512) } / PAGE & 0xff_ffff;
                unsafe { *word(at, 0) += 1 };
            }
        }
    }
    for root in roots {
        expect("unpin", ext(mmuext::UNPIN_TABLE, root), 0);
    }
    say("ok\n");
}

fn divide() {
    new_space();
    let fault = start_user(user_divide, 0).exception(0);
    expect(
        "rip",
        fault.registers.rip as i64,
        (&raw const user_divide_at) as i64,
    );
    expect("rbx", fault.registers.gpr[3] as i64, 7);
    let mut registers = fault.registers;
    registers.rip += 2;
    registers.gpr[3] = 8;
    let [value, ..] =
        continue_with(iret::RESUME_FRAME, &raw const registers as u64).call(nr::REPORT);
    expect("rbx", value as i64, 8);
    say("ok\n");
}

extern "C" fn kernel_trap(frame: &mut crate::h::UpcallFrame) -> ! {
    expect("ring", frame.ring as i64, 0);
    expect("vector", frame.vector as i64, 0);
    frame.registers.rip += 2;
    frame.registers.gpr[3] += 1;
    hc(Call::Iret, [iret::KERNEL, frame as *mut _ as u64, 0, 0, 0]);
    shutdown(7)
}

fn kernel_divide() {
    use crate::h::{TrapEntry, layout::KERNEL_CS};
    let table = [
        TrapEntry {
            vector: 0,
            cs: KERNEL_CS,
            address: kernel_trap as *const () as u64,
            ..TrapEntry::default()
        },
        TrapEntry::default(),
    ];
    expect(
        "traps",
        hc(Call::SetTrapTable, [table.as_ptr() as u64, 0, 0, 0, 0]),
        0,
    );
    let mut count = 0u64;
    for _ in 0..100 {
        unsafe {
            core::arch::asm!(
                "mov r12, rbx", "mov rbx, rsi", "xor ecx, ecx", "mov eax, 1", "cdq", "div ecx",
                "mov rsi, rbx", "mov rbx, r12",
                inout("rsi") count, out("rax") _, out("rcx") _, out("rdx") _, out("r12") _,
            );
        }
    }
    expect("count", count as i64, 100);
    say("ok\n");
}

fn arm(deadline: u64) {
    expect(
        "timer",
        hc(
            Call::VcpuOp,
            [vcpu_op::SET_SINGLESHOT_TIMER, 0, deadline, 0, 0],
        ),
        0,
    );
}

fn bind_timer() -> u64 {
    let port = hc(
        Call::EventChannelOp,
        [evtchn::BIND_VIRQ, evtchn::VIRQ_TIMER, 0, 0, 0],
    );
    expect(
        "unmask",
        hc(Call::EventChannelOp, [evtchn::UNMASK, port as u64, 0, 0, 0]),
        0,
    );
    port as u64
}

fn take(port: u64) {
    shared().upcall_pending.store(0, SeqCst);
    let pending = shared().pending.fetch_and(!(1 << port), SeqCst);
    expect("pending", (pending >> port & 1) as i64, 1);
}

fn timer_user() {
    new_space();
    let port = bind_timer();
    let start = now();
    arm(start + 3_000_000);
    let mut stopped = start_user(user_spin, 0);
    let mut counted = 0;
    let mut moved = false;
    for _ in 0..10 {
        expect("cause", stopped.frame.cause as i64, cause::EVENT as i64);
        expect("masked", shared().upcall_mask.load(SeqCst).into(), 1);
        take(port);
        let count = stopped.frame.registers.gpr[3];
        if count < counted {
            expect("progress", count as i64, counted as i64);
        }
        // A busy host may not let the application run between two expiries.
        moved |= count > counted;
        counted = count;
        arm(now() + 1_000_000);
        stopped = retry();
    }
    expect("moved", moved.into(), 1);
    if now() < start + 12_000_000 {
        expect("time", now() as i64, start as i64 + 12_000_000);
    }
    say("ok\n");
}

fn timer_block() {
    let port = bind_timer();
    for _ in 0..5 {
        let deadline = now() + 2_000_000;
        arm(deadline);
        expect("block", hc(Call::SchedOp, [sched::BLOCK, 0, 0, 0, 0]), 0);
        take(port);
        // The guest's clock may differ from the host's by its own error.
        if now() + 100_000 < deadline {
            expect("early", now() as i64, deadline as i64);
        }
    }
    arm(now() + 1_000_000);
    expect(
        "poll",
        hc(Call::SchedOp, [sched::POLL, 1 << port, 0, 0, 0]),
        0,
    );
    take(port);
    say("ok\n");
}

fn idle() {
    let port = bind_timer();
    say("idle\n");
    arm(now() + 1_000_000_000);
    hc(Call::SchedOp, [sched::BLOCK, 0, 0, 0, 0]);
    take(port);
}

fn registers_told() {
    new_space();
    start_user(user_echo, 9).call(nr::REPORT);
    let mut told = Registers::default();
    let get = |told: &mut Registers| {
        hc(
            Call::VcpuOp,
            [vcpu_op::GET_REGISTERS, 0, told as *mut _ as u64, 0, 0],
        )
    };
    expect("get", get(&mut told), 0);
    expect("rbx", told.gpr[3] as i64, 0x1111);
    expect("r12", told.gpr[12] as i64, 0x2222);
    expect("rdi", told.gpr[7] as i64, 10);
    let [value, ..] = resume(5).call(nr::REPORT);
    expect("value", value as i64, 6);
    // A second register file in the same space, and back.
    expect("get", get(&mut told), 0);
    let [value, ..] = start_user(user_echo, 99).call(nr::REPORT);
    expect("other", value as i64, 100);
    told.gpr[0] = 50;
    let [value, ..] = continue_with(iret::START, &raw const told as u64).call(nr::REPORT);
    expect("back", value as i64, 51);
    say("ok\n");
}

fn bases() {
    new_space();
    let set = |which, base| hc(Call::SetSegmentBase, [which, base, 0, 0, 0]);
    expect("fs", set(segment::FS, 0x1234_5000), 0);
    expect("gs", set(segment::GS_USER, 0x777), 0);
    let [fs, gs, ..] = start_user(user_bases, 0).call(nr::REPORT);
    expect("fs", fs as i64, 0x1234_5000);
    expect("gs", gs as i64, 0x777);
    expect("fs", set(segment::FS, 0x99), 0);
    let [fs, ..] = resume(0).call(nr::REPORT);
    expect("fs", fs as i64, 0x99);
    expect("kernel gs", set(segment::GS_KERNEL, 0x55), 0);
    let gs: u64;
    unsafe { core::arch::asm!("rdgsbase {}", out(reg) gs) };
    expect("kernel gs", gs as i64, 0x55);
    expect("bad", set(segment::FS, 1 << 63), -22);
    say("ok\n");
}

fn fork_storm() {
    let root = new_root();
    for _ in 0..200 {
        expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
        expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
        start_user(user_echo, 1).call(nr::REPORT);
        expect("unpin", ext(mmuext::UNPIN_TABLE, root), 0);
    }
    say("ok\n");
}

fn echo_console() {
    use crate::h::console_io;
    let port = evtchn::CONSOLE_PORT;
    expect(
        "unmask",
        hc(Call::EventChannelOp, [evtchn::UNMASK, port, 0, 0, 0]),
        0,
    );
    let console = unsafe { &*(info().console as *const crate::h::ConsoleRing) };
    let mut buffer = [0u8; 100];
    loop {
        let at = buffer.as_mut_ptr() as u64;
        let count = hc(Call::ConsoleIo, [console_io::READ, 100, at, 0, 0]);
        if count > 0 {
            hc(Call::ConsoleIo, [console_io::WRITE, count as u64, at, 0, 0]);
        } else if console.input_ended.load(SeqCst) != 0 {
            break;
        } else {
            hc(Call::SchedOp, [sched::BLOCK, 0, 0, 0, 0]);
            shared().upcall_pending.store(0, SeqCst);
            shared().pending.store(0, SeqCst);
        }
    }
}
