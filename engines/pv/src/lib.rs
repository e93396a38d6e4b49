//! The paravirtual engine: a guest kernel that knows its host, run without privilege.
//!
//! Three parties that cannot touch each other: V, this process, the VMM; K, a process that holds the
//! guest kernel and the monitor that answers most hypercalls; U, one process per guest address
//! space. Guest memory is a memfd, all of which K sees and of which a U sees what the guest's page
//! tables say. See `monitor/user.rs` for how K and U talk, [`abi::hypercall`] for what the guest
//! kernel may ask, [`filter`] for what K and U may ask of the host.
//!
//! Invariant: V never follows a pointer, index or length from a page that K can write without
//! checking it, and never waits for K or U without its own limits running.

use abi::hypercall;

mod clock;
mod console;
mod count;
mod filter;
#[cfg(test)]
mod filter_lists;
pub mod floor;
mod guest;
mod image;
mod ledger;
mod marks;
mod pages;
mod process;
mod rings;
mod run;
mod users;
mod wire;

/// A guest that does what its command line names, well or badly: see guest/main.rs. For tests.
#[cfg(feature = "testing")]
pub const TEST_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

#[cfg(feature = "testing")]
pub use guest::Defence;
pub use guest::{Guest, Options, probe};
pub use image::ImageError;
pub use rings::Devices;

/// Finds out whether `image` could be run, without running it.
///
/// # Errors
/// [`ImageError`]: says in one line what is wrong with the image.
pub fn check(image: &[u8]) -> Result<(), ImageError> {
    image::Image::parse(image).map(drop)
}

/// A guest can't be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image is bad.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Guest memory of a size that can't be had.
    #[error(transparent)]
    Memory(#[from] engine_core::memory::MemoryError),
    /// A host call failed.
    #[error("{operation}: {source}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
    /// A party did not come up.
    #[error("the {party} process did not start: {how}")]
    Party {
        /// Which.
        party: &'static str,
        /// What became of it.
        how: String,
    },
}

impl Error {
    fn host(operation: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Host { operation, source }
    }
}
