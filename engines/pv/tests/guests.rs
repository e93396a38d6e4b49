//! Guests that do what a guest does, and one body that runs them.

use std::time::Duration;

use engine_core::{Limits, Outcome};
use pv::{Guest, Options};

const GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

fn run(scenario: &str) -> (Outcome, String) {
    let mut guest = Guest::start(GUEST, 32, scenario, Options::default()).unwrap();
    let limits = Limits {
        timeout: Some(Duration::from_secs(10)),
        max_exits: None,
    };
    let outcome = guest.run(&limits);
    (
        outcome,
        String::from_utf8_lossy(guest.console()).into_owned(),
    )
}

#[test]
fn a_kernel_prints_and_shuts_down() {
    let (outcome, console) = run("hello");
    assert!(matches!(outcome, Outcome::Success), "{outcome:?} {console}");
    assert_eq!(console, "hello\n");
}
