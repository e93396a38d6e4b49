//! Hostile guests: random programs against every device, as many as `TRAPLINE_FUZZ_CASES` says.
//!
//! A case is a list of operations (register accesses, memory the device will look at, events from
//! the host) that is generated from a seed, or kept as bytes in `tests/corpus`. Half of the choices
//! follow what a driver would do, so that cases come far, the other half is noise. What must hold:
//! no panic, a bounded amount of work, no byte changed outside of guest memory (the memory ends at a
//! guard), backends are asked only for what they promise to do, and the device serves an honest
//! driver after a reset.
//!
//! A case that fails prints its bytes; they go to the corpus under a name that says what it was.

use std::collections::HashSet;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::{fuzz_pc, fuzz_virtio};

/// Cases of each device where the environment asks for no other number.
const CASES: u64 = 4_000;
/// Bytes of a generated case.
const LENGTH: usize = 512;

/// The choices of a case, taken from its bytes; zeros when they have run out.
pub(crate) struct Choices<'a> {
    bytes: &'a [u8],
}

impl<'a> Choices<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Choices { bytes }
    }

    pub(crate) fn done(&self) -> bool {
        self.bytes.is_empty()
    }

    /// No more choices.
    pub(crate) fn end(&mut self) {
        self.bytes = &[];
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        first
    }

    pub(crate) fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(crate) fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    /// One of `range`.
    pub(crate) fn below(&mut self, range: u32) -> u32 {
        u32::from(self.half()) % range
    }

    pub(crate) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }
}

/// A fuzzed device, and what plays a case on it and names the state that it led to.
pub(crate) type Target = (&'static str, fn(&mut Choices<'_>) -> String);

const TARGETS: &[Target] = &[
    ("virtio-blk", fuzz_virtio::block),
    ("virtio-net", fuzz_virtio::net),
    ("virtio-console", fuzz_virtio::console),
    ("ata", fuzz_pc::ata),
    ("ne2000", fuzz_pc::ne2000),
];

/// xorshift64*: small, seeded, and good enough to choose by.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn case(seed: u64) -> Vec<u8> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let length = random.next() as usize % LENGTH + 1;
        let mut bytes: Vec<u8> = (0..length.div_ceil(8))
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        bytes.truncate(length);
        bytes
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn play(target: &Target, origin: &str, bytes: &[u8]) -> String {
    let played = catch_unwind(AssertUnwindSafe(|| (target.1)(&mut Choices::new(bytes))));
    played.unwrap_or_else(|cause| {
        eprintln!("{}: case {origin}: {}", target.0, hexadecimal(bytes));
        std::panic::resume_unwind(cause);
    })
}

fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}

/// Plays generated cases, which must lead to at least `least` different states: cases that all end
/// the same way would show nothing. `TRAPLINE_FUZZ_KEEP` names a directory for the first case that
/// led to each.
fn generated(name: &str, least: usize) {
    let target = TARGETS.iter().find(|target| target.0 == name).unwrap();
    let cases = number("TRAPLINE_FUZZ_CASES").unwrap_or(CASES);
    let first = number("TRAPLINE_FUZZ_SEED").unwrap_or(0);
    let keep = std::env::var_os("TRAPLINE_FUZZ_KEEP");
    let mut seen = HashSet::new();
    for seed in first..first + cases {
        let bytes = Random::case(seed);
        let state = play(target, &format!("seed {seed}"), &bytes);
        if !seen.contains(&state) {
            if let Some(directory) = &keep {
                let file = Path::new(directory).join(format!("{name}-{state}.hex"));
                std::fs::write(file, hexadecimal(&bytes)).unwrap();
            }
            seen.insert(state);
        }
    }
    assert!(cases < CASES || seen.len() >= least, "{seen:?}");
}

#[test]
fn hostile_drivers_of_virtio_blk() {
    generated("virtio-blk", 7);
}

#[test]
fn hostile_drivers_of_virtio_net() {
    generated("virtio-net", 6);
}

#[test]
fn hostile_drivers_of_virtio_console() {
    generated("virtio-console", 6);
}

#[test]
fn hostile_drivers_of_ata() {
    generated("ata", 5);
}

#[test]
fn hostile_drivers_of_ne2000() {
    generated("ne2000", 5);
}

/// Files `DEVICE-WHAT.hex`: cases that once failed, or that reach what generated ones seldom do.
#[test]
fn the_corpus_stays_harmless() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let target = TARGETS
            .iter()
            .find(|target| name.starts_with(target.0))
            .unwrap_or_else(|| panic!("{name}: no such device"));
        let text = std::fs::read_to_string(&path).unwrap();
        let bytes: Vec<u8> = text
            .trim()
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        play(target, &name, &bytes);
        count += 1;
    }
    assert!(
        count >= 4 * TARGETS.len(),
        "each device has cases of its own"
    );
}
