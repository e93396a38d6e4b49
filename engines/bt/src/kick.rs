//! Stopping translated code from a signal handler or another thread.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use engine_core::Kick;

use crate::arena::Arena;

/// The doorbell of one vCPU. It shares the arena, so that a late kick rings a page that is there.
pub(crate) struct Doorbell {
    pending: AtomicBool,
    arena: Arc<Arena>,
}

impl Doorbell {
    pub(crate) fn new(arena: Arc<Arena>) -> Doorbell {
        Doorbell {
            pending: AtomicBool::new(false),
            arena,
        }
    }

    fn protect(&self, protection: i32) {
        let page = self.arena.doorbell();
        // SAFETY: the page belongs to the arena and holds nothing. mprotect is a plain
        // system call, so a signal handler may make it; its errno is put back for whoever was
        // interrupted.
        unsafe {
            let errno = *libc::__errno_location();
            libc::mprotect(page as *mut _, 4096, protection);
            *libc::__errno_location() = errno;
        }
    }

    /// True if somebody rang since the last [`Doorbell::answer`].
    pub(crate) fn rang(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// True if somebody rang since the last call.
    pub(crate) fn answer(&self) -> bool {
        if !self.pending.load(Ordering::Acquire) {
            return false;
        }
        // Open the page before forgetting the ring: the other way round a ring in between would be
        // forgotten with the page open. This way it costs one fault that finds nothing to do.
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
        self.pending.swap(false, Ordering::AcqRel)
    }

    /// Makes translated code leave soon, for the runtime's own sake: the run goes on after it.
    pub(crate) fn ring(&self) {
        self.protect(libc::PROT_NONE);
    }

    /// True if a kick waits for its answer.
    pub(crate) fn is_kicked(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Opens the page after a fault on it.
    pub(crate) fn open(&self) {
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
    }

    /// True if `address` lies in the page.
    pub(crate) fn contains(&self, address: u64) -> bool {
        address & !0xfff == self.arena.doorbell() as u64
    }
}

impl Kick for Doorbell {
    fn kick(&self) {
        self.pending.store(true, Ordering::Release);
        self.protect(libc::PROT_NONE);
    }
}
