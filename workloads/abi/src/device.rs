//! Devices of the `aware` flavour: virtio (1.2) without registers.
//!
//! What a transport has registers for lies in a page of guest memory here, one [`Device`] for each
//! device: frame `StartInfo::devices`, where the host sets [`feature::DEVICES`]. Rings are split
//! virtqueues anywhere in guest memory, addresses are guest-physical: frame number times 4096.
//!
//! The guest writes what it wants and then rings the doorbell, `evtchn::SEND` to the console's port;
//! the host looks at all devices and at all their queues then. What the host has to say it says
//! by raising that same port: used buffers that the driver wants to hear of, and answered orders.
//! Who waits clears the port's pending bit, looks, and sleeps by `sched::POLL`.
//!
//! | order | the host |
//! |---|---|
//! | [`order::START`] | resets the device, takes features and queues, answers [`answer::DONE`] or [`answer::REFUSED`] |
//! | [`order::STOP`] | resets the device, touches no ring any more, answers [`answer::DONE`] |
//!
//! The guest sets `answer` to 0 before it gives an order, and gives none before the last is
//! answered.
//!
//! [`feature::DEVICES`]: crate::hypercall::feature::DEVICES

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Devices in a page.
pub const DEVICES: usize = 4;
/// Queues of a device.
pub const QUEUES: usize = 2;

/// Values of [`Device::order`].
pub mod order {
    /// Nothing.
    pub const NONE: u32 = 0;
    /// Reset, then work.
    pub const START: u32 = 1;
    /// Reset.
    pub const STOP: u32 = 2;
}

/// Values of [`Device::answer`].
pub mod answer {
    /// It is done.
    pub const DONE: u32 = 1;
    /// Features or queues are not what the device takes; it is reset.
    pub const REFUSED: u32 = 2;
}

/// Where a queue is to lie.
#[derive(Debug)]
#[repr(C)]
pub struct QueuePlace {
    /// The host's: the largest size.
    pub most: AtomicU32,
    /// Its size, a power of two.
    pub size: AtomicU32,
    /// Address of the descriptor table.
    pub descriptors: AtomicU64,
    /// Address of the driver area.
    pub driver: AtomicU64,
    /// Address of the device area.
    pub device: AtomicU64,
}

/// A device. What the host writes it writes once, before the guest starts, but `answer`.
#[derive(Debug)]
#[repr(C)]
pub struct Device {
    /// The host's: virtio's device type; 0 is none.
    pub id: AtomicU32,
    /// The guest's: an [`order`]; the host takes it back to 0.
    pub order: AtomicU32,
    /// The host's, and the guest's to clear: an [`answer`].
    pub answer: AtomicU32,
    /// Unused.
    pub reserved: AtomicU32,
    /// The host's: features that it offers.
    pub offered: AtomicU64,
    /// The guest's: features that it accepts.
    pub accepted: AtomicU64,
    /// The host's: the device's configuration, as far as it fits.
    pub configuration: [AtomicU32; 16],
    /// The queues.
    pub queues: [QueuePlace; QUEUES],
}

/// The page.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Page {
    /// The devices.
    pub devices: [Device; DEVICES],
}
