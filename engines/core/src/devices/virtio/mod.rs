//! Paravirtual devices: virtio 1.2 block, network and console, and the transport over MMIO.
//!
//! | module | what |
//! |---|---|
//! | `chain` | one request: a descriptor chain, checked and taken apart |
//! | `ring` | one split virtqueue: requests out, completions in, who wants to be notified |
//! | `core` | a device's life: features, status, configuration; knows no transport |
//! | `mmio` | registers of the MMIO transport around a core |
//! | `block`, `net`, `console` | the devices |
//!
//! # Who does what
//! A transport (here [`Mmio`]; another engine may bring its own) turns what the driver does into
//! calls of [`Core`], and what [`Core`] answers, a [`Notice`], into an interrupt. [`Core`] owns the
//! [`Ring`]s and hands them to the [`VirtioDevice`], which takes requests out of a ring, serves
//! them and puts them back as used.
//!
//! Requests are served where the notification arrives, on the vCPU's thread: on return from its
//! doorbell a driver that polls finds everything done, and a batch of requests costs one exit. An
//! interrupt is asked for only if the driver wants one (used_event, or the flag without it).
//!
//! # Hostile drivers
//! Everything in guest memory may be anything, and may change while it is looked at. A descriptor
//! is read once; a chain is bounded by the queue's size; addresses are checked against RAM; work
//! per notification is bounded. A driver that breaks the rules of the ring gets
//! DEVICE_NEEDS_RESET (2.1.2), and the device does nothing until it is reset. A request that is
//! well-formed but wrong gets the device's own error.

pub mod block;
pub mod chain;
pub mod console;
pub mod core;
pub mod mmio;
pub mod net;
pub mod ring;

use std::os::fd::BorrowedFd;

pub use self::block::Block;
pub use self::chain::Chain;
pub use self::console::Console;
pub use self::core::{Core, Notice};
pub use self::mmio::Mmio;
pub use self::net::Net;
pub use self::ring::Ring;
use crate::devices::Action;

/// Feature bits that belong to no device type (6 Reserved Feature Bits).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: the driver follows 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// How a driver broke the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A ring that is misaligned, not in RAM, or of a size that is none.
    #[error("a ring is misaligned, outside of memory or of a wrong size")]
    Ring,
    /// The available index is further ahead than the ring is long.
    #[error("an available index that jumped")]
    Index,
    /// A chain that loops, leaves its table, is longer than its queue, or ends nowhere.
    #[error("a descriptor chain that loops or ends nowhere")]
    Chain,
    /// A readable descriptor after a writable one.
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// A buffer that is not in RAM.
    #[error("a buffer outside of memory")]
    Address,
    /// A request without room for its header or its status.
    #[error("a request without header or status")]
    Request,
}

/// One type of device, between its rings and its backend.
pub trait VirtioDevice: Send {
    /// Device type (5 Device Types).
    fn id(&self) -> u32;

    /// Name for counters.
    fn name(&self) -> &'static str;

    /// Features offered beside [`feature::COMMON`].
    fn features(&self) -> u64;

    /// Size of each queue, a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Copies configuration from `offset` on into `data`; bytes beyond its end stay as they are.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready, having accepted `features`.
    fn activate(&mut self, features: u64);

    /// The driver starts over.
    fn reset(&mut self);

    /// The driver says that it put something into queue `index`.
    ///
    /// # Errors
    /// [`Broken`], after which no ring is touched until a reset.
    fn notified(&mut self, index: usize, rings: &mut [Ring]) -> Result<(), Broken>;

    /// The host's descriptor became readable; `rings` is None while there is no driver.
    ///
    /// # Errors
    /// As [`notified`](VirtioDevice::notified).
    fn host_ready(&mut self, _rings: Option<&mut [Ring]>) -> Result<(), Broken> {
        Ok(())
    }

    /// Descriptor that [`host_ready`](VirtioDevice::host_ready) waits for, while there is anything to
    /// wait for.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// True once after the configuration has changed.
    fn take_config_change(&mut self) -> bool {
        false
    }

    /// What the run loop has to do after requests were served.
    fn action(&self) -> Action {
        Action::None
    }
}

/// Copies the part of `config` from `offset` on that there is.
fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (to, from) in data.iter_mut().zip(config.get(start..).unwrap_or(&[])) {
        *to = *from;
    }
}
