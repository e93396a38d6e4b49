//! Memory files, and views of them that other processes share.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

/// Creates a memory file of `bytes` that can't change its size.
pub(crate) fn memory_file(name: &std::ffi::CStr, bytes: u64) -> io::Result<File> {
    // SAFETY: `name` is a C string; the result is a new descriptor or an error.
    let fd = unsafe {
        libc::memfd_create(
            name.as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_NOEXEC_SEAL,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain numbers.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A shared view of one `T` in a memory file, whose fields other processes may change at any time:
/// so only types whose shared fields are atomic make sense here.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    address: NonNull<T>,
    marker: PhantomData<T>,
}

// SAFETY: the view is owned, and references to it follow T's own rules.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Maps the `T` at `offset`.
    ///
    /// # Safety
    /// `T` is valid for any bytes; `offset` is a multiple of the page size; the file is large enough and
    /// cannot shrink.
    pub(crate) unsafe fn map(file: &File, offset: u64) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the host's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address =
            NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Shared {
            address,
            marker: PhantomData,
        })
    }

    /// The shared value.
    pub(crate) fn get(&self) -> &T {
        // SAFETY: mapped for as long as `self` lives.
        unsafe { self.address.as_ref() }
    }

    /// Fills it before anybody else has it.
    pub(crate) fn fill(&mut self, value: T) {
        // SAFETY: mapped for as long as `self` lives; the caller is the only user yet.
        unsafe { self.address.as_ptr().write(value) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size; nobody holds a reference past `self`.
        unsafe { libc::munmap(self.address.as_ptr().cast(), size_of::<T>()) };
    }
}
