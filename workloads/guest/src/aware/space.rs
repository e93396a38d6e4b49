//! Address spaces, and where things lie in them.
//!
//! The first space has everything: arena, a large stack, probe pages, the storm's pages. Others
//! have the programs, a stack of one page, and own pages, all below one table, so that
//! creating one takes as little as a small process takes.

use super::{
    frames::{self, Number},
    hypercall::{self, Errno},
    tables::{CONSTANTS, DATA, TEXT, Tree},
    user::Process,
};
use abi::hypercall::{StartInfo, feature, mmuext};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use programs::{
    Kernel, Refusal,
    micro::{aspace, pfstorm},
};

/// Where the arena starts.
pub(super) const ARENA: u64 = 0x4000_0000;
/// Largest arena, in large pages.
const ARENA_MOST: u64 = 32;
/// Smallest arena: what 64 MiB of memory leave.
const ARENA_LEAST: u64 = 28;
/// Frames that are kept for everything but the arena: the storm's, the stack, tables, spaces.
const KEPT: u64 = 1024;
/// End of the first space's stack.
const STACK_END: u64 = 0x7fe0_0000;
/// Pages of that.
const STACK_PAGES: u64 = 64;
/// The probe pages, whose entries the nano workloads change.
pub(super) const PROBE: u64 = 0x7fe0_0000;
/// Their number, which is also the size of a batch.
pub(super) const PROBES: u64 = 64;
/// The storm's pages.
pub(super) const STORM: u64 = 0x7fa0_0000;

/// Own pages of a space beside the first one; the linker script ends the image below.
const OWN: u64 = 0x1a_0000;
/// End of the stack of such a space.
const OWN_STACK_END: u64 = 0x20_0000;

const PAGE: u64 = 4096;
/// Frames of a large page.
const LARGE: u64 = 512;

unsafe extern "C" {
    // Section borders, from the linker script.
    static utext_start: u8;
    static utext_end: u8;
    static urodata_start: u8;
    static urodata_end: u8;
}

/// Frame of the image's first page.
static IMAGE: AtomicU64 = AtomicU64::new(0);
/// Root of the current space, 0 if there is none.
static CURRENT: AtomicU64 = AtomicU64::new(0);

/// The first space.
#[derive(Debug)]
pub(super) struct First {
    /// Its tables.
    pub(super) tree: Tree,
    process: Process,
    /// The arena's first frame; the others follow.
    pub(super) arena: Number,
    /// Words of the arena.
    pub(super) words: u64,
    /// Frames A and B of the first probe page; those of the others follow, one after another.
    pub(super) probes: [Number; 2],
    /// The first of the storm's frames, one after another.
    pub(super) storm: Number,
}

impl First {
    /// Builds it and makes it current.
    ///
    /// # Errors
    /// What is wrong, in words for the console.
    pub(super) fn new(info: &StartInfo) -> Result<Self, &'static str> {
        const LITTLE: &str = "less than 64 MiB of memory";
        IMAGE.store(info.first_image_frame, Relaxed);
        let pages = (frames::left().saturating_sub(KEPT) / LARGE).min(ARENA_MOST);
        if pages < ARENA_LEAST {
            return Err(LITTLE);
        }
        let arena = frames::reserve(pages * LARGE, LARGE).ok_or(LITTLE)?;
        let stack = frames::reserve(STACK_PAGES, 1).ok_or(LITTLE)?;
        let storm = frames::reserve(pfstorm::MOST, 1).ok_or(LITTLE)?;
        let tree = Tree::new();
        map_programs(&tree);
        if info.features & feature::LARGE_PAGES != 0 {
            tree.map_large(ARENA, arena, pages, DATA);
        } else {
            tree.map(ARENA, arena, pages * LARGE, DATA);
        }
        let stack_start = STACK_END - STACK_PAGES * PAGE;
        tree.map(stack_start, stack, STACK_PAGES, DATA);
        // Tables alone: their entries are written by hypercall.
        tree.page(PROBE);
        tree.page(STORM);
        let run = || frames::reserve(PROBES, 1).ok_or(LITTLE);
        let probes = [run()?, run()?];
        let words = [programs::nano::WORD_A, programs::nano::WORD_B];
        for (first, word) in probes.into_iter().zip(words) {
            for page in 0..PROBES {
                Number(first.0 + page).words()[0].store(word, Relaxed);
            }
        }
        tree.pin()
            .map_err(|_| "the host does not take the first page tables")?;
        let first = First {
            tree,
            process: Process::new(Number(stack.0 + STACK_PAGES - 1), STACK_END),
            arena,
            words: pages * LARGE * PAGE / 8,
            probes,
            storm,
        };
        switch(first.tree.root).map_err(|_| "the host does not switch to the first space")?;
        Ok(first)
    }

    /// Makes it current, if it is not.
    pub(super) fn select(&self) -> Result<(), Errno> {
        switch(self.tree.root)
    }

    /// Calls an application here, with `words` words from `arena` on.
    #[inline]
    pub(super) fn call(
        &self,
        kernel: Kernel,
        (arena, words): (u64, u64),
        size: u64,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        switch(self.tree.root).map_err(broken)?;
        self.process.call(kernel, (arena, words), size, iterations)
    }
}

/// A space beside the first one.
#[derive(Debug)]
pub(super) struct Space {
    tree: Tree,
    process: Process,
    stack: Number,
    pages: u64,
    /// Frame of the first own page.
    pub(super) own: Number,
}

impl Space {
    /// Creates a space whose own pages, at least one, start with the words that `content` gives.
    pub(super) fn new(pages: u64, content: impl Fn(u64) -> u64) -> Result<Self, Refusal> {
        let pages = pages.clamp(1, aspace::MOST);
        let tree = Tree::new();
        map_programs(&tree);
        let stack = tree.map_owned(OWN_STACK_END - PAGE);
        let mut own = None;
        for page in 0..pages {
            let frame = tree.map_owned(OWN + page * PAGE);
            frame.words()[0].store(content(page), Relaxed);
            own = own.or(Some(frame));
        }
        tree.pin().map_err(broken)?;
        let own = own.ok_or(Refusal::Broken("a space has no page"))?;
        Ok(Space {
            tree,
            process: Process::new(stack, OWN_STACK_END),
            stack,
            pages,
            own,
        })
    }

    /// Calls an application here, with the own pages as arena.
    #[inline]
    pub(super) fn call(&self, kernel: Kernel) -> Result<u64, Refusal> {
        switch(self.tree.root).map_err(broken)?;
        let arena = (OWN, self.pages * PAGE / 8);
        self.process.call(kernel, arena, self.pages, 1)
    }

    /// Ends it. The stack's frame and the own pages go back as the programs left them: cleared
    /// here, since the pool wants them so.
    pub(super) fn destroy(self) -> Result<(), Refusal> {
        if CURRENT.load(Relaxed) == self.tree.root.0 {
            CURRENT.store(0, Relaxed);
        }
        // What programs write: one word of each own page, which the pool overwrites, and the stack.
        for word in self.stack.words() {
            word.store(0, Relaxed);
        }
        self.tree.destroy().map_err(broken)
    }
}

/// Makes a space current, if it is not.
#[inline(always)]
fn switch(root: Number) -> Result<(), Errno> {
    if CURRENT.load(Relaxed) != root.0 {
        hypercall::mmuext(mmuext::NEW_USER_BASEPTR, root.0)?;
        CURRENT.store(root.0, Relaxed);
    }
    Ok(())
}

fn broken(_: Errno) -> Refusal {
    Refusal::Broken("the host refuses to manage an address space")
}

/// Maps the programs' text and constants where the image has them.
fn map_programs(tree: &Tree) {
    let sections = [
        (&raw const utext_start, &raw const utext_end, TEXT),
        (&raw const urodata_start, &raw const urodata_end, CONSTANTS),
    ];
    let image = sections[0].0 as u64;
    for (start, end, rights) in sections {
        let (start, end) = (start as u64, end as u64);
        let frame = Number(IMAGE.load(Relaxed) + (start - image) / PAGE);
        tree.map(start, frame, (end - start) / PAGE, rights);
    }
}
