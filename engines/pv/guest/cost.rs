//! What operations cost, in ticks told on the console.

use crate::h::layout::PAGE;
use crate::h::{Call, MulticallEntry, mmuext};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[("cost", cost)];

const VA: u64 = 0x4000_0000;

fn per(name: &str, count: u64, mut work: impl FnMut()) {
    work();
    let start = now();
    work();
    tell(name, ((now() - start) * 1000 / count / 1000) as i64);
}

fn cost() {
    let root = new_root();
    table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    start_user(user_null, 0);
    per("syscall", 20000, || {
        for _ in 0..20000 {
            resume(0);
        }
    });
    per("hypercall", 100_000, || {
        for _ in 0..100_000 {
            hc(Call::FpuTaskswitch, [0; 5]);
        }
    });
    let page = frame();
    let map = |va: u64, value: u64, count: u64| hc(Call::UpdateVaMapping, [va, value, 0, count, 0]);
    start_user(user_read, VA);
    per("page fault, mapped by the kernel, and unmap", 2000, || {
        for _ in 0..2000 {
            // Stopped in the fault.
            map(VA, page * PAGE | P | U, 1);
            retry();
            map(VA, 0, 1);
            resume(VA as i64);
        }
    });
    let mut parts = [0u64; 4];
    for _ in 0..2000 {
        let a = now();
        map(VA, page * PAGE | P | U, 1);
        let b = now();
        retry();
        let c = now();
        map(VA, 0, 1);
        let d = now();
        resume(VA as i64);
        let e = now();
        for (part, (to, from)) in parts.iter_mut().zip([(b, a), (c, b), (d, c), (e, d)]) {
            *part += to - from;
        }
    }
    for (name, part) in [
        "- map",
        "- retry and report",
        "- unmap",
        "- resume and fault",
    ]
    .iter()
    .zip(parts)
    {
        tell(name, part as i64 / 2000);
    }
    map(VA, page * PAGE | P | U, 1);
    retry();
    per("shadow fault and invlpg", 2000, || {
        for _ in 0..2000 {
            ext(mmuext::INVLPG_LOCAL, VA);
            resume(VA as i64);
        }
    });
    per("divide", 2000, || {
        for _ in 0..2000 {
            start_user(user_divide, 0);
        }
    });
    let pool = frames(128, 1);
    map(VA, pool * PAGE | P | W | U, 64);
    let mut calls = [MulticallEntry::default(); 64];
    per(
        "ptemod in a multicall of 64, mapped, per page",
        64 * 100,
        || {
            for round in 0..100 {
                start_user(user_write, VA);
                resume((VA + 16 * PAGE) as i64);
                resume((VA + 32 * PAGE) as i64);
                resume((VA + 48 * PAGE) as i64);
                for (index, call) in calls.iter_mut().enumerate() {
                    let index = index as u64;
                    let to = pool + (round & 1) * 64 + index;
                    call.call = Call::UpdateVaMapping as u64;
                    call.arguments = [VA + index * PAGE, to * PAGE | P | W | U, 0, 1, 0, 0];
                }
                hc(Call::Multicall, [calls.as_mut_ptr() as u64, 64, 0, 0, 0]);
            }
        },
    );
    per("ptemod, not mapped", 100_000, || {
        for round in 0..100_000 {
            map(VA, (pool + (round & 1)) * PAGE | P | W | U, 1);
        }
    });
    let other = new_root();
    expect("pin", ext(mmuext::PIN_L4_TABLE, other), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, other), 0);
    start_user(user_null, 0);
    ext(mmuext::NEW_USER_BASEPTR, root);
    start_user(user_null, 0);
    per("switch and syscall", 10000, || {
        for _ in 0..5000 {
            ext(mmuext::NEW_USER_BASEPTR, other);
            resume(0);
            ext(mmuext::NEW_USER_BASEPTR, root);
            resume(0);
        }
    });
    let third = new_root();
    per("create, run and destroy a space", 200, || {
        for _ in 0..200 {
            ext(mmuext::PIN_L4_TABLE, third);
            ext(mmuext::NEW_USER_BASEPTR, third);
            start_user(user_null, 0);
            ext(mmuext::UNPIN_TABLE, third);
        }
    });
    per("mark", 1000, || {
        for _ in 0..500 {
            hc(Call::Mark, [1, 0, 0, 0, 0]);
            hc(Call::Mark, [2, 0, 0, 0, 0]);
        }
    });
    per("doorbell", 10000, || {
        for _ in 0..10000 {
            hc(Call::EventChannelOp, [crate::h::evtchn::SEND, 1, 0, 0, 0]);
        }
    });
}
