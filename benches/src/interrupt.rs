//! Ctrl-C: a flag that every wait looks at, so that a run ends with its files written.
//!
//! Does not end anything itself. Invariant: once [`requested`] is true it stays true. Virtual
//! machines live in process groups of their own, so the terminal's signal reaches the harness alone.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    if REQUESTED.swap(true, Ordering::Relaxed) {
        // A second signal means that the first was not answered soon enough. The virtual machines
        // die with this process (PR_SET_PDEATHSIG).
        // SAFETY: _exit is async-signal-safe and does not return.
        unsafe { libc::_exit(130) }
    }
}

/// Makes SIGINT, SIGTERM and SIGHUP raise the flag instead of ending the process.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: an all-zero sigaction is valid (no flags, empty mask); the handler touches one
        // atomic and calls nothing but _exit. SA_RESTART is left out: poll must return EINTR.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Whether the user asked for the end.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
