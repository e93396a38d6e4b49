//! I/O workloads: what devices are for. One iteration is one request, frame, line or expiry.
//!
//! Each file holds the loop of one kind of device, generic over the machine, whose drivers do the
//! rest. Data lies in the arena, in slots of one page, so that the bulk of laying it out and of
//! verifying it is an application's work, done as a [`Kernel`](crate::Kernel) outside the window;
//! inside it the loop touches two words of each request.

pub mod block;
pub mod console;
pub mod histogram;
pub mod net;
pub mod timer;

use crate::{Platform, Refusal, fold};

pub use block::{BLOCK_BYTES, Block, Direction, Order};
pub use histogram::Histogram;
pub use timer::Timer;

/// Slots of the arena that data moves through.
pub const SLOTS: u64 = 256;
/// Words of a slot: a page.
pub const SLOT_WORDS: u64 = 512;

/// Why a machine without the device refuses.
pub const NO_DEVICE: &str = "this machine has no such device";

/// A use of a device. Each says what closing returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Closes with 0.
    Console,
    /// Closes with 0.
    Block(Block),
    /// A frame out, its echo back. Closes with 0.
    Echo,
    /// Frames out, a summary back. Closes with 0.
    Stream,
    /// Closes with the number of expiries since it was opened.
    Timer(Timer),
    /// Closes with the number of expiries since it was opened.
    HaltWake,
    /// Closes with the number of interrupts since it was opened.
    SelfInterrupt,
}

impl Io {
    /// Largest size.
    #[inline]
    pub(crate) fn most(self) -> u64 {
        match self {
            Io::Console => console::MOST,
            Io::Block(_) => block::MOST,
            Io::Echo | Io::Stream => net::MOST,
            Io::Timer(Timer::Pit) => timer::PIT_MOST,
            Io::Timer(Timer::Lapic | Timer::Deadline | Timer::Paravirtual) | Io::HaltWake => {
                timer::MOST
            }
            Io::SelfInterrupt => 1,
        }
    }

    /// Words of arena that it needs.
    #[inline]
    pub(crate) fn words(self) -> u64 {
        match self {
            Io::Block(_) | Io::Echo | Io::Stream => SLOTS * SLOT_WORDS,
            Io::Console | Io::Timer(_) | Io::HaltWake | Io::SelfInterrupt => 0,
        }
    }

    /// Opens the device, lays out data, and tries one request.
    #[inline]
    pub(crate) fn prepare<P: Platform>(
        self,
        platform: &mut P,
        size: u64,
        iterations: u64,
    ) -> Result<(), Refusal> {
        platform.open(self, size)?;
        match self {
            Io::Block(block) => block::prepare(platform, block, size, iterations)?,
            Io::Echo | Io::Stream => net::prepare(platform, self, size)?,
            Io::Console | Io::Timer(_) | Io::HaltWake | Io::SelfInterrupt => {}
        }
        if let Some(latencies) = platform.latencies() {
            latencies.clear();
        }
        Ok(())
    }

    /// Does it `iterations` times.
    #[inline]
    pub(crate) fn run<P: Platform>(
        self,
        platform: &mut P,
        size: u64,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        match self {
            Io::Console => console::lines(platform, size, iterations),
            Io::Block(block) => block::requests(platform, block, size, iterations),
            Io::Echo => net::echoes(platform, size, iterations),
            Io::Stream => net::stream(platform, size, iterations),
            Io::Timer(timer) => timer::expiries(platform, timer, size, iterations),
            Io::HaltWake => timer::wakes(platform, size, iterations),
            Io::SelfInterrupt => timer::self_interrupts(platform, iterations),
        }
    }

    /// Verifies what the window can't, closes the device, folds what that returns.
    #[inline]
    pub(crate) fn conclude<P: Platform>(
        self,
        platform: &mut P,
        sum: u64,
        size: u64,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        let verified = match self {
            Io::Block(block) => block::verify(platform, block, size, iterations),
            Io::Console
            | Io::Echo
            | Io::Stream
            | Io::Timer(_)
            | Io::HaltWake
            | Io::SelfInterrupt => Ok(0),
        };
        let left = platform.close(self);
        Ok(fold(fold(sum, verified?), left))
    }
}

/// Times one request.
#[inline(always)]
fn timed<P: Platform, T>(
    platform: &mut P,
    request: impl FnOnce(&mut P) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let start = platform.ticks();
    let result = request(platform)?;
    let taken = platform.ticks().wrapping_sub(start);
    if let Some(latencies) = platform.latencies() {
        latencies.record(taken);
    }
    Ok(result)
}
