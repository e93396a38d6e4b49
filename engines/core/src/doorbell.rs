//! Doorbells: how a driver's notification reaches its device.
//!
//! Either the guest leaves for the VMM, and the vCPU's thread serves the request before the guest
//! goes on: nothing is hidden, and each notification is an exit ([`Doorbell::Exit`]). Or the host's
//! kernel takes the write, signals an eventfd and lets the guest go on; a thread beside the vCPU's
//! serves the request and asks for the interrupt by another eventfd ([`Doorbell::Eventfd`]). Then
//! guest and device work at the same time, and what was an exit is counted as an event.
//!
//! An engine says what its host can do by a [`Doorbells`]; what is done with it is the business of
//! `IoThread`.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::GuestPhys;
use crate::exit::ExitKind;
use crate::tally::HostStat;

/// How a driver's notification reaches its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbell {
    /// By an exit to the VMM: the same in every mode, and counted where all exits are.
    #[default]
    Exit,
    /// By an eventfd of the host's kernel, on another thread.
    Eventfd,
}

impl Doorbell {
    /// The name that stands in labels and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Doorbell::Exit => "exit",
            Doorbell::Eventfd => "eventfd",
        }
    }
}

/// What an engine's host kernel does between guest and devices by itself.
pub trait Doorbells: Send + Sync {
    /// From now on the guest's 32-bit write of `value` at `address` signals `event`, and does not
    /// leave for the VMM.
    ///
    /// # Errors
    /// The host's: then those writes leave, as all others do.
    fn listen(&self, address: GuestPhys, value: u32, event: BorrowedFd<'_>) -> io::Result<()>;

    /// From now on a signal of `event` raises interrupt line `number`. It falls when the guest
    /// ends the interrupt, which signals `ended`: a device that still asks has to signal again.
    /// False if lines are not the kernel's, but the machine's.
    ///
    /// # Errors
    /// The host's: then the line is nobody's.
    fn interrupt(
        &self,
        number: u8,
        event: BorrowedFd<'_>,
        ended: BorrowedFd<'_>,
    ) -> io::Result<bool>;
}

/// The source name of what is counted here.
pub const SOURCE: &str = "eventfd";

/// What passed by without an exit, for one device. Counted by the thread that serves it.
#[derive(Debug)]
pub(crate) struct Passed {
    device: &'static str,
    /// Notifications of the guest.
    rings: AtomicU64,
    /// Signals that asked for an interrupt.
    interrupts: AtomicU64,
}

impl Passed {
    pub(crate) fn new(device: &'static str) -> Self {
        Passed {
            device,
            rings: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
        }
    }

    /// Adds what a doorbell's eventfd held: each write of the guest's adds one to it.
    pub(crate) fn rang(&self, times: u64) {
        self.rings.fetch_add(times, Ordering::Relaxed);
    }

    pub(crate) fn interrupted(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters as they stand. They are no exits, and have a source of their own.
    pub(crate) fn counts(&self) -> [HostStat; 2] {
        let stat = |what: &str, kind, counter: &AtomicU64| HostStat {
            source: SOURCE,
            kind,
            name: format!("{what} {}", self.device),
            value: counter.load(Ordering::Relaxed),
        };
        [
            stat("ioeventfd", ExitKind::Mmio, &self.rings),
            stat("irqfd", ExitKind::Irq, &self.interrupts),
        ]
    }
}
