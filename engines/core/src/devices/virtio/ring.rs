//! One split virtqueue (2.7) as its device sees it.
//!
//! virtio-queue keeps the indices; this adds what it leaves out: checks before a queue is used, an
//! error for each way in which a driver can break it, VIRTQ_AVAIL_F_NO_INTERRUPT, and the log of
//! pages written.
//!
//! Invariant: an index is published after the buffers and the used element that it stands for.

use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Broken;
use super::chain::Chain;
use crate::dma::DeviceMemory;

/// Where a queue lies and how long it is, as the driver says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring (the driver area).
    pub available: u64,
    /// Guest-physical address of the used ring (the device area).
    pub used: u64,
}

/// A queue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    memory: DeviceMemory,
    chain: Chain,
    /// Completed since the driver was last told.
    completed: bool,
    /// Requests that may still be taken in this round; see [`Ring::start_round`].
    budget: u32,
    /// Bytes that they may still name.
    bytes: usize,
}

/// Bytes that the requests of one round may name before everybody else gets a word in: more than
/// honest drivers have in flight.
const ROUND_BYTES: usize = 64 << 20;

impl Ring {
    /// A queue of at most `most` descriptors, a power of two, not ready.
    pub(super) fn new(most: u16, memory: DeviceMemory) -> Self {
        Ring {
            queue: Queue::new(most).expect("sizes of queues are powers of two"),
            chain: Chain::new(memory.clone()),
            memory,
            completed: false,
            budget: 0,
            bytes: 0,
        }
    }

    /// The largest size that the device takes.
    pub fn most(&self) -> u16 {
        self.queue.max_size()
    }

    /// True while the driver has the queue in use.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Starts to use the queue where `layout` says.
    ///
    /// # Errors
    /// [`Broken::Ring`] if that is no place for it.
    pub(super) fn start(&mut self, layout: &Layout, event_idx: bool) -> Result<(), Broken> {
        self.stop();
        let set = self
            .queue
            .try_set_size(layout.size)
            .and_then(|()| {
                let at = GuestAddress(layout.descriptors);
                self.queue.try_set_desc_table_address(at)
            })
            .and_then(|()| {
                let at = GuestAddress(layout.available);
                self.queue.try_set_avail_ring_address(at)
            })
            .and_then(|()| {
                self.queue
                    .try_set_used_ring_address(GuestAddress(layout.used))
            });
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        // virtio-queue takes 0 for an available ring that was never set.
        if set.is_err() || layout.available == 0 || !self.queue.is_valid(&**self.memory.ram()) {
            self.stop();
            return Err(Broken::Ring);
        }
        Ok(())
    }

    /// Stops using the queue.
    pub(super) fn stop(&mut self) {
        self.queue.reset();
        self.completed = false;
    }

    /// Bounds what is done before the guest goes on: a driver that has the device overwrite its
    /// own ring could keep it busy for ever. No honest driver has more than a ring full of
    /// requests, unless it adds some while they are served. A request may name much more memory than
    /// there is; the first one that is too long for the round ends it.
    pub(super) fn start_round(&mut self) {
        self.budget = 2 * u32::from(self.queue.size());
        self.bytes = ROUND_BYTES;
    }

    /// True if the last round ended with requests left.
    pub(super) fn exhausted(&self) -> bool {
        self.ready() && self.budget == 0
    }

    /// The next request, if there is one. It has to be given back, by [`complete`](Ring::complete)
    /// or by [`put_back`](Ring::put_back).
    ///
    /// # Errors
    /// [`Broken`].
    #[expect(clippy::should_implement_trait, reason = "it lends and it can fail")]
    pub fn next(&mut self) -> Result<Option<&Chain>, Broken> {
        if !self.queue.ready() || self.budget == 0 {
            return Ok(None);
        }
        let ram = &**self.memory.ram();
        let most = self.queue.size();
        let found = self.queue.iter(ram).map_err(|_| Broken::Index)?.next();
        let Some(chain) = found else {
            return Ok(None);
        };
        self.chain.load(chain, most)?;
        self.bytes = self.bytes.saturating_sub(self.chain.bytes());
        self.budget = match self.bytes {
            0 => 0,
            _ => self.budget - 1,
        };
        Ok(Some(&self.chain))
    }

    /// The request that [`next`](Ring::next) has found.
    pub fn last(&self) -> &Chain {
        &self.chain
    }

    /// Gives the last request back unserved: it will come again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives the last request back, `written` bytes of it written by the device.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn complete(&mut self, written: usize) -> Result<(), Broken> {
        self.chain.log_writes();
        self.completed = true;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue
            .add_used(&**self.memory.ram(), self.chain.head(), written)
            .map_err(|_| Broken::Chain)
    }

    /// Serves every request with `serve`, which answers with the bytes it wrote, and sees to it
    /// that the driver notifies of the next one.
    ///
    /// # Errors
    /// [`Broken`], its own or that of `serve`.
    pub fn serve_all(
        &mut self,
        mut serve: impl FnMut(&Chain) -> Result<usize, Broken>,
    ) -> Result<(), Broken> {
        loop {
            self.suppress_notifications()?;
            while let Some(chain) = self.next()? {
                let written = serve(chain)?;
                self.complete(written)?;
            }
            // One that came in between would go unnoticed.
            if !self.ask_for_notification()? || self.budget == 0 {
                return Ok(());
            }
        }
    }

    fn suppress_notifications(&mut self) -> Result<(), Broken> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue
            .disable_notification(&**self.memory.ram())
            .map_err(|_| Broken::Ring)
    }

    /// Asks the driver to notify of its next request. True if there is one already.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn ask_for_notification(&mut self) -> Result<bool, Broken> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue
            .enable_notification(&**self.memory.ram())
            .map_err(|_| Broken::Ring)
    }

    /// True if the driver wants to hear of what was completed since it was last told (2.7.7).
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn interrupt_due(&mut self) -> Result<bool, Broken> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let ram = &**self.memory.ram();
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(ram).map_err(|_| Broken::Ring);
        }
        let flags: u16 = ram
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)
            .map_err(|_| Broken::Ring)?;
        Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
    }
}
