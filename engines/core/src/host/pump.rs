//! The pump: the one thread beside the vCPU's. It waits for console input, the timers and host
//! signals, and raises [`Events`].
//!
//! A thread rather than signal handlers: nothing here runs asynchronously to the vCPU thread's own
//! code, and a kick reaches the guest the same way from every source. Timers are timerfds that the
//! vCPU thread arms itself, which does not wake the pump.
//!
//! SIGINT and SIGTERM are taken from a signalfd if asked for; they must then be blocked in every
//! thread, which [`Pump::start`] does for the calling thread and those that it starts later.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::events::{Events, flag};
use super::input::Input;

/// What the pump watches besides the timers.
#[derive(Debug, Default)]
pub struct PumpOptions {
    /// Where console input comes from.
    pub input: Option<OwnedFd>,
    /// Take SIGINT and SIGTERM as events.
    pub signals: bool,
}

struct Shared {
    events: Arc<Events>,
    input: Arc<Input>,
    control: OwnedFd,
    stop: AtomicBool,
    timer: OwnedFd,
    deadline: OwnedFd,
}

/// A running pump; it ends when this is dropped.
pub struct Pump {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn timer() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    Ok(timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

/// Arms a timer to expire once after `delay`; `None` disarms it.
fn arm(timer: &OwnedFd, delay: Option<Duration>) {
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // A zero it_value would disarm.
    let delay = delay.map(|delay| delay.max(Duration::from_nanos(1)));
    let value = delay.map_or(zero, |delay| Timespec {
        tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: delay.subsec_nanos().into(),
    });
    let spec = Itimerspec {
        it_interval: zero,
        it_value: value,
    };
    // The descriptor is a timerfd and the value is normalised: there is nothing left to fail.
    let set = timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec);
    debug_assert!(set.is_ok(), "timerfd_settime: {set:?}");
}

fn drained(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

impl Pump {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host's, if a descriptor or the thread can't be had.
    pub fn start(events: Arc<Events>, input: Arc<Input>, options: PumpOptions) -> io::Result<Pump> {
        let signals = options.signals.then(signal_descriptor).transpose()?;
        let shared = Arc::new(Shared {
            events,
            input,
            control: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
            timer: timer()?,
            deadline: timer()?,
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pump".into())
            .spawn(move || theirs.pump(options.input, signals))?;
        Ok(Pump {
            shared,
            thread: Some(thread),
        })
    }

    /// Raises [`flag::TIMER`] after `delay`; `None` calls it off.
    pub fn arm_timer(&self, delay: Option<Duration>) {
        arm(&self.shared.timer, delay);
    }

    /// Raises [`flag::DEADLINE`] after `delay`; `None` calls it off.
    pub fn arm_deadline(&self, delay: Option<Duration>) {
        arm(&self.shared.deadline, delay);
    }

    /// Makes the pump look at the room in the input queue again.
    pub fn resume_input(&self) {
        let _ = rustix::io::write(&self.shared.control, &1u64.to_ne_bytes());
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.resume_input();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn pump(&self, mut source: Option<OwnedFd>, signals: Option<OwnedFd>) {
        let mut buffer = [0; 4096];
        while !self.stop.load(Ordering::Acquire) {
            let room = if source.is_some() {
                self.input.room()
            } else {
                0
            };
            // A slot without a descriptor watches the control descriptor for nothing.
            let slots = [
                Some(&self.control),
                Some(&self.timer),
                Some(&self.deadline),
                signals.as_ref(),
                source.as_ref().filter(|_| room > 0),
            ]
            .map(|fd| match fd {
                Some(fd) => (fd, PollFlags::IN),
                None => (&self.control, PollFlags::empty()),
            });
            let mut fds = slots.map(|(fd, flags)| PollFd::from_borrowed_fd(fd.as_fd(), flags));
            if rustix::event::poll(&mut fds, None).is_err() {
                continue;
            }
            let ready: [bool; 5] =
                std::array::from_fn(|at| !slots[at].1.is_empty() && !fds[at].revents().is_empty());
            if ready[0] {
                drained(&self.control);
            }
            if ready[1] && drained(&self.timer) {
                self.events.raise(flag::TIMER);
            }
            if ready[2] && drained(&self.deadline) {
                self.events.raise(flag::DEADLINE);
            }
            if let Some(number) = signals.as_ref().filter(|_| ready[3]).and_then(next_signal) {
                self.events.raise_signal(number);
            }
            if ready[4] {
                let wanted = room.min(buffer.len());
                let count = source
                    .as_ref()
                    .map(|fd| rustix::io::read(fd, &mut buffer[..wanted]));
                match count {
                    Some(Ok(count)) if count > 0 => self.input.push(&buffer[..count]),
                    Some(Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN)) => continue,
                    // End of file, or a descriptor that can't be read: no input either way.
                    _ => {
                        source = None;
                        self.input.end();
                    }
                }
                self.events.raise(flag::INPUT);
            }
        }
    }
}

fn signal_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is a valid object; the calls below initialise it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid sigset_t that outlives the calls; the signal numbers are valid, and
    // signalfd with -1 creates a descriptor that nobody else owns.
    let fd = unsafe {
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        let blocked = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just returned this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads one signal number from a signalfd.
fn next_signal(fd: &OwnedFd) -> Option<u32> {
    // The first field of signalfd_siginfo is ssi_signo; reads are whole records of 128 bytes.
    let mut record = [0; size_of::<libc::signalfd_siginfo>()];
    let count = rustix::io::read(fd, &mut record).ok()?;
    (count == record.len())
        .then(|| u32::from_ne_bytes([record[0], record[1], record[2], record[3]]))
}
