//! How many iterations fill a window.
//!
//! Pure arithmetic on windows that somebody else measured. Invariant: an answer lies between 1
//! and [`MAX_ITERATIONS`] and has at most two significant digits, so that rows can be read and
//! repeated by hand.

use std::time::Duration;

/// Most iterations of one window: a bound for the oracle, which runs them all over again.
pub const MAX_ITERATIONS: u64 = 1_000_000_000;

/// Most intermediate runs of one calibration.
pub const MAX_TRIES: u32 = 5;

/// What to do after a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The run was too short to judge by: try this many iterations.
    Try(u64),
    /// This many iterations fill the window.
    Use(u64),
}

/// How many iterations to try after the first run, whose window says little: it holds translation
/// and first touch, so that even one that filled the target may be short when warm.
pub fn first_try(iterations: u64, window: Duration, target: Duration) -> u64 {
    match step(iterations, window, target) {
        Step::Try(next) | Step::Use(next) => next,
    }
}

/// Judges a run of `iterations` that took `window` (already without the empty window) against a
/// `target` window.
pub fn step(iterations: u64, window: Duration, target: Duration) -> Step {
    let measured = window.as_secs_f64().max(1e-9);
    let ratio = target.as_secs_f64() / measured;
    if ratio <= 4.0 || iterations >= MAX_ITERATIONS {
        return Step::Use(scale(iterations, ratio));
    }
    // Half of the target, in case that the short run was slower than the steady state; not more
    // than a hundredfold, in case that it was far slower (a first run translates, faults, ...).
    Step::Try(scale(iterations, (ratio / 2.0).min(100.0)))
}

fn scale(iterations: u64, ratio: f64) -> u64 {
    let exact = (iterations as f64 * ratio) as u64;
    two_digits(exact.clamp(1, MAX_ITERATIONS))
}

fn two_digits(value: u64) -> u64 {
    let mut unit = 1;
    while value / unit >= 100 {
        unit *= 10;
    }
    value / unit * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Duration = Duration::from_millis(30);

    /// Iterations that calibration settles on for an operation of `ns` whose first run costs
    /// `first_ns` on top.
    fn check(start: u64, ns: f64, first_ns: f64) -> u64 {
        let window = |n: u64| Duration::from_nanos((n as f64 * ns) as u64);
        let first = window(start) + Duration::from_nanos(first_ns as u64);
        let mut next = Step::Try(first_try(start, first, TARGET));
        for _ in 0..MAX_TRIES {
            match next {
                Step::Use(n) => return n,
                Step::Try(n) => next = step(n, window(n), TARGET),
            }
        }
        panic!("no end after {MAX_TRIES} tries");
    }

    #[test]
    fn settles_near_the_target_whatever_the_first_run_cost() {
        for (ns, first_ns) in [(1.0, 0.0), (2.5, 5e6), (66.0, 1e5), (25_000.0, 2e7)] {
            let n = check(100, ns, first_ns);
            let filled = n as f64 * ns / TARGET.as_nanos() as f64;
            assert!((0.2..=1.1).contains(&filled), "{ns} ns: {n} iterations");
        }
    }

    #[test]
    fn slow_operations_run_once_and_free_ones_end() {
        assert_eq!(step(1, Duration::from_secs(2), TARGET), Step::Use(1));
        assert_eq!(
            step(MAX_ITERATIONS, Duration::ZERO, TARGET),
            Step::Use(MAX_ITERATIONS)
        );
    }

    #[test]
    fn answers_are_round() {
        assert_eq!(two_digits(7), 7);
        assert_eq!(two_digits(1299), 1200);
        assert_eq!(two_digits(99_999), 99_000);
    }
}
