//! Two pages of guest memory next to each other, so that one instruction can access both.
//!
//! A locked instruction across two pages is atomic if the processor executes it, and it can as soon
//! as the two lie side by side somewhere. That costs two system calls, but for the pair that was
//! accessed last.

use std::os::fd::RawFd;
use std::ptr;

const PAGE: usize = 4096;

/// Address space for two pages.
#[derive(Default)]
pub(crate) struct Pair {
    base: Option<*mut u8>,
    /// What is mapped there.
    mapped: Option<[(RawFd, u64); 2]>,
}

impl Pair {
    /// Maps two pages of files, by descriptor and offset, and answers where. None if the host refuses.
    pub(crate) fn map(&mut self, pages: [(RawFd, u64); 2]) -> Option<*mut u8> {
        let base = match self.base {
            Some(base) => base,
            None => {
                // SAFETY: a fresh mapping.
                let base = unsafe {
                    libc::mmap(
                        ptr::null_mut(),
                        2 * PAGE,
                        libc::PROT_NONE,
                        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                        -1,
                        0,
                    )
                };
                if base == libc::MAP_FAILED {
                    return None;
                }
                *self.base.insert(base.cast())
            }
        };
        if self.mapped == Some(pages) {
            return Some(base);
        }
        self.mapped = None;
        for (index, (fd, offset)) in pages.into_iter().enumerate() {
            // SAFETY: the page belongs to this value, and nobody has an address in it any more.
            let mapped = unsafe {
                libc::mmap(
                    base.add(index * PAGE).cast(),
                    PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    fd,
                    offset as i64,
                )
            };
            if mapped == libc::MAP_FAILED {
                return None;
            }
        }
        self.mapped = Some(pages);
        Some(base)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(base) = self.base {
            // SAFETY: its own mapping.
            unsafe { libc::munmap(base.cast(), 2 * PAGE) };
        }
    }
}
