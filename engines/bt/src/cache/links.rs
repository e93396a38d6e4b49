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

use super::{Cache, Dropped};
use crate::{
    arena::Arena,
    checks::Levels,
    site::{GUESSES, Gate, Guess, Kind, Site},
};

impl Cache {
    /// Links the direct branch of `site` to `target`, if that is sound. Returns true if it did.
    pub(crate) fn link(&mut self, site: usize, target: u32, arena: &Arena) -> bool {
        let Site {
            block: source,
            kind,
            ..
        } = self.sites[site];
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
        let single = from.key.mode.single || to.key.mode.single;
        let (page, crosses) = (to.key.virt >> 12, to.second().is_some());
        let leaf = to.leaf.as_ref().map(|leaf| leaf.virt >> 12);
        // Who has lost the flags can't go where they are read.
        if lost && to.lazy_entry() != to.entry() {
            return false;
        }
        if !from.alive || !to.alive || single || !to.links() || from.key.mode != to.key.mode {
            return false;
        }
        let same_page = from.second().is_none()
            && from.key.virt >> 12 == to.key.virt >> 12
            && from.key.phys >> 12 == to.key.phys >> 12;
        let entry = if lazy && to.lazy_entry() != to.entry() {
            to.lazy_entry()
        } else if known.cover(to.needs) {
            to.inner_entry()
        } else {
            to.entry()
        };
        point(patch, entry, arena);
        self.blocks[target as usize].incoming.push(site as u32);
        let other = leaf.filter(|&leaf| leaf != page);
        for (page, depends) in [
            (page, !same_page),
            (page + 1, crosses),
            (other.unwrap_or_default(), other.is_some()),
        ] {
            if depends {
                self.across.entry(page).or_default().push(site as u32);
            }
        }
        true
    }

    /// The gate of `site` was reached on the way to block `number`, as guest instruction pointer
    /// `target`: makes the next guess, if the block is one to be linked to, and opens the gate after
    /// the last.
    pub(crate) fn guess(&mut self, site: usize, target: u64, number: u32, arena: &Arena) {
        let Kind::Indirect {
            gate: Some(gate), ..
        } = self.sites[site].kind
        else {
            return;
        };
        let guesses = gate.first as usize..gate.first as usize + GUESSES;
        let empty = |site: &Site| matches!(site.kind, Kind::Guess(Guess { target: None, .. }));
        let Some(index) = guesses.clone().find(|&index| empty(&self.sites[index])) else {
            return;
        };
        if let Kind::Guess(guess) = &mut self.sites[index].kind {
            guess.target = Some(target);
            let guess = *guess;
            if let Ok(constant) = i32::try_from(target as i64) {
                arena.write_code(guess.compared, &constant.to_le_bytes());
                self.link(index, number, arena);
            }
        }
        if !guesses.into_iter().any(|index| empty(&self.sites[index])) {
            arena.write_code(gate.at, &NOP);
        }
    }

    fn unlink(&mut self, site: u32, arena: &Arena) {
        let kind = &mut self.sites[site as usize].kind;
        if let Kind::Direct { patch, stub, .. } = *kind {
            point(patch, stub, arena);
        } else if let Kind::Guess(guess) = kind
            && !self.keep_guesses
        {
            guess.target = None;
            // To what comes next.
            point(guess.patch, guess.patch + 4, arena);
            let gate = guess.gate as usize;
            if let Kind::Indirect {
                gate: Some(Gate { at, stub, .. }),
                ..
            } = self.sites[gate].kind
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
        self.across.clear();
    }

    pub(super) fn unlink_incoming(&mut self, block: u32, arena: &Arena) {
        for site in std::mem::take(&mut self.blocks[block as usize].incoming) {
            self.unlink(site, arena);
        }
    }

    /// Undoes links between pages, to targets that may map elsewhere.
    pub(crate) fn unlink_across(&mut self, dropped: Dropped, arena: &Arena) {
        let mut across = std::mem::take(&mut self.across);
        match dropped {
            // The usual case: one bucket at most.
            Dropped::Span(span) if span.bytes == 4096 => {
                let gone = across.remove(&(span.start >> 12)).unwrap_or_default();
                gone.iter().for_each(|&site| self.unlink(site, arena));
            }
            Dropped::Span(_) | Dropped::User(_) | Dropped::Bank(_) | Dropped::All => {
                across.retain(|&page, sites| {
                    sites.retain(|&site| {
                        let mode = self.blocks[self.sites[site as usize].block as usize]
                            .key
                            .mode;
                        let bank = usize::from(mode.bank);
                        let stays = match dropped {
                            Dropped::Span(span) => !span.contains(page << 12),
                            Dropped::User(dropped) => !mode.user || bank != dropped,
                            Dropped::Bank(dropped) => bank != dropped,
                            Dropped::All => false,
                        };
                        if !stays {
                            self.unlink(site, arena);
                        }
                        stays
                    });
                    !sites.is_empty()
                });
            }
        }
        self.across = across;
    }
}

/// Does nothing, in five bytes.
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];

/// Has the branch whose rel32 is at `patch` lead to `target`.
fn point(patch: u64, target: u64, arena: &Arena) {
    let rel = target.wrapping_sub(patch + 4) as i32;
    arena.write_code(patch, &rel.to_le_bytes());
}
