//! Reading the ledger that the monitor keeps: counters and crash reports.
//!
//! K can write anything there. The counters are a guest's own statistics; what is wrong in them
//! misleads nobody but their reader.

use std::sync::atomic::Ordering::Relaxed;

use engine_core::CpuState;

use crate::wire::{Ledger, crash};

/// The state that a crashed kernel has left.
pub(crate) fn state(ledger: &Ledger) -> CpuState {
    let mut state = CpuState::default();
    for (index, value) in ledger.registers.iter().enumerate() {
        let value = value.load(Relaxed);
        match index {
            16 => state.rip = value,
            17 => state.rflags = value,
            index => state.gpr[index] = value,
        }
    }
    state
}

/// What the ledger says about a crash, in one line.
pub(crate) fn message(ledger: &Ledger) -> String {
    let detail = |index: usize| ledger.detail[index].load(Relaxed);
    let rip = ledger.registers[16].load(Relaxed);
    match ledger.crash.load(Relaxed) {
        crash::EXCEPTION => format!(
            "exception {} (error {:#x}, address {:#x}) in the kernel without an entry for it, rip {rip:#x}",
            detail(0),
            detail(1),
            detail(2)
        ),
        crash::NO_ENTRY => format!(
            "no entry or stack for an upcall of cause {}, vector {}",
            detail(0),
            detail(1)
        ),
        crash::MONITOR => format!(
            "the kernel broke its monitor: exception {} or line, address {:#x}, rip {rip:#x}",
            detail(0),
            detail(2)
        ),
        crash::HOST => format!(
            "host call {:#x} failed in the monitor: error {}",
            detail(0),
            -detail(1)
        ),
        crash::SIGNAL_STATE => format!(
            "the user process in slot {} broke its signal state (step {}), and the kernel has no failsafe entry",
            detail(0),
            detail(1)
        ),
        other => format!("the kernel's process reported an unknown crash ({other})"),
    }
}
