//! Events: what may stop or wake a vCPU's thread from outside the guest.
//!
//! One [`Events`] is shared between a vCPU's thread and whoever has something for it: the first
//! vCPU's with the [`Pump`](super::Pump), which raises what comes from the host, and each with the
//! other vCPUs' threads. The thread looks at the flags between two exits with one relaxed load, and
//! sleeps on the wake descriptor when it has nothing to run.
//!
//! Invariant: a flag is set before the descriptor is written and before the vCPU is kicked, and a
//! sleeper looks at the flags after it has drained the descriptor. So no event is slept through.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::kick::KickHandle;

/// Event flags.
pub mod flag {
    /// Console input has arrived or ended.
    pub const INPUT: u32 = 1 << 0;
    /// The deadline that some device asked for may have come.
    pub const TIMER: u32 = 1 << 1;
    /// The time limit is reached.
    pub const DEADLINE: u32 = 1 << 2;
    /// The host asked the VMM to end.
    pub const SIGNAL: u32 = 1 << 3;
    /// An interrupt line has changed.
    pub const LINES: u32 = 1 << 4;
    /// A descriptor that a device watches has become readable.
    pub const DEVICES: u32 = 1 << 5;
    /// The interrupt controllers have something for this vCPU, or it is to look again.
    pub const SOMETHING: u32 = 1 << 6;
    /// Another vCPU has ended the run.
    pub const STOP: u32 = 1 << 7;
    /// The flags that end a run.
    pub const FINAL: u32 = DEADLINE | SIGNAL;
}

/// Flags, a descriptor to sleep on and the vCPU to kick.
#[derive(Debug)]
pub struct Events {
    pending: AtomicU32,
    signal: AtomicU32,
    wake: OwnedFd,
    vcpu: Mutex<Kicked>,
}

#[derive(Default)]
struct Kicked(Option<KickHandle>);

impl std::fmt::Debug for Kicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kicked({})", self.0.is_some())
    }
}

impl Events {
    /// Nothing pending, no vCPU attached.
    ///
    /// # Errors
    /// The host's, if it has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Events {
            pending: AtomicU32::new(0),
            signal: AtomicU32::new(0),
            wake,
            vcpu: Mutex::default(),
        })
    }

    /// Names the vCPU that [`raise`](Events::raise) kicks; `None` detaches it.
    pub fn attach(&self, kick: Option<KickHandle>) {
        let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        vcpu.0 = kick;
        if let Some(kick) = &vcpu.0
            && self.pending() != 0
        {
            kick.kick();
        }
    }

    /// Sets flags, wakes a sleeper and kicks the vCPU.
    pub fn raise(&self, flags: u32) {
        self.wake(flags);
        self.kick(0);
    }

    /// Sets flags and wakes the thread, which is known to sleep.
    pub fn wake(&self, flags: u32) {
        self.pending.fetch_or(flags, Ordering::Release);
        // Failing with EAGAIN means that the counter is full: the sleeper is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Sets flags and kicks the vCPU, whose thread is known not to sleep.
    pub fn kick(&self, flags: u32) {
        self.pending.fetch_or(flags, Ordering::Release);
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kick) = &vcpu.0 {
            kick.kick();
        }
    }

    /// Sets flags without waking anybody: for the vCPU's own thread, which looks before it goes on.
    pub fn note(&self, flags: u32) {
        self.pending.fetch_or(flags, Ordering::Release);
    }

    /// Raises [`flag::SIGNAL`] for host signal `number`.
    pub fn raise_signal(&self, number: u32) {
        self.signal.store(number, Ordering::Relaxed);
        self.raise(flag::SIGNAL);
    }

    /// The last host signal that was raised.
    pub fn signal(&self) -> u32 {
        self.signal.load(Ordering::Relaxed)
    }

    /// The flags that are set.
    #[inline]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Clears `flags` and answers with those of them that were set.
    pub fn take(&self, flags: u32) -> u32 {
        self.pending.fetch_and(!flags, Ordering::Acquire) & flags
    }

    /// Sleeps until a flag is set or `limit` has passed.
    pub fn sleep(&self, limit: Option<Duration>) {
        self.sleep_until(limit, u32::MAX, None);
    }

    /// Sleeps until `fd` takes output. False if a flag of [`flag::FINAL`] came first.
    pub fn sleep_until_writable(&self, fd: BorrowedFd<'_>) -> bool {
        self.sleep_until(None, flag::FINAL, Some(fd))
    }

    /// Answers whether `output` is ready.
    fn sleep_until(
        &self,
        limit: Option<Duration>,
        flags: u32,
        output: Option<BorrowedFd<'_>>,
    ) -> bool {
        let end = limit.map(|limit| Instant::now() + limit);
        let mut drained = false;
        let ready = self.wait(end, flags, output, &mut drained);
        if drained && output.is_some() {
            // Another thread may sleep here, and it was for that one.
            self.wake(0);
        }
        ready
    }

    fn wait(
        &self,
        end: Option<Instant>,
        flags: u32,
        output: Option<BorrowedFd<'_>>,
        drained: &mut bool,
    ) -> bool {
        loop {
            // A pending flag turns the wait into a look, so that output that can go out still does.
            let stop = self.pending.load(Ordering::Acquire) & flags != 0;
            let left = if stop {
                Some(Duration::ZERO)
            } else {
                end.map(|end| end.saturating_duration_since(Instant::now()))
            };
            let mut fds = [
                PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(
                    output.unwrap_or(self.wake.as_fd()),
                    if output.is_some() {
                        PollFlags::OUT
                    } else {
                        PollFlags::empty()
                    },
                ),
            ];
            let left = left.map(|left| Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            });
            let ready = rustix::event::poll(&mut fds, left.as_ref());
            let (woken, writable) = (fds[0].revents(), fds[1].revents());
            if !woken.is_empty() {
                let mut count = [0; 8];
                // Nonblocking; another drain may have been faster.
                *drained |= rustix::io::read(&self.wake, &mut count).is_ok();
            }
            if output.is_some() && !writable.is_empty() {
                // POLLERR and POLLHUP count as ready: the write then says what is wrong.
                return true;
            }
            if stop || matches!(ready, Ok(0)) {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_raised_before_the_sleep_ends_it_at_once() {
        let events = Events::new().unwrap();
        events.raise(flag::TIMER);
        events.sleep(None);
        assert_eq!(events.take(flag::TIMER | flag::INPUT), flag::TIMER);
        assert_eq!(events.pending(), 0);
    }

    #[test]
    fn a_sleep_without_events_ends_at_its_limit() {
        let events = Events::new().unwrap();
        events.sleep(Some(Duration::from_millis(1)));
        assert_eq!(events.pending(), 0);
    }

    #[test]
    fn a_full_pipe_is_left_when_the_deadline_comes() {
        let events = Events::new().unwrap();
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(events.sleep_until_writable(writer.as_fd()));
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
        events.raise(flag::INPUT | flag::DEADLINE);
        assert!(!events.sleep_until_writable(writer.as_fd()));
    }
}
