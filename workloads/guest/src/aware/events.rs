//! Events: the virtual counterpart of interrupts. Masking and unmasking are stores to a page shared
//! with the host and cost no exit.

use super::hypercall;
use crate::cpu;
use abi::hypercall::{SharedInfo, StartInfo, evtchn};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// Where the shared page is.
static SHARED: AtomicU64 = AtomicU64::new(0);
/// Events that [`deliver`] has taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Takes note of where the shared page is. Before any other function of this module.
pub(super) fn set_up(info: &StartInfo) {
    SHARED.store(info.shared_info, Relaxed);
}

#[inline(always)]
fn shared() -> &'static SharedInfo {
    // SAFETY: the host maps the page there for as long as the guest runs; all of it is atomic.
    unsafe { &*(SHARED.load(Relaxed) as *const SharedInfo) }
}

/// Takes a port's pending bit away.
pub(super) fn clear(port: u64) {
    shared().pending.fetch_and(!(1 << port), SeqCst);
}

/// Masks events: cli.
#[inline(always)]
pub(super) fn mask() {
    shared().upcall_mask.store(1, Relaxed);
}

/// Unmasks events: sti. What became pending meanwhile is taken now.
///
/// The store may pass the load, as far as the processor is concerned, and an event that arrives
/// between them be missed here. It is not lost: the host never interrupts the kernel, looks itself
/// before it enters user mode or sleeps, and the next unmasking looks again.
#[inline(always)]
pub(super) fn unmask() {
    shared().upcall_mask.store(0, Relaxed);
    if shared().upcall_pending.load(Relaxed) != 0 {
        deliver();
    }
}

/// Whether events are unmasked.
pub(super) fn unmasked() -> bool {
    shared().upcall_mask.load(Relaxed) == 0
}

/// Takes every event that is pending and not masked. This kernel waits for no event here: all it
/// does is count them.
#[cold]
#[inline(never)]
pub(super) fn deliver() {
    shared().upcall_pending.store(0, SeqCst);
    let open = !shared().mask.load(SeqCst);
    let ports = shared().pending.fetch_and(!open, SeqCst) & open;
    TAKEN.fetch_add(ports.count_ones().into(), Relaxed);
}

/// Events taken so far.
pub(super) fn taken() -> u64 {
    TAKEN.load(Relaxed)
}

/// The host's clock in ns, from the shared page.
#[inline(always)]
pub(super) fn system_time() -> u64 {
    let clock = &shared().clock;
    loop {
        let version = clock.version.load(SeqCst);
        let ticks = cpu::time_stamp().wrapping_sub(clock.tsc_timestamp.load(Relaxed));
        // The host shifts left alone, and by 0 above 1 GHz.
        let ticks = ticks << (clock.shift.load(Relaxed) & 31);
        let passed = (u128::from(ticks) * u128::from(clock.multiplier.load(Relaxed))) >> 32;
        let time = clock.system_time.load(Relaxed).wrapping_add(passed as u64);
        if version & 1 == 0 && clock.version.load(SeqCst) == version {
            return time;
        }
    }
}

/// Ticks of the time-stamp counter in a second, from the shared page.
pub(super) fn rate() -> Option<u64> {
    let clock = &shared().clock;
    let multiplier = u64::from(clock.multiplier.load(Relaxed));
    let shift = clock.shift.load(Relaxed) & 31;
    (1_000_000_000u64 << 32).checked_div(multiplier << shift)
}

/// Tries it: an event raised while masked is taken at the unmasking, once, and not before.
pub(super) fn works() -> bool {
    let Ok(port) = hypercall::event_channel(evtchn::BIND_IPI, 0) else {
        return false;
    };
    mask();
    let before = TAKEN.load(Relaxed);
    let raised = hypercall::event_channel(evtchn::UNMASK, port).is_ok()
        && hypercall::event_channel(evtchn::SEND, port).is_ok();
    let early = TAKEN.load(Relaxed);
    unmask();
    let after = TAKEN.load(Relaxed);
    mask();
    let closed = hypercall::event_channel(evtchn::CLOSE, port).is_ok();
    raised && closed && early == before && after == before + 1
}
