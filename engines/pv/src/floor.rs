//! Floors: what the host's own mechanisms cost, without any guest. Reference lines for benches.
//!
//! Each floor does an operation a number of times and answers with how often it found it done, which
//! the caller holds against what it asked for; the caller has the clock. The operations are those that
//! the engine is made of: a guest system call is one [`Notifications`] round trip, a page fault is that,
//! one of [`Faults`] and one of [`Maps`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::process::{Process, receive_descriptor};
use crate::wire::{Filter, PAGE};
use crate::{filter, pages};

/// Bare Linux system calls: `getppid`. Answers with how many had the right result.
pub fn syscalls(count: u64) -> u64 {
    let parent = std::os::unix::process::parent_id().into();
    let mut done = 0;
    for _ in 0..count {
        // SAFETY: has no arguments.
        let answer: libc::c_long = unsafe { libc::syscall(libc::SYS_getppid) };
        done += u64::from(answer == parent);
    }
    done
}

/// Calls that a living process takes back before one of [`Notifications::round_trips`] gives it up.
const RETRACTIONS: u32 = 1000;

/// A process that makes system calls which this one answers by user notification.
#[derive(Debug)]
pub struct Notifications {
    listener: OwnedFd,
    /// What the last answer was: the other process passes it on with its next call.
    last: u64,
    /// Ended when dropped.
    #[cfg_attr(not(test), expect(dead_code, reason = "owned for its end"))]
    caller: Process,
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
            last: 0,
            caller,
        })
    }

    /// Answers `count` system calls: that many round trips. Answers with how many of them brought the
    /// answer before them back.
    ///
    /// # Errors
    /// The host's.
    pub fn round_trips(&mut self, count: u64) -> io::Result<u64> {
        let fd = self.listener.as_raw_fd();
        let mut done = 0;
        let (mut answered, mut retracted) = (0, 0);
        while answered < count {
            // SAFETY: all zero is what the kernel wants; each request takes its structure.
            let (notification, received) = unsafe {
                let mut notification: libc::seccomp_notif = std::mem::zeroed();
                let request = libc::SECCOMP_IOCTL_NOTIF_RECV;
                let received = libc::ioctl(fd, request, &mut notification);
                (notification, received)
            };
            if !went_through(received)? {
                retracted += 1;
                if retracted > RETRACTIONS {
                    return Err(io::Error::other("the calling process is gone"));
                }
                continue;
            }
            let answer = libc::seccomp_notif_resp {
                id: notification.id,
                val: self.last as i64 + 1,
                error: 0,
                flags: 0,
            };
            // SAFETY: the request takes this structure.
            let sent = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &answer) };
            if went_through(sent)? {
                done += u64::from(notification.data.args[0] == self.last);
                self.last += 1;
                answered += 1;
            }
        }
        Ok(done)
    }
}

/// Whether a request did its work. A process that is stopped and continued takes its call back and
/// makes it again (seccomp_unotify(2)), which is no error.
fn went_through(result: libc::c_int) -> io::Result<bool> {
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::EINTR) => Ok(false),
        _ => Err(error),
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
        let flags =
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
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
        let mut answer = 0;
        loop {
            answer = libc::syscall(crate::wire::gate::FIRST as libc::c_long, answer);
            // The listener's end is the caller's end: the call fails then.
            if answer < 0 {
                libc::_exit(0);
            }
        }
    }
}

/// A page-sized place in this process where a memory file is mapped anew again and again.
#[derive(Debug)]
pub struct Maps {
    address: NonNull<libc::c_void>,
    file: File,
}

impl Maps {
    /// Makes the file and takes the place.
    ///
    /// # Errors
    /// The host's.
    pub fn start() -> io::Result<Self> {
        let file = pages::memory_file(c"trapline-floor", PAGE)?;
        // SAFETY: a new mapping at an address of the host's choice.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE as usize,
                libc::PROT_NONE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(Maps { address, file }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Maps the page in place of what was there, `count` times. Answers with how often it got the place.
    pub fn map(&mut self, count: u64) -> u64 {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let (at, fd) = (self.address.as_ptr(), self.file.as_raw_fd());
        let mut done = 0;
        for _ in 0..count {
            // SAFETY: replaces this place's own mapping.
            let result = unsafe { libc::mmap(at, PAGE as usize, rights, flags, fd, 0) };
            done += u64::from(result == at);
        }
        done
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        // SAFETY: this place's own mapping.
        unsafe { libc::munmap(self.address.as_ptr(), PAGE as usize) };
    }
}

/// A process that faults and whose handler skips the instruction: it has a handler of its own, which
/// this process is spared.
#[derive(Debug)]
pub struct Faults {
    orders: UnixStream,
    /// Ended when dropped.
    _faulter: Process,
}

impl Faults {
    /// Starts the other process.
    ///
    /// # Errors
    /// The host's.
    pub fn start() -> io::Result<Self> {
        let (orders, theirs) = UnixStream::pair()?;
        // SAFETY: the child makes system calls and faults only, and never returns.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            drop(orders);
            fault_on_order(theirs);
        }
        let faulter = Process::adopt(pid)?;
        Ok(Faults {
            orders,
            _faulter: faulter,
        })
    }

    /// Has the other process fault `count` times. Answers with how often its handler ran.
    ///
    /// # Errors
    /// The host's.
    pub fn round_trips(&mut self, count: u64) -> io::Result<u64> {
        self.orders.write_all(&count.to_ne_bytes())?;
        let mut answer = [0; 8];
        self.orders.read_exact(&mut answer)?;
        Ok(u64::from_ne_bytes(answer))
    }
}

/// How often the handler ran.
static HANDLED: AtomicU64 = AtomicU64::new(0);

/// Reads a page that is not there as often as it is told to.
fn fault_on_order(mut orders: UnixStream) -> ! {
    extern "C" fn skip(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        HANDLED.fetch_add(1, Relaxed);
        // SAFETY: the host hands out a valid ucontext; the faulting load is three bytes long.
        unsafe {
            (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 3
        };
    }
    // SAFETY: a handler that touches its context and a number only; the load is one that it skips.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = skip as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) != 0 {
            libc::_exit(1);
        }
        let mut order = [0; 8];
        // The other end's end is this process's.
        while orders.read_exact(&mut order).is_ok() {
            let before = HANDLED.load(Relaxed);
            for _ in 0..u64::from_ne_bytes(order) {
                std::arch::asm!("mov rax, [rdi]", in("rdi") 8, out("rax") _, options(nostack));
            }
            let handled = HANDLED.load(Relaxed) - before;
            if orders.write_all(&handled.to_ne_bytes()).is_err() {
                break;
            }
        }
        libc::_exit(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_floor_does_what_it_says() {
        assert_eq!(syscalls(10), 10);
        let mut maps = Maps::start().unwrap();
        let mut faults = Faults::start().unwrap();
        for count in [1, 0, 10] {
            assert_eq!(maps.map(count), count);
            assert_eq!(faults.round_trips(count).unwrap(), count);
        }
        // A process that is gone is an error and no endless wait.
        let mut notifications = Notifications::start(true).unwrap();
        notifications.caller.end();
        assert!(notifications.round_trips(1).is_err());
        for synchronous in [false, true] {
            let mut notifications = Notifications::start(synchronous).unwrap();
            for count in [1, 0, 10] {
                assert_eq!(notifications.round_trips(count).unwrap(), count);
            }
        }
    }
}
