//! Address spaces beside the kernel's own, and the pages of the storm.
//!
//! A space shares the kernel's low memory, device memory and ring 3's stack with the first one; its own pages lie
//! at [`OWN`], below three tables of its own and a root. Frames come from a pool and go back to it.
//!
//! Invariant: a frame of the pool is all zero but for its first word, so that it can become a
//! table or a page at once: who returns a frame clears what it has written.

use crate::{
    cpu,
    memory::{
        self, NO_EXECUTE, PAGE, POOL, POOL_FRAMES, PRESENT, STORM, STORM_FRAMES, Table, USER,
        WRITABLE,
    },
    traps::trap_count,
    user,
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use programs::{
    Fault, Kernel, Refusal,
    micro::{Micro, PAGE_WORDS, aspace, ctxsw, pfstorm},
};

/// Where a space's own pages start, in ring 3.
const OWN: u64 = 0x8000_0000;

/// Rights of a table and of ring 3's pages.
const TABLE: u64 = PRESENT | WRITABLE | USER;
const PAGE_RIGHTS: u64 = TABLE | NO_EXECUTE;

/// The pool's first free frame; each holds the address of the next in its first word.
static FREE: AtomicU64 = AtomicU64::new(0);
/// Spaces created less spaces destroyed.
static ALIVE: AtomicU64 = AtomicU64::new(0);
/// The kernel's own root.
static FIRST_ROOT: AtomicU64 = AtomicU64::new(0);
/// Roots of the spaces of ctxsw, 0 where there is none.
static ROOTS: [AtomicU64; ctxsw::MOST] = [const { AtomicU64::new(0) }; ctxsw::MOST];

/// Bytes from [`STORM`] on whose first touch is mended by the page-fault handler; 0 is off.
#[unsafe(no_mangle)]
static storm_bytes: AtomicU64 = AtomicU64::new(0);
/// The entry that the handler stores next.
#[unsafe(no_mangle)]
static storm_next: AtomicU64 = AtomicU64::new(0);
/// Faults that the handler still mends: no more than there are frames, whatever an engine does.
#[unsafe(no_mangle)]
static storm_left: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static low_directory: Table;
    static user_directory: Table;
    static device_directory: Table;
    static storm_table: Table;
}

/// A frame as words. `address` is that of a frame of the pool or of the storm.
fn frame(address: u64) -> &'static Table {
    // SAFETY: those frames lie in memory that is mapped as itself and that nothing else uses; the
    // processor's walker and ring 3 access it besides, as atomics allow.
    unsafe { &*(address as *const Table) }
}

/// Makes the pool. Once, before any other function of this module.
pub(crate) fn set_up() {
    FIRST_ROOT.store(cpu::root(), Relaxed);
    for index in (0..POOL_FRAMES).rev() {
        give(POOL + index * PAGE);
    }
}

fn take() -> u64 {
    let address = FREE.load(Relaxed);
    // The most that is alive at once is 8 spaces of 5 frames, or one of 4 and aspace::MOST.
    assert!(address != 0, "the pool is empty");
    let next = &frame(address)[0];
    FREE.store(next.load(Relaxed), Relaxed);
    next.store(0, Relaxed);
    address
}

fn give(address: u64) {
    frame(address)[0].store(FREE.load(Relaxed), Relaxed);
    FREE.store(address, Relaxed);
}

/// Creates a space whose own pages start with the words that `content` gives; returns its root.
fn create(pages: u64, content: impl Fn(u64) -> u64) -> u64 {
    let (root, upper, directory, table) = (take(), take(), take(), take());
    // SAFETY: tables of the kernel's space, which every space shares.
    let (low, user, devices) = unsafe {
        (
            low_directory.as_ptr() as u64,
            user_directory.as_ptr() as u64,
            device_directory.as_ptr() as u64,
        )
    };
    frame(root)[0].store(upper | TABLE, Relaxed);
    frame(upper)[0].store(low | TABLE, Relaxed);
    frame(upper)[1].store(user | TABLE, Relaxed);
    frame(upper)[2].store(directory | TABLE, Relaxed);
    frame(upper)[3].store(devices | PRESENT | WRITABLE, Relaxed);
    frame(directory)[0].store(table | TABLE, Relaxed);
    for (page, entry) in (0..pages).zip(frame(table)) {
        let address = take();
        frame(address)[0].store(content(page), Relaxed);
        entry.store(address | PAGE_RIGHTS, Relaxed);
    }
    ALIVE.fetch_add(1, Relaxed);
    root
}

/// Gives back everything that [`create`] took. The space is not the current one.
fn destroy(root: u64) {
    let below = |table: u64, index: usize| {
        let entry = &frame(table)[index];
        let address = entry.load(Relaxed) & memory::ADDRESS;
        entry.store(0, Relaxed);
        address
    };
    let upper = below(root, 0);
    let directory = below(upper, 2);
    frame(upper)[1].store(0, Relaxed);
    frame(upper)[3].store(0, Relaxed);
    let table = below(directory, 0);
    for index in 0..aspace::MOST as usize {
        match below(table, index) {
            0 => break,
            page => give(page),
        }
    }
    for address in [table, directory, upper, root] {
        give(address);
    }
    ALIVE.fetch_sub(1, Relaxed);
}

fn enter(root: u64) {
    // SAFETY: every space maps the kernel as the first one does.
    unsafe { cpu::set_root(root) };
}

/// Calls an application in the space of `root`, with its own pages as arena.
fn call(root: u64, kernel: Kernel, pages: u64) -> Result<u64, Fault> {
    enter(root);
    user::call(kernel, OWN, pages * PAGE_WORDS as u64, pages, 1)
}

/// Back to the first space; everything that the acts took goes back.
fn clear() {
    enter(FIRST_ROOT.load(Relaxed));
    for root in &ROOTS {
        let address = root.swap(0, Relaxed);
        if address != 0 {
            destroy(address);
        }
    }
}

/// See [`programs::Platform::set_up`].
pub(crate) fn start(micro: Micro, size: u64) -> Result<(), Refusal> {
    clear();
    match micro {
        Micro::Switch { spaces } => {
            for (number, root) in (0..spaces).zip(&ROOTS) {
                root.store(create(1, |_| ctxsw::seed(number)), Relaxed);
            }
            for number in 0..spaces {
                if switch(number)? != ctxsw::after(ctxsw::seed(number)) {
                    return Err(Refusal::Broken(
                        "an address space does not show its own page",
                    ));
                }
            }
            for (number, root) in (0..spaces).zip(&ROOTS) {
                own_word(root.load(Relaxed)).store(ctxsw::seed(number), Relaxed);
            }
        }
        Micro::Storm => {
            for fault in 0..pfstorm::MOST {
                frame(STORM_FRAMES + fault * PAGE)[0].store(pfstorm::tag(fault), Relaxed);
            }
            trap_count.store(0, Relaxed);
            storm(size, 0)?;
            if trap_count.swap(0, Relaxed) != size {
                return Err(Refusal::Broken("first touches did not fault once each"));
            }
        }
        Micro::Space => {
            space(size, 0)?;
        }
    }
    Ok(())
}

/// The first word of the first own page of a space.
fn own_word(root: u64) -> &'static AtomicU64 {
    let down = |table: u64, index: usize| frame(table)[index].load(Relaxed) & memory::ADDRESS;
    let table = down(down(down(root, 0), 2), 0);
    &frame(down(table, 0))[0]
}

/// See [`programs::Platform::take_down`].
pub(crate) fn finish(micro: Micro) -> u64 {
    clear();
    match micro {
        Micro::Switch { .. } => 0,
        Micro::Storm => trap_count.load(Relaxed),
        Micro::Space => ALIVE.load(Relaxed),
    }
}

/// See [`programs::Platform::switch`].
#[inline(always)]
pub(crate) fn switch(number: u64) -> Result<u64, Refusal> {
    let root = ROOTS[number as usize & (ctxsw::MOST - 1)].load(Relaxed);
    call(root, ctxsw::step, 1).map_err(Refusal::Fault)
}

/// See [`programs::Platform::storm`]. Unmapping flushes once, with a load of CR3.
pub(crate) fn storm(pages: u64, round: u64) -> Result<u64, Refusal> {
    storm_next.store(STORM_FRAMES | PAGE_RIGHTS, Relaxed);
    storm_left.store(pages, Relaxed);
    storm_bytes.store(pages * PAGE, Relaxed);
    let sum = user::call(
        pfstorm::storm,
        STORM,
        pages * PAGE_WORDS as u64,
        pages,
        round,
    );
    storm_bytes.store(0, Relaxed);
    // SAFETY: the table is written here, by the fault handler, and by the processor's walker.
    for entry in unsafe { &storm_table }.iter().take(pages as usize) {
        entry.store(0, Relaxed);
    }
    enter(FIRST_ROOT.load(Relaxed));
    sum.map_err(Refusal::Fault)
}

/// See [`programs::Platform::space`].
pub(crate) fn space(pages: u64, life: u64) -> Result<u64, Refusal> {
    let root = create(pages, |page| aspace::content(life, page));
    let sum = call(root, aspace::visit, pages);
    enter(FIRST_ROOT.load(Relaxed));
    destroy(root);
    sum.map_err(Refusal::Fault)
}
