//! The host's side of a machine: what wakes a vCPU, console input and console output.

pub mod console;
pub mod events;
pub mod input;
pub(crate) mod io_thread;
mod pump;

pub use pump::{Pump, PumpOptions, WATCHED};

/// Makes timed sleeps of the calling thread end on time: the kernel rounds those of an ordinary
/// thread up by as much as 50 us to save wake-ups (PR_SET_TIMERSLACK, prctl(2)), which a halted
/// guest's timer must not wait for.
pub(crate) fn sharpen_sleeps() {
    const NANOSECOND: libc::c_ulong = 1;
    // SAFETY: sets a number of the calling thread; without effect if the kernel refuses.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, NANOSECOND) };
}
