//! Counting exits: by reason, by port and by device, as totals and between two marks.
//!
//! Two sources are kept apart because their units differ: exits to the VMM ("vmm"), and what the
//! engine itself counts (its translator's callouts, the host kernel's statistics).
//!
//! Each port has a counter of its own for either direction: counting an exit is three additions.

use std::sync::Arc;

use crate::doorbell::Passed;
use crate::exit::ExitKind;
use crate::{ExitCounts, ExitReason, Vcpu};

/// One counter's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// Who counted: `vmm`, `translator`, or what the engine calls its host statistics.
    pub source: &'static str,
    /// Mode-neutral kind.
    pub kind: ExitKind,
    /// The reason in the engine's own terms.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Statistic about a vCPU that only the engine or the host's kernel can collect, cumulative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostStat {
    /// Who counted ("kvm-stats", "translated-code").
    pub source: &'static str,
    /// Mode-neutral kind.
    pub kind: ExitKind,
    /// Their name for it.
    pub name: String,
    /// Value since the vCPU was created.
    pub value: u64,
}

/// A device's memory accesses.
#[derive(Clone, Copy, Debug, Default)]
struct Accesses {
    reads: u64,
    writes: u64,
}

/// Counters of the run loop.
#[derive(Debug)]
pub struct Tally {
    exits: ExitCounts,
    total: u64,
    /// Accesses to each port, read and written. Memory comes in with the ports that are used.
    ports: Box<[[u64; 2]; 1 << 16]>,
    /// Those that were used, in that order: port, written.
    used: Vec<(u16, bool)>,
    /// By device slot; the last one is for addresses without a device.
    memory: Vec<(&'static str, Accesses)>,
    /// What passes between guest and devices without an exit.
    passed: Vec<Arc<Passed>>,
    /// What the translators of other vCPUs than the one at hand have counted, by vCPU, when they
    /// last left their guests.
    callouts: Vec<ExitCounts>,
}

/// Counters at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    exits: ExitCounts,
    ports: Vec<u64>,
    memory: Vec<Accesses>,
    callouts: ExitCounts,
    host: Vec<HostStat>,
}

impl Tally {
    /// Nothing counted; `devices` names the devices by slot.
    pub fn new(devices: impl Iterator<Item = &'static str>) -> Self {
        Tally {
            exits: ExitCounts::default(),
            total: 0,
            ports: vec![[0; 2]; 1 << 16].try_into().expect("as many as that"),
            used: Vec::with_capacity(64),
            memory: devices
                .chain(["unassigned"])
                .map(|name| (name, Accesses::default()))
                .collect(),
            passed: Vec::new(),
            callouts: Vec::new(),
        }
    }

    /// Takes note of what the engine of vCPU `cpu`, one of several, has counted so far.
    pub fn publish(&mut self, cpu: usize, callouts: ExitCounts) {
        if self.callouts.len() <= cpu {
            self.callouts.resize(cpu + 1, ExitCounts::default());
        }
        self.callouts[cpu] = callouts;
    }

    /// Adds the next device; before anything is counted.
    pub fn add_device(&mut self, name: &'static str) {
        let last = self.memory.len() - 1;
        self.memory.insert(last, (name, Accesses::default()));
    }

    /// Adds what passes without an exit, beside the host's statistics.
    pub(crate) fn add_passed(&mut self, passed: Arc<Passed>) {
        self.passed.push(passed);
    }

    /// Exits so far.
    #[inline]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Exits so far, by reason.
    pub fn exits(&self) -> &ExitCounts {
        &self.exits
    }

    /// Counts an exit.
    #[inline]
    pub fn exit(&mut self, reason: ExitReason) {
        self.exits.add(reason);
        self.total += 1;
    }

    /// Counts the port of an exit that [`exit`](Tally::exit) has counted.
    /// False the first time, when [`note_port`](Tally::note_port) is to be called.
    #[inline(always)]
    #[must_use]
    pub fn port(&mut self, port: u16, write: bool) -> bool {
        let count = &mut self.ports[usize::from(port)][usize::from(write)];
        *count += 1;
        *count != 1
    }

    /// Has the port's counter be among those that are told of, from its first access on.
    pub fn note_port(&mut self, port: u16, write: bool) {
        if self.uses(port, write) == 1 {
            self.used.push((port, write));
        }
    }

    fn uses(&self, port: u16, write: bool) -> u64 {
        self.ports[usize::from(port)][usize::from(write)]
    }

    /// Counts the device of a memory exit; `None` where there is no device.
    #[inline]
    pub fn memory(&mut self, slot: Option<u8>, write: bool) {
        let last = self.memory.len() - 1;
        let accesses = &mut self.memory[slot.map_or(last, usize::from)].1;
        if write {
            accesses.writes += 1;
        } else {
            accesses.reads += 1;
        }
    }

    /// Takes one write to `port` out of a snapshot.
    pub(crate) fn forget_port_write(&self, port: u16, snapshot: &mut Snapshot) {
        if let Some(index) = self.used.iter().position(|&used| used == (port, true)) {
            snapshot.ports[index] -= 1;
            snapshot.exits.remove(ExitReason::PioOut);
        }
    }

    /// All counters as they stand when vCPU `cpu` has left its guest. The host's statistics are
    /// those of the VM and of this vCPU: those of others can't be told while they run.
    pub fn snapshot(&self, cpu: usize, vcpu: &mut dyn Vcpu) -> Snapshot {
        let mut callouts = vcpu.counts();
        for (other, counts) in self.callouts.iter().enumerate() {
            if other != cpu {
                callouts.merge(counts);
            }
        }
        self.with(callouts, vcpu.host_stats())
    }

    /// All counters when all vCPUs have stopped.
    pub fn last(&self, vcpus: &mut [&mut dyn Vcpu]) -> Snapshot {
        let mut callouts = ExitCounts::default();
        let mut host: Vec<HostStat> = Vec::new();
        for vcpu in vcpus {
            callouts.merge(&vcpu.counts());
            for stat in vcpu.host_stats() {
                let same = |known: &&mut HostStat| {
                    (known.source, &known.name) == (stat.source, &stat.name)
                };
                match host.iter_mut().find(same) {
                    Some(known) => known.value += stat.value,
                    None => host.push(stat),
                }
            }
        }
        self.with(callouts, host)
    }

    fn with(&self, callouts: ExitCounts, mut host: Vec<HostStat>) -> Snapshot {
        host.extend(self.passed.iter().flat_map(|passed| passed.counts()));
        Snapshot {
            exits: self.exits.clone(),
            ports: self
                .used
                .iter()
                .map(|&(port, write)| self.uses(port, write))
                .collect(),
            memory: self.memory.iter().map(|entry| entry.1).collect(),
            callouts,
            host,
        }
    }

    /// What was counted between two snapshots of this tally, zeros left out.
    pub fn between(&self, from: &Snapshot, to: &Snapshot, vcpu: &dyn Vcpu) -> Vec<Count> {
        let mut counts = Vec::new();
        let mut add = |source, kind, reason: String, count| {
            if count > 0 {
                counts.push(Count {
                    source,
                    kind,
                    reason,
                    count,
                });
            }
        };
        for (reason, count) in to.exits.since(&from.exits).iter() {
            let name = vcpu.exit_name(reason);
            // Port and memory exits come with more detail below.
            if !matches!(reason.kind(), ExitKind::Pio | ExitKind::Mmio) {
                add("vmm", reason.kind(), name.to_owned(), count);
            }
        }
        for (index, &count) in to.ports.iter().enumerate() {
            let before = from.ports.get(index).copied().unwrap_or(0);
            let (port, write) = self.used[index];
            let reason = if write {
                ExitReason::PioOut
            } else {
                ExitReason::PioIn
            };
            let name = format!("{} {port:#x}", vcpu.exit_name(reason));
            add("vmm", ExitKind::Pio, name, count - before);
        }
        for (index, now) in to.memory.iter().enumerate() {
            let before = from.memory.get(index).copied().unwrap_or_default();
            let device = self.memory[index].0;
            for (reason, count) in [
                (ExitReason::MmioRead, now.reads - before.reads),
                (ExitReason::MmioWrite, now.writes - before.writes),
            ] {
                let name = format!("{} {device}", vcpu.exit_name(reason));
                add("vmm", ExitKind::Mmio, name, count);
            }
        }
        for (reason, count) in to.callouts.since(&from.callouts).iter() {
            add("translator", reason.kind(), reason.name().to_owned(), count);
        }
        for stat in &to.host {
            let before = from
                .host
                .iter()
                .find(|other| (other.source, &other.name) == (stat.source, &stat.name))
                .map_or(0, |other| other.value);
            let count = stat.value.saturating_sub(before);
            add(stat.source, stat.kind, stat.name.clone(), count);
        }
        counts
    }
}
