//! Creation of guest RAM.
//!
//! RAM lies where a PC has it: one region from 0 up to at most [`MMIO_HOLE_START`], the rest from
//! [`MMIO_HOLE_END`]. Both are views of one memfd, mapped shared, so that an engine can map the
//! same pages a second time at addresses of its own choosing (`FileOffset` of the region says
//! where). Pages are allocated on first touch.
//!
//! What this does not do: keep track of dirty pages, or change size later.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{GuestPhys, GuestRam};

/// RAM below 4 GiB ends here at the latest; device memory follows.
pub const MMIO_HOLE_START: GuestPhys = GuestPhys(3 << 30);
/// RAM that does not fit below the hole continues here.
pub const MMIO_HOLE_END: GuestPhys = GuestPhys(4 << 30);

const MIB: u64 = 1 << 20;

/// Guest RAM could not be created.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A machine without memory.
    #[error("guest memory must be at least 1 MiB")]
    Empty,
    /// More than this host has.
    #[error("guest memory of {mib} MiB is more than this host has ({limit_mib} MiB)")]
    TooLarge {
        /// What was asked for.
        mib: u64,
        /// The most this host can give.
        limit_mib: u64,
    },
    /// The host refused to create the memory file.
    #[error("memfd for guest memory of {mib} MiB: {source}")]
    Create {
        /// What was asked for.
        mib: u64,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
    /// The host refused to map it.
    #[error("mapping guest memory of {mib} MiB: {source}")]
    Map {
        /// What was asked for.
        mib: u64,
        /// vm-memory's error.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
}

/// The most memory that [`create`] grants on this host, in MiB.
pub fn limit_mib() -> u64 {
    let info = rustix::system::sysinfo();
    // The types of these fields differ between C libraries.
    #[allow(
        clippy::useless_conversion,
        reason = "u64 on this libc, narrower on others"
    )]
    let total = u64::from(info.totalram) * u64::from(info.mem_unit);
    (total / MIB).min(crate::cpuid::PHYSICAL_MEMORY_LIMIT / MIB - 1024)
}

/// Creates `mib` MiB of zeroed guest RAM.
///
/// # Errors
/// [`MemoryError`]: nothing asked for, more than the host has, or the host refused.
pub fn create(mib: u64) -> Result<Arc<GuestRam>, MemoryError> {
    if mib == 0 {
        return Err(MemoryError::Empty);
    }
    let limit_mib = limit_mib();
    if mib > limit_mib {
        return Err(MemoryError::TooLarge { mib, limit_mib });
    }
    let bytes = mib * MIB;
    let create = |source: rustix::io::Errno| MemoryError::Create {
        mib,
        source: source.into(),
    };
    let fd = rustix::fs::memfd_create("trapline-guest-ram", MemfdFlags::CLOEXEC).map_err(create)?;
    rustix::fs::ftruncate(&fd, bytes).map_err(create)?;
    let file = Arc::new(File::from(fd));

    let low = bytes.min(MMIO_HOLE_START.0);
    let mut ranges = vec![(
        GuestAddress(0),
        low as usize,
        Some(FileOffset::from_arc(Arc::clone(&file), 0)),
    )];
    if bytes > low {
        ranges.push((
            GuestAddress(MMIO_HOLE_END.0),
            (bytes - low) as usize,
            Some(FileOffset::from_arc(file, low)),
        ));
    }
    GuestRam::from_ranges_with_files(ranges)
        .map(Arc::new)
        .map_err(|source| MemoryError::Map { mib, source })
}

/// The RAM regions as (start, length in bytes), lowest first.
pub fn regions(ram: &GuestRam) -> Vec<(GuestPhys, u64)> {
    ram.iter()
        .map(|region| (GuestPhys(region.start_addr().0), region.len()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_memory_and_too_much_memory_are_refused() {
        assert!(matches!(create(0), Err(MemoryError::Empty)));
        assert!(matches!(
            create(u64::MAX),
            Err(MemoryError::TooLarge { .. })
        ));
        let over = limit_mib() + 1;
        assert!(matches!(create(over), Err(MemoryError::TooLarge { .. })));
    }

    #[test]
    fn memory_is_file_backed_from_zero() {
        let ram = create(2).unwrap();
        assert_eq!(regions(&ram), [(GuestPhys(0), 2 * MIB)]);
        let region = ram.iter().next().unwrap();
        assert_eq!(region.file_offset().unwrap().start(), 0);
    }

    #[test]
    fn memory_beyond_three_gib_continues_above_the_hole() {
        if limit_mib() < 3073 {
            return;
        }
        let ram = create(3073).unwrap();
        assert_eq!(
            regions(&ram),
            [(GuestPhys(0), 3 << 30), (GuestPhys(4 << 30), MIB)]
        );
        let above = ram.iter().nth(1).unwrap();
        assert_eq!(above.file_offset().unwrap().start(), 3 << 30);
    }
}
