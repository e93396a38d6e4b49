//! Devices: one file each.
//!
//! A device answers reads and writes of its own registers and tells the run loop through
//! [`Action`] what else must happen. It never blocks on guest progress and never fails the VMM:
//! what a guest does wrong reads as ones or is ignored.

mod exit;
mod ignored;
pub mod lapic;
mod mark;
mod pic;
pub mod serial;

pub use exit::ExitPort;
pub use ignored::Ignored;
pub use lapic::Lapic;
pub use mark::MarkPort;
pub use pic::Pic;
pub use serial::Serial;

/// What the run loop has to do after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing more.
    None,
    /// The guest looked for console input and there is none.
    Poll,
    /// The guest ends with this code.
    Exit(u32),
    /// The guest wrote this value to the mark port.
    Mark(u8),
    /// The host's end of the console is gone.
    ConsoleClosed,
}

/// Registers of a device on the port or memory bus.
pub trait Device {
    /// Name for counters.
    fn name(&self) -> &'static str;

    /// Reads one item of 1 to 8 bytes at `offset` from the device's first register. `data` comes
    /// filled with ones, which is what bytes that the device does not drive read as.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action;

    /// Writes one item of 1 to 8 bytes.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;
}
