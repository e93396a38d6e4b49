//! Calls to V: system calls that K's filter turns into notifications of V.

use core::sync::atomic::Ordering::Relaxed;

use crate::{ledger, sys, wire};

/// Calls V and waits for its answer.
pub(crate) fn call(number: u64, argument: u64) -> i64 {
    count_exit();
    raw(number, argument)
}

fn raw(number: u64, argument: u64) -> i64 {
    // SAFETY: not a system call of the host; V takes plain numbers.
    unsafe { sys::call(number, [argument, 0, 0, 0, 0, 0]) }
}

/// Counts a transition out of the guest kernel, and stops at the limit.
pub(crate) fn count_exit() {
    let ledger = ledger();
    let exits = ledger.exits.load(Relaxed) + 1;
    ledger.exits.store(exits, Relaxed);
    if exits >= ledger.limit.load(Relaxed) {
        raw(wire::vmm::LIMIT, 0);
    }
}

/// Adds one to a counter that only the monitor writes.
pub(crate) fn count(counter: &core::sync::atomic::AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

/// Ends the guest: says why in the ledger. Registers are there already if they are known.
pub(crate) fn crashed(code: u64, detail: [i64; 4]) -> ! {
    let ledger = ledger();
    for (place, value) in ledger.detail.iter().zip(detail) {
        place.store(value, Relaxed);
    }
    ledger.crash.store(code, Relaxed);
    loop {
        raw(wire::vmm::CRASH, 0);
    }
}

/// A host system call of the monitor failed in a way that has no meaning for the guest.
pub(crate) fn failed(number: u64, error: i64) -> ! {
    crashed(wire::crash::HOST, [number as i64, error, 0, 0])
}
