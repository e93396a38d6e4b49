//! What a contender's devices stand on: a disk and a network peer of its own.
//!
//! Which arguments attach them is [`crate::contender`]'s to know. Invariant: all contenders of a run
//! get the same, and what has a name in the file system is removed with the value.

use std::io;
use std::path::{Path, PathBuf};

use reports_data::{Backing, file_system};

use crate::choices::DiskCache;
use crate::disk::{DISK_BYTES, Disk};
use crate::peer::Peer;

/// Devices of one contender.
#[derive(Debug)]
pub struct Devices {
    disk: Disk,
    peer: Peer,
    cache: DiskCache,
}

impl Devices {
    /// Makes a disk on the file system of `disks`, and a peer whose sockets lie in `sockets` under
    /// names that begin with `name`.
    ///
    /// # Errors
    /// The host refuses file, socket or thread, or the file system O_DIRECT.
    pub fn create(
        disks: &Path,
        sockets: &Path,
        name: &str,
        cache: DiskCache,
    ) -> io::Result<Devices> {
        let disk = Disk::create(disks, span())?;
        if cache == DiskCache::Direct {
            disk.takes_direct()?;
        }
        Ok(Devices {
            disk,
            peer: Peer::listen(&sockets.join(format!("{name}.peer")))?,
            cache,
        })
    }

    /// How everybody is to open the disk.
    pub fn cache(&self) -> DiskCache {
        self.cache
    }

    /// The disk's file.
    pub fn disk(&self) -> PathBuf {
        self.disk.path()
    }

    /// The socket to send frames to.
    pub fn peer(&self) -> &Path {
        self.peer.path()
    }

    /// A name for the guest's own socket, for a VMM that wants to be told one.
    pub fn station(&self) -> PathBuf {
        self.peer.path().with_extension("guest")
    }

    /// Brings the page cache into the state in which every machine is to find it.
    ///
    /// # Errors
    /// The disk can't be read.
    pub fn settle(&self) -> io::Result<()> {
        match self.cache {
            DiskCache::Host => self.disk.warm(),
            DiskCache::Direct => Ok(()),
        }
    }
}

/// Largest span of any workload, as the catalogue has it.
fn span() -> u64 {
    let blocks = programs::CATALOGUE.iter().filter(|w| w.uses_disk());
    blocks.map(|workload| workload.size).max().unwrap_or(0)
}

/// What the manifest says of devices whose disks lie in `disks`.
pub fn backing(disks: &Path, cache: DiskCache) -> Backing {
    Backing {
        filesystem: file_system(disks),
        caching: cache.text().to_owned(),
        network: "AF_UNIX datagrams to a peer in the harness".to_owned(),
        disk_mib: DISK_BYTES >> 20,
    }
}
