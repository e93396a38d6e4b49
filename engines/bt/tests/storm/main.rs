//! Random lives of page tables: remaps, address spaces, large and global pages, changes of rights, code
//! that changes itself and is changed through aliases, all with the invalidations that the
//! architecture asks for and no others; what the guest computes is what a model without any cache
//! computes. vCPUs of one guest have tables of their own, and change each other's code.
//!
//! `TRAPLINE_STORM_SEEDS` guests are run (a few unless told), from seed `TRAPLINE_STORM_FIRST` on.

mod functions;
mod generate;
mod guest;
mod layout;
mod model;
#[path = "../oracle/random.rs"]
#[expect(dead_code, reason = "values are for instructions")]
mod random;
mod step;
mod tables;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use guest::Way;

const STEPS: usize = 2000;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

/// The first step that went wrong.
fn differ(seed: u64, cpus: usize, way: Way) -> Option<String> {
    let plan = generate::plan(seed, cpus, STEPS);
    let all = match guest::run(&plan, way) {
        Ok(all) => all,
        Err(error) => return Some(format!("seed {seed}, {way:?}: {error}")),
    };
    plan.lives
        .iter()
        .zip(all)
        .enumerate()
        .find_map(|(cpu, (life, sums))| {
            let at = (0..life.sums.len()).find(|&at| sums.get(at) != Some(&life.sums[at]))?;
            let first = at.saturating_sub(30);
            Some(format!(
                "seed {seed}, {way:?}, vCPU {cpu}: not what step {} gives: {:#x?}",
                at.wrapping_sub(1),
                &life.steps[first..at]
            ))
        })
}

/// `usual` guests, if nobody asks for more.
fn storm(cpus: usize, usual: u64) {
    let first = number("TRAPLINE_STORM_FIRST", 0);
    let end = first + number("TRAPLINE_STORM_SEEDS", usual);
    let next = AtomicU64::new(first);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..if cpus == 1 { 2 } else { 1 } {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let differences = [Way::Plain, Way::Tight, Way::Window]
                        .into_iter()
                        .filter_map(|way| differ(seed, cpus, way));
                    found.lock().expect("no panic").extend(differences);
                }
            });
        }
    });
    let found = found.into_inner().expect("no panic");
    assert!(
        found.is_empty(),
        "{} of them; the first: {}",
        found.len(),
        found[0]
    );
}

#[test]
fn nothing_outlives_its_mapping() {
    storm(1, 40);
}

#[test]
fn nothing_outlives_its_mapping_on_others() {
    storm(layout::MOST_CPUS, 12);
}

#[test]
fn vcpus_that_are_not_told_of_writes_run_old_code() {
    assert!((0..5).any(|seed| differ(seed, layout::MOST_CPUS, Way::Untold).is_some()));
}
