//! The pump: the one thread beside the vCPU's. It waits for console input, the timers and host
//! signals, and raises [`Events`].
//!
//! A thread rather than signal handlers: nothing here runs asynchronously to the vCPU thread's own
//! code, and a kick reaches the guest the same way from every source. Timers are timerfds that the
//! vCPU thread arms itself, which does not wake the pump.
//!
//! Descriptors of devices are watched through one epoll descriptor, each until it has become
//! readable once ([EPOLLONESHOT]): watching one again is a system call of the vCPU's thread that
//! wakes nobody.
//!
//! [EPOLLONESHOT]: https://man7.org/linux/man-pages/man2/epoll_ctl.2.html
//!
//! SIGINT and SIGTERM are taken from a signalfd if asked for; they must then be blocked in every
//! thread, which [`Pump::start`] does for the calling thread and those that it starts later.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
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
    devices: OwnedFd,
    /// Devices whose descriptor has become readable, by number.
    ready: AtomicU64,
}

/// Devices whose descriptors can be watched.
pub const WATCHED: usize = 64;

/// A running pump; it ends when this is dropped.
pub struct Pump {
    shared: Arc<Shared>,
    /// Copies of the descriptors that are watched, which live as long as the watch.
    watched: [OnceLock<OwnedFd>; WATCHED],
    thread: Option<JoinHandle<()>>,
}

fn timer() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    Ok(timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

/// Arms a timer to expire once, after or at `time` as `flags` say; `None` disarms it.
fn arm(timer: &OwnedFd, time: Option<Duration>, flags: TimerfdTimerFlags) {
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // A zero it_value would disarm.
    let time = time.map(|time| time.max(Duration::from_nanos(1)));
    let value = time.map_or(zero, |time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let spec = Itimerspec {
        it_interval: zero,
        it_value: value,
    };
    // The descriptor is a timerfd and the value is normalised: there is nothing left to fail.
    let set = timerfd_settime(timer, flags, &spec);
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
            devices: epoll::create(CreateFlags::CLOEXEC)?,
            ready: AtomicU64::new(0),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pump".into())
            .spawn(move || theirs.pump(options.input, signals))?;
        Ok(Pump {
            shared,
            watched: std::array::from_fn(|_| OnceLock::new()),
            thread: Some(thread),
        })
    }

    /// Raises [`flag::TIMER`] when CLOCK_MONOTONIC reaches `time`, in nanoseconds; `None` calls it
    /// off.
    pub fn arm_timer(&self, time: Option<u64>) {
        let time = time.map(Duration::from_nanos);
        arm(&self.shared.timer, time, TimerfdTimerFlags::ABSTIME);
    }

    /// Raises [`flag::DEADLINE`] after `delay`; `None` calls it off.
    pub fn arm_deadline(&self, delay: Option<Duration>) {
        arm(&self.shared.deadline, delay, TimerfdTimerFlags::empty());
    }

    /// Raises [`flag::DEVICES`] when `fd` becomes readable, once; [`rewatch`](Pump::rewatch) starts
    /// over.
    ///
    /// # Errors
    /// The host's, for a descriptor that can't be waited for.
    ///
    /// # Panics
    /// If `device` is not below [`WATCHED`] or is watched already.
    pub fn watch(&self, device: usize, fd: BorrowedFd<'_>) -> io::Result<()> {
        let copy = fd.try_clone_to_owned()?;
        let data = EventData::new_u64(device as u64);
        epoll::add(&self.shared.devices, &copy, data, WATCH)?;
        let fresh = self.watched[device].set(copy).is_ok();
        assert!(fresh, "device {device} is watched already");
        Ok(())
    }

    /// Watches the descriptor of `device` again.
    pub fn rewatch(&self, device: usize) {
        if let Some(fd) = self.watched.get(device).and_then(OnceLock::get) {
            let data = EventData::new_u64(device as u64);
            // The descriptor was added and lives: there is nothing left to fail.
            let modified = epoll::modify(&self.shared.devices, fd, data, WATCH);
            debug_assert!(modified.is_ok(), "epoll_ctl: {modified:?}");
        }
    }

    /// The devices, as bits, whose descriptors have become readable since the last call.
    pub fn take_ready(&self) -> u64 {
        self.shared.ready.swap(0, Ordering::Acquire)
    }

    /// Makes the pump look at the room in the input queue again.
    pub fn resume_input(&self) {
        let _ = rustix::io::write(&self.shared.control, &1u64.to_ne_bytes());
    }
}

/// Readable or broken, which a read then tells, and only once.
const WATCH: EventFlags = EventFlags::IN.union(EventFlags::ONESHOT);

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
                Some(&self.devices),
            ]
            .map(|fd| match fd {
                Some(fd) => (fd, PollFlags::IN),
                None => (&self.control, PollFlags::empty()),
            });
            let mut fds = slots.map(|(fd, flags)| PollFd::from_borrowed_fd(fd.as_fd(), flags));
            if rustix::event::poll(&mut fds, None).is_err() {
                continue;
            }
            let ready: [bool; 6] =
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
            if ready[5] {
                self.devices_ready();
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

impl Shared {
    /// Notes which devices' descriptors have become readable.
    fn devices_ready(&self) {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = Vec::with_capacity(WATCHED);
        let spare = rustix::buffer::spare_capacity(&mut events);
        if epoll::wait(&self.devices, spare, Some(&zero)).is_err() {
            return;
        }
        let bits = events.iter().fold(0, |bits, event| {
            bits | 1 << (event.data.u64() % WATCHED as u64)
        });
        if bits != 0 {
            self.ready.fetch_or(bits, Ordering::Release);
            self.events.raise(flag::DEVICES);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_readable_descriptor_is_told_once_until_it_is_watched_again() {
        let events = Arc::new(Events::new().unwrap());
        let input = Arc::new(Input::closed(b""));
        let pump = Pump::start(Arc::clone(&events), input, PumpOptions::default()).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        pump.watch(7, reader.as_fd()).unwrap();
        let told = || {
            let mut ready = 0;
            for _ in 0..100 {
                events.sleep(Some(Duration::from_millis(100)));
                events.take(flag::DEVICES);
                ready = pump.take_ready();
                if ready != 0 {
                    break;
                }
            }
            ready
        };
        rustix::io::write(&writer, b"x").unwrap();
        assert_eq!(told(), 1 << 7);
        rustix::io::write(&writer, b"y").unwrap();
        events.sleep(Some(Duration::from_millis(20)));
        assert_eq!(events.take(flag::DEVICES), 0);
        pump.rewatch(7);
        assert_eq!(told(), 1 << 7);
        // The other end gone is news too.
        rustix::io::read(&reader, &mut [0; 8]).unwrap();
        pump.rewatch(7);
        drop(writer);
        assert_eq!(told(), 1 << 7);
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(
            pump.watch(8, file.as_fd()).is_err(),
            "a file is always ready"
        );
    }
}
