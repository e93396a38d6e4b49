//! `aspace`: the life of an address space: created with SIZE pages, an application run in it once,
//! destroyed.
//!
//! One iteration takes fresh page tables and SIZE frames, writes [`content`] into each, maps them
//! one after another at the same addresses in every life, enters the application, and gives all of
//! it back. A page left over from an earlier life gives another checksum.

use super::{Micro, PAGE_WORDS};
use crate::{Group, Platform, Refusal, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "aspace",
    group: Group::Micro,
    ring: Ring::Kernel,
    size: 4,
    iterations: 50,
    operation: "address space of SIZE pages created, run in ring 3 once, destroyed",
    program: Program::Micro(Micro::Space),
};

/// Most pages of a space.
pub const MOST: u64 = 64;

/// The first word of a page at the start of a life.
#[inline(always)]
pub fn content(life: u64, page: u64) -> u64 {
    mix(0x6173_7061_6365_0000, life << 16 | page)
}

/// The application: arena is the pages. Reads and changes one word of each.
#[inline(never)]
pub fn visit(arena: &mut [u64], pages: u64, _iterations: u64) -> u64 {
    let mut sum = 0;
    for page in arena.chunks_mut(PAGE_WORDS).take(pages as usize) {
        if let Some(word) = page.first_mut() {
            sum = mix(sum, *word);
            *word = sum;
        }
    }
    sum
}

#[inline(always)]
pub(super) fn lives<P: Platform>(
    platform: &mut P,
    pages: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for life in 0..iterations {
        sum = mix(sum, platform.space(pages, life)?);
    }
    Ok(sum)
}
