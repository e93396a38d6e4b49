//! Access to a file past the page cache (O_DIRECT), through an aligned bounce buffer.
//!
//! The kernel wants offset, length and memory aligned to the device's blocks (open(2), statx(2)
//! STATX_DIOALIGN). Guests give buffers of any alignment and requests of single sectors, so data
//! passes through a buffer of our own, and a write that covers part of a block reads the rest of
//! that block first.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{MmapRegion, VolatileMemory};

use crate::buffer::{self, Buffer};

/// Size of the bounce buffer; a larger request goes in several steps.
const BOUNCE: usize = 1 << 20;

/// What the kernel asks of direct accesses to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of offset and length, in bytes.
    pub(super) offset: u64,
}

impl Alignment {
    /// Asks the kernel; a kernel too old to say gets blocks of 4096 bytes, which suit all disks.
    pub(super) fn of(file: &File) -> Alignment {
        // SAFETY: statx is all integers, so zero is a valid value.
        let mut info: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor, an empty path with AT_EMPTY_PATH, and a statx to fill.
        let done = unsafe {
            libc::statx(
                file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_DIOALIGN,
                &mut info,
            )
        };
        let told = done == 0
            && info.stx_mask & libc::STATX_DIOALIGN != 0
            && info.stx_dio_offset_align.is_power_of_two()
            && info.stx_dio_offset_align as usize <= BOUNCE;
        Alignment {
            offset: if told {
                info.stx_dio_offset_align.into()
            } else {
                4096
            },
        }
    }
}

/// The bounce buffer.
#[derive(Debug)]
pub(super) struct Bounce {
    memory: MmapRegion<()>,
    alignment: Alignment,
}

impl Bounce {
    /// A buffer for a file of this alignment.
    pub(super) fn new(alignment: Alignment) -> io::Result<Bounce> {
        let memory = MmapRegion::new(BOUNCE).map_err(io::Error::other)?;
        Ok(Bounce { memory, alignment })
    }

    /// The buffer as memory of this process alone.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is private, BOUNCE bytes long, and borrowed mutably with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.memory.len()) }
    }

    /// The aligned range around `length` bytes at `offset`, cut to the buffer; the part of it that
    /// was asked for begins at `.1` and is `.2` long.
    fn step(&self, offset: u64, length: usize) -> (u64, usize, usize, usize) {
        let start = offset & !(self.alignment.offset - 1);
        let skip = (offset - start) as usize;
        let wanted = length.min(BOUNCE - skip);
        let span = (skip + wanted).next_multiple_of(self.alignment.offset as usize);
        (start, span, skip, wanted)
    }

    pub(super) fn read(&mut self, file: &File, offset: u64, into: &[Buffer<'_>]) -> io::Result<()> {
        let length = buffer::total(into);
        let mut done = 0;
        while done < length {
            let (start, span, skip, wanted) = self.step(offset + done as u64, length - done);
            let bytes = &mut self.bytes()[..span];
            file.read_exact_at(bytes, start)?;
            buffer::scatter(into, done, &bytes[skip..skip + wanted]);
            done += wanted;
        }
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        file: &File,
        offset: u64,
        from: &[Buffer<'_>],
    ) -> io::Result<()> {
        let length = buffer::total(from);
        let block = self.alignment.offset as usize;
        let mut done = 0;
        while done < length {
            let (start, span, skip, wanted) = self.step(offset + done as u64, length - done);
            let bytes = &mut self.bytes()[..span];
            if skip != 0 {
                file.read_exact_at(&mut bytes[..block], start)?;
            }
            let last = span - block;
            if skip + wanted != span && (last != 0 || skip == 0) {
                file.read_exact_at(&mut bytes[last..], start + last as u64)?;
            }
            buffer::gather(from, done, &mut bytes[skip..skip + wanted]);
            file.write_all_at(bytes, start)?;
            done += wanted;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_blocks_keep_their_other_sectors_and_long_requests_go_in_steps() {
        // An ordinary file: what matters here is the arithmetic, not the page cache.
        let file = tempfile::tempfile().unwrap();
        let mut model: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 512) as u8).collect();
        file.write_all_at(&model, 0).unwrap();
        let mut bounce = Bounce::new(Alignment { offset: 4096 }).unwrap();
        let cases = [
            (0, 512),
            (512, 512),
            (3584, 512),
            (3584, 1024),
            (512, 8192),
            (1024, 2 << 20),
            (4096, 1 << 20),
        ];
        for (number, (offset, length)) in cases.into_iter().enumerate() {
            let mut data = vec![0xa0 + number as u8; length];
            let (left, right) = data.split_at_mut(length / 3);
            let pieces = [Buffer::new(left), Buffer::new(right)];
            bounce.write(&file, offset as u64, &pieces).unwrap();
            model[offset..offset + length].fill(0xa0 + number as u8);
            let mut whole = vec![0; model.len()];
            file.read_exact_at(&mut whole, 0).unwrap();
            assert!(whole == model, "write of {length} at {offset}");
            let mut back = vec![0; length];
            let (left, right) = back.split_at_mut(100);
            let pieces = [Buffer::new(left), Buffer::new(right)];
            bounce.read(&file, offset as u64, &pieces).unwrap();
            assert!(back == data, "read of {length} at {offset}");
        }
        assert_eq!(file.metadata().unwrap().len(), model.len() as u64);
    }
}
