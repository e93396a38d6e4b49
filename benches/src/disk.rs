//! A contender's disk: a file of its own, with the content that the guests' reads are verified
//! against.
//!
//! The file has no name in its directory, so nothing is left of it however the harness ends; others
//! open it through the harness's own table of descriptors. Invariant: every disk of a run lies on the
//! same file system, all blocks that the catalogue's sizes reach are allocated, and the page cache
//! holds them when a machine boots.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use programs::io::block::{BLOCK_BYTES, DISK_BLOCKS, MOST, whole};

/// Blocks that are written or read at once.
const CHUNK: u64 = 256;

/// Bytes of a disk.
pub const DISK_BYTES: u64 = DISK_BLOCKS * BLOCK_BYTES;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    span: u64,
}

impl Disk {
    /// Makes a disk on the file system of `dir`, for spans of up to `span` blocks: beyond these it
    /// has holes.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn create(dir: &Path, span: u64) -> io::Result<Disk> {
        let mut file = tempfile::tempfile_in(dir)?;
        let span = span.min(MOST);
        let mut bytes = Vec::new();
        for first in (0..span).step_by(CHUNK as usize) {
            bytes.clear();
            for block in first..span.min(first + CHUNK) {
                bytes.extend(whole(block).iter().flat_map(|word| word.to_le_bytes()));
            }
            file.write_all(&bytes)?;
        }
        // The half that is written: what it holds means nothing, but a first write that has to
        // find room would cost more than a second.
        for first in (0..span).step_by(CHUNK as usize) {
            let blocks = CHUNK.min(span - first);
            let zeros = vec![0; (blocks * BLOCK_BYTES) as usize];
            file.write_all_at(&zeros, (MOST + first) * BLOCK_BYTES)?;
        }
        file.set_len(DISK_BYTES)?;
        // What is still to be written back would be written back inside somebody's window.
        file.sync_data()?;
        Ok(Disk { file, span })
    }

    /// A path under which other processes of this user can open it.
    pub fn path(&self) -> PathBuf {
        let process = std::process::id();
        PathBuf::from(format!("/proc/{process}/fd/{}", self.file.as_raw_fd()))
    }

    /// Finds out whether the file can be opened past the page cache.
    ///
    /// # Errors
    /// It can't: the file system's word.
    pub fn takes_direct(&self) -> io::Result<()> {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_DIRECT);
        options.open(self.path()).map(drop).map_err(|error| {
            let text = format!("the file system takes no O_DIRECT ({error}): --disk-cache host");
            io::Error::new(error.kind(), text)
        })
    }

    /// Reads all that was written, so that it is in the page cache.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn warm(&self) -> io::Result<()> {
        let mut bytes = vec![0; (CHUNK * BLOCK_BYTES) as usize];
        for half in [0, MOST] {
            for first in (0..self.span).step_by(CHUNK as usize) {
                let blocks = CHUNK.min(self.span - first);
                let bytes = &mut bytes[..(blocks * BLOCK_BYTES) as usize];
                self.file
                    .read_exact_at(bytes, (half + first) * BLOCK_BYTES)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use programs::io::block::content;

    #[test]
    fn a_disk_holds_the_content_and_leaves_no_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let disk = Disk::create(dir.path(), 300).expect("writable");
        let other = File::options().read(true).write(true).open(disk.path());
        let other = other.expect("opened by path");
        assert_eq!(other.metadata().expect("a file").len(), DISK_BYTES);
        let mut word = [0; 8];
        for (block, place) in [(0, 0), (0, 511), (257, 3), (299, 511)] {
            let at = block * BLOCK_BYTES + 8 * place;
            other.read_exact_at(&mut word, at).expect("inside");
            assert_eq!(u64::from_le_bytes(word), content(block, place));
        }
        disk.warm().expect("readable");
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 0);
    }

    #[test]
    fn a_disk_that_can_t_be_made_is_an_error() {
        assert!(Disk::create(Path::new("/proc/self"), 1).is_err());
    }
}
