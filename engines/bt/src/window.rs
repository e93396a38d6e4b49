//! The window: guest-virtual memory of ring 3 at host addresses of its own, `gs:[address]`.
//!
//! # What it is
//!
//! A reservation without any rights, per vCPU; its base is the host's GS base while the vCPU runs,
//! which Rust doesn't use. Pages of guest RAM are mapped into it from guest memory's file when
//! translated code first faults on them, after a page walk with the rights of ring 3. So an access
//! costs what it costs natively, and one that may not be is a host fault.
//!
//! ```text
//! base - GUARD   nothing
//! base           SIZE: address a of the guest is at base + a
//! base + SIZE    nothing, for another GUARD
//! ```
//!
//! # Why nothing else is in reach
//!
//! A memory operand is `base + index * scale + displacement`. Translated code compares a register
//! before it serves as base (below [`SIZE`]) or as index (below [`INDEX_LIMIT`]); or it knows where the
//! register is from what it did: an access that has not faulted was at an address below [`SIZE`], so
//! its base and its index are not far from that, and close to it while they move by constants. Known
//! that way, a base lies between `-`[`REACH`] and [`SIZE`]` + `[`REACH`], an index between `-`[`REACH`]
//! and [`REACH`] unless its scale is 1, either [`MARGIN`] more at an access. The displacement is a signed 32-bit number and no
//! access is longer than 64 bytes. So the sum lies between `-(9 * (REACH + MARGIN) + 2^31)` and `SIZE +
//! 9 * (REACH + MARGIN) + 2^31 + 64`: in the reservation, where there is guest RAM that ring 3 may
//! reach, or a fault. Operands with 32-bit address size need no comparison: the processor cuts their
//! sum. See [`crate::checks`], which decides what is compared where.
//!
//! # Coherence
//!
//! The window behaves as a TLB does. A mapping is made with the rights that the walk found, writable
//! only if the entry's dirty bit is set and the page holds no translated code; pages of an entry
//! come together. What invalidates an entry of a software TLB takes the mapping out, or closes the
//! window: then user code runs in blocks that look into the TLB, until it opens again, empty.
//!
//! # When it is worth it
//!
//! A page costs some 10 µs to fill and 2 µs to drop, which only lasting mappings earn back. The
//! time spent on both is held against the time the window was open; one that closes having cost
//! more than an eighth of its life stays closed until translations have lived, or usually live, longer
//! than a limit: what would have been worth that, and twice the limit before.
//!
//! Invariant: no extent maps a page writable that holds translated code, and nothing but guest RAM
//! is ever mapped here.

use std::{cell::Cell, collections::BTreeMap, io, ptr};

use crate::tlb::Span;

/// Guest addresses from 0 that the window shows.
pub(crate) const SIZE: u64 = 1 << 39;
/// An index register has to be below this.
pub(crate) const INDEX_LIMIT: u64 = 1 << 36;
/// How far outside a register may be that is known from what was accessed through it.
pub(crate) const REACH: i64 = 12 << 34;
/// How much farther, at an access.
pub(crate) const MARGIN: i64 = 1 << 30;
/// How far a register may move in one step, and RSP where blocks meet.
pub(crate) const SLACK: u64 = 1 << 24;
/// Longest access that goes through the window.
pub(crate) const LONGEST: u32 = 64;
const GUARD: u64 = 9 * (REACH + MARGIN) as u64 + (1 << 31) + 4096;
const RESERVED: u64 = SIZE + 2 * GUARD;

const _: () = assert!(GUARD.is_multiple_of(4096));
// An access with an index that is scaled by 4 shows that the index is within reach, with room to move on.
const _: () = assert!((SIZE as i64 + REACH + MARGIN + (1 << 31)) / 4 + MARGIN < REACH);
// So does one at scale 1 for any register as index.
const _: () = assert!(2 * (SIZE as i64 + REACH + MARGIN) <= SIZE as i64 + 9 * REACH);
const _: () = assert!(INDEX_LIMIT < REACH as u64 && SLACK < MARGIN as u64);

/// Extents beyond which all are dropped: each may be a mapping of the host's, of which a process
/// has 65,530 by default.
const EXTENTS: usize = 4096;

/// What a fill costs besides the system calls, in TSC ticks: the signal there and back.
const SIGNAL: u64 = 8_000;
/// Ticks that a window may cost at first, before it is held against its age.
const GRACE: u64 = 1 << 22;
const GRACE_LATER: u64 = 1 << 19;
/// Most that one fill or drop counts for: whoever was preempted meanwhile hasn't worked.
const DEAREST: u64 = 1 << 17;
const BACKOFF_LEAST: u64 = 1 << 18;
const BACKOFF_MOST: u64 = 1 << 29;

thread_local! {
    /// GS base of this thread, as far as it was set here.
    static GS_BASE: Cell<u64> = const { Cell::new(0) };
}

/// Guest RAM that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    bytes: u64,
    phys: u64,
    /// Except for pages that hold translated code.
    writable: bool,
}

/// Where a piece of guest RAM is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub virt: u64,
    pub bytes: u64,
    pub phys: u64,
    /// Descriptor and offset in guest memory's file.
    pub fd: i32,
    pub offset: u64,
    pub writable: bool,
}

/// One vCPU's window.
pub(crate) struct Window {
    /// Host address of guest address 0; 0 if there is no window.
    base: u64,
    extents: BTreeMap<u64, Extent>,
    open: bool,
    /// It stays open whatever that costs.
    held: bool,
    /// It never opens.
    refused: bool,
    /// Closed with mappings that nobody keeps up to date.
    stale: bool,
    /// Flushes while closed, those that were noticed, and since when there was none.
    flushes: u64,
    seen: u64,
    calm_since: u64,
    /// Time between flushes, as far as was seen last.
    gap: u64,
    backoff: u64,
    opened: u64,
    spent: u64,
    /// Mappings made.
    pub fills: u64,
    /// Mappings taken away.
    pub drops: u64,
}

impl Window {
    /// A window, closed and empty; none at all if the host doesn't let a process set its GS base
    /// or has no room.
    pub(crate) fn new() -> Window {
        let mut window = Window {
            base: 0,
            extents: BTreeMap::new(),
            open: false,
            held: false,
            refused: false,
            stale: false,
            flushes: 0,
            seen: 0,
            calm_since: 0,
            gap: 0,
            backoff: 0,
            opened: 0,
            spent: 0,
            fills: 0,
            drops: 0,
        };
        if !may_set_gs() {
            return window;
        }
        // SAFETY: a fresh mapping without rights.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                RESERVED as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved != libc::MAP_FAILED {
            window.base = reserved as u64 + GUARD;
        }
        window
    }

    /// Makes GS point here for this thread. To be called before translated code is entered.
    pub(crate) fn activate(&self) {
        if self.base == 0 || GS_BASE.get() == self.base {
            return;
        }
        // SAFETY: `may_set_gs` was asked when the window was made; nothing in this process uses GS.
        unsafe { std::arch::asm!("wrgsbase {}", in(reg) self.base, options(nomem, nostack)) };
        GS_BASE.set(self.base);
    }

    /// Guest address of a host address in the reservation; beyond [`SIZE`] in a guard.
    pub(crate) fn guest(&self, host: u64) -> Option<u64> {
        let start = self.base.wrapping_sub(GUARD);
        (self.base != 0 && host.wrapping_sub(start) < RESERVED)
            .then(|| host.wrapping_sub(self.base))
    }

    /// Keeps it open from now on, emptied at once by whatever would close it. Returns the host address
    /// of guest address 0, None if there is no window.
    pub(crate) fn hold(&mut self) -> Option<u64> {
        self.held = true;
        (self.base != 0).then_some(self.base)
    }

    /// Keeps it closed, before it was first opened.
    pub(crate) fn refuse(&mut self) {
        debug_assert!(!self.open, "code may rely on it");
        self.refused = true;
    }

    /// True if user code is to run through the window now. Opens it if it is time.
    pub(crate) fn ready(&mut self) -> bool {
        if self.open || self.base == 0 || self.refused {
            return self.open;
        }
        let now = engine_core::clock::tsc();
        let new = self.flushes.wrapping_sub(self.seen);
        if let Some(gap) = now.wrapping_sub(self.calm_since).checked_div(new) {
            self.gap = gap;
            self.seen = self.flushes;
            self.calm_since = now;
        }
        // Calm for long enough, or calm for as long most of the time.
        if now.wrapping_sub(self.calm_since).max(self.gap) < self.backoff && !self.held {
            return false;
        }
        if self.stale {
            self.drop_all();
        }
        self.open = true;
        self.opened = now;
        self.spent = 0;
        true
    }

    /// True if it is closed and may open again.
    pub(crate) fn waits(&self) -> bool {
        !self.open && self.base != 0 && !self.refused
    }

    /// Every translation was dropped, between two instructions: translated code isn't resumed before
    /// [`Window::ready`] has been asked.
    pub(crate) fn flush(&mut self) {
        self.flushes = self.flushes.wrapping_add(1);
        if self.held {
            self.drop_all();
        } else if self.open && !self.extents.is_empty() {
            self.close(engine_core::clock::tsc());
        }
    }

    fn close(&mut self, now: u64) {
        let life = now.wrapping_sub(self.opened);
        self.backoff = if life < 8 * self.spent {
            // A life that long would have been worth it.
            let worth = (2 * self.backoff).max(8 * self.spent);
            worth.clamp(BACKOFF_LEAST, BACKOFF_MOST)
        } else if self.backoff > BACKOFF_LEAST {
            self.backoff / 4
        } else {
            0
        };
        self.open = false;
        self.stale = true;
        self.calm_since = now;
        self.seen = self.flushes;
        // What closed it ended a calm that was no longer than this, but for what the window took.
        self.gap = life.saturating_sub(self.spent);
    }

    /// Notes what maintenance cost, and closes a window that costs too much.
    fn charge(&mut self, since: u64) {
        let now = engine_core::clock::tsc();
        self.spent += now.wrapping_sub(since).min(DEAREST) + SIGNAL;
        let grace = if self.backoff == 0 {
            GRACE
        } else {
            GRACE_LATER
        };
        let bad = self.spent > grace && self.spent > now.wrapping_sub(self.opened) / 2;
        if self.open && bad && !self.held {
            self.close(now);
        }
    }

    /// The extent that shows `address`, as its start, first physical address and whether it can be
    /// written.
    fn covering(&self, address: u64) -> Option<(u64, Extent)> {
        let (&start, &extent) = self.extents.range(..=address).next_back()?;
        (address - start < extent.bytes).then_some((start, extent))
    }

    /// True if the page at `address` is mapped to `phys` with at least these rights, but for pages
    /// that held code.
    pub(crate) fn shows(&self, address: u64, phys: u64, writable: bool) -> bool {
        self.covering(address).is_some_and(|(start, extent)| {
            extent.phys + (address - start) == phys && extent.writable == writable
        })
    }

    /// Maps a piece of guest RAM, writable but for the pages in `code` (physical addresses).
    /// Returns false if the host refuses.
    pub(crate) fn fill(&mut self, piece: Piece, code: &[u64]) -> bool {
        let since = engine_core::clock::tsc();
        if self.extents.len() >= EXTENTS {
            self.drop_all();
        }
        let Piece {
            virt,
            bytes,
            phys,
            writable,
            ..
        } = piece;
        debug_assert!(virt < SIZE && bytes <= SIZE - virt && (virt | bytes | phys) & 0xfff == 0);
        self.forget(virt, bytes);
        if !self.map(piece) {
            return false;
        }
        self.fills += 1;
        self.note(
            virt,
            Extent {
                bytes,
                phys,
                writable,
            },
        );
        if writable {
            for &page in code {
                self.protect_at(virt + (page - phys));
            }
        }
        self.charge(since);
        true
    }

    /// Maps one page of an extent again, with other rights than it had. Returns false if the host
    /// refuses.
    pub(crate) fn fill_hole(&mut self, piece: Piece) -> bool {
        let since = engine_core::clock::tsc();
        let mapped = self.map(piece);
        if !mapped {
            self.forget(piece.virt, piece.bytes);
        }
        self.fills += 1;
        self.charge(since);
        mapped
    }

    /// Maps guest RAM; if the host refuses, nothing is there.
    fn map(&mut self, piece: Piece) -> bool {
        let rights = libc::PROT_READ | if piece.writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the range lies inside the reservation, and what it replaces is guest RAM or
        // nothing.
        let mapped = unsafe {
            libc::mmap(
                (self.base + piece.virt) as *mut _,
                piece.bytes as usize,
                rights,
                libc::MAP_SHARED | libc::MAP_FIXED,
                piece.fd,
                piece.offset as i64,
            )
        };
        if mapped == libc::MAP_FAILED {
            self.unmap(piece.virt, piece.bytes);
            return false;
        }
        true
    }

    /// Remembers an extent, as part of the one before it where that goes on.
    fn note(&mut self, virt: u64, extent: Extent) {
        if let Some((&start, before)) = self.extents.range_mut(..virt).next_back()
            && start + before.bytes == virt
            && before.phys + before.bytes == extent.phys
            && before.writable == extent.writable
        {
            before.bytes += extent.bytes;
            return;
        }
        self.extents.insert(virt, extent);
    }

    /// Forgets extents in a range; the mappings are the caller's business. Returns true if there
    /// were any.
    fn forget(&mut self, virt: u64, bytes: u64) -> bool {
        let end = virt.saturating_add(bytes);
        let mut found = false;
        while let Some((&start, &extent)) = self.extents.range(..end).next_back()
            && start + extent.bytes > virt
        {
            found = true;
            self.extents.remove(&start);
            let extent_end = start + extent.bytes;
            if extent_end > end {
                let rest = Extent {
                    bytes: extent_end - end,
                    phys: extent.phys + (end - start),
                    ..extent
                };
                self.extents.insert(end, rest);
            }
            if start < virt {
                let rest = Extent {
                    bytes: virt - start,
                    ..extent
                };
                self.extents.insert(start, rest);
            }
        }
        found
    }

    /// Takes the rights of a range away.
    ///
    /// # Panics
    /// If the host refuses even to forget the whole window: memory that the guest has given away
    /// would stay in its reach.
    fn unmap(&mut self, virt: u64, bytes: u64) {
        if self.reserve(virt, bytes).is_err() {
            self.extents.clear();
            self.reserve(0, SIZE).expect("the window is taken back");
        }
    }

    fn reserve(&self, virt: u64, bytes: u64) -> io::Result<()> {
        // SAFETY: the range lies inside the reservation; it loses its rights.
        let mapped = unsafe {
            libc::mmap(
                (self.base + virt) as *mut _,
                bytes as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Takes the pages in `span` out.
    pub(crate) fn remove_span(&mut self, span: Span) {
        if self.stale || self.extents.is_empty() || span.start >= SIZE {
            return;
        }
        let bytes = span.bytes.min(SIZE - span.start);
        if self.forget(span.start, bytes) {
            let since = engine_core::clock::tsc();
            self.unmap(span.start, bytes);
            self.drops += 1;
            self.charge(since);
        }
    }

    /// Takes everything out, at once: for whoever can't wait until translated code is left.
    pub(crate) fn drop_all(&mut self) {
        if !self.extents.is_empty() {
            self.extents.clear();
            self.unmap(0, SIZE);
            self.drops += 1;
        }
        self.stale = false;
    }

    /// Makes every mapping of the page at `phys` read-only: it holds translated code now.
    pub(crate) fn protect(&mut self, phys: u64) {
        let found: Vec<u64> = self
            .extents
            .iter()
            .filter(|(_, extent)| extent.writable && phys.wrapping_sub(extent.phys) < extent.bytes)
            .map(|(&virt, extent)| virt + (phys - extent.phys))
            .collect();
        for virt in found {
            self.protect_at(virt);
        }
    }

    fn protect_at(&mut self, virt: u64) {
        // SAFETY: a page inside the reservation loses a right.
        let result = unsafe { libc::mprotect((self.base + virt) as *mut _, 4096, libc::PROT_READ) };
        if result != 0 {
            self.forget(virt, 4096);
            self.unmap(virt, 4096);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.base != 0 {
            // SAFETY: the reservation is this window's own; no translated code runs any more.
            unsafe { libc::munmap((self.base - GUARD) as *mut _, RESERVED as usize) };
        }
    }
}

/// True if the kernel lets a process write its GS base (FSGSBASE, told by AT_HWCAP2:
/// Documentation/arch/x86/x86_64/fsgs.rst).
fn may_set_gs() -> bool {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}
