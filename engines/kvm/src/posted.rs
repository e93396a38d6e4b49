//! Writes to data ports that wait in a ring for the next exit: coalesced PIO (KVM_CAP_COALESCED_PIO,
//! KVM_REGISTER_COALESCED_MMIO, api.rst 4.116).
//!
//! KVM's instruction emulator does `rep outs` item by item, and each one leaves for the VMM
//! (arch/x86/kvm/emulate.c, em_out: one item a call, where em_in reads ahead): a sector written by
//! programmed I/O is 256 exits. With a ring the kernel notes a write there and goes on, until the
//! ring is full. What makes that safe is how full it may get: the kernel compares its own index with
//! the one up to which the VMM has read, and writes no further. So the VMM says in that index how
//! many writes may wait: as many as the device would take without anything happening
//! ([`Device::postable`]). The write that completes a block leaves, and takes the others along as one
//! exit with many items, as a `rep outs` of processors with string I/O does.
//!
//! Invariant: what waits is handed over before any exit that the guest made after it, except those
//! that no device sees.
//!
//! [`Device::postable`]: engine_core::devices::Device::postable

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use engine_core::Exit;
use kvm_bindings as kb;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};

const PAGE: usize = 4096;
/// Entries of the ring (KVM_COALESCED_MMIO_MAX); one stays free.
const ENTRIES: u32 = ((PAGE - size_of::<kb::kvm_coalesced_mmio_ring>())
    / size_of::<kb::kvm_coalesced_mmio>()) as u32;
/// Ports of a zone: a data port takes items of up to 4 bytes.
const ZONE: u32 = 4;

/// The ring of one VM.
pub(crate) struct Posted {
    ring: *mut kb::kvm_coalesced_mmio_ring,
    /// How many writes may wait.
    postable: Arc<AtomicU32>,
    /// The next entry to be taken.
    next: u32,
    port: u16,
    size: u8,
    /// Items of `size` bytes that were written to `port`.
    items: Vec<u8>,
}

// SAFETY: the mapping is this value's own, and only reached through `&mut self`.
unsafe impl Send for Posted {}

impl Posted {
    /// Lets writes to each of `ports` and the three ports after it wait. None where KVM has no such
    /// rings.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        vcpu: &VcpuFd,
        ports: &[u16],
        postable: Arc<AtomicU32>,
    ) -> io::Result<Option<Self>> {
        let page = kvm.check_extension_int(Cap::CoalescedMmio);
        if page <= 0 || kvm.check_extension_int(Cap::CoalescedPio) <= 0 {
            return Ok(None);
        }
        // SAFETY: a new mapping of the vCPU's descriptor at the page that KVM names.
        let ring = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                i64::from(page) * PAGE as i64,
            )
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut posted = Posted {
            ring: ring.cast(),
            postable,
            next: 0,
            port: 0,
            size: 1,
            items: Vec::with_capacity(PAGE),
        };
        // Full before it is in use.
        posted.allow();
        for &port in ports {
            vm.register_coalesced_mmio(IoEventAddress::Pio(port.into()), ZONE)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(Some(posted))
    }

    /// The kernel's index: where it writes next.
    fn last(&self) -> u32 {
        // SAFETY: the ring is mapped and aligned; the kernel writes it, hence volatile.
        let last = unsafe { (&raw const (*self.ring).last).read_volatile() };
        // What the kernel has written before its index.
        fence(Ordering::Acquire);
        last % ENTRIES
    }

    /// Before the guest is entered: lets as many writes wait as the devices allow.
    #[inline]
    pub(crate) fn allow(&mut self) {
        let most = self.postable.load(Ordering::Relaxed).min(ENTRIES - 1);
        // Those that still wait (after an exit that no device sees) are among them.
        let waiting = (self.last() + ENTRIES - self.next) % ENTRIES;
        let first = (self.last() + 1 + most.saturating_sub(waiting)) % ENTRIES;
        // SAFETY: as in `last`; the kernel only reads this one.
        unsafe { (&raw mut (*self.ring).first).write_volatile(first) };
    }

    /// True if writes wait.
    #[inline]
    pub(crate) fn any(&self) -> bool {
        self.last() != self.next
    }

    /// Takes the oldest writes that went to the same port with items of the same size.
    pub(crate) fn take(&mut self) {
        self.items.clear();
        let last = self.last();
        while self.next != last {
            // SAFETY: entries up to the kernel's index are written and left alone; the index is
            // below their number, and all of them lie in the page.
            let entry = unsafe {
                let entries =
                    (&raw const (*self.ring).coalesced_mmio).cast::<kb::kvm_coalesced_mmio>();
                entries.add(self.next as usize).read_volatile()
            };
            let size = entry.len.clamp(1, 4) as u8;
            let port = entry.phys_addr as u16;
            if self.items.is_empty() {
                (self.port, self.size) = (port, size);
            } else if (port, size) != (self.port, self.size) {
                return;
            }
            self.items.extend_from_slice(&entry.data[..size.into()]);
            self.next = (self.next + 1) % ENTRIES;
        }
    }

    /// Adds the write that leaves after all others, if it goes where the last ones went.
    pub(crate) fn join(&mut self, exit: &Exit<'_>) -> bool {
        match exit {
            Exit::PioOut { port, size, data } if (*port, *size) == (self.port, self.size) => {
                self.items.extend_from_slice(data);
                true
            }
            _ => false,
        }
    }

    /// What was taken.
    pub(crate) fn exit(&self) -> Exit<'_> {
        Exit::PioOut {
            port: self.port,
            size: self.size,
            data: &self.items,
        }
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and by nobody else.
        unsafe { libc::munmap(self.ring.cast(), PAGE) };
    }
}
