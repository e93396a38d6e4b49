//! One request: a descriptor chain (2.7.5), checked and taken apart.
//!
//! virtio-queue walks the chain; this checks that it came to a proper end, that its parts are in
//! the right order and in RAM, and keeps them as buffers that system calls take. What it does not
//! know is what a request means.
//!
//! Invariant: every buffer lies in RAM as a whole.

use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryBackend;

use super::Broken;
use crate::buffer::{self, Buffer};
use crate::dma::{DeviceMemory, DeviceRam};

/// A request, in memory that the next one reuses.
#[derive(Debug)]
pub struct Chain {
    /// What the buffers point into: they live as long as this.
    memory: DeviceMemory,
    head: u16,
    readable: Vec<Buffer<'static>>,
    writable: Vec<Buffer<'static>>,
    /// Guest-physical address and length of each writable buffer.
    targets: Vec<(u64, usize)>,
}

impl Chain {
    /// An empty one.
    pub(super) fn new(memory: DeviceMemory) -> Self {
        Chain {
            memory,
            head: 0,
            readable: Vec::new(),
            writable: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Takes `chain` apart. At most `most` descriptors (2.7.5.3.1: the queue's size).
    pub(super) fn load(
        &mut self,
        chain: DescriptorChain<&DeviceRam>,
        most: u16,
    ) -> Result<(), Broken> {
        let Chain {
            memory,
            head,
            readable,
            writable,
            targets,
        } = self;
        *head = chain.head_index();
        readable.clear();
        writable.clear();
        targets.clear();
        let ram = memory.ram();
        // The walk just stops where something is wrong: then the last descriptor announced another.
        let mut open = true;
        for (number, descriptor) in chain.enumerate() {
            if number >= usize::from(most) {
                return Err(Broken::Chain);
            }
            open = descriptor.has_next();
            let length = descriptor.len() as usize;
            let write = descriptor.is_write_only();
            if !write && !writable.is_empty() {
                return Err(Broken::Order);
            }
            if length == 0 {
                continue;
            }
            let slice = ram
                .get_slice(descriptor.addr(), length)
                .map_err(|_| Broken::Address)?;
            // SAFETY: in a mapping that `memory` keeps; no Rust reference to guest memory
            // exists anywhere.
            let part = unsafe { Buffer::from_raw(slice.ptr_guard_mut().as_ptr(), length) };
            if write {
                writable.push(part);
                targets.push((descriptor.addr().0, length));
            } else {
                readable.push(part);
            }
        }
        if open { Err(Broken::Chain) } else { Ok(()) }
    }

    /// Index of the first descriptor, which names the request.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver has written for the device.
    pub fn readable(&self) -> &[Buffer<'_>] {
        &self.readable
    }

    /// What the device is to write.
    pub fn writable(&self) -> &[Buffer<'_>] {
        &self.writable
    }

    /// Bytes of all buffers.
    pub(super) fn bytes(&self) -> usize {
        length(&self.readable) + length(&self.writable)
    }

    /// Logs all of the writable part as written.
    pub(super) fn log_writes(&self) {
        if let Some(log) = self.memory.log() {
            for &(start, length) in &self.targets {
                log.mark(start, length);
            }
        }
    }
}

/// Bytes of a part.
pub(super) fn length(buffers: &[Buffer<'_>]) -> usize {
    buffer::total(buffers)
}
