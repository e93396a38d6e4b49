//! The branches that are linked to one block: a list through the sites of these branches.
//!
//! Invariant: a site is in the list of the block that it leads to, and in no other.

/// Where a linked branch is among those that lead to the same block.
#[derive(Clone, Copy)]
pub(in crate::cache) struct Link {
    pub previous: Neighbour,
    /// A site's number, or [`NONE`].
    pub next: u32,
}

/// No site.
pub(in crate::cache) const NONE: u32 = u32::MAX;

/// Who comes before a linked branch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::cache) struct Neighbour(u32);

impl Neighbour {
    /// It isn't linked.
    pub(in crate::cache) const NOBODY: Neighbour = Neighbour(u32::MAX);
    const BLOCK: u32 = 1 << 31;

    pub(in crate::cache) fn site(number: u32) -> Neighbour {
        Neighbour(number)
    }

    /// The block that it leads to: it is the first.
    pub(in crate::cache) fn block(number: u32) -> Neighbour {
        Neighbour(number | Self::BLOCK)
    }

    pub(in crate::cache) fn as_site(self) -> Option<u32> {
        (self.0 & Self::BLOCK == 0).then_some(self.0)
    }

    /// A block's number, if it is one.
    pub(in crate::cache) fn as_block(self) -> Option<u32> {
        (self.0 & Self::BLOCK != 0 && self != Self::NOBODY).then_some(self.0 & !Self::BLOCK)
    }
}

/// Of a branch that is not linked.
pub(in crate::cache) const UNLINKED: Link = Link {
    previous: Neighbour::NOBODY,
    next: NONE,
};
