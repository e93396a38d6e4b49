//! Bodies of bounced writes: copies that come back to the runtime when they are done.
//!
//! The body of an access runs where it is when all that it writes is where it belongs. One that has written
//! to a buffer, or over code, has the runtime look at that before anything else happens, so a copy of it runs
//! that ends with an exit. Hardly any access is ever in need of one: it is made then, in a slot that serves
//! the sites of its number one after the other.
//!
//! Invariant: a slot that names a site holds that site's body, whole, and its exit.

use super::Cache;
use crate::{
    arena::Arena,
    lower::LEAVING,
    site::{Slow, number},
};

/// Bytes of a slot.
const SLOT: u64 = 128;
/// Longest body of a write.
pub(crate) const BODY: usize = SLOT as usize - LEAVING;

/// What a slot is to a site.
pub(crate) enum Slot {
    /// Its body is here.
    Made(u64),
    /// Another's, which may have been run.
    Taken,
    Free,
}

pub(super) struct Bounces {
    /// Host address of the first slot.
    start: u64,
    /// One more than the site whose body a slot holds, or 0.
    sites: Vec<u32>,
}

impl Bounces {
    /// Slots from `start` on, for a code cache of so many bytes.
    pub(super) fn new(start: u64, bytes: usize) -> Bounces {
        Bounces {
            start,
            sites: vec![0; (bytes >> 19).clamp(8, 128)],
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.start + SLOT * self.sites.len() as u64
    }

    pub(super) fn clear(&mut self) {
        self.sites.fill(0);
    }

    fn slot(&self, site: usize) -> usize {
        site % self.sites.len()
    }

    fn address(&self, slot: usize) -> u64 {
        self.start + SLOT * slot as u64
    }

    /// The site whose body `rip` is in, and how far.
    pub(super) fn inside(&self, rip: u64) -> Option<(usize, u64)> {
        if !(self.start..self.end()).contains(&rip) {
            return None;
        }
        let offset = rip - self.start;
        let site = self.sites[(offset / SLOT) as usize].checked_sub(1)?;
        Some((site as usize, offset % SLOT))
    }
}

impl Cache {
    /// What there is of the body of `site`.
    pub(crate) fn bounced(&self, site: usize) -> Slot {
        let slot = self.bounces.slot(site);
        match self.bounces.sites[slot] {
            0 => Slot::Free,
            holds if holds as usize == site + 1 => Slot::Made(self.bounces.address(slot)),
            _ => Slot::Taken,
        }
    }

    /// Makes the body of `site`, which is `slow`. Answers where it is.
    pub(crate) fn bounce(&mut self, site: usize, slow: &Slow, arena: &Arena) -> u64 {
        let slot = self.bounces.slot(site);
        let at = self.bounces.address(slot);
        let length = (slow.resume.address() - slow.body.address()) as usize;
        let mut code = [0; SLOT as usize];
        let (body, rest) = code.split_at_mut(length);
        arena.read_code(slow.body.address(), body);
        let leaving = self.layout.leaving(number(site, 1), at + length as u64);
        rest[..LEAVING].copy_from_slice(&leaving);
        arena.write_code(at, &code[..length + LEAVING]);
        self.bounces.sites[slot] = site as u32 + 1;
        at
    }

    /// Where the code at `rip` is in its block, if it is the body of a bounced write.
    pub(super) fn in_line(&self, rip: u64) -> Option<u64> {
        let (site, offset) = self.bounces.inside(rip)?;
        let site = self.sites.get(site)?;
        let body = u64::from(site.body()?);
        Some(self.block(site.block).code() + body + offset)
    }
}
