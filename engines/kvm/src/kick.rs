//! Stopping a vCPU that is in KVM_RUN, from another thread, without losing a kick.
//!
//! KVM_RUN returns EINTR when a signal is pending, but a signal that is handled just before the
//! ioctl would be lost. So the handler, which runs on the vCPU's own thread, also sets
//! `kvm_run.immediate_exit`, which KVM looks at on entry (api.rst 5, immediate_exit). It finds the
//! byte through a thread-local pointer that [`Running`] sets for the time of the ioctl.
//!
//! A kick outside of KVM_RUN leaves `requested` set, which [`KvmKick::enter`] takes. Kicker and
//! vCPU each store first and load second (`requested`/`thread`, sequentially consistent), so at
//! least one of them sees the other.

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};

use engine_core::Kick;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, null between runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
    /// This thread's id, 0 until asked for.
    static THREAD: Cell<i32> = const { Cell::new(0) };
}

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    SIGRTMIN() + 1
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A const-initialised thread-local without a destructor: no lazy set-up in a handler.
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: `Running` sets the pointer to a byte of the mapped kvm_run page and takes it
        // back before that mapping can go, on this same thread.
        unsafe { (*immediate_exit).store(1, Ordering::Relaxed) };
    }
}

/// Kick handle of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct KvmKick {
    requested: AtomicBool,
    /// Thread that is in KVM_RUN, 0 for none.
    thread: AtomicI32,
}

impl KvmKick {
    /// Installs the signal handler, once for the process.
    pub(crate) fn prepare() -> std::io::Result<()> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        INSTALLED
            .get_or_init(|| {
                register_signal_handler(kick_signal(), on_signal).map_err(|error| error.errno())
            })
            .map_err(std::io::Error::from_raw_os_error)
    }

    /// Marks this thread as running the vCPU whose `immediate_exit` this is; `None` if a kick is due.
    ///
    /// # Safety
    /// `immediate_exit` must stay valid until the guard is dropped, on the calling thread.
    pub(crate) unsafe fn enter(&self, immediate_exit: *const AtomicU8) -> Option<Running<'_>> {
        IMMEDIATE_EXIT.set(immediate_exit);
        self.thread.store(thread_id(), Ordering::SeqCst);
        let running = Running {
            kick: self,
            immediate_exit,
        };
        if self.requested.swap(false, Ordering::SeqCst) {
            return None;
        }
        Some(running)
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        self.requested.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: tgkill takes plain numbers; a thread that has ended meanwhile is ESRCH, and
            // any other thread of this process has the harmless handler too.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal());
            }
        }
    }
}

/// This thread is about to enter or in KVM_RUN.
pub(crate) struct Running<'a> {
    kick: &'a KvmKick,
    immediate_exit: *const AtomicU8,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.kick.thread.store(0, Ordering::SeqCst);
        IMMEDIATE_EXIT.set(ptr::null());
        // SAFETY: valid for the guard's lifetime by the contract of `enter`.
        unsafe { (*self.immediate_exit).store(0, Ordering::Relaxed) };
    }
}

impl Running<'_> {
    /// Takes back a kick that has done its work by interrupting this run.
    pub(crate) fn interrupted(self) {
        self.kick.requested.store(false, Ordering::SeqCst);
    }
}

fn thread_id() -> i32 {
    let known = THREAD.get();
    if known != 0 {
        return known;
    }
    // SAFETY: gettid takes no arguments and cannot fail.
    let id = unsafe { libc::gettid() };
    THREAD.set(id);
    id
}
