//! Memory that translated code lives in and reaches: context, doorbell, lookup tables, code.
//!
//! ```text
//! base            Context                         rw
//! +DOORBELL       doorbell page                   rw, or nothing while a kick is pending
//! +PRIVILEGED     system registers                rw
//! +TLB            8 software TLBs (see tlb.rs)    rw
//! +JUMP           4 jump caches (see tlb.rs)      rw
//! +TARGETS        2 tables of indirect branches (see dispatch.rs)   rw
//! +CODE           code cache                      rx   (the same pages are rw at `writable`)
//! ```
//!
//! All of it sits below 2 GiB, for absolute displacements. The code cache is W^X by two mappings of
//! one memfd: no page is ever writable and executable at one address.

use std::{
    io, ptr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::{
    context::Context,
    dispatch::TARGET_BYTES,
    privileged::Privileged,
    tlb::{BANKS, JUMP_BYTES, TLB_BYTES, TLB_KINDS},
};

const PAGE: usize = 4096;
/// Offset of the doorbell page.
pub(crate) const DOORBELL: usize = PAGE;
const PRIVILEGED: usize = 2 * PAGE;
const TLB: usize = 6 * PAGE;
const JUMP: usize = TLB + BANKS * TLB_KINDS * TLB_BYTES;
const TARGETS: usize = JUMP + 2 * BANKS * JUMP_BYTES;
const CODE: usize = TARGETS + BANKS * TARGET_BYTES;

const _: () = assert!(size_of::<Context>() <= PAGE);
// What a vCPU may have beside its code. Four of them, the VMM's own memory and what it is to a guest have to fit
// into 16 MiB; no guest has code and data of both privileges in both banks.
const _: () = assert!(CODE <= 9 << 18);
const _: () = assert!(size_of::<Privileged>() <= TLB - PRIVILEGED);

/// One vCPU's low-memory arena.
pub(crate) struct Arena {
    base: usize,
    writable: usize,
    code_bytes: usize,
    /// How much of the code cache has pages, at both of its addresses.
    populated: AtomicUsize,
    /// The x87 state is in the context, not in some thread's registers.
    pub x87_away: AtomicBool,
}

impl Arena {
    /// Maps an arena with room for `code_bytes` of translated code.
    pub(crate) fn new(code_bytes: usize) -> io::Result<Arena> {
        let code_bytes = code_bytes.next_multiple_of(PAGE);
        let total = CODE + code_bytes;
        // SAFETY: a fresh anonymous mapping anywhere in the low 2 GiB; nothing is replaced.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                total,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut arena = Arena {
            base: base as usize,
            writable: 0,
            code_bytes,
            populated: AtomicUsize::new(0),
            x87_away: AtomicBool::new(true),
        };
        // SAFETY: plain system calls; the fixed mapping lies inside the arena just reserved.
        unsafe {
            let fd = libc::memfd_create(c"trapline-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let mapped = (|| {
                if libc::ftruncate(fd, code_bytes as i64) != 0 {
                    return Err(io::Error::last_os_error());
                }
                let writable = libc::mmap(
                    ptr::null_mut(),
                    code_bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    fd,
                    0,
                );
                if writable == libc::MAP_FAILED {
                    return Err(io::Error::last_os_error());
                }
                arena.writable = writable as usize;
                let code = libc::mmap(
                    (arena.base + CODE) as *mut _,
                    code_bytes,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    fd,
                    0,
                );
                if code == libc::MAP_FAILED {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            })();
            libc::close(fd);
            mapped?;
        }
        Ok(arena)
    }

    /// The context.
    pub(crate) fn context(&self) -> *mut Context {
        self.base as *mut Context
    }

    /// Address of the context as a displacement.
    pub(crate) fn context_disp(&self) -> i32 {
        self.base as i32
    }

    /// The system registers, not filled in yet.
    pub(crate) fn privileged(&self) -> *mut Privileged {
        (self.base + PRIVILEGED) as *mut Privileged
    }

    /// Address of the doorbell page.
    pub(crate) fn doorbell(&self) -> usize {
        self.base + DOORBELL
    }

    /// Address of software TLB `index` (see [`crate::tlb`]).
    pub(crate) fn tlb(&self, index: usize) -> usize {
        self.base + TLB + index * TLB_BYTES
    }

    /// Address of jump cache `index` (see [`jump_index`](crate::tlb::jump_index)).
    pub(crate) fn jump(&self, index: usize) -> usize {
        self.base + JUMP + index * JUMP_BYTES
    }

    /// Address of a bank's table of indirect branches.
    pub(crate) fn targets(&self, bank: usize) -> usize {
        self.base + TARGETS + bank * TARGET_BYTES
    }

    /// Where the code cache executes.
    pub(crate) fn code(&self) -> u64 {
        (self.base + CODE) as u64
    }

    /// Size of the code cache in bytes.
    pub(crate) fn code_bytes(&self) -> usize {
        self.code_bytes
    }

    /// Has the host provide pages for code up to `end`, and for some more: page by page they would cost
    /// a fault for each of the two mappings.
    pub(crate) fn populate(&self, end: u64) {
        const STEP: usize = 64 << 10;
        let wanted = (end - self.code()) as usize;
        let done = self.populated.load(Ordering::Relaxed);
        if wanted <= done {
            return;
        }
        let upto = wanted.next_multiple_of(STEP).min(self.code_bytes);
        let code = self.base + CODE;
        for (start, advice) in [
            (self.writable, libc::MADV_POPULATE_WRITE),
            (code, libc::MADV_POPULATE_READ),
        ] {
            // SAFETY: pages of this arena's own mappings are brought in; nothing in them changes. A host
            // that can't do it has them fault.
            unsafe { libc::madvise((start + done) as *mut _, upto - done, advice) };
        }
        self.populated.store(upto, Ordering::Relaxed);
    }

    /// Copies code from the executable address `at`.
    ///
    /// # Panics
    /// If `at` and `bytes` don't lie inside the code cache.
    pub(crate) fn read_code(&self, at: u64, bytes: &mut [u8]) {
        let from = self.alias(at, bytes.len());
        // SAFETY: so many bytes lie in the writable alias, and nobody writes to them now.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies code to the executable address `at`, through the writable alias.
    ///
    /// # Panics
    /// If `at` and `bytes` don't lie inside the code cache.
    pub(crate) fn write_code(&self, at: u64, bytes: &[u8]) {
        let to = self.alias(at, bytes.len());
        // SAFETY: so many bytes lie in the writable alias, which lives as long as self.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Where `length` bytes at the executable address `at` are written.
    fn alias(&self, at: u64, length: usize) -> *mut u8 {
        let offset = (at - self.code()) as usize;
        assert!(offset + length <= self.code_bytes, "code outside the cache");
        (self.writable + offset) as *mut u8
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both ranges are this arena's own mappings and nothing refers to them any more.
        unsafe {
            libc::munmap(self.base as *mut _, CODE + self.code_bytes);
            if self.writable != 0 {
                libc::munmap(self.writable as *mut _, self.code_bytes);
            }
        }
    }
}
