//! What a well-behaved guest does with its memory.

use crate::h::layout::PAGE;
use crate::h::{Call, iret, mmuext};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("faults", faults),
    ("rights", rights),
    ("unmap", unmap),
    ("follow", follow),
    ("large", large),
    ("many-mappings", many_mappings),
    ("many-pages", many_pages),
];

pub(crate) const VA: u64 = 0x4000_0000;

pub(crate) fn map(va: u64, value: u64, count: u64) -> i64 {
    hc(Call::UpdateVaMapping, [va, value, 0, count, 0])
}

/// A space with a table for `VA` on.
pub(crate) fn space_with_table() -> u64 {
    let root = new_root();
    table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    root
}

fn faults() {
    space_with_table();
    let page = frame();
    unsafe { *word(page, 0) = 77 };
    let fault = start_user(user_read, VA).exception(14);
    expect("address", fault.address as i64, VA as i64);
    expect("error", fault.error as i64, 4);
    expect("map", map(VA, page * PAGE | P | U, 1), 0);
    let [value, ..] = retry().call(nr::REPORT);
    expect("value", value as i64, 77);
    expect("unmap", map(VA, 0, 1), 0);
    let fault = resume(VA as i64).exception(14);
    expect("address", fault.address as i64, VA as i64);
    expect("kernel address", resume_after_map(page), 77);
    // Addresses that no table can map.
    let mut registers = registers(user_read as *const () as u64, 1 << 46);
    let fault = continue_with(iret::START, &raw const registers as u64).exception(14);
    expect("address", fault.address as i64, 1 << 46);
    registers.gpr[7] = 0;
    let fault = continue_with(iret::START, &raw const registers as u64).exception(14);
    expect("address", fault.address as i64, 0);
    registers.gpr[7] = 0x8000_0000_0000_0000;
    continue_with(iret::START, &raw const registers as u64).exception(13);
    say("ok\n");
}

fn resume_after_map(page: u64) -> i64 {
    expect("map", map(VA, page * PAGE | P | U, 1), 0);
    let [value, ..] = retry().call(nr::REPORT);
    value as i64
}

fn rights() {
    space_with_table();
    let page = frame();
    // Read-only: a write faults with P, W and U; after the upgrade it goes through.
    expect("map", map(VA, page * PAGE | P | U, 1), 0);
    let fault = start_user(user_write, VA).exception(14);
    expect("write error", fault.error as i64, 7);
    expect("map", map(VA, page * PAGE | P | W | U | NX, 1), 0);
    let [value, ..] = retry().call(nr::REPORT);
    expect("written", value as i64, VA as i64);
    expect("seen", unsafe { *word(page, 0) } as i64, VA as i64);
    // Protecting it again takes effect at once.
    expect("map", map(VA, page * PAGE | P | U | NX, 1), 0);
    let fault = resume(VA as i64).exception(14);
    expect("write error", fault.error as i64, 7);
    // No-execute.
    let fault = start_user(user_jump, VA).exception(14);
    expect("fetch error", fault.error as i64, 0x15);
    expect("fetch address", fault.address as i64, VA as i64);
    // Kernel-only.
    expect("map", map(VA, page * PAGE | P | W, 1), 0);
    let fault = start_user(user_read, VA).exception(14);
    expect("user error", fault.error as i64, 5);
    // hlt is privileged.
    unsafe { *word(page, 0) = 0xf4 };
    expect("map", map(VA, page * PAGE | P | U, 1), 0);
    start_user(user_jump, VA).exception(13);
    say("ok\n");
}

fn unmap() {
    space_with_table();
    let first = frames(64, 1);
    expect("map", map(VA, first * PAGE | P | W | U, 64), 0);
    let mut stopped = start_user(user_write, VA);
    for page in 1..=64 {
        stopped.call(nr::REPORT);
        stopped = if page < 64 {
            resume((VA + page * PAGE) as i64)
        } else {
            stopped
        };
    }
    // In the middle, by multicall; the process waits in a system call.
    let mut calls = [crate::h::MulticallEntry::default(); 4];
    for (index, call) in calls.iter_mut().enumerate() {
        call.call = Call::UpdateVaMapping as u64;
        call.arguments = [VA + (10 + index as u64) * PAGE, 0, 0, 1, 0, 0];
    }
    expect(
        "multicall",
        hc(Call::Multicall, [calls.as_mut_ptr() as u64, 4, 0, 0, 0]),
        0,
    );
    for call in &calls {
        expect("result", call.result, 0);
    }
    let mut stopped = resume((VA + 9 * PAGE) as i64);
    stopped.call(nr::REPORT);
    stopped = resume((VA + 10 * PAGE) as i64);
    expect(
        "gone",
        stopped.exception(14).address as i64,
        (VA + 10 * PAGE) as i64,
    );
    stopped = start_user(user_write, VA + 14 * PAGE);
    stopped.call(nr::REPORT);
    // A flush leaves everything accessible.
    expect("flush", ext(mmuext::TLB_FLUSH_LOCAL, 0), 0);
    stopped = resume((VA + 20 * PAGE) as i64);
    stopped.call(nr::REPORT);
    expect("invlpg", ext(mmuext::INVLPG_LOCAL, VA + 20 * PAGE), 0);
    stopped = resume((VA + 20 * PAGE) as i64);
    stopped.call(nr::REPORT);
    say("ok\n");
}

/// Entries of pages in use change in every way, with the accessed and dirty bits set, which the host
/// may carry out without a fault, and without them, which takes one that sets them.
fn follow() {
    let root = space_with_table();
    let leaf = leaf(root);
    let entry = || unsafe { word(leaf, VA / PAGE % 512).read_volatile() };
    let pages = [frame(), frame()];
    for (index, page) in pages.into_iter().enumerate() {
        unsafe { *word(page, 0) = 1000 + index as u64 };
    }
    let value = |index: usize, bits: u64| pages[index] * PAGE | P | U | bits;
    let reads = |expected: u64| {
        let [word, ..] = start_user(user_read, VA).call(nr::REPORT);
        expect("word", word as i64, expected as i64);
    };
    let writes = || {
        start_user(user_write, VA).call(nr::REPORT);
    };
    let faults = |error: i64| {
        let frame = start_user(user_write, VA).exception(14);
        expect("error", frame.error as i64, error);
    };
    for bits in [A | D, 0] {
        let set = |index, more| expect("set", map(VA, value(index, bits | more), 1), 0);
        set(0, W);
        reads(1000);
        // Another frame, to and fro within one iret, and at the end of it the second one.
        set(1, W);
        set(0, W);
        set(1, W);
        reads(1001);
        // Less, and more.
        set(1, 0);
        reads(1001);
        faults(7);
        set(1, W);
        writes();
        expect("written", unsafe { *word(pages[1], 0) } as i64, VA as i64);
        unsafe { *word(pages[1], 0) = 1001 };
        // No-execute comes and goes.
        set(1, W | NX);
        let fault = start_user(user_jump, VA).exception(14);
        expect("fetch", fault.error as i64, 0x15);
        reads(1001);
        // Not the user's, and back.
        expect("hide", map(VA, pages[1] * PAGE | P | W | bits, 1), 0);
        faults(7);
        set(1, W);
        reads(1001);
        // Away, and back with the same frame, with fewer rights; then with the other one.
        expect("unmap", map(VA, 0, 1), 0);
        faults(6);
        set(1, 0);
        reads(1001);
        faults(7);
        expect("unmap", map(VA, 0, 1), 0);
        set(0, 0);
        faults(7);
        reads(1000);
        // Away and back without anything in between, and away.
        expect("unmap", map(VA, 0, 1), 0);
        set(0, W);
        expect("unmap", map(VA, 0, 1), 0);
        faults(6);
    }
    // Bits that the kernel clears come back with the next access, and no sooner.
    expect("set", map(VA, value(0, W), 1), 0);
    writes();
    expect("bits", (entry() & (A | D)) as i64, (A | D) as i64);
    for _ in 0..3 {
        expect("clear", map(VA, value(0, W), 1), 0);
        start_user(user_null, 0).call(nr::NULL);
        expect("bits", (entry() & (A | D)) as i64, 0);
        writes();
        expect("bits", (entry() & (A | D)) as i64, (A | D) as i64);
    }
    // Many at once, more than are gathered, every other one.
    let pool = frames(400, 1);
    expect("map", map(VA, pool * PAGE | P | W | U, 200), 0);
    for page in 0..200 {
        start_user(user_write, VA + page * PAGE).call(nr::REPORT);
    }
    for page in (0..200).step_by(2) {
        let value = (pool + 200 + page) * PAGE | P | W | U | A | D;
        expect("move", map(VA + page * PAGE, value, 1), 0);
    }
    for page in 0..200 {
        let at = VA + page * PAGE;
        let expected = if page % 2 == 0 { 0 } else { at };
        let [word, ..] = start_user(user_read, at).call(nr::REPORT);
        expect("word", word as i64, expected as i64);
    }
    say("ok\n");
}

/// The level-1 table for `VA`.
pub(crate) fn leaf(root: u64) -> u64 {
    table(root, VA)
}

fn large() {
    let root = new_root();
    let first = frames(512, 512);
    // Level 2 by hand: the entry for VA is a leaf.
    table(root, VA + (2 << 20));
    let third = unsafe { *word(root, VA >> 39 & 511) } / PAGE;
    let second = unsafe { *word(third, VA >> 30 & 511) } / PAGE;
    unsafe { *word(second, VA >> 21 & 511) = first * PAGE | P | W | U | 1 << 7 };
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    let mut stopped = start_user(user_write, VA);
    for page in [1, 2, 100, 511] {
        stopped.call(nr::REPORT);
        stopped = resume((VA + page * PAGE) as i64);
    }
    stopped.call(nr::REPORT);
    expect(
        "seen",
        unsafe { *word(first + 100, 0) } as i64,
        (VA + 100 * PAGE) as i64,
    );
    say("ok\n");
}

/// Maps every other frame, so that nothing can be merged, beyond what the host takes.
fn many_mappings() {
    const PAGES: u64 = 70_000;
    let root = new_root();
    for page in 0..PAGES {
        table(root, VA + page * PAGE);
    }
    let pool = frames(2048, 1);
    for page in 0..PAGES {
        put(
            root,
            VA + page * PAGE,
            (pool + page * 2 % 2047) * PAGE | P | W | U,
        );
    }
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    let mut stopped = start_user(user_write, VA);
    for page in 1..PAGES {
        stopped.call(nr::REPORT);
        stopped = resume((VA + page * PAGE) as i64);
    }
    stopped.call(nr::REPORT);
    say("ok\n");
}

/// Maps 200,000 pages, in runs of consecutive frames, and writes to each.
fn many_pages() {
    const PAGES: u64 = 200_000;
    const RUN: u64 = 4096;
    let root = new_root();
    for page in (0..PAGES).step_by(512) {
        table(root, VA + page * PAGE);
    }
    table(root, VA + PAGES * PAGE);
    let pool = frames(RUN, 1);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    for run in (0..PAGES).step_by(RUN as usize) {
        let count = RUN.min(PAGES - run);
        expect(
            "map",
            map(VA + run * PAGE, pool * PAGE | P | W | U, count),
            0,
        );
    }
    let mut stopped = start_user(user_write, VA);
    for page in 1..PAGES {
        stopped.call(nr::REPORT);
        stopped = resume((VA + page * PAGE) as i64);
    }
    stopped.call(nr::REPORT);
    // The last ones to write to the frames were the last run and, behind its end, the one before.
    for page in [0, 1000, RUN - 1] {
        let last = (PAGES - 1 - page) / RUN * RUN + page;
        let written = unsafe { *word(pool + page, 0) };
        expect("written", written as i64, (VA + last * PAGE) as i64);
    }
    say("ok\n");
}
