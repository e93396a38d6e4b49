//! What operations cost, in ticks told on the console.

use crate::h::layout::PAGE;
use crate::h::{Call, MulticallEntry, Registers, mmuext, vcpu_op};
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

/// 64 pages are touched one after another, each mapped by the kernel's handler, and taken away at
/// once: the two legs, per page, in the best of many rounds.
fn faults(name: &str, map: impl Fn(u64, u64) -> i64) {
    let mut best = [u64::MAX; 2];
    for round in 0..100 {
        let start = now();
        for index in 0..64 {
            resume((VA + index * PAGE) as i64).exception(14);
            map(round, index);
            retry().call(nr::REPORT);
        }
        let mid = now();
        hc(Call::UpdateVaMapping, [VA, 0, 0, 64, 0]);
        // Carried out on the way there.
        resume((VA + 100 * PAGE) as i64).call(nr::REPORT);
        let end = now();
        best = [best[0].min(mid - start), best[1].min(end - mid)];
    }
    say(name);
    tell(
        ", with the system call that tells of it",
        best[0] as i64 / 64,
    );
    tell(
        "- its unmapping, all 64 with one system call",
        best[1] as i64,
    );
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
    let mut registers = Registers::default();
    per("syscall that is continued by a frame", 20000, || {
        for _ in 0..20000 {
            let at = &raw mut registers as u64;
            hc(Call::VcpuOp, [vcpu_op::GET_REGISTERS, 0, at, 0, 0]);
            resume(0);
        }
    });
    let mut legs = [u64::MAX; 2];
    for _ in 0..20 {
        let mut sums = [0; 2];
        for _ in 0..1000 {
            let start = now();
            let at = &raw mut registers as u64;
            hc(Call::VcpuOp, [vcpu_op::GET_REGISTERS, 0, at, 0, 0]);
            let mid = now();
            resume(0);
            sums[0] += mid - start;
            sums[1] += now() - mid;
        }
        legs = [legs[0].min(sums[0]), legs[1].min(sums[1])];
    }
    tell("- to the gate", legs[0] as i64 / 1000);
    tell("- by the frame to the next call", legs[1] as i64 / 1000);
    per("hypercall", 100_000, || {
        for _ in 0..100_000 {
            hc(Call::FpuTaskswitch, [0; 5]);
        }
    });
    let page = frame();
    let map = |va: u64, value: u64, count: u64| hc(Call::UpdateVaMapping, [va, value, 0, count, 0]);
    // A neighbour that stays, as in any process: the host keeps its tables.
    map(VA + 100 * PAGE, page * PAGE | P | U, 1);
    start_user(user_read, VA + 100 * PAGE);
    faults("page fault, the frame as before", |_, index| {
        map(VA + index * PAGE, page * PAGE | P | U, 1)
    });
    let pool = frames(128, 1);
    faults("page fault, frames in order", |round, index| {
        let frame = pool + (round & 1) * 64 + index;
        map(VA + index * PAGE, frame * PAGE | P | W | U, 1)
    });
    faults("page fault, frames in disorder", |round, index| {
        let frame = pool + (round & 1) * 64 + 63 - index;
        map(VA + index * PAGE, frame * PAGE | P | W | U, 1)
    });
    map(VA, page * PAGE | P | U, 1);
    resume(VA as i64);
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
                    call.arguments = [VA + index * PAGE, to * PAGE | P | W | U | A | D, 0, 1, 0, 0];
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
