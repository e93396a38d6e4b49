//! How many times as fast one mode is as another at one workload, and whether that is decided.
//!
//! Invariant: a factor comes from two rows of one run that are both `ok`; it is decided only if its
//! whole interval lies on one side of 1.

use crate::statistics::{keyed, median, ratio_interval};
use crate::{Metric, Phase, Sample, Summary};

/// One mode against another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Advantage {
    /// Median of the other's values over the mode's own: above 1 the mode is faster.
    pub factor: f64,
    /// 95 % bootstrap interval; `None` where one of the two has fewer than two samples.
    pub interval: Option<(f64, f64)>,
}

/// What an advantage comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The mode is faster.
    Ahead,
    /// The mode is slower.
    Behind,
    /// The interval holds 1, or there is none.
    Undecided,
}

impl Advantage {
    /// Holds warm values of `metric` at `workload` in `mode` against those in `other`: `None` unless
    /// both rows are `ok` and positive.
    pub fn of(
        samples: &[Sample],
        summary: &Summary,
        seed: u64,
        (workload, metric): (&str, &Metric),
        (mode, other): (&str, &str),
    ) -> Option<Advantage> {
        let values = |mode: &str| -> Option<Vec<f64>> {
            let row = summary.find(workload, mode, Phase::Warm, &metric.name)?;
            row.value
                .filter(|&value| row.status.is_ok() && value > 0.0)?;
            let here = samples.iter().filter(|sample| {
                sample.workload == workload
                    && sample.mode == mode
                    && sample.phase == Phase::Warm
                    && sample.metric.name == metric.name
            });
            Some(here.filter_map(|sample| sample.value).collect())
        };
        let (own, theirs) = (values(mode)?, values(other)?);
        let factor = median(&theirs)? / median(&own)?;
        let mut rng = keyed(seed, &[workload, mode, other, &metric.name]);
        factor.is_finite().then(|| Advantage {
            factor,
            interval: ratio_interval(&theirs, &own, &mut rng),
        })
    }

    /// Which side of 1 the interval lies on.
    pub fn decision(self) -> Decision {
        match self.interval {
            Some((low, _)) if low > 1.0 => Decision::Ahead,
            Some((_, high)) if high < 1.0 => Decision::Behind,
            Some(_) | None => Decision::Undecided,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Status, summarise};

    fn samples(mode: &str, values: &[f64]) -> Vec<Sample> {
        let rows = values.iter().zip(0..).map(|(&value, round)| Sample {
            run: "run".to_owned(),
            workload: "blk".to_owned(),
            mode: mode.to_owned(),
            engine: "e".to_owned(),
            flavour: "f".to_owned(),
            phase: Phase::Warm,
            metric: Metric::TIME,
            round,
            order: round,
            value: Some(value),
            checksum: None,
            status: Status::Ok,
            reason: String::new(),
        });
        rows.collect()
    }

    fn check(own: &[f64], theirs: &[f64]) -> Option<(f64, Decision)> {
        let mut all = samples("own", own);
        all.extend(samples("theirs", theirs));
        let summary = summarise(&all, 1);
        let blk = ("blk", &Metric::TIME);
        let advantage = Advantage::of(&all, &summary, 1, blk, ("own", "theirs"))?;
        Some((advantage.factor, advantage.decision()))
    }

    #[test]
    fn a_factor_is_decided_when_its_interval_leaves_out_1() {
        let near = [9.0, 10.0, 11.0, 10.0, 9.5];
        let far = [49.0, 50.0, 51.0, 50.0, 52.0];
        assert_eq!(check(&near, &far), Some((5.0, Decision::Ahead)));
        assert_eq!(check(&far, &near), Some((0.2, Decision::Behind)));
        assert_eq!(check(&near, &near), Some((1.0, Decision::Undecided)));
        assert_eq!(check(&[10.0], &[50.0]), Some((5.0, Decision::Undecided)));
        assert_eq!(check(&near, &[]), None);
    }

    #[test]
    fn a_row_that_is_not_ok_has_no_advantage() {
        let mut all = samples("own", &[1.0, 1.0]);
        all.extend(samples("theirs", &[2.0, 2.0]));
        all[3].status = Status::Failed;
        all[3].value = None;
        all[3].reason = "because".to_owned();
        let summary = summarise(&all, 1);
        let blk = ("blk", &Metric::TIME);
        let advantage = Advantage::of(&all, &summary, 1, blk, ("own", "theirs"));
        assert_eq!(advantage, None);
    }
}
