//! A piece of memory that the host's kernel reads or fills: an `iovec` with a lifetime.
//!
//! Devices hand guest memory to the host's system calls without copying it. Guest memory can't be
//! a Rust slice, because the guest may write it at any time; a [`Buffer`] is only an address and a
//! length, and only the kernel and `memcpy` look behind it.
//!
//! Invariant: what a buffer points to stays mapped, and writable, for its lifetime.

use std::borrow::Cow;
use std::marker::PhantomData;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most buffers that one system call takes (IOV_MAX on Linux).
pub const MOST: usize = 1024;

/// Memory to be read or filled. The layout is that of `struct iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Buffer<'a> {
    vector: libc::iovec,
    memory: PhantomData<&'a ()>,
}

// SAFETY: an address and a length; what is behind them is shared memory that any thread may use.
unsafe impl Send for Buffer<'_> {}

impl std::fmt::Debug for Buffer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

impl<'a> Buffer<'a> {
    /// The memory of a slice.
    pub fn new(memory: &'a mut [u8]) -> Self {
        // SAFETY: the slice is mapped and writable for 'a.
        unsafe { Self::from_raw(memory.as_mut_ptr(), memory.len()) }
    }

    /// Guest memory. Whoever lets it be filled marks it in the slice's bitmap.
    pub fn from_guest<B: BitmapSlice>(memory: &VolatileSlice<'a, B>) -> Self {
        // SAFETY: vm-memory's slices lie in a mapping that lives for 'a, and that is writable.
        unsafe { Self::from_raw(memory.ptr_guard_mut().as_ptr(), memory.len()) }
    }

    /// Memory by address.
    ///
    /// # Safety
    /// `length` bytes at `start` are mapped and writable for 'a, and no Rust reference to them is
    /// used while the buffer is.
    pub unsafe fn from_raw(start: *mut u8, length: usize) -> Self {
        Buffer {
            vector: libc::iovec {
                iov_base: start.cast(),
                iov_len: length,
            },
            memory: PhantomData,
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.vector.iov_len
    }

    /// True without bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.vector.iov_base.cast()
    }

    /// Without the first `count` bytes.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn after(&self, count: usize) -> Self {
        assert!(count <= self.len());
        // SAFETY: a part of memory that is valid for 'a.
        unsafe { Self::from_raw(self.as_ptr().add(count), self.len() - count) }
    }

    /// The first `count` bytes, or all if there are fewer.
    pub fn first(&self, count: usize) -> Self {
        // SAFETY: a part of memory that is valid for 'a.
        unsafe { Self::from_raw(self.as_ptr(), self.len().min(count)) }
    }

    /// Copies the start of `from` in; the number of bytes is the smaller length.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let count = self.len().min(from.len());
        // SAFETY: `count` bytes are valid on both sides; guest memory never overlaps a Rust slice.
        unsafe { std::ptr::copy(from.as_ptr(), self.as_ptr(), count) };
        count
    }

    /// Copies the start of the memory out; the number of bytes is the smaller length.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let count = self.len().min(into.len());
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::copy(self.as_ptr(), into.as_mut_ptr(), count) };
        count
    }

    /// As the kernel takes them.
    pub(crate) fn vectors(buffers: &[Buffer<'_>]) -> *const libc::iovec {
        // The layout is the same: repr(transparent).
        buffers.as_ptr().cast()
    }
}

/// Bytes of all buffers together.
pub fn total(buffers: &[Buffer<'_>]) -> usize {
    buffers.iter().map(Buffer::len).sum()
}

/// Copies `from` into the buffers, skipping their first `skip` bytes. Returns the bytes copied.
pub fn scatter(buffers: &[Buffer<'_>], mut skip: usize, mut from: &[u8]) -> usize {
    let mut done = 0;
    for buffer in buffers {
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let count = buffer.after(skip).copy_from(from);
        skip = 0;
        from = &from[count..];
        done += count;
    }
    done
}

/// Copies out of the buffers into `into`, skipping their first `skip` bytes. Returns the bytes
/// copied.
pub fn gather(buffers: &[Buffer<'_>], mut skip: usize, into: &mut [u8]) -> usize {
    let mut done = 0;
    for buffer in buffers {
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        done += buffer.after(skip).copy_to(&mut into[done..]);
        skip = 0;
    }
    done
}

/// The `length` bytes of `buffers` from `skip` on. Borrows where headers have a descriptor of their
/// own, as drivers do it; a device must not rely on that (2.7.4.1).
pub(crate) fn window<'a>(
    buffers: &'a [Buffer<'a>],
    mut skip: usize,
    mut length: usize,
) -> Cow<'a, [Buffer<'a>]> {
    let mut first = 0;
    while first < buffers.len() && skip >= buffers[first].len() {
        skip -= buffers[first].len();
        first += 1;
    }
    let mut last = first;
    let mut room = 0;
    while last < buffers.len() && room < skip + length {
        room += buffers[last].len();
        last += 1;
    }
    let whole = &buffers[first..last];
    if skip == 0 && room == length {
        return Cow::Borrowed(whole);
    }
    let cut = whole.iter().filter_map(|part| {
        let part = part.after(std::mem::take(&mut skip)).first(length);
        length -= part.len();
        (!part.is_empty()).then_some(part)
    });
    Cow::Owned(cut.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scatter_and_gather_cross_buffers_and_respect_ends() {
        let (mut one, mut two) = ([0; 3], [0; 4]);
        let buffers = [Buffer::new(&mut one), Buffer::new(&mut two)];
        assert_eq!(total(&buffers), 7);
        assert_eq!(scatter(&buffers, 2, b"abcdefgh"), 5);
        let mut back = [0; 8];
        assert_eq!(gather(&buffers, 2, &mut back), 5);
        assert_eq!(&back[..5], b"abcde");
        assert_eq!(gather(&buffers, 7, &mut back), 0);
        assert_eq!((one, two), ([0, 0, b'a'], *b"bcde"));
    }

    #[test]
    fn windows_cut_anywhere() {
        let mut bytes: Vec<u8> = (0..20).collect();
        let (left, right) = bytes.split_at_mut(7);
        let buffers = [Buffer::new(left), Buffer::new(right)];
        for skip in 0..=20 {
            for length in 0..=20 - skip {
                let part = window(&buffers, skip, length);
                assert_eq!(total(&part), length);
                let mut seen = vec![0xff; length];
                gather(&part, 0, &mut seen);
                let expected: Vec<u8> = (skip as u8..(skip + length) as u8).collect();
                assert_eq!(seen, expected);
            }
        }
        assert!(matches!(window(&buffers, 7, 13), Cow::Borrowed(_)));
        assert!(matches!(window(&buffers, 0, 7), Cow::Borrowed(_)));
        assert!(matches!(window(&buffers, 1, 7), Cow::Owned(_)));
    }
}
