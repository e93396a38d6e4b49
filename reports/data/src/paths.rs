//! Shares of what translated code does by itself, from the counts of a counting pass.
//!
//! Rows of source [`TRANSLATED_CODE`] count branches and accesses as translated code took them, and
//! in the same window those of them that went through the runtime (`... missed`). Such a window is
//! slower than others and stands for no time.

use crate::{ExitRow, Phase};

/// Source of what translated code counts by itself.
pub const TRANSLATED_CODE: &str = "translated-code";

/// What was counted for one workload, mode and phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Paths {
    /// Direct branches, and blocks that went on behind their end.
    pub direct: f64,
    /// Of these, through the runtime.
    pub direct_missed: f64,
    /// Indirect branches and returns.
    pub indirect: f64,
    /// Of these, through the runtime.
    pub indirect_missed: f64,
    /// Accesses by way of the memory window.
    pub window: f64,
    /// Accesses with a lookup of their own in the software TLB.
    pub software: f64,
    /// Accesses that shared the lookup of one before.
    pub shared: f64,
    /// Accesses, of whichever kind, through the runtime.
    pub access_missed: f64,
}

impl Paths {
    /// Counts per iteration; `None` where nothing was counted.
    pub fn of(rows: &[ExitRow], workload: &str, mode: &str, phase: Phase) -> Option<Paths> {
        let mut paths = Paths::default();
        let mut any = false;
        for row in rows.iter().filter(|row| {
            row.source == TRANSLATED_CODE
                && row.workload == workload
                && row.mode == mode
                && row.phase == phase
        }) {
            let Some(slot) = paths.slot(&row.reason) else {
                continue;
            };
            *slot += row.per_iteration;
            any = true;
        }
        any.then_some(paths)
    }

    fn slot(&mut self, reason: &str) -> Option<&mut f64> {
        Some(match reason {
            "direct-branch" => &mut self.direct,
            "direct-branch missed" => &mut self.direct_missed,
            "indirect-branch" => &mut self.indirect,
            "indirect-branch missed" => &mut self.indirect_missed,
            "window-access" => &mut self.window,
            "software-access" => &mut self.software,
            "shared-access" => &mut self.shared,
            "access missed" => &mut self.access_missed,
            _ => return None,
        })
    }

    /// Share of direct branches that went from block to block.
    pub fn chained(&self) -> Option<f64> {
        share(self.direct - self.direct_missed, self.direct)
    }

    /// Share of indirect branches whose target was found without the runtime.
    pub fn indirect_hits(&self) -> Option<f64> {
        share(self.indirect - self.indirect_missed, self.indirect)
    }

    /// Accesses to memory.
    pub fn accesses(&self) -> f64 {
        self.window + self.software + self.shared
    }

    /// Share of accesses that went through the window.
    pub fn in_window(&self) -> Option<f64> {
        share(self.window, self.accesses())
    }

    /// Share of accesses that looked into the software TLB, or shared such a look.
    pub fn in_software(&self) -> Option<f64> {
        share(self.software + self.shared, self.accesses())
    }

    /// Share of accesses that went through the runtime.
    pub fn missed(&self) -> Option<f64> {
        share(self.access_missed, self.accesses())
    }
}

fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| (part / whole).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(source: &str, reason: &str, count: u64) -> ExitRow {
        ExitRow {
            run: "r".into(),
            workload: "w".into(),
            mode: "m".into(),
            phase: Phase::Warm,
            round: 0,
            source: source.into(),
            kind: "inline".into(),
            reason: reason.into(),
            count,
            per_iteration: count as f64,
        }
    }

    #[test]
    fn shares_are_of_the_same_source_and_of_something() {
        let rows = [
            row(TRANSLATED_CODE, "direct-branch", 100),
            row(TRANSLATED_CODE, "direct-branch missed", 10),
            row("translator", "direct-branch missed", 50),
            row(TRANSLATED_CODE, "window-access", 30),
            row(TRANSLATED_CODE, "software-access", 6),
            row(TRANSLATED_CODE, "shared-access", 4),
            row(TRANSLATED_CODE, "what comes later", 4),
        ];
        let paths = Paths::of(&rows, "w", "m", Phase::Warm).unwrap();
        assert_eq!(paths.chained(), Some(0.9));
        assert_eq!(paths.indirect_hits(), None);
        assert_eq!(paths.in_window(), Some(0.75));
        assert_eq!(paths.in_software(), Some(0.25));
        assert_eq!(paths.missed(), Some(0.0));
        for (workload, mode, phase) in [
            ("w", "m", Phase::Cold),
            ("w", "x", Phase::Warm),
            ("x", "m", Phase::Warm),
        ] {
            assert_eq!(Paths::of(&rows, workload, mode, phase), None);
        }
    }
}
