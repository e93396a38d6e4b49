//! Devices: one file each.
//!
//! A device answers reads and writes of its own registers and tells the run loop through
//! [`Action`] what else must happen. It never blocks on guest progress and never fails the VMM:
//! what a guest does wrong reads as ones or is ignored.

pub mod ata;
pub(crate) mod board;
mod debug_console;
mod exit;
mod fw_cfg;
mod i8042;
mod ignored;
pub mod ioapic;
pub mod irqchip;
pub mod lapic;
pub mod lapics;
mod mark;
pub mod ne2000;
pub mod pic;
pub mod pit;
pub(crate) mod power;
mod reset;
pub mod rtc;
pub mod serial;
pub mod testdev;
pub mod virtio;

use std::os::fd::BorrowedFd;

pub use ata::Ata;
pub use debug_console::DebugConsole;
pub use exit::ExitPort;
pub use fw_cfg::FwCfg;
pub use i8042::Keyboard;
pub use ignored::Ignored;
pub use ioapic::IoApic;
pub use irqchip::Irqchip;
pub use lapic::Lapic;
pub use lapics::Lapics;
pub use mark::MarkPort;
pub use ne2000::Ne2000;
pub use pic::Pics;
pub use pit::Pit;
pub use power::Power;
pub use reset::ResetPorts;
pub use rtc::Rtc;
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
    /// The guest pulled the reset line.
    Reset,
    /// The guest switched its machine off.
    Off,
    /// The guest suspended its machine to memory.
    Suspend,
    /// The guest wrote this value to the mark port.
    Mark(u8),
    /// The host's end of the console is gone.
    ConsoleClosed,
    /// From [`Device::host_ready`]: there is no room for what the descriptor holds. It is watched
    /// again after the guest's next access to the device.
    Hold,
}

/// Registers of a device on the port or memory bus, and what it waits for.
///
/// All of it is called on a vCPU's thread, by one at a time. Times are the machine's: nanoseconds of the guest's
/// clock, which never goes back and which is never used to measure.
pub trait Device: Send {
    /// Name for counters.
    fn name(&self) -> &'static str;

    /// Reads one item of 1 to 8 bytes at `offset` from the device's first register. `data` comes
    /// filled with ones, which is what bytes that the device does not drive read as.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action;

    /// Writes one item of 1 to 8 bytes.
    fn write(&mut self, offset: u64, data: &[u8]) -> Action;

    /// Reads many items of `size` bytes at the same offset (`rep ins`). For devices with a data
    /// register that can do better than one by one.
    fn read_items(&mut self, offset: u64, size: usize, data: &mut [u8]) -> Action {
        let mut action = Action::None;
        for item in data.chunks_exact_mut(size) {
            action = self.read(offset, item);
        }
        action
    }

    /// Writes many items (`rep outs`). An action ends it early.
    fn write_items(&mut self, offset: u64, size: usize, data: &[u8]) -> Action {
        for item in data.chunks_exact(size) {
            let action = self.write(offset, item);
            if action != Action::None {
                return action;
            }
        }
        Action::None
    }

    /// How many more writes to its data register nobody would notice: the device does nothing but
    /// keep them before the one after them. `u32::MAX` while it expects none. Asked after each access
    /// to a device that was added with [`Machine::add_posted`](crate::Machine::add_posted).
    fn postable(&self) -> u32 {
        0
    }

    /// When [`advance`](Device::advance) is wanted next, if ever. Asked after each access to the
    /// device, so it must be cheap.
    fn deadline(&self) -> Option<u64> {
        None
    }

    /// Time has come to `now`, which may be later than the deadline asked for.
    fn advance(&mut self, _now: u64) {}

    /// A descriptor of the host whose readability matters to the device. Asked once, when the
    /// machine is put together.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The descriptor has become readable. It is watched again when this returns, so a device that
    /// leaves it readable for want of room answers [`Action::Hold`].
    fn host_ready(&mut self) -> Action {
        Action::None
    }

    /// What the guest left for its firmware to find after a reset, from the device that keeps it; 0 is
    /// nothing.
    fn shutdown_code(&self) -> u8 {
        0
    }
}

/// Items that may be posted where `bytes` bytes make something happen: none is wider than 4 bytes.
fn posted_items(bytes: usize) -> u32 {
    (bytes / 4).saturating_sub(1) as u32
}
