//! The user processes: made by the zygote when K asks for a space, killed when K destroys it.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use abi::hypercall::errno;
use rustix::process::Signal;

use crate::guest::Guest;
use crate::process::Process;
use crate::wire::k_fd;

/// Killed user processes that may be on their way out.
const DYING: usize = 16;

impl Guest {
    /// Kills the user process of a slot. It is stopped in a system call and has a fatal signal from
    /// here on, so no instruction of user code runs in it any more; nobody need wait for its end.
    pub(crate) fn destroy(&mut self, slot: u64) {
        let user = usize::try_from(slot)
            .ok()
            .and_then(|slot| self.users.get_mut(slot));
        if let Some(user) = user.and_then(Option::take) {
            user.signal(Signal::KILL);
            self.dying.push(user);
        }
    }

    /// Reaps killed processes that have ended, and waits for the oldest if there are many.
    pub(crate) fn bury(&mut self) {
        self.dying.retain_mut(|process| !process.reap());
        if self.dying.len() > DYING {
            self.dying.remove(0);
        }
    }

    /// Makes the user process of a slot; its process id.
    pub(crate) fn create(&mut self, id: u64, slot: u64) -> Result<i64, i64> {
        let place = usize::try_from(slot)
            .ok()
            .filter(|&place| place < self.users.len());
        let place = place.ok_or(errno::EINVAL)?;
        if self.users[place].is_some() {
            return Err(errno::EBUSY);
        }
        let mut answer = [0; 8];
        self.zygote_socket
            .write_all(&(slot as u32).to_ne_bytes())
            .and_then(|()| self.zygote_socket.read_exact(&mut answer))
            .map_err(|_| errno::ENOMEM)?;
        let pid = i64::from_ne_bytes(answer);
        let process = i32::try_from(pid).ok().filter(|&pid| pid > 0);
        let process = process
            .and_then(|pid| Process::adopt(pid).ok())
            .ok_or(errno::ENOMEM)?;
        self.give(id, process.descriptor.as_fd(), k_fd::PROCESS + place as i32)?;
        self.users[place] = Some(process);
        Ok(pid)
    }

    /// Installs a descriptor in K, which waits in call `id`.
    fn give(&self, id: u64, fd: BorrowedFd<'_>, number: i32) -> Result<(), i64> {
        let add = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
            srcfd: fd.as_raw_fd() as u32,
            newfd: number as u32,
            newfd_flags: 0,
        };
        let listener = self.listener.as_raw_fd();
        // SAFETY: the request takes this structure.
        let added = unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_ADDFD, &add) };
        if added < 0 {
            Err(errno::ENOMEM)
        } else {
            Ok(())
        }
    }
}
