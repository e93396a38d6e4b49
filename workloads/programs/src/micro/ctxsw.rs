//! `ctxsw2`, `ctxsw8`: a switch to the next of 2 or 8 address spaces, with an application in each.
//!
//! One iteration: the kernel switches to the next space and enters its application; that reads a
//! word of its own page, which lies at the same address in every space, changes it, and comes back.
//! A space that saw another's page, or a page whose change was lost, gives another checksum.

use super::Micro;
use crate::{Group, Platform, Refusal, Ring, Workload, mix, workload::Program};

pub(crate) const TWO: Workload = Workload {
    name: "ctxsw2",
    group: Group::Micro,
    ring: Ring::Kernel,
    size: 1,
    iterations: 1000,
    operation: "switch to the next of 2 address spaces, one page touched in ring 3, and back",
    program: Program::Micro(Micro::Switch { spaces: 2 }),
};

pub(crate) const EIGHT: Workload = Workload {
    name: "ctxsw8",
    group: Group::Micro,
    ring: Ring::Kernel,
    size: 1,
    iterations: 1000,
    operation: "switch to the next of 8 address spaces, one page touched in ring 3, and back",
    program: Program::Micro(Micro::Switch { spaces: 8 }),
};

/// Most address spaces that a platform is asked for.
pub const MOST: usize = 8;

/// The first word of a space's own page before its application first runs.
#[inline(always)]
pub fn seed(space: u64) -> u64 {
    mix(0x6374_7873_7700_0000, space)
}

/// What [`step`] makes of a word.
#[inline(always)]
pub fn after(word: u64) -> u64 {
    mix(word, 1)
}

/// The application of each space: arena is its own page.
#[inline(never)]
pub fn step(arena: &mut [u64], _size: u64, _iterations: u64) -> u64 {
    let Some(word) = arena.first_mut() else {
        return 0;
    };
    *word = after(*word);
    *word
}

#[inline(always)]
pub(super) fn switches<P: Platform>(
    platform: &mut P,
    spaces: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let (mut sum, mut next) = (0, 0);
    for _ in 0..iterations {
        sum = mix(sum, platform.switch(next)?);
        next += 1;
        if next == spaces {
            next = 0;
        }
    }
    Ok(sum)
}
