//! Lists that grow with every block.
//!
//! They count as code cache: what is known of the code is bounded with it. Each has address space for as much as
//! may be, and pages of a memory file as it grows, some at a time: page by page they would cost a fault each.
//!
//! Invariant: a list is never asked to hold more than it was made for.

use std::{
    io,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    slice,
};

/// Bytes that the host is asked for at once.
const STEP: usize = 64 << 10;

/// A list that is appended to.
pub(super) struct List<T: Copy> {
    items: NonNull<T>,
    len: usize,
    /// Bytes of address space.
    room: usize,
    /// Bytes of it that have pages.
    populated: usize,
    owns: PhantomData<T>,
}

// SAFETY: it owns its memory, as a Vec does.
unsafe impl<T: Copy + Send> Send for List<T> {}

impl<T: Copy> List<T> {
    /// With room for items of so many bytes together.
    ///
    /// # Errors
    /// The host has no address space or no memory file.
    pub(super) fn new(bytes: usize) -> io::Result<List<T>> {
        let room = bytes.next_multiple_of(STEP);
        // SAFETY: plain system calls; the file is closed on every way out, and the mapping is fresh.
        let items = unsafe {
            let fd = libc::memfd_create(c"trapline-code-records".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let mapped = if libc::ftruncate(fd, room as i64) == 0 {
                let access = libc::PROT_READ | libc::PROT_WRITE;
                libc::mmap(ptr::null_mut(), room, access, libc::MAP_SHARED, fd, 0)
            } else {
                libc::MAP_FAILED
            };
            let error = io::Error::last_os_error();
            libc::close(fd);
            if mapped == libc::MAP_FAILED {
                return Err(error);
            }
            mapped
        };
        Ok(List {
            items: NonNull::new(items.cast()).expect("a mapping isn't at 0"),
            len: 0,
            room,
            populated: 0,
            owns: PhantomData,
        })
    }

    #[inline(always)]
    pub(super) fn push(&mut self, item: T) {
        let end = (self.len + 1) * size_of::<T>();
        if end > self.populated {
            self.populate(end);
        }
        // SAFETY: `populate` has made sure that there is room behind the last item.
        unsafe { self.items.add(self.len).write(item) };
        self.len += 1;
    }

    /// Appends `item` until there are `len`.
    pub(super) fn extend_to(&mut self, len: usize, item: T) {
        (self.len..len).for_each(|_| self.push(item));
    }

    /// Forgets everything, but keeps the memory.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Bytes that its items have.
    #[inline]
    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Sees to pages up to `end` bytes, and some more.
    #[cold]
    fn populate(&mut self, end: usize) {
        assert!(end <= self.room, "a list of {end} bytes");
        let upto = end.next_multiple_of(STEP);
        // SAFETY: pages of the list's own mapping are brought in; nothing in them changes. A host
        // that can't do it has them fault.
        unsafe {
            let from = self.items.as_ptr().byte_add(self.populated).cast();
            libc::madvise(from, upto - self.populated, libc::MADV_POPULATE_WRITE);
        }
        self.populated = upto;
    }
}

impl<T: Copy> Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: so many items have been written.
        unsafe { slice::from_raw_parts(self.items.as_ptr(), self.len) }
    }
}

impl<T: Copy> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has the list.
        unsafe { slice::from_raw_parts_mut(self.items.as_ptr(), self.len) }
    }
}

impl<T: Copy> Drop for List<T> {
    fn drop(&mut self) {
        // SAFETY: the list's own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.items.as_ptr().cast(), self.room) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_what_it_was_given() {
        let mut list = List::new(150_000 * 8).unwrap();
        for round in 0..2 {
            assert_eq!(list.bytes(), 0);
            (0..150_000u64).for_each(|number| list.push(number));
            assert_eq!(list.bytes(), 150_000 * 8, "round {round}");
            assert!(list.iter().copied().eq(0..150_000), "round {round}");
            list.clear();
        }
    }

    #[test]
    #[should_panic = "a list of"]
    fn a_list_never_holds_more_than_it_was_made_for() {
        let mut list = List::new(1).unwrap();
        (0..=STEP as u64 / 8).for_each(|number| list.push(number));
    }
}
