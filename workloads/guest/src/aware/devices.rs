//! Devices as an aware kernel has them: the console's ring, the host's one-shot timer, events.

use super::{console::Ring, events, hypercall};
use crate::{
    cpu,
    virtio::{Card, Disk},
};
use abi::hypercall::{StartInfo, evtchn};
use core::cell::UnsafeCell;
use programs::{
    Refusal,
    io::{Histogram, Io, NO_DEVICE, Timer, histogram::Scale},
    session::Console,
};

/// What a hypercall that has failed says of the run.
const REFUSED: Refusal = Refusal::Broken("the host refuses a hypercall");

/// What is open.
#[derive(Debug)]
enum Open {
    Nothing,
    Disk(Disk),
    Card(Card),
    /// A timer or a port, with the events so far.
    Port {
        port: u64,
        count: u64,
    },
}

/// The devices.
pub(super) struct Devices {
    open: Open,
    console: Ring,
    latencies: &'static mut Histogram,
}

/// Too large for a kernel's stack.
struct Latencies(UnsafeCell<Histogram>);

// SAFETY: there is one processor, and `Devices::new` takes the only reference.
unsafe impl Sync for Latencies {}

static LATENCIES: Latencies = Latencies(UnsafeCell::new(Histogram::new()));

impl Devices {
    /// Nothing is open.
    ///
    /// # Safety
    /// It is called once.
    pub(super) unsafe fn new(info: &StartInfo) -> Self {
        Devices {
            open: Open::Nothing,
            console: Ring::new(info),
            // SAFETY: the caller's contract: there is no other reference.
            latencies: unsafe { &mut *LATENCIES.0.get() },
        }
    }

    /// See [`programs::Platform::open`]. What an earlier run that failed has left open is closed.
    pub(super) fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        self.close();
        match io {
            Io::Console => {}
            Io::Block(block) => self.open = Open::Disk(Disk::open(block, size)?),
            Io::Echo | Io::Stream => self.open = Open::Card(Card::open()?),
            Io::Timer(Timer::Pit | Timer::Lapic | Timer::Deadline) => {
                return Err(Refusal::Unsupported(
                    "an aware guest has none of a PC's timers",
                ));
            }
            Io::Timer(Timer::Paravirtual) | Io::HaltWake => {
                let port = hypercall::event_channel(evtchn::BIND_VIRQ, evtchn::VIRQ_TIMER);
                let port = port.map_err(|_| REFUSED)?;
                events::clear(port);
                self.open = Open::Port { port, count: 0 };
                self.expire(50)?;
                self.open = Open::Port { port, count: 0 };
            }
            Io::SelfInterrupt => {
                let port = hypercall::event_channel(evtchn::BIND_IPI, 0);
                let port = port.map_err(|_| REFUSED)?;
                events::mask();
                self.open = Open::Port { port, count: 0 };
                hypercall::event_channel(evtchn::UNMASK, port).map_err(|_| REFUSED)?;
            }
        }
        Ok(())
    }

    /// See [`programs::Platform::close`].
    pub(super) fn close(&mut self) -> u64 {
        match core::mem::replace(&mut self.open, Open::Nothing) {
            Open::Nothing => 0,
            Open::Disk(disk) => {
                disk.close();
                0
            }
            Open::Card(card) => {
                card.close();
                0
            }
            Open::Port { port, count } => {
                // Neither can fail for a port that is bound, and a timer's that is not armed.
                let _ = hypercall::stop_timer();
                let _ = hypercall::event_channel(evtchn::CLOSE, port);
                count
            }
        }
    }

    #[inline(always)]
    pub(super) fn latencies(&mut self) -> &mut Histogram {
        self.latencies
    }

    pub(super) fn scale(&self) -> Option<Scale> {
        events::rate().and_then(Scale::new)
    }

    #[inline(always)]
    pub(super) fn disk(&mut self) -> Result<&mut Disk, Refusal> {
        match &mut self.open {
            Open::Disk(disk) => Ok(disk),
            Open::Nothing | Open::Card(_) | Open::Port { .. } => {
                Err(Refusal::Unsupported(NO_DEVICE))
            }
        }
    }

    #[inline(always)]
    pub(super) fn card(&mut self) -> Result<&mut Card, Refusal> {
        match &mut self.open {
            Open::Card(card) => Ok(card),
            Open::Nothing | Open::Disk(_) | Open::Port { .. } => {
                Err(Refusal::Unsupported(NO_DEVICE))
            }
        }
    }

    pub(super) fn send_line(&mut self, line: &[u8]) {
        self.console.write(line);
    }

    /// See [`programs::Platform::expire`]. There is no handler: what follows the sleep begins at once.
    #[inline(always)]
    pub(super) fn expire(&mut self, microseconds: u64) -> Result<u64, Refusal> {
        let Open::Port { port, count } = &mut self.open else {
            return Err(Refusal::Unsupported(NO_DEVICE));
        };
        let interval = microseconds * 1000;
        let start = cpu::time_stamp();
        let due = events::system_time() + interval;
        hypercall::set_timer(due).map_err(|_| REFUSED)?;
        hypercall::poll(1 << *port).map_err(|_| REFUSED)?;
        let end = cpu::time_stamp();
        events::clear(*port);
        let scale = events::rate().and_then(Scale::new).ok_or(REFUSED)?;
        let interval = scale.ticks(interval);
        let taken = end.wrapping_sub(start);
        // What the clock page's rate may be off by.
        if taken + interval / 64 + scale.ticks(2000) < interval {
            return Err(Refusal::Broken("the timer expires before its time"));
        }
        self.latencies.record(taken.saturating_sub(interval));
        *count += 1;
        Ok(*count)
    }

    /// See [`programs::Platform::self_interrupt`]: an event to itself, taken at the unmasking.
    #[inline(always)]
    pub(super) fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        let Open::Port { port, count } = &mut self.open else {
            return Err(Refusal::Unsupported(NO_DEVICE));
        };
        let before = events::taken();
        let start = cpu::time_stamp();
        hypercall::event_channel(evtchn::SEND, *port).map_err(|_| REFUSED)?;
        events::unmask();
        let taken = cpu::time_stamp().wrapping_sub(start);
        events::mask();
        if events::taken().wrapping_sub(before) != 1 {
            return Err(Refusal::Broken("the event is not taken once"));
        }
        self.latencies.record(taken);
        *count += 1;
        Ok(*count)
    }
}

impl core::fmt::Debug for Devices {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Devices")
    }
}
