//! Storage in a file or block device of the host, in raw format: sector n lies at byte 512 n.
//!
//! The capacity is what the file had when it was opened. A file that becomes shorter meanwhile
//! makes reads fail; a full host disk makes writes fail; neither ends the VMM.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::aligned::{Alignment, Bounce};
use super::{SECTOR, Storage};
use crate::buffer::{self, Buffer};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// Writes are refused.
    pub read_only: bool,
}

/// A file can't serve as a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It can't be opened.
    #[error("disk {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// It can be opened, but not without the page cache.
    #[error(
        "disk {}: its file system has no direct access (O_DIRECT): {source}; \
         leave out `direct`, or move the file to a disk",
        path.display()
    )]
    Direct {
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// It can be read only.
    #[error("disk {}: {source}; to use it as it is, append ,readonly", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// It is neither a regular file nor a block device.
    #[error("disk {} is {kind}; a disk is a regular file or a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It does not consist of whole blocks.
    #[error("disk {} has {bytes} bytes; a disk has a multiple of {block}, and not 0", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// What it has.
        bytes: u64,
        /// What its size must be a multiple of.
        block: u64,
    },
    /// Another machine writes it.
    #[error("disk {} is in use by another machine", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

/// A raw image.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    bytes: u64,
    read_only: bool,
    id: String,
    bounce: Option<Bounce>,
    /// The error of the first flush that failed.
    lost: Option<i32>,
}

impl RawFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`OpenError`]: missing, a directory, not whole sectors, locked, or refused by the host.
    pub fn open(path: &Path, options: FileOptions) -> Result<RawFile, OpenError> {
        let path = || path.to_owned();
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags)
                .open(path())
        };
        // Not O_DIRECT at first, so that each error can be told from the others.
        let mut file = open(libc::O_NONBLOCK).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                if !options.read_only && File::open(path()).is_ok() =>
            {
                OpenError::Write {
                    path: path(),
                    source,
                }
            }
            io::ErrorKind::IsADirectory => OpenError::Kind {
                path: path(),
                kind: "a directory",
            },
            _ => OpenError::Open {
                path: path(),
                source,
            },
        })?;
        let failed = |source| OpenError::Open {
            path: path(),
            source,
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() {
                "a directory"
            } else if kind.is_fifo() {
                "a pipe"
            } else {
                "a character device"
            };
            return Err(OpenError::Kind { path: path(), kind });
        }
        let bounce = if options.direct {
            file = open(libc::O_DIRECT).map_err(|source| OpenError::Direct {
                path: path(),
                source,
            })?;
            Some(Bounce::new(Alignment::of(&file)).map_err(failed)?)
        } else {
            None
        };
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let block = if options.direct {
            Alignment::of(&file).offset.max(SECTOR)
        } else {
            SECTOR
        };
        if bytes == 0 || !bytes.is_multiple_of(block) {
            return Err(OpenError::Size {
                path: path(),
                bytes,
                block,
            });
        }
        let lock = if options.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        // A file system without locks is no reason to refuse the disk.
        if rustix::fs::flock(&file, lock) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(OpenError::Locked { path: path() });
        }
        let id = path()
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(RawFile {
            file,
            bytes,
            read_only: options.read_only,
            id,
            bounce,
            lost: None,
        })
    }

    /// The file alone, for another process; it stays locked.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Repeats `call` (preadv or pwritev) until all of `buffers` is done.
    fn all(
        mut offset: u64,
        buffers: &[Buffer<'_>],
        call: impl Fn(&[Buffer<'_>], i64) -> isize,
    ) -> io::Result<()> {
        let (mut first, mut within) = (0, 0);
        loop {
            while first < buffers.len() && within == buffers[first].len() {
                (first, within) = (first + 1, 0);
            }
            if first == buffers.len() {
                return Ok(());
            }
            let one;
            let rest = if within == 0 {
                &buffers[first..buffers.len().min(first + buffer::MOST)]
            } else {
                one = [buffers[first].after(within)];
                &one[..]
            };
            let mut count = match call(rest, offset as i64) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count if count > 0 => count as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
            };
            offset += count as u64;
            while count > 0 {
                let step = count.min(buffers[first].len() - within);
                count -= step;
                within += step;
                if within == buffers[first].len() {
                    (first, within) = (first + 1, 0);
                }
            }
        }
    }
}

impl Storage for RawFile {
    fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn read_at(&mut self, offset: u64, into: &[Buffer<'_>]) -> io::Result<()> {
        if let Some(bounce) = &mut self.bounce {
            return bounce.read(&self.file, offset, into);
        }
        let fd = self.file.as_raw_fd();
        Self::all(offset, into, |rest, at| match rest {
            // Most requests: no list for the kernel to check, and no cancellation point.
            // SAFETY: the buffer is writable memory.
            [one] => unsafe {
                libc::syscall(libc::SYS_pread64, fd, one.as_ptr(), one.len(), at) as isize
            },
            // SAFETY: the buffers are writable memory, at most IOV_MAX of them.
            _ => unsafe { libc::preadv(fd, Buffer::vectors(rest), rest.len() as i32, at) },
        })
    }

    fn write_at(&mut self, offset: u64, from: &[Buffer<'_>]) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if let Some(bounce) = &mut self.bounce {
            return bounce.write(&self.file, offset, from);
        }
        let fd = self.file.as_raw_fd();
        Self::all(offset, from, |rest, at| match rest {
            // SAFETY: the buffer is readable memory.
            [one] => unsafe {
                libc::syscall(libc::SYS_pwrite64, fd, one.as_ptr(), one.len(), at) as isize
            },
            // SAFETY: the buffers are readable memory, at most IOV_MAX of them.
            _ => unsafe { libc::pwritev(fd, Buffer::vectors(rest), rest.len() as i32, at) },
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(code) = self.lost {
            return Err(io::Error::from_raw_os_error(code));
        }
        if self.read_only {
            return Ok(());
        }
        rustix::fs::fdatasync(&self.file).map_err(|error| {
            self.lost = Some(error.raw_os_error());
            error.into()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn disk(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0x5a; bytes]).unwrap();
        file
    }

    fn open(path: &Path, text: &str) -> Result<RawFile, OpenError> {
        let options = FileOptions {
            direct: text.contains("direct"),
            read_only: text.contains("readonly"),
        };
        RawFile::open(path, options)
    }

    #[test]
    fn what_is_not_a_disk_is_refused_by_name() {
        let odd = disk(1000);
        let none = disk(0);
        let cases = [
            (Path::new("/nonexistent/disk"), "No such file"),
            (Path::new("/"), "is a directory"),
            (Path::new("/dev/null"), "is a character device"),
            (odd.path(), "has 1000 bytes"),
            (none.path(), "has 0 bytes"),
        ];
        for (path, expected) in cases {
            for options in ["", "readonly"] {
                let message = open(path, options).unwrap_err().to_string();
                assert!(message.contains(expected), "{message}");
            }
        }
    }

    #[test]
    fn one_machine_writes_or_several_read() {
        let file = disk(1024);
        let writer = open(file.path(), "").unwrap();
        assert!(matches!(
            open(file.path(), "readonly"),
            Err(OpenError::Locked { .. })
        ));
        drop(writer);
        let _reader = open(file.path(), "readonly").unwrap();
        open(file.path(), "readonly").unwrap();
        assert!(matches!(
            open(file.path(), ""),
            Err(OpenError::Locked { .. })
        ));
    }

    #[test]
    fn data_comes_back_in_every_way_of_access() {
        let file = disk(64 * 1024);
        for options in ["", "direct"] {
            let mut disk = match open(file.path(), options) {
                Ok(disk) => disk,
                // tmpfs of older kernels.
                Err(OpenError::Direct { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            assert_eq!(disk.sectors(), 128);
            let mut data: Vec<u8> = (0..3 * 512u32).map(|at| at as u8).collect();
            let (left, right) = data.split_at_mut(700);
            disk.write_at(512, &[Buffer::new(left), Buffer::new(right)])
                .unwrap();
            disk.flush().unwrap();
            let mut back = vec![0; 5 * 512];
            disk.read_at(0, &[Buffer::new(&mut back)]).unwrap();
            assert!(back[512..4 * 512] == data[..]);
            assert!(
                back[..512]
                    .iter()
                    .chain(&back[4 * 512..])
                    .all(|&byte| byte == 0x5a)
            );
        }
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let file = disk(1024 * 1024);
        let mut disk = open(file.path(), "").unwrap();
        let mut back = vec![0; 1024 * 1024];
        let pieces: Vec<Buffer<'_>> = back.chunks_mut(512).map(Buffer::new).collect();
        assert!(pieces.len() > buffer::MOST);
        disk.read_at(0, &pieces).unwrap();
        assert!(back.iter().all(|&byte| byte == 0x5a));
    }

    #[test]
    fn a_file_that_became_shorter_fails_reads_and_takes_writes() {
        let file = disk(4096);
        let mut disk = open(file.path(), "").unwrap();
        file.as_file().set_len(1024).unwrap();
        let mut sector = [7; 512];
        let error = disk.read_at(2048, &[Buffer::new(&mut sector)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        sector.fill(7);
        disk.write_at(2048, &[Buffer::new(&mut sector)]).unwrap();
        sector.fill(0);
        disk.read_at(2048, &[Buffer::new(&mut sector)]).unwrap();
        assert_eq!(sector, [7; 512]);
    }

    #[test]
    fn a_read_only_disk_takes_no_write() {
        let file = disk(4096);
        let mut disk = open(file.path(), "readonly").unwrap();
        assert!(disk.read_only());
        let mut sector = [7; 512];
        assert!(disk.write_at(0, &[Buffer::new(&mut sector)]).is_err());
        disk.flush().unwrap();
    }

    #[test]
    fn a_full_disk_is_an_error_and_a_failed_flush_stays_one() {
        // /dev/full is no disk; the file behind a RawFile may be anything all the same.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/full")
            .unwrap();
        let mut disk = RawFile {
            file,
            bytes: 4096,
            read_only: false,
            id: String::new(),
            bounce: None,
            lost: None,
        };
        let mut sector = [7; 512];
        let error = disk.write_at(0, &[Buffer::new(&mut sector)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        // fdatasync of a character device: EINVAL.
        assert!(disk.flush().is_err());
        disk.file = tempfile::tempfile().unwrap();
        assert!(disk.flush().is_err());
    }
}
