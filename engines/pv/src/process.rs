//! The parties' processes: started with nothing but what they are given, ended with V.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};

use crate::Error;

/// How long a party may take to come up or to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors above this number hold sources while targets are filled.
const HIGH: libc::c_int = 200;
/// Descriptors that a party can have.
const DESCRIPTORS: libc::rlim_t = 256;

/// A child process of V: ended and reaped when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    /// Its process descriptor; readable when it has ended.
    pub(crate) descriptor: OwnedFd,
    reaped: bool,
}

impl Process {
    /// Takes over a child of this process.
    pub(crate) fn adopt(pid: i32) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("no such process"))?;
        let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Process {
            pid,
            descriptor,
            reaped: false,
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends it a signal. A process that is gone is not an error: it is about to be noticed.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.descriptor, signal);
    }

    /// Reaps it if it has ended already; whether it had.
    pub(crate) fn reap(&mut self) -> bool {
        let mut status = 0;
        // SAFETY: `status` is writable for the duration of the call.
        let result = unsafe { libc::waitpid(self.pid(), &mut status, libc::WNOHANG) };
        self.reaped |= result == self.pid();
        self.reaped
    }

    /// Ends and reaps it; answers with how it had ended, in words.
    pub(crate) fn end(&mut self) -> String {
        if self.reaped {
            return String::new();
        }
        self.signal(Signal::KILL);
        let mut status = 0;
        loop {
            // SAFETY: `status` is writable for the duration of the call.
            let result = unsafe { libc::waitpid(self.pid(), &mut status, 0) };
            if result >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                break;
            }
        }
        self.reaped = true;
        if libc::WIFSIGNALED(status) {
            format!("ended by signal {}", libc::WTERMSIG(status))
        } else {
            format!("exited with code {}", libc::WEXITSTATUS(status))
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts `program`, an ELF file's content, with these descriptors at these numbers and no others.
pub(crate) fn start(
    party: &'static str,
    name: &CStr,
    program: &[u8],
    descriptors: &[(BorrowedFd<'_>, i32)],
) -> Result<Process, Error> {
    let host = |operation| Error::host(operation);
    // SAFETY: `name` is a C string; the result is a new descriptor or an error.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_EXEC) };
    if fd < 0 {
        return Err(host("memfd_create")(io::Error::last_os_error()));
    }
    // SAFETY: just created, owned by nobody else.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(program)
        .map_err(host("writing a party's program"))?;
    // Out of the way of the numbers that are to be filled. Opened anew for reading: a file that is
    // open for writing can't be executed.
    let readable =
        File::open(format!("/proc/self/fd/{fd}")).map_err(host("opening a party's program"))?;
    drop(file);
    // SAFETY: plain numbers.
    let high = unsafe { libc::fcntl(readable.as_raw_fd(), libc::F_DUPFD_CLOEXEC, HIGH + 100) };
    if high < 0 {
        return Err(host("F_DUPFD")(io::Error::last_os_error()));
    }
    // SAFETY: just created, owned by nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(high) };
    let numbers: Vec<(i32, i32)> = descriptors
        .iter()
        .map(|(fd, target)| (fd.as_raw_fd(), *target))
        .collect();
    // SAFETY: getpid has no conditions.
    let parent = unsafe { libc::getpid() };
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .env_clear()
        .arg0(party)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    // SAFETY: `confine` makes system calls only: nothing that a fork of a threaded process forbids.
    unsafe { command.pre_exec(move || confine(&numbers, parent)) };
    let child = command.spawn().map_err(host("starting a party"))?;
    Process::adopt(child.id() as i32).map_err(host("pidfd_open"))
}

/// Runs in the new process, before it becomes the party.
fn confine(descriptors: &[(i32, i32)], parent: i32) -> io::Result<()> {
    let check = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: system calls with plain numbers and structures that are readable for their duration.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        // V may have died before the line above.
        if libc::getppid() != parent {
            return Err(io::Error::other("the parent has ended"));
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // A party that spins must not keep V from its limits: under a real-time policy it runs
        // below V.
        let mut scheduling = libc::sched_param { sched_priority: 0 };
        let policy = libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK;
        if matches!(policy, libc::SCHED_FIFO | libc::SCHED_RR) {
            check(libc::sched_getparam(0, &mut scheduling))?;
            scheduling.sched_priority -= 1;
            let policy = if scheduling.sched_priority == 0 {
                libc::SCHED_OTHER
            } else {
                policy
            };
            check(libc::sched_setscheduler(0, policy, &scheduling))?;
        }
        let mut sources = [0; 16];
        for (source, (fd, _)) in sources.iter_mut().zip(descriptors) {
            *source = check(libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, HIGH))?;
        }
        check(libc::syscall(
            libc::SYS_close_range,
            0u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) as libc::c_int)?;
        for (source, (_, target)) in sources.iter().zip(descriptors) {
            check(libc::dup2(*source, *target))?;
        }
        for (resource, most) in [
            (libc::RLIMIT_CORE, 0),
            (libc::RLIMIT_NOFILE, DESCRIPTORS),
            (libc::RLIMIT_MEMLOCK, 0),
        ] {
            let limit = libc::rlimit {
                rlim_cur: most,
                rlim_max: most,
            };
            check(libc::setrlimit(resource, &limit))?;
        }
    }
    Ok(())
}

/// Receives a descriptor that a party sends over `socket`.
pub(crate) fn receive_descriptor(socket: &UnixStream) -> io::Result<OwnedFd> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0u8; 1];
    let mut vector = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // Room for one descriptor, aligned as cmsghdr.
    let mut control = [0u64; 4];
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message describes writable memory for the duration of the call.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled the message; the header is null or lies in `control`.
    let fd = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        if count == 0 || header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        libc::CMSG_DATA(header).cast::<i32>().read_unaligned()
    };
    // SAFETY: the kernel has just installed it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a descriptor over `socket`; negative if that fails. Allocates nothing.
pub(crate) fn send_descriptor(socket: libc::c_int, fd: libc::c_int) -> isize {
    let bytes = [0u8];
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = [0u64; 4];
    // SAFETY: all zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: the header lies in `control`, which has room for one descriptor; the message describes
    // readable memory for the duration of the call.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd);
        libc::sendmsg(socket, &message, libc::MSG_NOSIGNAL)
    }
}
