//! What can be measured: the catalogue of metrics.
//!
//! A new metric is one constant here, one entry of [`Metric::CATALOGUE`], one place that collects
//! it and one row of METHODOLOGY.md. A file may hold metrics that this catalogue does not know:
//! they are read, summarised and shown by their own name.

use std::borrow::Cow;

use crate::{Class, Direction, Unit};

/// What a value means: name, unit, which way is better and how much it may vary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Metric {
    /// Name in csv and JSON.
    pub name: Cow<'static, str>,
    /// Unit of the value.
    pub unit: Unit,
    /// Which way is better.
    pub direction: Direction,
    /// How much it may vary between runs of the same thing.
    pub class: Class,
}

const fn metric(name: &'static str, unit: Unit, direction: Direction, class: Class) -> Metric {
    Metric {
        name: Cow::Borrowed(name),
        unit,
        direction,
        class,
    }
}

impl Metric {
    /// Host monotonic time, in ns. Phase `warm` and `cold`: the window between the marks, the
    /// `empty` workload's window subtracted, divided by the iterations; one operation (nano) or
    /// one run (compute). Phase `boot`: start of the VMM's process to the guest's greeting.
    pub const TIME: Metric = metric("time", Unit::Ns, Direction::Lower, Class::Noisy);
    /// Guest TSC ticks of one iteration, as the guest reports them; secondary to `time`.
    pub const CYCLES: Metric = metric("cycles", Unit::Cycles, Direction::Lower, Class::Noisy);
    /// How many iterations one window of this phase held. Needed for the cost of warming up:
    /// (cold time - warm time) x cold iterations.
    pub const ITERATIONS: Metric =
        metric("iterations", Unit::Count, Direction::Neither, Class::Exact);
    /// Exits to the VMM per iteration, all reasons of source `vmm` together.
    pub const EXITS: Metric = metric("exits", Unit::Exits, Direction::Lower, Class::Bounded);
    /// Peak resident memory of the VMM's process.
    pub const PEAK_MEMORY: Metric =
        metric("peak_memory", Unit::Mib, Direction::Lower, Class::Noisy);
    /// Half of the values of a round's histogram do not exceed this; see [`crate::LatencyRow`].
    pub const LATENCY_P50: Metric = metric("latency_p50", Unit::Ns, Direction::Lower, Class::Noisy);
    /// 99 % of the values of a round's histogram do not exceed this.
    pub const LATENCY_P99: Metric = metric("latency_p99", Unit::Ns, Direction::Lower, Class::Noisy);
    /// The greatest value of a round's histogram.
    pub const LATENCY_MAX: Metric = metric("latency_max", Unit::Ns, Direction::Lower, Class::Noisy);
    /// Derived by [`crate::summarise`]: median warm time over native's median warm time.
    pub const SLOWDOWN: Metric = metric("slowdown", Unit::Ratio, Direction::Lower, Class::Noisy);

    /// Every metric this version knows, with what it is and where it is collected.
    pub const CATALOGUE: &[(Metric, &str, &str)] = &[
        (
            Metric::TIME,
            "host monotonic time of one iteration (warm, cold) or of the boot",
            "harness, console lines `begin` and `end`",
        ),
        (
            Metric::CYCLES,
            "guest TSC ticks of one iteration",
            "guest, in its `done` line",
        ),
        (
            Metric::ITERATIONS,
            "iterations in one window",
            "harness, as it asked the guest",
        ),
        (
            Metric::EXITS,
            "exits to the VMM per iteration",
            "VMM, stats fd, between the marks",
        ),
        (
            Metric::PEAK_MEMORY,
            "peak resident memory of the VMM's process",
            "harness, from the kernel's accounting of the child",
        ),
        (
            Metric::LATENCY_P50,
            "median of a request's time or a timer's lateness",
            "guest, in its `latency` and `bucket` lines",
        ),
        (
            Metric::LATENCY_P99,
            "99th percentile of the same",
            "guest, in its `latency` and `bucket` lines",
        ),
        (
            Metric::LATENCY_MAX,
            "greatest of the same",
            "guest, in its `latency` and `bucket` lines",
        ),
        (
            Metric::SLOWDOWN,
            "median warm time over native's",
            "derived from the samples",
        ),
    ];
}
