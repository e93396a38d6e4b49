//! The devices of this machine, as workloads use them: one open at a time.

#[cfg(feature = "hybrid")]
use crate::virtio::{Card, Disk, LINES};
#[cfg(not(feature = "hybrid"))]
use crate::{ata, ata::Disk, ne2000, ne2000::Card};
use crate::{
    clock,
    console::Terminal,
    timers::{self, OneShot},
};
use core::cell::UnsafeCell;
use programs::{
    Refusal,
    io::{Direction, Histogram, Io, NO_DEVICE, Timer, histogram::Scale},
    session::Console,
};

/// What is open.
#[derive(Debug)]
enum Open {
    Nothing,
    Disk(Disk),
    Card(Card),
    Timer(OneShot),
    /// With the number of interrupts so far.
    SelfInterrupt(u64),
}

/// The devices. There is one of it.
#[derive(Debug)]
pub(crate) struct Devices {
    open: Open,
}

/// Too large for a kernel's stack.
struct Latencies(UnsafeCell<Histogram>);

// SAFETY: there is one processor and one `Devices`, through which alone it is reached.
unsafe impl Sync for Latencies {}

static LATENCIES: Latencies = Latencies(UnsafeCell::new(Histogram::new()));

/// Lets a line's device take its interrupt back. Called by the interrupt handler.
pub(crate) fn acknowledge(line: u8) {
    #[cfg(feature = "hybrid")]
    if LINES.contains(&line) {
        crate::virtio::acknowledge(line);
    }
    #[cfg(not(feature = "hybrid"))]
    match line {
        ata::LINE => ata::acknowledge(),
        ne2000::LINE => ne2000::acknowledge(),
        _ => {}
    }
}

impl Devices {
    /// Nothing is open.
    ///
    /// # Safety
    /// It is called once.
    pub(crate) const unsafe fn new() -> Self {
        Devices {
            open: Open::Nothing,
        }
    }

    /// See [`programs::Platform::open`]. What an earlier run that failed has left open is closed.
    pub(crate) fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        self.close();
        clock::set_up();
        self.open = match io {
            Io::Console => Open::Nothing,
            Io::Block(block) => Open::Disk(Disk::open(block, size)?),
            Io::Echo | Io::Stream => Open::Card(Card::open()?),
            Io::Timer(timer) => Open::Timer(OneShot::open(timer)?),
            // Every machine with a local APIC has this one, so its figures compare.
            Io::HaltWake => Open::Timer(OneShot::open(Timer::Lapic)?),
            Io::SelfInterrupt => {
                timers::open_self(self.latencies())?;
                Open::SelfInterrupt(0)
            }
        };
        Ok(())
    }

    /// See [`programs::Platform::close`].
    pub(crate) fn close(&mut self) -> u64 {
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
            Open::Timer(timer) => timer.close(),
            Open::SelfInterrupt(count) => count,
        }
    }

    #[inline(always)]
    pub(crate) fn latencies(&mut self) -> &mut Histogram {
        // SAFETY: the caller has this, of which there is one, to itself for as long.
        unsafe { &mut *LATENCIES.0.get() }
    }

    pub(crate) fn scale(&self) -> Option<Scale> {
        clock::scale()
    }

    #[inline(always)]
    fn disk(&mut self) -> Result<&mut Disk, Refusal> {
        match &mut self.open {
            Open::Disk(disk) => Ok(disk),
            Open::Nothing | Open::Card(_) | Open::Timer(_) | Open::SelfInterrupt(_) => {
                Err(Refusal::Unsupported(NO_DEVICE))
            }
        }
    }

    #[inline(always)]
    fn card(&mut self) -> Result<&mut Card, Refusal> {
        match &mut self.open {
            Open::Card(card) => Ok(card),
            Open::Nothing | Open::Disk(_) | Open::Timer(_) | Open::SelfInterrupt(_) => {
                Err(Refusal::Unsupported(NO_DEVICE))
            }
        }
    }

    #[inline(always)]
    pub(crate) fn transfer(
        &mut self,
        direction: Direction,
        blocks: &[u64],
        slot: u64,
    ) -> Result<(), Refusal> {
        self.disk()?.transfer(direction, blocks, slot)
    }

    pub(crate) fn flush_disk(&mut self) -> Result<(), Refusal> {
        self.disk()?.flush()
    }

    pub(crate) fn station(&mut self) -> u64 {
        self.card().map_or(0, |card| card.station)
    }

    #[inline(always)]
    pub(crate) fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        self.card()?.transmit(slot, count, bytes)
    }

    #[inline(always)]
    pub(crate) fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        self.card()?.receive()
    }

    /// See [`programs::Platform::send_line`]. Leaves the console with nothing on its way.
    pub(crate) fn send_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let mut console = Terminal::again();
        console.write(line);
        console.flush();
        Ok(())
    }

    /// See [`programs::Platform::expire`], and [`programs::Platform::wake`] if `whole`.
    #[inline(always)]
    pub(crate) fn expire(&mut self, microseconds: u64, whole: bool) -> Result<u64, Refusal> {
        // SAFETY: as in `latencies`; the open device is another object.
        let latencies = unsafe { &mut *LATENCIES.0.get() };
        match &mut self.open {
            Open::Timer(timer) => timer.expire(microseconds, whole, latencies),
            Open::Nothing | Open::Disk(_) | Open::Card(_) | Open::SelfInterrupt(_) => {
                Err(Refusal::Unsupported(NO_DEVICE))
            }
        }
    }

    /// See [`programs::Platform::self_interrupt`].
    #[inline(always)]
    pub(crate) fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        let taken = timers::self_interrupt(self.latencies())?;
        if let Open::SelfInterrupt(count) = &mut self.open {
            *count += taken;
            return Ok(*count);
        }
        Ok(taken)
    }
}
