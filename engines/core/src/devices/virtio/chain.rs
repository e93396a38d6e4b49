//! One request: a descriptor chain (2.7.5), checked and taken apart.
//!
//! virtio-queue walks the chain; this checks that it came to a proper end, that its parts are in
//! the right order and in RAM, and keeps them as buffers that system calls take. What it does not
//! know is what a request means.
//!
//! Invariant: every buffer lies in RAM as a whole.

use std::borrow::Cow;
use std::sync::Arc;

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
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        self.targets.clear();
        let ram = Arc::clone(self.memory.ram());
        // The walk just stops where something is wrong: then the last descriptor announced another.
        let mut open = true;
        for (number, descriptor) in chain.enumerate() {
            if number >= usize::from(most) {
                return Err(Broken::Chain);
            }
            open = descriptor.has_next();
            let length = descriptor.len() as usize;
            let write = descriptor.is_write_only();
            if !write && !self.writable.is_empty() {
                return Err(Broken::Order);
            }
            if length == 0 {
                continue;
            }
            let memory = ram
                .get_slice(descriptor.addr(), length)
                .map_err(|_| Broken::Address)?;
            // SAFETY: in a mapping that `self.memory` keeps; no Rust reference to guest memory
            // exists anywhere.
            let part = unsafe { Buffer::from_raw(memory.ptr_guard_mut().as_ptr(), length) };
            if write {
                self.writable.push(part);
                self.targets.push((descriptor.addr().0, length));
            } else {
                self.readable.push(part);
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

    /// Logs all of the writable part as written.
    pub(super) fn log_writes(&self) {
        if let Some(log) = self.memory.log() {
            for &(start, length) in &self.targets {
                log.mark(start, length);
            }
        }
    }
}

/// The `length` bytes of `buffers` from `skip` on. Borrows where headers have a descriptor of their
/// own, as drivers do it; a device must not rely on that (2.7.4.1).
pub(super) fn window<'a>(
    buffers: &'a [Buffer<'a>],
    mut skip: usize,
    mut length: usize,
) -> Cow<'a, [Buffer<'a>]> {
    let mut first = 0;
    while first < buffers.len() && skip >= buffers[first].len() {
        skip -= buffers[first].len();
        first += 1;
    }
    let mut last = first;
    let mut room = 0;
    while last < buffers.len() && room < skip + length {
        room += buffers[last].len();
        last += 1;
    }
    let whole = &buffers[first..last];
    if skip == 0 && room == length {
        return Cow::Borrowed(whole);
    }
    let cut = whole.iter().filter_map(|part| {
        let part = part.after(std::mem::take(&mut skip)).first(length);
        length -= part.len();
        (!part.is_empty()).then_some(part)
    });
    Cow::Owned(cut.collect())
}

/// Bytes of a part.
pub(super) fn length(buffers: &[Buffer<'_>]) -> usize {
    buffer::total(buffers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cut_anywhere() {
        let mut bytes: Vec<u8> = (0..20).collect();
        let (left, right) = bytes.split_at_mut(7);
        let buffers = [Buffer::new(left), Buffer::new(right)];
        for skip in 0..=20 {
            for length in 0..=20 - skip {
                let part = window(&buffers, skip, length);
                assert_eq!(buffer::total(&part), length);
                let mut seen = vec![0xff; length];
                buffer::gather(&part, 0, &mut seen);
                let expected: Vec<u8> = (skip as u8..(skip + length) as u8).collect();
                assert_eq!(seen, expected);
            }
        }
        assert!(matches!(window(&buffers, 7, 13), Cow::Borrowed(_)));
        assert!(matches!(window(&buffers, 0, 7), Cow::Borrowed(_)));
        assert!(matches!(window(&buffers, 1, 7), Cow::Owned(_)));
    }
}
