//! The run loop: V's side of a running guest.
//!
//! V sleeps until K calls or rings, a timer expires, the console moves, a party dies, or a limit is
//! reached. K's calls are notifications of its filter: K waits until V answers, so there is at most
//! one at a time, and a flood of them costs K its own time.
//!
//! A party that dies ends the guest; a guest that ends takes every party with it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use abi::hypercall::evtchn;
use engine_core::{Error as EngineError, Limit, Limits, Outcome};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;

use crate::console::Broken;
use crate::count::Snapshot;
use crate::guest::Guest;
use crate::ledger;
use crate::process::Process;
use crate::wire::vmm;

/// The timer's port, as the monitor knows it.
const TIMER_PORT: u64 = 0;
/// How long after a window has closed it is reported, if the guest keeps V busy no further.
const REPORT: Duration = Duration::from_millis(2);
/// How often V looks at a guest that nothing tells it about: console input without room, a sleep
/// that nothing can end.
const LOOK: Duration = Duration::from_millis(20);

/// What a round of waiting has found.
#[derive(Default)]
struct Ready {
    call: bool,
    bell: bool,
    timer: bool,
    signal: bool,
    input: bool,
    output: bool,
    /// The kernel, the zygote, or the user process in this slot has ended.
    kernel: bool,
    zygote: bool,
    user: Option<usize>,
    /// The descriptor of this device is readable.
    device: Option<usize>,
    nothing: bool,
}

impl Guest {
    /// Runs the guest until it ends. Every party has ended and is reaped on return.
    pub fn run(&mut self, limits: &Limits) -> Outcome {
        let deadline = limits.timeout.map(|timeout| Instant::now() + timeout);
        self.ledger
            .get()
            .limit
            .store(limits.max_exits.unwrap_or(u64::MAX), Relaxed);
        // Measured over a longer time than at the start.
        self.clock.publish(&self.events.get().clock);
        let outcome = self.serve(deadline, limits.max_exits.unwrap_or(u64::MAX));
        self.end();
        // What the guest had said before it ended still goes out.
        let _ = self.console.take(self.ring.get());
        let _ = self.console.write(true);
        self.marks.report();
        outcome
    }

    /// Ends every party. All are killed before any is waited for, user processes first: without K
    /// their system calls fail at once, and code that repeats them would keep the CPU from V.
    fn end(&mut self) -> String {
        for user in self.users.iter().flatten() {
            user.signal(Signal::KILL);
        }
        let how = self.kernel.end();
        for user in &mut self.users {
            *user = None;
        }
        self.dying.clear();
        self.zygote.end();
        how
    }

    fn serve(&mut self, deadline: Option<Instant>, max_exits: u64) -> Outcome {
        // The ledger's count and limit are K's to write. What comes here is counted here too.
        let mut calls = 0;
        // A console call that waits for room.
        let mut held = None;
        loop {
            self.clock.refresh(&self.events.get().clock);
            let ready = match self.wait(deadline, held.is_some()) {
                Ok(ready) => ready,
                Err(error) => return engine_failed("poll", error.into()),
            };
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Outcome::Limit(Limit::Timeout);
            }
            if ready.signal
                && let Some(signal) = self.signal()
            {
                return Outcome::Interrupted { signal };
            }
            if let Err(broken) = self.move_console(&ready) {
                return self.console_broke(&broken);
            }
            self.move_devices(&ready);
            if ready.timer && drained(&self.timer) {
                self.raise(TIMER_PORT);
            }
            if ready.call {
                calls += 1;
                if calls > max_exits {
                    return Outcome::Limit(Limit::Exits);
                }
                match self.call(&mut held) {
                    Ok(None) => {}
                    Ok(Some(outcome)) => return outcome,
                    Err(Failure::Console(broken)) => return self.console_broke(&broken),
                    Err(Failure::Host(operation, error)) => return engine_failed(operation, error),
                }
            } else if ready.kernel {
                let how = self.end();
                return crashed(format!("the kernel's process {how}"));
            }
            if let Some(slot) = ready.user {
                let how = self.users[slot]
                    .as_mut()
                    .map_or(String::new(), Process::end);
                return crashed(format!("the user process in slot {slot} {how}"));
            }
            if ready.zygote {
                let how = self.zygote.end();
                return crashed(format!("the zygote of the user processes {how}"));
            }
            if let Some(id) = held {
                match self.console.take(self.ring.get()) {
                    Ok(true) => {
                        held = None;
                        self.answer(id, 0, 0);
                    }
                    Ok(false) => {}
                    Err(broken) => return self.console_broke(&broken),
                }
            }
            if ready.nothing {
                self.marks.report();
                if self.hopeless() {
                    return Outcome::Limit(Limit::Input);
                }
            }
        }
    }

    /// Sleeps until something is ready.
    fn wait(&self, deadline: Option<Instant>, held: bool) -> rustix::io::Result<Ready> {
        #[derive(Clone, Copy)]
        enum What {
            Call,
            Bell,
            Timer,
            Kernel,
            Zygote,
            Signal,
            Input,
            Output,
            User(usize),
            Device(usize),
        }
        let mut whats = Vec::with_capacity(16);
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(16);
        let mut watch = |what, fd: BorrowedFd<'_>, flags| {
            whats.push(what);
            // SAFETY: the descriptors live in `self`, which outlives this call.
            let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        const IN: PollFlags = PollFlags::IN;
        if !held {
            watch(What::Call, self.listener.as_fd(), IN);
        }
        watch(What::Bell, self.bell.as_fd(), IN);
        watch(What::Timer, self.timer.as_fd(), IN);
        watch(What::Kernel, self.kernel.descriptor.as_fd(), IN);
        watch(What::Zygote, self.zygote.descriptor.as_fd(), IN);
        if let Some(signals) = &self.signals {
            watch(What::Signal, signals.as_fd(), IN);
        }
        if let Some(input) = self.console.input() {
            watch(What::Input, input, IN);
        }
        if let Some(output) = self.console.output() {
            watch(What::Output, output, PollFlags::OUT);
        }
        for (slot, user) in self.users.iter().enumerate() {
            if let Some(user) = user {
                watch(What::User(slot), user.descriptor.as_fd(), IN);
            }
        }
        for (device, descriptor) in self.rings.descriptors() {
            watch(What::Device(device), descriptor, IN);
        }
        let mut patience =
            deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut sooner =
            |limit: Duration| patience = Some(patience.map_or(limit, |had| had.min(limit)));
        if self.marks.unreported() {
            sooner(REPORT);
        }
        if self.console.held() || self.console.exhausted(self.ring.get()) {
            sooner(LOOK);
        }
        let patience = patience.map(|left| Timespec {
            tv_sec: left.as_secs().min(1 << 30) as i64,
            tv_nsec: left.subsec_nanos().into(),
        });
        let count = match rustix::event::poll(&mut fds, patience.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            other => other?,
        };
        let mut ready = Ready {
            nothing: count == 0,
            ..Ready::default()
        };
        for (what, fd) in whats.iter().zip(&fds) {
            let revents = fd.revents();
            if revents.is_empty() {
                continue;
            }
            match *what {
                // The listener hangs up when K is gone.
                What::Call => ready.call = revents.contains(IN),
                What::Bell => ready.bell = true,
                What::Timer => ready.timer = true,
                What::Kernel => ready.kernel = true,
                What::Zygote => ready.zygote = true,
                What::Signal => ready.signal = true,
                What::Input => ready.input = true,
                What::Output => ready.output = true,
                What::User(slot) => ready.user = Some(slot),
                What::Device(device) => ready.device = Some(device),
            }
        }
        Ok(ready)
    }

    fn signal(&self) -> Option<u32> {
        let mut information = [0u32; 32];
        let fd = self.signals.as_ref()?.as_raw_fd();
        let size = size_of_val(&information);
        // SAFETY: writable memory of that size: struct signalfd_siginfo, number first.
        let read = unsafe { libc::read(fd, information.as_mut_ptr().cast(), size) };
        (read > 0).then_some(information[0])
    }

    fn move_console(&mut self, ready: &Ready) -> Result<(), Broken> {
        if ready.input {
            self.console.read();
        }
        if ready.bell {
            drained(&self.bell);
            self.take_output()?;
        }
        if ready.output {
            self.take_output()?;
        }
        if self.console.feed(self.ring.get())? {
            self.raise(evtchn::CONSOLE_PORT);
        }
        Ok(())
    }

    /// Serves the rings if the guest has rung, or a device's host has something. Orders and used
    /// buffers are told by the port that the doorbell belongs to.
    fn move_devices(&mut self, ready: &Ready) {
        let mut told = false;
        if ready.bell {
            let served = self.rings.serve();
            told = served.tell;
            if served.more {
                // Blocks never: a full counter rings already.
                let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
            }
        }
        if let Some(device) = ready.device {
            told |= self.rings.host_ready(device);
        }
        if told {
            self.raise(evtchn::CONSOLE_PORT);
        }
    }

    /// Takes output, and tells a guest that waits for room. Answers whether the ring is empty.
    fn take_output(&mut self) -> Result<bool, Broken> {
        // The wish is read before room is made: one that comes later rings again, and an event for it
        // that came before there was room would be taken for nothing.
        let wanted = self.ring.get().output_wanted.swap(0, SeqCst) != 0;
        let empty = self.console.take(self.ring.get())?;
        match (wanted, empty) {
            (true, true) => self.raise(evtchn::CONSOLE_PORT),
            (true, false) => self.ring.get().output_wanted.store(1, SeqCst),
            (false, _) => {}
        }
        Ok(empty)
    }

    /// Raises an event: see the essay in monitor/user.rs for the order of these steps.
    fn raise(&self, port: u64) {
        let events = self.events.get();
        let bit = 1u64 << port;
        events.pending.fetch_or(bit, SeqCst);
        let masked = events.mask.load(SeqCst) & bit != 0;
        if !masked {
            events.upcall_pending.store(1, SeqCst);
        }
        fence(SeqCst);
        let ledger = self.ledger.get();
        if ledger.asleep.load(SeqCst) != 0 {
            // Blocks never: K reads the counter down each time.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        let running = ledger.running.load(SeqCst) as usize;
        if !masked
            && let Some(slot) = running.checked_sub(1)
            && let Some(Some(user)) = self.users.get(slot)
        {
            user.signal(Signal::USR1);
        }
    }

    /// The guest sleeps, and nothing is left that could wake it.
    ///
    /// Asked in this order: a guest that nobody has told to wake, and that sleeps after that, stays asleep, for
    /// V alone wakes it; only then does it say anything that no timer is armed. One that has expired since V last
    /// looked is armed no longer, and its event still to be raised.
    fn hopeless(&self) -> bool {
        let told = self.events.get().upcall_pending.load(SeqCst) != 0 || readable(&self.wake);
        if told || self.ledger.get().asleep.load(SeqCst) == 0 {
            return false;
        }
        let mut armed = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
        };
        // SAFETY: `armed` is writable for the duration of the call.
        unsafe { libc::timerfd_gettime(self.timer.as_raw_fd(), &mut armed) };
        self.console.output().is_none()
            && self.console.exhausted(self.ring.get())
            && armed.it_value.tv_sec == 0
            && armed.it_value.tv_nsec == 0
            && !readable(&self.timer)
            && !self.rung()
    }

    /// The guest has rung since V last looked. It does so before it goes to sleep, so whoever has seen
    /// it asleep sees the bell too.
    fn rung(&self) -> bool {
        readable(&self.bell)
    }

    fn console_broke(&self, broken: &Broken) -> Outcome {
        match broken {
            Broken::Ring => crashed("the console ring's indices make no sense".into()),
            Broken::Closed => Outcome::Interrupted {
                signal: libc::SIGPIPE as u32,
            },
        }
    }

    /// Answers one call of K.
    fn call(&mut self, held: &mut Option<u64>) -> Result<Option<Outcome>, Failure> {
        // SAFETY: all zero is a valid notification, and what the kernel wants.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let listener = self.listener.as_raw_fd();
        // SAFETY: the request takes this structure.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut notification) } != 0
        {
            let error = std::io::Error::last_os_error();
            return match error.raw_os_error() {
                // K was killed, or interrupted: it is noticed otherwise, or calls again.
                Some(libc::ENOENT | libc::EINTR) => Ok(None),
                _ => Err(Failure::Host("SECCOMP_IOCTL_NOTIF_RECV", error)),
            };
        }
        let id = notification.id;
        let argument = notification.data.args[0];
        match notification.data.nr as u64 {
            vmm::SPACE_CREATE => {
                let value = self.create(id, argument).unwrap_or_else(|error| -error);
                self.answer(id, value, 0);
            }
            vmm::SPACE_DESTROY => {
                self.destroy(argument);
                self.answer(id, 0, 0);
                self.bury();
            }
            vmm::MARK => {
                let now = Snapshot::take(self.ledger.get());
                self.marks.mark(argument, now);
                self.answer(id, 0, 0);
            }
            vmm::CONSOLE => {
                if self.take_output().map_err(Failure::Console)? {
                    self.answer(id, 0, 0);
                } else {
                    *held = Some(id);
                }
            }
            vmm::SHUTDOWN => {
                return Ok(Some(match argument as u32 {
                    0 => Outcome::Success,
                    code => Outcome::Failure(code),
                }));
            }
            vmm::CRASH => {
                let ledger = self.ledger.get();
                return Ok(Some(Outcome::Crashed {
                    state: Some(Box::new(ledger::state(ledger))),
                    message: ledger::message(ledger),
                }));
            }
            vmm::LIMIT => return Ok(Some(Outcome::Limit(Limit::Exits))),
            // The filter lets no other number through.
            _ => self.answer(id, 0, -libc::ENOSYS),
        }
        Ok(None)
    }

    /// Lets K go on. A K that is gone is noticed by its process descriptor.
    fn answer(&self, id: u64, value: i64, error: i32) {
        let answer = libc::seccomp_notif_resp {
            id,
            val: value,
            error,
            flags: 0,
        };
        // SAFETY: the request takes this structure.
        unsafe {
            libc::ioctl(
                self.listener.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &answer,
            )
        };
    }
}

/// Why a call could not be answered.
enum Failure {
    Console(Broken),
    Host(&'static str, std::io::Error),
}

/// Reads a counter descriptor down; whether it had counted anything.
fn drained(fd: &impl AsFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

/// Something waits to be read.
fn readable(fd: &impl AsFd) -> bool {
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    !matches!(rustix::event::poll(&mut fds, Some(&zero)), Ok(0))
}

fn crashed(message: String) -> Outcome {
    Outcome::Crashed {
        state: None,
        message,
    }
}

fn engine_failed(operation: &'static str, source: std::io::Error) -> Outcome {
    Outcome::EngineError {
        state: None,
        error: EngineError::Host { operation, source },
    }
}
