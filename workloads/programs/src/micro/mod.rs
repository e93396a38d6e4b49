//! Micro workloads: what a kernel does with address spaces, as a whole.
//!
//! Where a nano workload is one privileged operation, one iteration here is an act that every
//! kernel knows and that takes several: a switch of address spaces, a first touch of a page, the
//! life of a process. Each file holds the loop, and the application's part of it as a [`Kernel`]:
//! that is compiled once, into this crate's object, as compute kernels are.
//!
//! [`Kernel`]: crate::Kernel

pub mod aspace;
pub mod ctxsw;
pub mod pfstorm;

use crate::{Platform, Refusal};

/// Words of a page.
pub const PAGE_WORDS: usize = 512;

/// An act with address spaces. Each says which state it starts from, and what settling returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Micro {
    /// Starts with that many address spaces, each with one page of its own that holds
    /// [`ctxsw::seed`]; settles with 0.
    Switch {
        /// Address spaces, 1 to [`ctxsw::MOST`].
        spaces: u64,
    },
    /// Starts with no page of the storm mapped and the count of faults 0; settles with the count.
    Storm,
    /// Settles with the number of spaces created less that of spaces destroyed, which is 0.
    Space,
}

impl Micro {
    /// Does it `iterations` times.
    #[inline]
    pub(crate) fn run<P: Platform>(
        self,
        platform: &mut P,
        size: u64,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        match self {
            Micro::Switch { spaces } => ctxsw::switches(platform, spaces, iterations),
            Micro::Storm => pfstorm::storms(platform, size, iterations),
            Micro::Space => aspace::lives(platform, size, iterations),
        }
    }
}
