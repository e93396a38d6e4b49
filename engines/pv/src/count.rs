//! Counts of a guest, as totals and between marks, in the words that other engines use.

use std::sync::atomic::Ordering::Relaxed;

use abi::hypercall::Call;
use engine_core::ExitKind;
use engine_core::tally::Count;

use crate::wire::{Ledger, event};

/// Who counts.
const SOURCE: &str = "vmm";

/// Counters at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    calls: [u64; 64],
    exceptions: [u64; 32],
    events: [u64; event::COUNT],
}

impl Default for Snapshot {
    fn default() -> Self {
        Snapshot {
            calls: [0; 64],
            exceptions: [0; 32],
            events: [0; event::COUNT],
        }
    }
}

/// Names of exceptions (SDM 3A table 6-1); those without one are told by number.
const EXCEPTIONS: [(usize, &str); 8] = [
    (0, "#DE"),
    (1, "#DB"),
    (3, "#BP"),
    (6, "#UD"),
    (12, "#SS"),
    (13, "#GP"),
    (14, "#PF"),
    (17, "#AC"),
];

/// Kind and name of each [`event`].
const EVENTS: [(usize, ExitKind, &str); event::COUNT] = [
    (event::SYSCALL, ExitKind::Hypercall, "upcall syscall"),
    (event::EVENT, ExitKind::Irq, "upcall event"),
    (event::FAILSAFE, ExitKind::GuestFault, "upcall failsafe"),
    (event::SHADOW_FAULT, ExitKind::ShadowFault, "shadow fault"),
    (event::PREEMPT, ExitKind::Irq, "preemption"),
    (event::DOORBELL, ExitKind::Pio, "doorbell"),
    (event::SHOOTDOWN, ExitKind::ShadowFault, "shootdown"),
    (event::EVICTION, ExitKind::ShadowFault, "eviction"),
];

impl Snapshot {
    /// The counters as they stand.
    pub(crate) fn take(ledger: &Ledger) -> Self {
        let mut snapshot = Snapshot::default();
        let load = |to: &mut [u64], from: &[std::sync::atomic::AtomicU64]| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.load(Relaxed);
            }
        };
        load(&mut snapshot.calls, &ledger.calls);
        load(&mut snapshot.exceptions, &ledger.exceptions);
        load(&mut snapshot.events, &ledger.events);
        snapshot
    }

    /// Takes the closing mark's own call out.
    pub(crate) fn forget_mark(&mut self) {
        let mark = &mut self.calls[Call::Mark as usize];
        *mark = mark.saturating_sub(1);
    }

    /// What was counted since `earlier`, zeros left out.
    pub(crate) fn since(&self, earlier: &Snapshot) -> Vec<Count> {
        let mut counts = Vec::new();
        let mut add = |kind, reason: String, now: u64, before: u64| {
            let count = now.saturating_sub(before);
            if count > 0 {
                counts.push(Count {
                    source: SOURCE,
                    kind,
                    reason,
                    count,
                });
            }
        };
        for call in Call::ALL {
            let index = *call as usize;
            let reason = format!("hypercall {} {}", call.name(), call.tier().name());
            add(
                ExitKind::Hypercall,
                reason,
                self.calls[index],
                earlier.calls[index],
            );
        }
        for (vector, (&now, &before)) in self.exceptions.iter().zip(&earlier.exceptions).enumerate()
        {
            let reason = match EXCEPTIONS.iter().find(|known| known.0 == vector) {
                Some((_, name)) => format!("upcall {name}"),
                None => format!("upcall exception {vector}"),
            };
            add(ExitKind::GuestFault, reason, now, before);
        }
        for (index, kind, name) in EVENTS {
            add(
                kind,
                name.to_owned(),
                self.events[index],
                earlier.events[index],
            );
        }
        counts
    }
}
