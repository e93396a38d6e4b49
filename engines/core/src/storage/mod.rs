//! What stands behind a disk: sectors that are read, written and made durable.
//!
//! A device asks for whole ranges; a backend either does all of a request or says what failed.
//! Ranges are checked against [`Storage::sectors`] by the device, since what a bad range is called
//! is the device's own business.
//!
//! Invariant: a flush that succeeds means that everything written before it is durable. Once a
//! flush has failed, none succeeds any more: the kernel may have dropped the pages (fsync(2)), so
//! a later success would say nothing about them.

mod aligned;
mod file;
mod paced;

use std::io;

use crate::buffer::Buffer;

pub use file::{FileOptions, OpenError, RawFile};
pub(crate) use paced::Paced;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// A disk's content.
pub trait Storage: Send {
    /// Capacity.
    fn sectors(&self) -> u64;

    /// Writes are refused.
    fn read_only(&self) -> bool;

    /// Text that names the disk to its guest; at most 20 bytes of it are shown.
    fn id(&self) -> &str;

    /// Fills `into` from byte `offset` on; both are whole sectors within the capacity.
    ///
    /// # Errors
    /// The host's; what `into` then holds is unspecified.
    fn read_at(&mut self, offset: u64, into: &[Buffer<'_>]) -> io::Result<()>;

    /// Writes `from` at byte `offset`; both are whole sectors within the capacity. Durable only
    /// after [`flush`](Storage::flush).
    ///
    /// # Errors
    /// The host's; what the range then holds is unspecified, sector by sector.
    fn write_at(&mut self, offset: u64, from: &[Buffer<'_>]) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The host's, now and in every later call.
    fn flush(&mut self) -> io::Result<()>;
}

/// The byte range of `count` sectors from `first` on, if the storage has them.
pub fn range(storage: &dyn Storage, first: u64, count: u64) -> Option<u64> {
    let end = first.checked_add(count)?;
    (end <= storage.sectors()).then(|| first * SECTOR)
}
