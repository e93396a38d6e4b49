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
];

const MICRO: &[&str] = &["ctxsw2", "ctxsw8", "pfstorm", "aspace"];

/// The group of a workload.
pub(crate) fn group(workload: &str) -> Group {
    if COMPUTE.contains(&workload) {
        Group::Compute
    } else if NANO.contains(&workload) {
        Group::Nano
    } else if MICRO.contains(&workload) {
        Group::Micro
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
