//! Order and groups in which workloads are shown.
//!
//! The page is made from files alone, so the order stands here by name; a workload that this list
//! does not know is shown after those it does, in order of appearance.

/// What a workload exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// User-mode computation.
    Compute,
    /// One privileged operation.
    Nano,
    /// Acts of a kernel with address spaces.
    Micro,
    /// Requests to devices.
    Io,
    /// Interrupts that come at a time: how late they are counts, and not how long they take.
    Timers,
    /// Not in the list.
    Unlisted,
    /// The harness's own cost: measured, subtracted, never compared.
    Empty,
}

const COMPUTE: &[&str] = &[
    "alu",
    "sieve",
    "sort",
    "chase",
    "fib",
    "indirect",
    "sse_matmul",
];

const NANO: &[&str] = &[
    "syscall",
    "hypercall",
    "in",
    "out",
    "cpuid",
    "cr3_reload",
    "invlpg",
    "pgfault",
    "divzero",
    "callret",
    "cr8wr",
    "ptemod",
    "cli_sti",
    "int3",
    "cr3_touch",
    "pushf_popf",
    "rep_movsb",
    "rep_stosq",
];

const MICRO: &[&str] = &["ctxsw2", "ctxsw8", "pfstorm", "aspace"];

/// What one iteration of an I/O workload moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Moves {
    /// Bytes to or from a device, one request after another: a rate in bytes says most.
    Bytes(f64),
    /// One thing of that name.
    One(&'static str),
}

/// Bytes of a line of workload `console`.
const LINE: f64 = 64.0;
/// Bytes of a block.
const BLOCK: f64 = 4096.0;
/// Bytes of a frame of workload `net_stream`.
const FRAME: f64 = 1512.0;

/// I/O workloads with their default sizes, as the catalogue has them.
const IO: &[(&str, Moves)] = &[
    ("console", Moves::Bytes(LINE)),
    ("blk_seqread", Moves::Bytes(BLOCK)),
    ("blk_seqread32", Moves::Bytes(BLOCK)),
    ("blk_seqwrite", Moves::Bytes(BLOCK)),
    ("blk_seqwrite32", Moves::Bytes(BLOCK)),
    ("blk_randread", Moves::One("IOPS")),
    ("blk_randread32", Moves::One("IOPS")),
    ("blk_randwrite", Moves::One("IOPS")),
    ("blk_randwrite32", Moves::One("IOPS")),
    ("net_rr", Moves::One("round trips/s")),
    ("net_stream", Moves::Bytes(FRAME)),
    ("self_ipi", Moves::One("interrupts/s")),
];

const TIMERS: &[&str] = &[
    "timer_pit",
    "timer_lapic",
    "timer_tscdl",
    "timer_pv",
    "hlt_wake",
];

/// What one iteration moves, for a workload of group [`Group::Io`].
pub(crate) fn moves(workload: &str) -> Option<Moves> {
    let known = IO.iter().find(|(name, _)| *name == workload);
    known.map(|(_, moves)| *moves)
}

/// The group of a workload.
pub(crate) fn group(workload: &str) -> Group {
    if COMPUTE.contains(&workload) {
        Group::Compute
    } else if NANO.contains(&workload) {
        Group::Nano
    } else if MICRO.contains(&workload) {
        Group::Micro
    } else if moves(workload).is_some() {
        Group::Io
    } else if TIMERS.contains(&workload) {
        Group::Timers
    } else if workload == reports_data::EMPTY {
        Group::Empty
    } else {
        Group::Unlisted
    }
}

impl Group {
    /// Heading of the group.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Group::Compute => "Compute",
            Group::Nano => "Privileged operations",
            Group::Micro => "Address spaces",
            Group::Io => "Devices",
            Group::Timers => "Timers",
            Group::Unlisted => "Other workloads",
            Group::Empty => "The measurement itself",
        }
    }
}

/// Sorts by group and list position; stable for those that the list does not know.
pub(crate) fn sort(workloads: &mut [&str]) {
    workloads.sort_by_key(|workload| {
        let place = |list: &[&str]| list.iter().position(|name| name == workload);
        let place = place(COMPUTE)
            .or(place(NANO))
            .or(place(MICRO))
            .or(IO.iter().position(|(name, _)| name == workload))
            .or(place(TIMERS))
            .unwrap_or_default();
        (group(workload), place)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlisted_workloads_come_last_in_order_of_appearance() {
        let mut names = vec!["zeta", "empty", "out", "beta", "sieve", "in", "alu"];
        sort(&mut names);
        assert_eq!(
            names,
            ["alu", "sieve", "in", "out", "zeta", "beta", "empty"]
        );
    }
}
