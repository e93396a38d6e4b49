//! A device's life (3.1): features are offered and accepted, queues set up, the driver is ready.
//!
//! This is what transports have in common. A transport calls it with what the driver does, and
//! carries the [`Notice`] that comes back to the driver. [`Mmio`](super::Mmio) is one; an engine
//! with hypercalls can bring another, and serve the rings on a thread of its own, since nothing
//! here is tied to a vCPU.
//!
//! Invariant: rings are touched only between DRIVER_OK and a reset, and not at all once the device
//! needs one.

use std::os::fd::BorrowedFd;

use super::ring::{Layout, Ring};
use super::{Broken, VirtioDevice, feature};
use crate::devices::Action;
use crate::dma::DeviceMemory;

/// Device status bits (2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// It is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device can't go on.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// What the driver has to be told, and the run loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Queues with used buffers that the driver wants to hear of, one bit each.
    pub used: u32,
    /// The configuration, or the need of a reset, is new.
    pub config: bool,
    /// Requests are left: notify the same queue again soon. Happens only with a driver that adds
    /// requests while others are served.
    pub more: bool,
    /// What the run loop has to do.
    pub action: Action,
}

impl Notice {
    /// Nothing to tell.
    pub const NONE: Notice = Notice {
        used: 0,
        config: false,
        more: false,
        action: Action::None,
    };
}

/// A device without its transport.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    rings: Vec<Ring>,
    layouts: Vec<Layout>,
    offered: u64,
    accepted: u64,
    status: u8,
    generation: u32,
    broken: Option<Broken>,
}

impl Core {
    /// `device`, reset, over guest memory.
    pub fn new(device: Box<dyn VirtioDevice>, memory: &DeviceMemory) -> Self {
        let sizes = device.queue_sizes();
        let rings = sizes
            .iter()
            .map(|&most| Ring::new(most, memory.clone()))
            .collect();
        let mut core = Core {
            offered: device.features() | feature::COMMON,
            device,
            rings,
            layouts: vec![Layout::default(); sizes.len()],
            accepted: 0,
            status: 0,
            generation: 0,
            broken: None,
        };
        core.reset();
        core
    }

    /// Device type.
    pub fn id(&self) -> u32 {
        self.device.id()
    }

    /// Name for counters.
    pub fn name(&self) -> &'static str {
        self.device.name()
    }

    /// Features that the device offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Features that the driver accepts, valid once FEATURES_OK is set.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The driver accepts `features`; too late once it has set FEATURES_OK.
    pub fn accept(&mut self, features: u64) {
        if self.status & status::FEATURES_OK == 0 {
            self.accepted = features;
        }
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// How the driver broke the rules, if it has.
    pub fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// The driver writes the device status. Zero is a reset.
    pub fn set_status(&mut self, value: u8) -> Notice {
        if value == 0 {
            self.reset();
            return Notice::NONE;
        }
        // A driver sets bits and never clears one (2.1.1); NEEDS_RESET is the device's.
        let mut new = value & !status::NEEDS_RESET & !self.status;
        if new & status::FEATURES_OK != 0 && !self.features_fit() {
            new &= !status::FEATURES_OK;
        }
        self.status |= new;
        if new & status::DRIVER_OK != 0 {
            if self.status & status::FEATURES_OK == 0 {
                // Without agreed features there is no layout of the rings to go by.
                self.status &= !status::DRIVER_OK;
            } else {
                self.device.activate(self.accepted);
            }
        }
        Notice::NONE
    }

    /// 6.1: nothing that was not offered, and VERSION_1, since no legacy interface is here.
    fn features_fit(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0
    }

    fn reset(&mut self) {
        for (ring, layout) in self.rings.iter_mut().zip(&mut self.layouts) {
            ring.stop();
            *layout = Layout {
                size: ring.most(),
                ..Layout::default()
            };
        }
        self.accepted = 0;
        self.status = 0;
        self.broken = None;
        self.device.reset();
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.rings.len()
    }

    /// The largest size of queue `index`; 0 if there is none.
    pub fn queue_most(&self, index: usize) -> u16 {
        self.rings.get(index).map_or(0, Ring::most)
    }

    /// True if queue `index` is in use.
    pub fn queue_ready(&self, index: usize) -> bool {
        self.rings.get(index).is_some_and(Ring::ready)
    }

    /// Where queue `index` is to lie; to be changed while it is not ready.
    pub fn layout(&mut self, index: usize) -> Option<&mut Layout> {
        if self.queue_ready(index) {
            return None;
        }
        self.layouts.get_mut(index)
    }

    /// Starts or stops the use of queue `index`.
    pub fn set_queue_ready(&mut self, index: usize, ready: bool) -> Notice {
        let Some(ring) = self.rings.get_mut(index) else {
            return Notice::NONE;
        };
        if !ready {
            ring.stop();
        } else if !ring.ready() && self.status & status::NEEDS_RESET == 0 {
            let event_idx = self.accepted & feature::EVENT_IDX != 0;
            if let Err(broken) = ring.start(&self.layouts[index], event_idx) {
                return self.fail(broken);
            }
        }
        Notice::NONE
    }

    /// True while there is a driver to serve.
    fn live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    /// The driver notifies of queue `index`. Everything in it is served.
    pub fn notify(&mut self, index: usize) -> Notice {
        if !self.live() || index >= self.rings.len() {
            return Notice::NONE;
        }
        self.rings.iter_mut().for_each(Ring::start_round);
        let done = self.device.notified(index, &mut self.rings);
        self.conclude(done)
    }

    /// The device's descriptor became readable.
    pub fn host_ready(&mut self) -> Notice {
        if !self.live() {
            // Without a driver there are no rings to break.
            let _ = self.device.host_ready(None);
            return Notice {
                action: self.device.action(),
                ..Notice::NONE
            };
        }
        self.rings.iter_mut().for_each(Ring::start_round);
        let done = self.device.host_ready(Some(&mut self.rings));
        self.conclude(done)
    }

    /// Descriptor of the host that [`host_ready`](Core::host_ready) waits for.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.device.descriptor()
    }

    fn conclude(&mut self, done: Result<(), Broken>) -> Notice {
        let mut used = 0;
        let mut more = false;
        let due = done.and_then(|()| {
            for (index, ring) in self.rings.iter_mut().enumerate() {
                used |= u32::from(ring.interrupt_due()?) << index;
                more |= ring.exhausted();
            }
            Ok(())
        });
        let config = self.device.take_config_change();
        if config {
            self.generation = self.generation.wrapping_add(1);
        }
        let notice = match due {
            Ok(()) => Notice::NONE,
            Err(broken) => self.fail(broken),
        };
        Notice {
            used,
            config: config || notice.config,
            more,
            action: self.device.action(),
        }
    }

    /// Stops until the driver resets the device (2.1.2).
    fn fail(&mut self, broken: Broken) -> Notice {
        self.broken = Some(broken);
        self.status |= status::NEEDS_RESET;
        Notice {
            config: self.status & status::DRIVER_OK != 0,
            ..Notice::NONE
        }
    }

    /// Changes whenever the configuration does.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Reads configuration; bytes that there are none of stay as they are.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("device", &self.device.name())
            .field("status", &self.status)
            .field("accepted", &self.accepted)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}
