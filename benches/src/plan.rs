//! What a run does, in which order, and when it must stop.
//!
//! Pure: no process is started here and no clock is read but by [`Budget`]. Invariant: the same
//! seed gives the same order, and over the rounds every contender takes every place in a turn.

use std::time::{Duration, Instant};

/// How long and how often is measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Rounds; each boots every contender afresh.
    pub rounds: u32,
    /// Rounds that a budget may not take away.
    pub min_rounds: u32,
    /// Warm windows of one contender and workload in one round.
    pub windows: u32,
    /// Windows of the `empty` workload of one contender in one round.
    pub empty_windows: u32,
    /// How long a warm window should be.
    pub target: Duration,
    /// The same for a workload that uses devices, whose requests are verified after the window: that
    /// takes as long as the window.
    pub device_target: Duration,
    /// Limit of one `run` command.
    pub command_limit: Duration,
    /// Limit from spawning a virtual machine to its greeting.
    pub boot_limit: Duration,
    /// Limit of the whole run.
    pub budget: Option<Duration>,
    /// Seed of the orders.
    pub seed: u64,
}

impl Plan {
    /// Under two minutes for four contenders and twenty workloads, the report included.
    pub fn quick() -> Plan {
        Plan {
            rounds: 5,
            min_rounds: 3,
            windows: 3,
            empty_windows: 9,
            target: Duration::from_millis(30),
            device_target: Duration::from_millis(20),
            command_limit: Duration::from_secs(4),
            boot_limit: Duration::from_secs(15),
            budget: Some(Duration::from_secs(105)),
            seed: 1,
        }
    }

    /// Long windows and more rounds, for figures that are to be quoted.
    pub fn thorough() -> Plan {
        Plan {
            rounds: 10,
            target: Duration::from_millis(200),
            device_target: Duration::from_millis(200),
            command_limit: Duration::from_secs(30),
            boot_limit: Duration::from_secs(30),
            budget: None,
            ..Plan::quick()
        }
    }

    /// The order of `count` workloads in a round: a permutation that changes from round to round,
    /// so that slow drift of the host meets all alike.
    pub fn workload_order(&self, round: u32, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        let mut random = SplitMix(self.seed.wrapping_mul(0x1_0001).wrapping_add(round.into()));
        for last in (1..count).rev() {
            // The bias of the remainder is below 2^-50 for any catalogue.
            order.swap(last, (random.next() % (last as u64 + 1)) as usize);
        }
        order
    }

    /// The order in which `count` contenders take their turn at one workload: rotated by one from
    /// round to round and from workload to workload.
    pub fn turn_order(&self, round: u32, workload: usize, count: usize) -> Vec<usize> {
        let start = (self.seed as usize)
            .wrapping_add(round as usize)
            .wrapping_add(workload);
        (0..count)
            .map(|place| (start % count + place) % count)
            .collect()
    }
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The time that is left for a whole run.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    deadline: Option<Instant>,
}

impl Budget {
    /// Starts the clock.
    pub fn start(limit: Option<Duration>) -> Budget {
        Budget {
            deadline: limit.map(|limit| Instant::now() + limit),
        }
    }

    /// Whether something that takes `needed` still fits in.
    pub fn fits(&self, needed: Duration) -> bool {
        self.deadline
            .is_none_or(|deadline| Instant::now() + needed < deadline)
    }

    /// `limit`, or what is left if that is less.
    pub fn clip(&self, limit: Duration) -> Duration {
        self.deadline.map_or(limit, |deadline| {
            limit.min(deadline.saturating_duration_since(Instant::now()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_takes_every_place() {
        let plan = Plan::quick();
        let contenders = 4;
        for place in 0..contenders {
            let mut seen: Vec<usize> = (0..contenders as u32)
                .map(|round| plan.turn_order(round, 3, contenders)[place])
                .collect();
            seen.sort_unstable();
            assert_eq!(seen, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn workload_orders_are_permutations_that_differ_and_repeat() {
        let plan = Plan::quick();
        let orders: Vec<_> = (0..3).map(|round| plan.workload_order(round, 20)).collect();
        for order in &orders {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..20).collect::<Vec<_>>());
        }
        assert_ne!(orders[0], orders[1]);
        assert_ne!(orders[1], orders[2]);
        assert_eq!(orders[0], Plan::quick().workload_order(0, 20));
    }

    #[test]
    fn a_budget_clips_limits_and_none_does_not() {
        let spent = Budget::start(Some(Duration::ZERO));
        assert!(!spent.fits(Duration::ZERO));
        assert_eq!(spent.clip(Duration::from_secs(1)), Duration::ZERO);
        let none = Budget::start(None);
        assert!(none.fits(Duration::from_secs(1 << 30)));
        assert_eq!(none.clip(Duration::from_secs(1)), Duration::from_secs(1));
    }
}
