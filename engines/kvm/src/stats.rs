//! What KVM counts itself: the binary statistics of VM and vCPU (KVM_GET_STATS_FD, api.rst 4.133).
//!
//! These are exits as the host's kernel sees them. Most never reach the VMM, so they stand beside
//! its own counts and are never added to them. Only cumulative counters are read: of a peak or an
//! instant there is no difference between two marks.
//!
//! The descriptors are opened before the vCPU first runs, because the ioctl waits for KVM_RUN to
//! return; reading them later does not.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use engine_core::ExitKind;
use engine_core::tally::HostStat;
use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_UNIT_NONE,
};

mod request {
    use kvm_bindings::KVMIO;

    // Not wrapped by kvm-ioctls.
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// The source name of these statistics.
pub const SOURCE: &str = "kvm-stats";

/// Size of kvm_stats_header.
const HEADER_BYTES: usize = 24;
/// Size of kvm_stats_desc before the name.
const DESCRIPTOR_BYTES: usize = 16;

/// What the better known counters count; the others are of no kind.
const KINDS: &[(&str, ExitKind)] = &[
    ("io_exits", ExitKind::Pio),
    ("mmio_exits", ExitKind::Mmio),
    ("halt_exits", ExitKind::Hlt),
    ("irq_exits", ExitKind::Irq),
    ("irq_window_exits", ExitKind::Irq),
    ("nmi_window_exits", ExitKind::Irq),
    ("request_irq_exits", ExitKind::Irq),
    ("irq_injections", ExitKind::Irq),
    ("nmi_injections", ExitKind::Irq),
    ("hypercalls", ExitKind::Hypercall),
    ("insn_emulation", ExitKind::Helper),
    ("insn_emulation_fail", ExitKind::Helper),
    ("pf_taken", ExitKind::ShadowFault),
    ("pf_fixed", ExitKind::ShadowFault),
    ("pf_emulate", ExitKind::ShadowFault),
    ("pf_spurious", ExitKind::ShadowFault),
    ("pf_fast", ExitKind::ShadowFault),
    ("pf_mmio_spte_created", ExitKind::ShadowFault),
    ("pf_guest", ExitKind::GuestFault),
    ("tlb_flush", ExitKind::ShadowFault),
    ("invlpg", ExitKind::ShadowFault),
];

#[derive(Debug)]
struct Counter {
    name: String,
    kind: ExitKind,
    /// Offset in the data block, in bytes.
    offset: usize,
}

/// The counters of one VM or vCPU.
#[derive(Debug)]
pub struct Statistics {
    file: File,
    counters: Vec<Counter>,
    data_offset: u64,
    data: Vec<u8>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Statistics {
    /// Opens the statistics of a VM or vCPU.
    ///
    /// # Errors
    /// The host's, if it keeps none or they can't be read.
    pub fn open(owner: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: KVM_GET_STATS_FD takes no argument; on success it returns a new descriptor that
        // nobody else owns.
        let file = unsafe {
            let fd = vmm_sys_util::ioctl::ioctl(owner, request::KVM_GET_STATS_FD());
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let name_bytes = word(&header, 4) as usize;
        let count = word(&header, 8) as usize;
        let descriptor_offset = u64::from(word(&header, 16));
        let data_offset = u64::from(word(&header, 20));
        let size = DESCRIPTOR_BYTES + name_bytes;
        let mut descriptors = vec![0; size * count];
        file.read_exact_at(&mut descriptors, descriptor_offset)?;
        let counters: Vec<Counter> = descriptors.chunks_exact(size).filter_map(counter).collect();
        let end = counters
            .iter()
            .map(|counter| counter.offset + 8)
            .max()
            .unwrap_or(0);
        Ok(Statistics {
            file,
            counters,
            data_offset,
            data: vec![0; end],
        })
    }

    /// Appends the counters' present values; nothing if they can't be read.
    pub fn read_into(&mut self, stats: &mut Vec<HostStat>) {
        if self
            .file
            .read_exact_at(&mut self.data, self.data_offset)
            .is_err()
        {
            return;
        }
        stats.extend(self.counters.iter().map(|counter| {
            let bytes = &self.data[counter.offset..counter.offset + 8];
            HostStat {
                source: SOURCE,
                kind: counter.kind,
                name: counter.name.clone(),
                value: bytes.try_into().map_or(0, u64::from_le_bytes),
            }
        }));
    }
}

/// Reads one kvm_stats_desc: flags u32, exponent s16, size u16, offset u32, bucket_size u32, name.
fn counter(descriptor: &[u8]) -> Option<Counter> {
    let flags = word(descriptor, 0);
    let values = u16::from_le_bytes([descriptor[6], descriptor[7]]);
    let plain = flags & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE
        && flags & KVM_STATS_UNIT_MASK == KVM_STATS_UNIT_NONE
        && values == 1;
    if !plain {
        return None;
    }
    let name = descriptor[DESCRIPTOR_BYTES..]
        .split(|&byte| byte == 0)
        .next()?;
    let name = String::from_utf8_lossy(name).into_owned();
    let kind = KINDS
        .iter()
        .find(|(known, _)| *known == name)
        .map_or(ExitKind::Other, |&(_, kind)| kind);
    Some(Counter {
        name,
        kind,
        offset: word(descriptor, 8) as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(flags: u32, values: u16, offset: u32, name: &[u8]) -> Vec<u8> {
        let mut bytes = flags.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&values.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(name);
        bytes
    }

    #[test]
    fn only_plain_cumulative_counters_are_taken() {
        let taken = counter(&descriptor(0, 1, 24, b"io_exits\0\0\0\0")).unwrap();
        assert_eq!((taken.name.as_str(), taken.offset), ("io_exits", 24));
        assert_eq!(taken.kind, ExitKind::Pio);
        assert!(counter(&descriptor(1, 1, 0, b"nx_lpage_splits\0")).is_none());
        assert!(counter(&descriptor(4, 32, 0, b"halt_wait_hist\0")).is_none());
        assert!(counter(&descriptor(0x20, 1, 0, b"halt_wait_ns\0")).is_none());
    }
}
