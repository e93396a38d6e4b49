//! Links between blocks: made, and undone with what they rely on.
//!
//! A link from one block to another is valid as long as the target's guest-virtual address maps to
//! the target's physical one. Within a page that follows from the source's own address. Links
//! across pages are remembered and undone whenever translations are dropped.
//!
//! The guesses of a return ([`Guess`]) are links like those of direct branches, made and
//! undone with them.
//!
//! A block with an instruction that crosses a page depends on two mappings: links to it are undone,
//! and it leaves its jump cache, when either page's is dropped.
//!
//! Invariant: a branch leads to its stub, or a guess to what comes next, or either to a living block of the
//! branch's own mode whose address maps to what it was made from.

use super::{
    Cache, Dropped, Map,
    kept::{Link, NONE, Neighbour, UNLINKED},
};
use crate::{
    arena::Arena,
    checks::Levels,
    site::{GUESSES, Gate, Guess, Kind, Site},
    tlb::jump_index,
};

impl Cache {
    /// Links the direct branch of `site` to `target`, if that is sound. Returns true if it did.
    pub(crate) fn link(&mut self, site: usize, target: u32, arena: &Arena) -> bool {
        let Site {
            block: source,
            kind,
            ..
        } = self.site(site);
        let (patch, lazy, known, lost) = if let Kind::Direct {
            patch, lazy, known, ..
        } = kind
        {
            (patch, lazy, known, false)
        } else if let Kind::Guess(Guess { patch, lazy, .. }) = kind {
            (patch, lazy, Levels::default(), !lazy)
        } else {
            return false;
        };
        let from = &self.blocks[source as usize];
        let to = &self.blocks[target as usize];
        // Who has lost the flags can't go where they are read.
        if lost && to.lazy_entry() != to.entry() {
            return false;
        }
        let single = from.single || to.single;
        if !from.alive || !to.alive || single || !to.links() || from.mode != to.mode {
            return false;
        }
        let page = to.virt >> 12;
        let crosses = to.second().is_some();
        let leaf = self.leaf(target).map(|leaf| leaf.virt >> 12);
        let same_page =
            from.second().is_none() && from.virt >> 12 == page && from.phys >> 12 == to.phys >> 12;
        let entry = if lazy && to.lazy_entry() != to.entry() {
            to.lazy_entry()
        } else if known.cover(to.needs) {
            to.inner_entry()
        } else {
            to.entry()
        };
        let to_mode = to.mode;
        point(patch, entry, arena);
        self.enter_link(site as u32, target);
        let other = leaf.filter(|&leaf| leaf != page);
        let across = &mut self.across[self.modes.mode(to_mode).jumps()];
        for (page, depends) in [
            (page, !same_page),
            (page + 1, crosses),
            (other.unwrap_or_default(), other.is_some()),
        ] {
            if depends {
                remember(across.entry(page).or_default(), site as u32);
            }
        }
        true
    }

    /// Puts `site` before the others that lead to block `target`.
    fn enter_link(&mut self, site: u32, target: u32) {
        self.leave_link(site);
        let first = std::mem::replace(&mut self.blocks[target as usize].incoming, site);
        if let Some(link) = self.link_of(first) {
            link.previous = Neighbour::site(site);
        }
        if let Some(link) = self.link_of(site) {
            *link = Link {
                previous: Neighbour::block(target),
                next: first,
            };
        }
    }

    /// Takes `site` from those that lead where it does.
    fn leave_link(&mut self, site: u32) {
        let Some(link) = self.link_of(site) else {
            return;
        };
        let Link { previous, next } = std::mem::replace(link, UNLINKED);
        if let Some(block) = previous.as_block() {
            self.blocks[block as usize].incoming = next;
        } else if let Some(link) = previous.as_site().and_then(|site| self.link_of(site)) {
            link.next = next;
        }
        if let Some(link) = self.link_of(next) {
            link.previous = previous;
        }
    }

    fn link_of(&mut self, site: u32) -> Option<&mut Link> {
        self.sites.get_mut(site as usize)?.link()
    }

    /// The gate of `site` was reached on the way to block `number`, as guest instruction pointer
    /// `target`: makes the next guess, if the block is one to be linked to, and opens the gate after
    /// the last.
    pub(crate) fn guess(&mut self, site: usize, target: u64, number: u32, arena: &Arena) {
        let Kind::Indirect {
            gate: Some(gate), ..
        } = self.site(site).kind
        else {
            return;
        };
        let mut open = gate.first as usize..gate.first as usize + GUESSES;
        let Some(index) = open.find(|&index| self.sites[index].made() == Some(&mut false)) else {
            return;
        };
        if let Some(made) = self.sites[index].made() {
            *made = true;
        }
        if let (Kind::Guess(guess), Ok(constant)) =
            (self.site(index).kind, i32::try_from(target as i64))
        {
            arena.write_code(guess.compared, &constant.to_le_bytes());
            self.link(index, number, arena);
        }
        // They are made in order, but not unmade.
        if !open.any(|index| self.sites[index].made() == Some(&mut false)) {
            arena.write_code(gate.at, &NOP);
        }
    }

    fn unlink(&mut self, site: u32, arena: &Arena) {
        self.leave_link(site);
        let kind = self.site(site as usize).kind;
        if let Kind::Direct { patch, stub, .. } = kind {
            point(patch, stub, arena);
        } else if let Kind::Guess(guess) = kind
            && !self.keep_guesses
        {
            if let Some(made) = self.sites[site as usize].made() {
                *made = false;
            }
            // To what comes next.
            point(guess.patch, guess.patch + 4, arena);
            let gate = guess.gate as usize;
            if let Kind::Indirect {
                gate: Some(Gate { at, stub, .. }),
                ..
            } = self.site(gate).kind
            {
                arena.write_code(at, &[0xe9]);
                point(at + 1, stub, arena);
            }
        }
    }

    /// Undoes every link.
    pub(crate) fn unlink_all(&mut self, arena: &Arena) {
        for block in 0..self.blocks.len() {
            self.unlink_incoming(block as u32, arena);
        }
        self.across.iter_mut().for_each(Map::clear);
    }

    pub(super) fn unlink_incoming(&mut self, block: u32, arena: &Arena) {
        loop {
            let first = self.blocks[block as usize].incoming;
            if first == NONE {
                return;
            }
            self.unlink(first, arena);
        }
    }

    /// Undoes links between pages, to targets that may map elsewhere.
    pub(crate) fn unlink_across(&mut self, dropped: Dropped, arena: &Arena) {
        let lists = match dropped {
            Dropped::Span(_) | Dropped::All => 0..self.across.len(),
            Dropped::User(bank) => jump_index(bank, true)..jump_index(bank, true) + 1,
            Dropped::Bank(bank) => jump_index(bank, false)..jump_index(bank, true) + 1,
        };
        for list in lists {
            let mut across = std::mem::take(&mut self.across[list]);
            match dropped {
                // The usual case: one bucket at most.
                Dropped::Span(span) if span.bytes == 4096 => {
                    let gone = across.remove(&(span.start >> 12)).unwrap_or_default();
                    gone.iter().for_each(|&site| self.unlink(site, arena));
                }
                Dropped::Span(span) => across.retain(|&page, sites| {
                    let stays = !span.contains(page << 12);
                    if !stays {
                        sites.iter().for_each(|&site| self.unlink(site, arena));
                    }
                    stays
                }),
                Dropped::User(_) | Dropped::Bank(_) | Dropped::All => {
                    let gone = across.drain().flat_map(|(_, sites)| sites);
                    gone.for_each(|site| self.unlink(site, arena));
                }
            }
            self.across[list] = across;
        }
    }
}

/// Adds a site to those of a page. A site that depends on two pages stays with one of them when the other is
/// dropped, and comes again when it is linked anew: what is there twice goes before there is more room.
fn remember(sites: &mut Vec<u32>, site: u32) {
    if sites.len() == sites.capacity() {
        sites.sort_unstable();
        sites.dedup();
        if sites.len() > sites.capacity() / 2 {
            sites.reserve(sites.len().max(4));
        }
    }
    sites.push(site);
}

/// Does nothing, in five bytes.
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// Has the branch whose rel32 is at `patch` lead to `target`.
fn point(patch: u64, target: u64, arena: &Arena) {
    let rel = target.wrapping_sub(patch + 4) as i32;
    arena.write_code(patch, &rel.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_that_are_linked_again_and_again_need_no_more_room() {
        let mut sites = Vec::new();
        for round in 0..100_000 {
            remember(&mut sites, round % 7);
        }
        assert!(sites.capacity() <= 32, "{}", sites.capacity());
        assert!((0..7).all(|site| sites.contains(&site)));
        // Others get theirs.
        (0..1000).for_each(|site| remember(&mut sites, site));
        assert!((0..1000).all(|site| sites.contains(&site)));
    }
}
