//! Floors: what the host's own mechanisms cost, without any guest. Reference lines for benches.
//!
//! Each floor is a function that does an operation a number of times; who calls it has the clock. The
//! operations are those that the engine is made of: a guest system call is one [`Notifications`]
//! round trip, a page fault is that, a [`fault`] and a [`map`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::{self, NonNull};

use crate::process::{Process, receive_descriptor};
use crate::wire::{Filter, PAGE};
use crate::{filter, pages};

/// Bare Linux system calls: `getppid`.
pub fn syscalls(count: u64) {
    for _ in 0..count {
        // SAFETY: has no arguments.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
}

/// A process that makes system calls which this one answers by user notification.
#[derive(Debug)]
pub struct Notifications {
    listener: OwnedFd,
    /// Ended when dropped.
    _caller: Process,
}

impl Notifications {
    /// Starts the other process. With `synchronous` the host hands the CPU over at once
    /// (SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP), as the engine has it.
    ///
    /// # Errors
    /// The host's.
    pub fn start(synchronous: bool) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let filter = filter::user_calls();
        // SAFETY: the child makes system calls only, and never returns.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            call_for_ever(&filter, theirs.as_raw_fd());
        }
        let caller = Process::adopt(pid)?;
        drop(theirs);
        let listener = receive_descriptor(&ours)?;
        /// SECCOMP_IOCTL_NOTIF_SET_FLAGS
        const SET_FLAGS: libc::Ioctl = 0x4008_2104u32 as libc::Ioctl;
        // SAFETY: plain numbers.
        let set = unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS, u64::from(synchronous)) };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Notifications {
            listener,
            _caller: caller,
        })
    }

    /// Answers `count` system calls: that many round trips.
    ///
    /// # Errors
    /// The host's.
    pub fn round_trips(&self, count: u64) -> io::Result<()> {
        let fd = self.listener.as_raw_fd();
        for _ in 0..count {
            // SAFETY: all zero is what the kernel wants; each request takes its structure.
            unsafe {
                let mut notification: libc::seccomp_notif = std::mem::zeroed();
                if libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut notification) != 0 {
                    return Err(io::Error::last_os_error());
                }
                let answer = libc::seccomp_notif_resp {
                    id: notification.id,
                    val: 0,
                    error: 0,
                    flags: 0,
                };
                if libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &answer) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }
}

/// The other process: installs the filter, sends the listener, calls.
fn call_for_ever(filter: &Filter, socket: libc::c_int) -> ! {
    let program = libc::sock_fprog {
        len: filter.length as u16,
        filter: filter.program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: system calls with readable structures, in a process of its own that never returns.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let listener = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &program,
        );
        if listener < 0 || crate::process::send_descriptor(socket, listener as libc::c_int) < 0 {
            libc::_exit(1);
        }
        libc::close(listener as libc::c_int);
        loop {
            // The listener's end is the caller's end: the call fails then.
            if libc::syscall(crate::wire::gate::FIRST as libc::c_long) < 0 {
                libc::_exit(0);
            }
        }
    }
}

/// Maps and unmaps one page of a memory file, `count` times each.
///
/// # Errors
/// The host's.
pub fn map(count: u64) -> io::Result<()> {
    let file = pages::memory_file(c"trapline-floor", PAGE)?;
    let place = Place::reserve(&file)?;
    for _ in 0..count {
        place.map(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    Ok(())
}

/// A page-sized place in this process that is mapped anew.
struct Place {
    address: NonNull<libc::c_void>,
    fd: libc::c_int,
}

impl Place {
    fn reserve(file: &File) -> io::Result<Self> {
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address of the host's choice.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE as usize,
                libc::PROT_NONE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        match NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(Place { address, fd }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn map(&self, rights: libc::c_int) -> io::Result<()> {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let at = self.address.as_ptr();
        // SAFETY: replaces this place's own mapping.
        let result = unsafe { libc::mmap(at, PAGE as usize, rights, flags, self.fd, 0) };
        if result == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // SAFETY: this place's own mapping.
        unsafe { libc::munmap(self.address.as_ptr(), PAGE as usize) };
    }
}

/// SIGSEGV round trips: a fault whose handler skips the instruction. In a process of its own, because
/// the handler is the process's; its start is part of a call, so `count` should be large.
///
/// # Errors
/// The host's.
pub fn faults(count: u64) -> io::Result<()> {
    // SAFETY: the child makes system calls and faults only, and never returns.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        fault(count);
    }
    let mut status = 0;
    // SAFETY: `status` is writable for the duration of the call.
    if unsafe { libc::waitpid(pid, &mut status, 0) } != pid || status != 0 {
        return Err(io::Error::other(format!(
            "the faulting process ended with status {status:#x}"
        )));
    }
    Ok(())
}

/// Reads a page that is not there, `count` times, and ends the process.
fn fault(count: u64) -> ! {
    extern "C" fn skip(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the host hands out a valid ucontext; the faulting load is three bytes long.
        unsafe {
            (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 3
        };
    }
    // SAFETY: a handler that touches its context only; the load is one that it skips.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = skip as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) != 0 {
            libc::_exit(1);
        }
        for _ in 0..count {
            std::arch::asm!("mov rax, [rdi]", in("rdi") 8, out("rax") _, options(nostack));
        }
        libc::_exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_floor_does_what_it_says() {
        syscalls(10);
        map(10).unwrap();
        faults(10).unwrap();
        for synchronous in [false, true] {
            Notifications::start(synchronous)
                .unwrap()
                .round_trips(10)
                .unwrap();
        }
    }
}
