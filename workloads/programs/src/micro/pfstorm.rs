//! `pfstorm`: an application touches SIZE fresh pages, each of which faults in once.
//!
//! One iteration: the application reads one word of each page, in an order that is not the
//! addresses'; the kernel's handler maps the next frame at each fault, so that which frame a page
//! got tells the order of the faults. The application writes to each page, reads everything back,
//! and the kernel unmaps all of them again. A page's cost is the iteration's divided by SIZE.

use super::{Micro, PAGE_WORDS};
use crate::{Group, Platform, Refusal, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "pfstorm",
    group: Group::Micro,
    ring: Ring::User,
    size: 64,
    iterations: 50,
    operation: "SIZE fresh pages touched in ring 3, a fault each; read back; unmapped",
    program: Program::Micro(Micro::Storm),
};

/// Most pages of a storm.
pub const MOST: u64 = 256;

/// The first word of the frame that the storm's fault number `fault`, from 0, is answered with.
#[inline(always)]
pub fn tag(fault: u64) -> u64 {
    mix(0x7066_7374_6f72_6d00, fault)
}

/// The page that is touched as number `touch` of `pages`: a different order in each round.
#[inline(always)]
pub fn order(touch: u64, pages: u64, round: u64) -> u64 {
    // An odd step below a power of two visits all; what is beyond the pages is skipped below.
    let span = pages.next_power_of_two();
    (touch
        .wrapping_mul(2 * (round & 31) + 11)
        .wrapping_add(round))
        & (span - 1)
}

/// The application: arena is the pages. Returns the checksum of the round.
#[inline(never)]
pub fn storm(arena: &mut [u64], pages: u64, round: u64) -> u64 {
    let mut sum = 0;
    for touch in 0..pages.next_power_of_two() {
        let page = order(touch, pages, round);
        if page >= pages {
            continue;
        }
        let Some([tag, own, ..]) = arena.get_mut(page as usize * PAGE_WORDS..) else {
            return 0;
        };
        // SAFETY: a reference is readable and writable. Volatile, so that the touches keep the
        // order in which they stand here.
        unsafe {
            let read = (&raw const *tag).read_volatile();
            (&raw mut *own).write_volatile(read ^ page);
        }
    }
    for page in arena.chunks(PAGE_WORDS).take(pages as usize) {
        if let [tag, own, ..] = page {
            sum = mix(mix(sum, *tag), *own);
        }
    }
    sum
}

#[inline(always)]
pub(super) fn storms<P: Platform>(
    platform: &mut P,
    pages: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let mut sum = 0;
    for round in 0..iterations {
        sum = mix(sum, platform.storm(pages, round)?);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_touches_every_page_once() {
        for pages in [1, 2, 3, 7, 64, 100, MOST] {
            for round in 0..40 {
                let mut touched: alloc::vec::Vec<u64> = (0..pages.next_power_of_two())
                    .map(|touch| order(touch, pages, round))
                    .filter(|&page| page < pages)
                    .collect();
                touched.sort_unstable();
                assert!(touched.into_iter().eq(0..pages), "{pages} {round}");
            }
        }
    }
}
