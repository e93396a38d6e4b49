//! A run as the page sees it: columns in order, workloads in order, and rows by place.
//!
//! Invariant: figures leave here only from rows whose status is `ok`.

use reports_data::statistics::geomean;
use reports_data::{Advantage, BOOT, FLOOR, Metric, NATIVE, Phase, Role, Run, Status, SummaryRow};

use crate::workloads::{self, Group};

/// One column of the comparison: a mode, the baseline or a peer.
pub(crate) struct Column<'a> {
    /// Value of column `mode` in the files.
    pub(crate) name: &'a str,
    /// What the page calls it, backend included.
    pub(crate) label: &'a str,
    /// What it is to the comparison.
    pub(crate) role: Role,
    /// Engine, where the manifest names it.
    pub(crate) engine: &'a str,
    /// Flavour, where the manifest names it.
    pub(crate) flavour: &'a str,
    /// Index of its colour and marker.
    pub(crate) series: usize,
}

/// A figure with its spread, from a row with status `ok`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    /// The median.
    pub(crate) value: f64,
    /// 95 % interval, where there are enough samples.
    pub(crate) interval: Option<(f64, f64)>,
    /// Samples behind it.
    pub(crate) n: usize,
}

/// What stands in a cell.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cell<'a> {
    /// A figure.
    Figure(Figure),
    /// No figure: status and reason.
    Without(Status, &'a str),
    /// The run has no such row.
    Absent,
}

impl<'a> Cell<'a> {
    fn of(row: Option<&'a SummaryRow>) -> Cell<'a> {
        match row {
            None => Cell::Absent,
            Some(row) => match (row.status, row.value) {
                (Status::Ok, Some(value)) => Cell::Figure(Figure {
                    value,
                    interval: row.ci_low.zip(row.ci_high),
                    n: row.n,
                }),
                (status, _) => Cell::Without(status, &row.reason),
            },
        }
    }

    /// The figure, if there is one.
    pub(crate) fn figure(self) -> Option<Figure> {
        match self {
            Cell::Figure(figure) => Some(figure),
            Cell::Without(..) | Cell::Absent => None,
        }
    }
}

/// The run, arranged.
pub(crate) struct View<'a> {
    /// The files.
    pub(crate) run: &'a Run,
    /// Columns: the manifest's order, then modes that only the rows know. Floors are none.
    pub(crate) columns: Vec<Column<'a>>,
    /// Workloads in the order to show them, boot left out.
    pub(crate) workloads: Vec<&'a str>,
}

impl<'a> View<'a> {
    /// Arranges a run.
    pub(crate) fn new(run: &'a Run) -> View<'a> {
        let rows = &run.summary.rows;
        let seen = |name: &str| rows.iter().any(|row| row.mode == name);
        let is_floor = |name: &str| {
            let mut modes = run.manifest.modes.iter();
            name == FLOOR || modes.any(|info| info.name == name && info.role == Role::Floor)
        };
        let mut columns: Vec<Column<'a>> = Vec::new();
        for info in run.manifest.modes.iter() {
            if !is_floor(&info.name) && columns.iter().all(|column| column.name != info.name) {
                columns.push(Column {
                    name: &info.name,
                    label: &info.label,
                    role: info.role,
                    engine: &info.engine,
                    flavour: &info.flavour,
                    series: 0,
                });
            }
        }
        for row in rows {
            if !is_floor(&row.mode) && columns.iter().all(|column| column.name != row.mode) {
                let role = if row.mode == NATIVE {
                    Role::Baseline
                } else {
                    Role::Mode
                };
                columns.push(Column {
                    name: &row.mode,
                    label: &row.mode,
                    role,
                    engine: "",
                    flavour: "",
                    series: 0,
                });
            }
        }
        // A mode that was listed but left no row at all says nothing, except that it is absent:
        // the status section names it.
        columns.retain(|column| seen(column.name));
        columns.sort_by_key(|column| match column.role {
            Role::Baseline => 0,
            Role::Mode => 1,
            Role::Peer | Role::Floor => 2,
        });
        let mut next = 1;
        for column in &mut columns {
            if column.role != Role::Baseline {
                column.series = next;
                next += 1;
            }
        }
        let mut workloads: Vec<&str> = Vec::new();
        for row in rows {
            let shown = row.workload != BOOT && !is_floor(&row.mode);
            if shown && !workloads.contains(&row.workload.as_str()) {
                workloads.push(&row.workload);
            }
        }
        workloads::sort(&mut workloads);
        View {
            run,
            columns,
            workloads,
        }
    }

    /// Any cell.
    pub(crate) fn cell(
        &self,
        workload: &str,
        mode: &str,
        phase: Phase,
        metric: &Metric,
    ) -> Cell<'a> {
        let summary = &self.run.summary;
        Cell::of(summary.find(workload, mode, phase, &metric.name))
    }

    /// Time of one iteration.
    pub(crate) fn time(&self, workload: &str, mode: &str, phase: Phase) -> Cell<'a> {
        self.cell(workload, mode, phase, &Metric::TIME)
    }

    /// Warm time of one iteration.
    pub(crate) fn warm(&self, workload: &str, mode: &str) -> Option<Figure> {
        self.time(workload, mode, Phase::Warm).figure()
    }

    /// Time of one operation of the host itself.
    pub(crate) fn floor(&self, name: &str) -> Cell<'a> {
        self.time(name, FLOOR, Phase::Warm)
    }

    /// The workloads of a group.
    pub(crate) fn group(&self, group: Group) -> impl Iterator<Item = &'a str> + '_ {
        let workloads = self.workloads.iter().copied();
        workloads.filter(move |workload| workloads::group(workload) == group)
    }

    /// The workloads that are compared: all but the harness's own cost.
    pub(crate) fn compared(&self) -> impl Iterator<Item = &'a str> + '_ {
        let workloads = self.workloads.iter().copied();
        workloads.filter(|workload| workloads::group(workload) != Group::Empty)
    }

    /// The workloads whose time is a speed: a timer's is mostly what it was armed with.
    pub(crate) fn raced(&self) -> impl Iterator<Item = &'a str> + '_ {
        let compared = self.compared();
        compared.filter(|workload| workloads::group(workload) != Group::Timers)
    }

    /// Privileged operations and acts of a kernel that no process can do. Devices are not among
    /// them: what a process lacks there is the device, not the right.
    pub(crate) fn without_native(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.compared().filter(|workload| {
            let of_a_kernel = match workloads::group(workload) {
                Group::Compute | Group::Nano | Group::Micro | Group::Unlisted => true,
                Group::Io | Group::Timers | Group::Empty => false,
            };
            of_a_kernel && !self.has_native(workload)
        })
    }

    /// How `mode` stands to `other` at a workload.
    pub(crate) fn advantage(
        &self,
        workload: &str,
        metric: &Metric,
        mode: &str,
        other: &str,
    ) -> Option<Advantage> {
        let Run {
            manifest,
            samples,
            summary,
            ..
        } = self.run;
        let pair = (mode, other);
        Advantage::of(samples, summary, manifest.seed, (workload, metric), pair)
    }

    /// True if a slowdown against native can be given for this workload.
    pub(crate) fn has_native(&self, workload: &str) -> bool {
        self.warm(workload, NATIVE).is_some_and(|f| f.value > 0.0)
    }

    /// True if a native figure was to be had for this workload, whether or not there is one: what
    /// a mean over slowdowns is counted against.
    pub(crate) fn native_applies(&self, workload: &str) -> bool {
        match self.time(workload, NATIVE, Phase::Warm) {
            Cell::Figure(_) => true,
            Cell::Without(status, _) => status != Status::Unsupported,
            Cell::Absent => workloads::group(workload) == Group::Compute,
        }
    }

    /// All columns but the baseline.
    pub(crate) fn guests(&self) -> impl Iterator<Item = &Column<'a>> {
        let columns = self.columns.iter();
        columns.filter(|column| column.role != Role::Baseline)
    }

    /// What operations without a native figure are held against: the first peer, or else the
    /// first mode, that has a figure for any of them.
    pub(crate) fn reference(&self) -> Option<&Column<'a>> {
        let measured = |column: &&Column<'a>| {
            let mut without = self.without_native();
            without.any(|workload| self.warm(workload, column.name).is_some())
        };
        let peers = self.guests().filter(|column| column.role == Role::Peer);
        let modes = self.guests().filter(|column| column.role == Role::Mode);
        peers.chain(modes).find(measured)
    }
}

/// Two columns held against each other, over the workloads where both have a figure.
pub(crate) struct Duel {
    /// Geometric mean of time(a) / time(b); `None` where they share no figure.
    pub(crate) ratio: Option<f64>,
    /// Shared workloads.
    pub(crate) shared: usize,
    /// Workloads asked about.
    pub(crate) of: usize,
    /// Where a's whole interval lies below b's.
    pub(crate) wins: usize,
    /// Where a's whole interval lies above b's.
    pub(crate) losses: usize,
}

impl Duel {
    /// Holds the warm times of `a` and `b` against each other.
    pub(crate) fn new<'w>(
        view: &View<'_>,
        a: &str,
        b: &str,
        workloads: impl Iterator<Item = &'w str>,
    ) -> Duel {
        let mut duel = Duel {
            ratio: None,
            shared: 0,
            of: 0,
            wins: 0,
            losses: 0,
        };
        let mut ratios = Vec::new();
        for workload in workloads {
            duel.of += 1;
            let (Some(a), Some(b)) = (view.warm(workload, a), view.warm(workload, b)) else {
                continue;
            };
            if a.value <= 0.0 || b.value <= 0.0 {
                continue;
            }
            duel.shared += 1;
            ratios.push(a.value / b.value);
            match clearly_faster(a, b) {
                Some(true) => duel.wins += 1,
                Some(false) => duel.losses += 1,
                None => {}
            }
        }
        duel.ratio = geomean(&ratios);
        duel
    }

    /// Shared workloads in which the intervals overlap.
    pub(crate) fn undecided(&self) -> usize {
        self.shared - self.wins - self.losses
    }
}

/// `Some(true)` if `a` is faster beyond both intervals, `Some(false)` if slower, `None` if the
/// intervals overlap or one is unknown.
pub(crate) fn clearly_faster(a: Figure, b: Figure) -> Option<bool> {
    let ((a_low, a_high), (b_low, b_high)) = (a.interval?, b.interval?);
    if a_high < b_low {
        Some(true)
    } else if b_high < a_low {
        Some(false)
    } else {
        None
    }
}

/// The slowdowns of one column over some workloads.
pub(crate) struct Slowdowns<'w> {
    /// Geometric mean; `None` without figures.
    pub(crate) geomean: Option<f64>,
    /// Workload and slowdown, smallest first.
    pub(crate) sorted: Vec<(&'w str, f64)>,
    /// Workloads asked about.
    pub(crate) of: usize,
}

impl<'w> Slowdowns<'w> {
    /// Collects the slowdowns of `mode`.
    pub(crate) fn new(
        view: &View<'_>,
        mode: &str,
        workloads: impl Iterator<Item = &'w str>,
    ) -> Slowdowns<'w> {
        let mut of = 0;
        let mut sorted: Vec<(&str, f64)> = workloads
            .inspect(|_| of += 1)
            .filter_map(|workload| {
                let cell = view.cell(workload, mode, Phase::Warm, &Metric::SLOWDOWN);
                Some((workload, cell.figure()?.value))
            })
            .collect();
        sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
        let values: Vec<f64> = sorted.iter().map(|(_, value)| *value).collect();
        Slowdowns {
            geomean: geomean(&values),
            sorted,
            of,
        }
    }
}
