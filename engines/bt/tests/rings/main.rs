//! Random code of the system level against Bochs: segments, gates, tasks, rings, virtual-8086 mode,
//! compatibility mode, limits.
//!
//! One image with many cases runs here and there. A case is a world of its own (descriptor tables,
//! tasks, stacks, all partly at random) and one or two instructions in it; what any handler then finds,
//! registers and changed memory, goes to port E9. QEMU is no reference for this: it checks no limits, and
//! sets neither RF in frames nor accessed bits where processors do.
//!
//! `TRAPLINE_RINGS_CASES` cases of each kind are run, from seed `TRAPLINE_RINGS_FIRST` on. Where Bochs
//! isn't installed, or doesn't run, nothing is.
//!
//! | module | what |
//! |---|---|
//! | `layout` | where everything lies |
//! | `executive`, `capture` | the code around the cases |
//! | `sandbox`, `case` | what cases start from, and one of them |
//! | `generate`, `long` | worlds at random |
//! | `instructions`, `accesses` | code at random |
//! | `machine` | the ways to run an image |
//! | `compare` | what counts as the same |

mod accesses;
mod capture;
mod case;
mod compare;
mod executive;
mod generate;
mod instructions;
mod layout;
mod long;
mod machine;
#[path = "../oracle/random.rs"]
#[expect(dead_code, reason = "more than cases need")]
mod random;
mod sandbox;

use case::Case;
use compare::{same, show};
use generate::Maker;
use machine::{Ending, bochs, here};

/// Cases of one image; more would not fit into the firmware that Bochs takes.
const IMAGE_CASES: usize = 500;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().expect("a number"))
}

fn compare(make: fn(u64) -> Maker) {
    let first = number("TRAPLINE_RINGS_FIRST", 0);
    let count = number("TRAPLINE_RINGS_CASES", 300);
    let makers: Vec<Maker> = (first..first + count).map(make).collect();
    let mut found = Vec::new();
    let (mut handlers, mut hangs) = (0, 0);
    for (part, makers) in makers.chunks(IMAGE_CASES).enumerate() {
        let cases: Vec<Case> = makers.iter().map(|maker| maker.case.clone()).collect();
        let Some(there) = bochs(&cases) else {
            eprintln!("skipped: Bochs isn't installed, or doesn't run");
            return;
        };
        for (number, (ours, theirs)) in here(&cases).iter().zip(&there).enumerate() {
            handlers += u64::from(matches!(theirs, Ending::Handler { .. }));
            hangs += u64::from(*theirs == Ending::Hang);
            if same(ours, theirs) {
                continue;
            }
            // By itself: wild writes of one case may be in the way of the next.
            let alone = std::slice::from_ref(&cases[number]);
            let theirs = bochs(alone).expect("it has just been there");
            let ours = here(alone);
            if !same(&ours[0], &theirs[0]) {
                let seed = first + (part * IMAGE_CASES + number) as u64;
                let what = show(&makers[number], &ours[0], &theirs[0]);
                found.push(format!("seed {seed}: {what}"));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} differ:\n{}",
        found.len(),
        found.join("\n")
    );
    // What doesn't end under Bochs passes, so there must be next to none of that.
    assert!(hangs <= count / 100, "{hangs} of {count} hang under Bochs");
    assert!(
        handlers >= count * 9 / 10,
        "{handlers} of {count} end in a handler"
    );
}

#[test]
fn legacy_system_code_does_what_it_does_under_bochs() {
    compare(Maker::narrow);
}

#[test]
fn system_code_of_ia_32e_mode_does_what_it_does_under_bochs() {
    compare(Maker::wide);
}
