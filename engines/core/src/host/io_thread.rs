//! The I/O thread: serves the doorbells that the host's kernel takes from the guest, while the guest
//! goes on.
//!
//! There is one for all devices of a machine, and none where doorbells are exits. It waits for the
//! doorbells' eventfds, for the descriptors of the devices' backends, and for the kernel's word
//! that the guest has ended an interrupt. The vCPU's thread reaches the same devices for everything
//! that is no doorbell; a lock for each device keeps the two apart.
//!
//! What this does not do: devices whose service may wait for a reader (the console), which stay
//! with the vCPU's thread.
//!
//! Invariant: an eventfd is drained before its device is looked at, so nothing rung is lost; and
//! the thread has ended before the machine is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::devices::virtio::Mmio;
use crate::devices::{Action, Device};
use crate::doorbell::Passed;
use crate::interrupt::Interrupts;

/// A transport that two threads reach.
pub(crate) type Shared = Arc<Mutex<Mmio>>;

fn lock(transport: &Shared) -> MutexGuard<'_, Mmio> {
    transport.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd as doorbells and interrupts have it.
///
/// # Errors
/// The host's, if it has no descriptors left.
pub(crate) fn event() -> io::Result<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

/// Takes what an eventfd holds; 0 if it was not signalled.
fn drain(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Ok(_) | Err(_) => 0,
    }
}

/// The vCPU's side of a transport that the I/O thread serves. Its descriptor is the thread's.
pub(crate) struct Remote {
    name: &'static str,
    transport: Shared,
}

impl Remote {
    pub(crate) fn new(name: &'static str, transport: Shared) -> Self {
        Remote { name, transport }
    }
}

impl Device for Remote {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        lock(&self.transport).read(offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        lock(&self.transport).write(offset, data)
    }

    fn deadline(&self) -> Option<u64> {
        lock(&self.transport).deadline()
    }

    fn advance(&mut self, now: u64) {
        lock(&self.transport).advance(now);
    }
}

/// An interrupt line that the host's kernel drives: raised by an eventfd, lowered by the guest's end
/// of interrupt.
pub(crate) struct Signal {
    event: OwnedFd,
    passed: Arc<Passed>,
}

impl Signal {
    pub(crate) fn new(event: OwnedFd, passed: Arc<Passed>) -> Self {
        Signal { event, passed }
    }
}

impl Interrupts for Signal {
    fn set_line(&self, _number: u8, level: bool) {
        if level {
            self.passed.interrupted();
            // Full, it is signalled already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }
}

/// A transport as the thread serves it.
pub(crate) struct Station {
    pub(crate) transport: Shared,
    /// By queue.
    pub(crate) doorbells: Vec<OwnedFd>,
    /// A copy of the backend's descriptor.
    pub(crate) backend: Option<OwnedFd>,
    /// Signalled when the guest ends the device's interrupt, where the kernel lowers the line.
    pub(crate) ended: Option<OwnedFd>,
    pub(crate) passed: Arc<Passed>,
}

/// The thread; it ends when this is dropped.
pub(crate) struct IoThread {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host's, if a descriptor or the thread can't be had.
    pub(crate) fn start(stations: Vec<Station>) -> io::Result<Self> {
        let stop = event()?;
        let theirs = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("io".into())
            .spawn(move || serve(&theirs, stations))?;
        Ok(IoThread {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Doorbell(usize),
    Backend,
    Ended,
}

fn serve(stop: &OwnedFd, mut stations: Vec<Station>) {
    super::sharpen_sleeps();
    let mut more = false;
    while let Some(ready) = wait(stop, &stations, more) {
        for (index, source) in ready {
            stations[index].serve(source);
        }
        more = stations.iter().any(Station::go_on);
    }
}

/// Waits until something is to be done, or just looks if there is `more`. None if the thread is to
/// end.
fn wait(stop: &OwnedFd, stations: &[Station], more: bool) -> Option<Vec<(usize, Source)>> {
    let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
    let mut sources = Vec::with_capacity(16);
    for (index, station) in stations.iter().enumerate() {
        let doorbells = station.doorbells.iter().enumerate();
        let own = doorbells
            .map(|(queue, fd)| (fd, Source::Doorbell(queue)))
            .chain(station.backend.iter().map(|fd| (fd, Source::Backend)))
            .chain(station.ended.iter().map(|fd| (fd, Source::Ended)));
        for (fd, source) in own {
            fds.push(PollFd::new(fd, PollFlags::IN));
            sources.push((index, source));
        }
    }
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    while rustix::event::poll(&mut fds, more.then_some(&zero)).is_err() {}
    let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
    if ready.next() == Some(true) {
        return None;
    }
    Some(
        sources
            .into_iter()
            .zip(ready)
            .filter_map(|(source, ready)| ready.then_some(source))
            .collect(),
    )
}

impl Station {
    fn serve(&mut self, source: Source) {
        match source {
            Source::Doorbell(queue) => {
                self.passed.rang(drain(&self.doorbells[queue]));
                lock(&self.transport).notify(queue);
            }
            Source::Backend => {
                // One that is gone would be ready for ever.
                if lock(&self.transport).host_ready() == Action::Hold {
                    self.backend = None;
                }
            }
            Source::Ended => {
                if let Some(ended) = &self.ended {
                    drain(ended);
                }
                lock(&self.transport).ask_again();
            }
        }
    }

    /// Serves what was left over. True if there is more yet.
    fn go_on(&self) -> bool {
        let mut transport = lock(&self.transport);
        if transport.deadline().is_some() {
            transport.advance(0);
        }
        transport.deadline().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::register;
    use crate::interrupt::Line;

    /// The thread ends when it is told to, whatever it waits for.
    #[test]
    fn it_ends_with_its_value() {
        let line = Line::disconnected();
        let transport = Arc::new(Mutex::new(Mmio::vacant(line)));
        let doorbell = event().unwrap();
        let bell = doorbell.try_clone().unwrap();
        let passed = Arc::new(Passed::new("none"));
        let station = Station {
            transport: Arc::clone(&transport),
            doorbells: vec![doorbell],
            backend: None,
            ended: Some(event().unwrap()),
            passed: Arc::clone(&passed),
        };
        let io = IoThread::start(vec![station]).unwrap();
        let mut remote = Remote::new("none", transport);
        let mut word = [0xff; 4];
        remote.read(register::DEVICE_ID, &mut word);
        assert_eq!(word, [0; 4]);
        for _ in 0..3 {
            rustix::io::write(&bell, &1u64.to_ne_bytes()).unwrap();
        }
        let begin = std::time::Instant::now();
        while passed.counts()[0].value < 3 {
            assert!(begin.elapsed().as_secs() < 10, "nobody comes to the door");
            std::thread::yield_now();
        }
        drop(io);
        assert_eq!(passed.counts()[0].value, 3);
    }
}
