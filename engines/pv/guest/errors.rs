//! Calls with bad arguments, each with the error it must give; and that nothing has changed then.

use crate::h::errno::*;
use crate::h::layout::{KERNEL_CS, KERNEL_SS, MAX_SPACES, PAGE, USER_END};
use crate::h::{
    Call, MAX_BATCH, MmuUpdate, MmuextOp, MulticallEntry, TrapEntry, console_io, evtchn, iret,
    mmuext, sched, vcpu_op,
};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("errors-tables", tables),
    ("errors-pointers", pointers),
    ("errors-values", values),
    ("errors-spaces", spaces),
];

const VA: u64 = 0x4000_0000;
const WILD: [u64; 7] = [
    8,
    0x5000_0000,
    0x3fff_ffff_fff8,
    // The monitor, its shared pages, the slots.
    0x6800_0000_1000,
    0x6000_0000_3000,
    0x6100_0000_0000,
    0xffff_ffff_ffff_fff8,
];

fn update(entry: u64, value: u64) -> i64 {
    let request = MmuUpdate { entry, value };
    hc(Call::MmuUpdate, [&raw const request as u64, 1, 0, 0, 0])
}

fn map(va: u64, value: u64) -> i64 {
    hc(Call::UpdateVaMapping, [va, value, 0, 1, 0])
}

fn tables() {
    let frames = info().frames;
    let root = new_root();
    let leaf = table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("no space", map(VA, 0), -ENOENT);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    let entry = leaf * PAGE + (VA / PAGE % 512) * 8;
    let page = frame();
    let good = page * PAGE | P | U;
    expect("good", update(entry, good), 0);
    let same = |what: &str| {
        expect(
            what,
            unsafe { *word(leaf, VA / PAGE % 512) } as i64,
            good as i64,
        )
    };
    expect("unaligned", update(entry + 4, good), -EINVAL);
    expect("command", update(entry | 3, good), -EINVAL);
    expect("beyond", update(frames * PAGE, good), -EINVAL);
    expect("far beyond", update(!7, good), -EINVAL);
    expect("no table", update(page * PAGE, good), -EINVAL);
    expect(
        "foreign frame",
        update(entry, frames * PAGE | P | U),
        -EINVAL,
    );
    expect(
        "far frame",
        update(entry, ((1 << 52) - PAGE) | P | U),
        -EINVAL,
    );
    expect("reserved bits", update(entry, good | 1 << 52), -EINVAL);
    expect("reserved bits", update(entry, good | 1 << 62), -EINVAL);
    same("unchanged");
    for table in [root, leaf] {
        expect(
            "writable table",
            update(entry, table * PAGE | P | U | W),
            -EBUSY,
        );
        expect("readable table", update(entry, table * PAGE | P | U), 0);
    }
    expect("good", update(entry, good), 0);
    // A frame that is mapped writable can't become a table; one that is one, not a second time.
    expect("writable", update(entry, good | W), 0);
    let top = root * PAGE + 8;
    expect("link", update(top, page * PAGE | P | W | U), -EBUSY);
    expect("link itself", update(top, root * PAGE | P | W | U), -EBUSY);
    expect("link twice", update(top, leaf * PAGE | P | W | U), -EBUSY);
    expect(
        "link",
        update(root * PAGE + 200 * 8, frame() * PAGE | P | W | U),
        -EINVAL,
    );
    expect("large in level 4", update(top, good | 1 << 7), -EINVAL);
    // Below the first user address.
    let low = new_root();
    put(low, 0, good);
    expect("low", ext(mmuext::PIN_L4_TABLE, low), -EINVAL);
    put(low, 0, 0);
    expect("low", ext(mmuext::PIN_L4_TABLE, low), 0);
    // A tree that is bad far down: nothing of it stays typed, so mending it is enough.
    let bad = new_root();
    put(bad, VA, frames * PAGE | P | U);
    expect("bad leaf", ext(mmuext::PIN_L4_TABLE, bad), -EINVAL);
    put(bad, VA, root * PAGE | P | U | W);
    expect("maps a table", ext(mmuext::PIN_L4_TABLE, bad), -EBUSY);
    put(bad, VA, bad * PAGE | P | U | W);
    expect("maps itself", ext(mmuext::PIN_L4_TABLE, bad), -EBUSY);
    put(bad, VA, good);
    expect("mended", ext(mmuext::PIN_L4_TABLE, bad), 0);
    expect("unpin", ext(mmuext::UNPIN_TABLE, bad), 0);
    // update_va_mapping.
    expect("unaligned", map(VA + 1, good), -EINVAL);
    expect("beyond", map(USER_END, good), -EINVAL);
    expect("no table", map(VA + (1 << 30), good), -EINVAL);
    expect(
        "flags",
        hc(Call::UpdateVaMapping, [VA, good, 8, 1, 0]),
        -EINVAL,
    );
    expect(
        "count",
        hc(Call::UpdateVaMapping, [VA, good, 0, MAX_BATCH + 1, 0]),
        -E2BIG,
    );
    // Large leaves.
    let third = unsafe { *word(root, VA >> 39 & 511) } / PAGE;
    let second = unsafe { *word(third, VA >> 30 & 511) } / PAGE;
    let at = second * PAGE + 8 * 100;
    expect("unaligned large", update(at, good | 1 << 7), -EINVAL);
    let beyond = frames.next_multiple_of(512) * PAGE;
    expect("large beyond", update(at, beyond | P | U | 1 << 7), -EINVAL);
    // What a batch has done is told.
    let batch = [
        MmuUpdate { entry, value: good },
        MmuUpdate {
            entry: entry + 8,
            value: good,
        },
        MmuUpdate {
            entry: entry + 1,
            value: good,
        },
        MmuUpdate { entry, value: 0 },
    ];
    let mut done = 99u64;
    let arguments = [batch.as_ptr() as u64, 4, &raw mut done as u64, 0, 0];
    expect("batch", hc(Call::MmuUpdate, arguments), -EINVAL);
    expect(
        "done",
        unsafe { (&raw const done).read_volatile() } as i64,
        2,
    );
    same("unchanged");
    say("ok\n");
}

fn pointers() {
    let root = new_space();
    start_user(user_null, 0);
    let good = MmuUpdate {
        entry: root * PAGE + 800,
        value: 0,
    };
    let at = &raw const good as u64;
    for wild in WILD {
        expect(
            "mmu_update",
            hc(Call::MmuUpdate, [wild, 1, 0, 0, 0]),
            -EFAULT,
        );
        expect("done", hc(Call::MmuUpdate, [at, 1, wild, 0, 0]), -EFAULT);
        expect("mmuext_op", hc(Call::MmuextOp, [wild, 1, 0, 0, 0]), -EFAULT);
        expect(
            "multicall",
            hc(Call::Multicall, [wild, 1, 0, 0, 0]),
            -EFAULT,
        );
        expect("traps", hc(Call::SetTrapTable, [wild, 0, 0, 0, 0]), -EFAULT);
        expect(
            "callbacks",
            hc(Call::SetCallbacks, [wild, 0, 0, 0, 0]),
            -EFAULT,
        );
        expect(
            "write",
            hc(Call::ConsoleIo, [console_io::WRITE, 8, wild, 0, 0]),
            -EFAULT,
        );
        expect(
            "read",
            hc(Call::ConsoleIo, [console_io::READ, 8, wild, 0, 0]),
            -EFAULT,
        );
        expect(
            "start",
            hc(Call::Iret, [iret::START, wild, 0, 0, 0]),
            -EFAULT,
        );
        expect(
            "kernel",
            hc(Call::Iret, [iret::KERNEL, wild, 0, 0, 0]),
            -EFAULT,
        );
        expect(
            "get",
            hc(Call::VcpuOp, [vcpu_op::GET_REGISTERS, 0, wild, 0, 0]),
            -EFAULT,
        );
        if wild % 16 == 0 {
            expect(
                "stack",
                hc(Call::StackSwitch, [KERNEL_SS.into(), wild, 0, 0, 0]),
                -EFAULT,
            );
        }
    }
    expect(
        "unaligned",
        hc(Call::MmuUpdate, [at + 1, 1, 0, 0, 0]),
        -EFAULT,
    );
    // Results into code and constants; more than there is.
    let code = pointers as *const () as u64 & !7;
    expect(
        "into code",
        hc(Call::MmuUpdate, [at, 1, code, 0, 0]),
        -EFAULT,
    );
    let end = info().direct_map + info().frames * PAGE;
    expect(
        "across the end",
        hc(Call::MmuUpdate, [end - 16, 2, 0, 0, 0]),
        -EFAULT,
    );
    let data = &raw const good as u64;
    expect(
        "data is no code",
        hc(Call::SetCallbacks, [data, 0, 0, 0, 0]),
        -EFAULT,
    );
    expect(
        "multicall into code",
        hc(Call::Multicall, [code & !63, 1, 0, 0, 0]),
        -EFAULT,
    );
    say("ok\n");
}

fn values() {
    new_space();
    let op = |command, argument| hc(Call::SchedOp, [command, argument, 0, 0, 0]);
    let event = |command, argument| hc(Call::EventChannelOp, [command, argument, 0, 0, 0]);
    expect(
        "no call",
        unsafe { raw(info().hypercall_page + 32 * 2) },
        -ENOSYS,
    );
    expect(
        "no call",
        unsafe { raw(info().hypercall_page + 32 * 127) },
        -ENOSYS,
    );
    expect("sched", op(99, 0), -ENOSYS);
    expect("poll", op(sched::POLL, 0), -EINVAL);
    expect("virq", event(evtchn::BIND_VIRQ, 7), -EINVAL);
    expect("port", event(evtchn::SEND, 63), -EINVAL);
    expect("port", event(evtchn::UNMASK, 64), -EINVAL);
    expect("port", event(evtchn::CLOSE, u64::MAX), -EINVAL);
    expect("event", event(77, 0), -ENOSYS);
    expect("ipi", event(evtchn::BIND_IPI, 1), -ENOENT);
    for _ in 0..62 {
        event(evtchn::BIND_IPI, 0);
    }
    expect("ports", event(evtchn::BIND_IPI, 0), -ENOSPC);
    expect("send", event(evtchn::SEND, 5), 0);
    expect(
        "vcpu",
        hc(Call::VcpuOp, [vcpu_op::STOP_SINGLESHOT_TIMER, 1, 0, 0, 0]),
        -ENOENT,
    );
    expect("vcpu_op", hc(Call::VcpuOp, [1, 0, 0, 0, 0]), -ENOSYS);
    expect(
        "result",
        hc(Call::VcpuOp, [vcpu_op::SET_RESULT, 0, 0, 0, 0]),
        -EINVAL,
    );
    expect("fpu", hc(Call::FpuTaskswitch, [2, 0, 0, 0, 0]), -EINVAL);
    expect("mark", hc(Call::Mark, [9, 0, 0, 0, 0]), -EINVAL);
    expect("console", hc(Call::ConsoleIo, [9, 0, 0, 0, 0]), -ENOSYS);
    expect(
        "console",
        hc(Call::ConsoleIo, [console_io::WRITE, 5000, 0, 0, 0]),
        -E2BIG,
    );
    expect(
        "selector",
        hc(Call::StackSwitch, [0x10, 0, 0, 0, 0]),
        -EPERM,
    );
    expect(
        "stack",
        hc(Call::StackSwitch, [KERNEL_SS.into(), 24, 0, 0, 0]),
        -EINVAL,
    );
    let entry = |vector, cs| {
        let address = values as *const () as u64;
        [
            TrapEntry {
                vector,
                cs,
                address,
                ..TrapEntry::default()
            },
            TrapEntry::default(),
        ]
    };
    for (table, error) in [(entry(32, KERNEL_CS), -EINVAL), (entry(3, 0x33), -EPERM)] {
        expect(
            "trap",
            hc(Call::SetTrapTable, [table.as_ptr() as u64, 0, 0, 0, 0]),
            error,
        );
    }
    let endless = [entry(1, KERNEL_CS)[0]; 33];
    expect(
        "endless",
        hc(Call::SetTrapTable, [endless.as_ptr() as u64, 0, 0, 0, 0]),
        -EINVAL,
    );
    let mut registers = registers(user_null as *const () as u64, 0);
    let start = |registers: &_| {
        hc(
            Call::Iret,
            [iret::START, registers as *const _ as u64, 0, 0, 0],
        )
    };
    registers.cs = 0x10;
    expect("cs", start(&registers), -EINVAL);
    registers.cs = KERNEL_CS.into();
    expect("cs", start(&registers), -EINVAL);
    registers.cs = 0x33;
    registers.ss = 0;
    expect("ss", start(&registers), -EINVAL);
    registers.ss = 0x2b;
    registers.rip = 0x6800_0000_0000;
    expect("rip", start(&registers), -EINVAL);
    expect(
        "resume",
        hc(Call::Iret, [iret::RESUME, 0, 0, 0, 0]),
        -EINVAL,
    );
    expect("form", hc(Call::Iret, [99, 0, 0, 0, 0]), -EINVAL);
    let batch = MAX_BATCH + 1;
    expect("batch", hc(Call::MmuUpdate, [0, batch, 0, 0, 0]), -E2BIG);
    expect("batch", hc(Call::MmuextOp, [0, u64::MAX, 0, 0, 0]), -E2BIG);
    expect("batch", hc(Call::Multicall, [0, batch, 0, 0, 0]), -E2BIG);
    let mut inside = [MulticallEntry::default(); 4];
    for (entry, call) in inside.iter_mut().zip([23, 13, 29, 2]) {
        entry.call = call;
    }
    expect(
        "multicall",
        hc(Call::Multicall, [inside.as_mut_ptr() as u64, 4, 0, 0, 0]),
        0,
    );
    for (entry, error) in inside.iter().zip([-EPERM, -EPERM, -EPERM, -ENOSYS]) {
        expect(
            "inside",
            unsafe { (&raw const entry.result).read_volatile() },
            error,
        );
    }
    say("ok\n");
}

unsafe fn raw(entry: u64) -> i64 {
    let entry: unsafe extern "C" fn() -> i64 = unsafe { core::mem::transmute(entry) };
    unsafe { entry() }
}

fn spaces() {
    let frames = info().frames;
    expect("pin beyond", ext(mmuext::PIN_L4_TABLE, frames), -EINVAL);
    expect("pin far", ext(mmuext::PIN_L4_TABLE, u64::MAX), -EINVAL);
    expect("unpin", ext(mmuext::UNPIN_TABLE, u64::MAX), -EINVAL);
    expect("base", ext(mmuext::NEW_USER_BASEPTR, 5), -EINVAL);
    expect("base", ext(mmuext::NEW_BASEPTR, u64::MAX), -EINVAL);
    expect("flush", ext(mmuext::TLB_FLUSH_LOCAL, 0), -ENOENT);
    expect("command", ext(99, 0), -ENOSYS);
    expect(
        "no space",
        hc(Call::Iret, [iret::RESUME, 0, 0, 0, 0]),
        -ENOENT,
    );
    let first = new_space();
    expect("twice", ext(mmuext::PIN_L4_TABLE, first), -EBUSY);
    expect("invlpg", ext(mmuext::INVLPG_LOCAL, USER_END), -EINVAL);
    expect("invlpg", ext(mmuext::INVLPG_ALL, u64::MAX), -EINVAL);
    let mut roots = [0; MAX_SPACES];
    for root in roots.iter_mut().skip(1) {
        *root = new_root();
        expect("pin", ext(mmuext::PIN_L4_TABLE, *root), 0);
    }
    let last = new_root();
    expect("full", ext(mmuext::PIN_L4_TABLE, last), -ENOSPC);
    // The tables of the one that failed are ordinary frames.
    expect("unpin", ext(mmuext::UNPIN_TABLE, roots[7]), 0);
    expect("room", ext(mmuext::PIN_L4_TABLE, last), 0);
    expect("unpin current", ext(mmuext::UNPIN_TABLE, first), 0);
    expect("none", hc(Call::Iret, [iret::RESUME, 0, 0, 0, 0]), -ENOENT);
    let _ = MmuextOp::default();
    say("ok\n");
}
