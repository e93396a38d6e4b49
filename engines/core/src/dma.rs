//! Guest memory as devices reach it: a mapping of their own, with a log of the pages they write.
//!
//! A translator keeps code that it made from guest memory. What the guest's own instructions write
//! it sees; what a device writes it does not, unless it is told. So devices write through an alias
//! (a second mapping of the memory file), whose writes are logged by page, and the run loop hands
//! the log to [`Vcpu::memory_written`](crate::Vcpu::memory_written). Engines that leave coherence
//! to the processor have no log, and it costs them one test per write. An engine that can say at any
//! time which pages it keeps code from ([`KeptCode`]) hears of those alone: a disk that fills pages of
//! data costs it nothing.
//!
//! Invariant: bytes are written before their page is logged, and a page is logged before the guest
//! is told that the device is done.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::GuestRam;

const PAGE_SHIFT: u64 = 12;

/// Guest memory as devices see it; what virtio-queue works on.
pub type DeviceRam = GuestMemoryMmap<RegionLog>;

/// The alias can't be made.
#[derive(Debug, thiserror::Error)]
pub enum AliasError {
    /// Memory without a file can't be mapped a second time.
    #[error("guest memory at {0:#x} has no file to map again")]
    NoFile(u64),
    /// The host refused.
    #[error("mapping guest memory for devices: {0}")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// The regions don't make up a memory.
    #[error("guest memory for devices: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

/// What an engine that keeps code knows of guest memory.
pub trait KeptCode: Send + Sync {
    /// True if anybody keeps code from the page at this guest-physical address, or is about to make
    /// some from bytes that may have been read already. The caller has written before it asks; it is
    /// for the engine to see to it that other processors find it so.
    fn holds(&self, address: u64) -> bool;
}

/// Pages of guest memory that devices have written and nobody was told of.
pub struct WriteLog {
    /// One bit per page, by page number.
    bits: Box<[AtomicU64]>,
    /// The pages whose bit is set.
    pages: Mutex<Vec<u64>>,
    any: AtomicBool,
    /// Who says which pages matter; all do without.
    kept: OnceLock<Arc<dyn KeptCode>>,
}

impl std::fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteLog")
            .field("pages", &self.pages)
            .field("limited", &self.kept.get().is_some())
            .finish_non_exhaustive()
    }
}

impl WriteLog {
    fn new(pages: u64) -> Self {
        WriteLog {
            bits: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            pages: Mutex::default(),
            any: AtomicBool::new(false),
            kept: OnceLock::new(),
        }
    }

    /// Has pages left out that no code is kept from when they are written: whoever makes some later
    /// finds the bytes that were written.
    ///
    /// # Panics
    /// If somebody else says so already.
    pub fn limit(&self, kept: Arc<dyn KeptCode>) {
        assert!(self.kept.set(kept).is_ok(), "the log is limited already");
    }

    #[inline]
    pub(crate) fn mark(&self, address: u64, length: usize) {
        if length == 0 {
            return;
        }
        let last = (address + length as u64 - 1) >> PAGE_SHIFT;
        let kept = self.kept.get();
        for page in address >> PAGE_SHIFT..=last {
            if kept.is_some_and(|kept| !kept.holds(page << PAGE_SHIFT)) {
                continue;
            }
            let Some(word) = self.bits.get((page / 64) as usize) else {
                return;
            };
            let bit = 1 << (page % 64);
            // Rings are written over and over: most pages are marked already.
            if word.load(Ordering::Relaxed) & bit == 0
                && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
            {
                let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
                pages.push(page);
                self.any.store(true, Ordering::Release);
            }
        }
    }

    /// True if [`take`](WriteLog::take) would find something.
    #[inline]
    pub fn has_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Moves the page numbers that were written into `into`, which is cleared first. Returns false
    /// if there are none; costs one load then.
    #[inline]
    pub fn take(&self, into: &mut Vec<u64>) -> bool {
        if !self.has_any() {
            return false;
        }
        into.clear();
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        self.any.store(false, Ordering::Release);
        std::mem::swap(&mut *pages, into);
        for page in into.iter() {
            self.bits[(page / 64) as usize].fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
        }
        !into.is_empty()
    }
}

/// One region's part of the log.
#[derive(Debug, Default)]
pub struct RegionLog {
    log: Option<Arc<WriteLog>>,
    /// Guest-physical address of the region.
    start: u64,
}

/// The log from some address on.
#[derive(Clone, Copy, Debug)]
pub struct LogSlice<'a> {
    log: Option<&'a WriteLog>,
    start: u64,
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = LogSlice<'a>;
}

impl Bitmap for RegionLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.slice_at(0).mark_dirty(offset, length);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice {
            log: self.log.as_deref(),
            start: self.start + offset as u64,
        }
    }
}

impl<'a> WithBitmapSlice<'_> for LogSlice<'a> {
    type S = LogSlice<'a>;
}

impl BitmapSlice for LogSlice<'_> {}

impl<'a> Bitmap for LogSlice<'a> {
    #[inline]
    fn mark_dirty(&self, offset: usize, length: usize) {
        if let Some(log) = self.log {
            log.mark(self.start + offset as u64, length);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.start + offset as u64) >> PAGE_SHIFT;
        self.log
            .and_then(|log| log.bits.get((page / 64) as usize))
            .is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (page % 64) != 0)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'a> {
        LogSlice {
            log: self.log,
            start: self.start + offset as u64,
        }
    }
}

/// The devices' mapping of a machine's memory, and the log of what they write if there is one.
#[derive(Clone, Debug)]
pub struct DeviceMemory {
    ram: Arc<DeviceRam>,
    log: Option<Arc<WriteLog>>,
}

impl DeviceMemory {
    /// Maps `ram` a second time, with a log if `logged`.
    ///
    /// # Errors
    /// [`AliasError`]: memory without a file, or the host refused.
    pub fn new(ram: &GuestRam, logged: bool) -> Result<DeviceMemory, AliasError> {
        let end = ram
            .iter()
            .map(|region| region.start_addr().0 + region.len())
            .max()
            .unwrap_or(0);
        let log = logged.then(|| Arc::new(WriteLog::new(end.div_ceil(1 << PAGE_SHIFT))));
        let regions = ram.iter().map(|region| {
            let start = region.start_addr();
            let file = region.file_offset().ok_or(AliasError::NoFile(start.0))?;
            let bitmap = RegionLog {
                log: log.clone(),
                start: start.0,
            };
            let mapping = MmapRegionBuilder::new_with_bitmap(region.len() as usize, bitmap)
                .with_file_offset(file.clone())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()?;
            GuestRegionMmap::new(mapping, GuestAddress(start.0)).ok_or(AliasError::NoFile(start.0))
        });
        let regions = regions.collect::<Result<Vec<_>, AliasError>>()?;
        let ram = Arc::new(DeviceRam::from_regions(regions)?);
        Ok(DeviceMemory { ram, log })
    }

    /// Maps the whole of a memory file of `bytes`, as guest memory from address 0 on, without a log.
    ///
    /// # Errors
    /// As [`DeviceMemory::new`].
    pub fn of_file(file: std::fs::File, bytes: u64) -> Result<DeviceMemory, AliasError> {
        let mapping = MmapRegionBuilder::new_with_bitmap(bytes as usize, RegionLog::default())
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or(AliasError::NoFile(0))?;
        Ok(DeviceMemory {
            ram: Arc::new(DeviceRam::from_regions(vec![region])?),
            log: None,
        })
    }

    /// The mapping.
    pub fn ram(&self) -> &Arc<DeviceRam> {
        &self.ram
    }

    /// The log, if an engine wants one.
    pub fn log(&self) -> Option<&Arc<WriteLog>> {
        self.log.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn writes_are_seen_by_the_guest_and_logged_once_per_page() {
        let ram = crate::memory::create(2).unwrap();
        let memory = DeviceMemory::new(&ram, true).unwrap();
        let log = memory.log().unwrap();
        let mut pages = Vec::new();
        assert!(!log.take(&mut pages));
        memory
            .ram()
            .write_slice(&[7; 3], GuestAddress(0x1ffe))
            .unwrap();
        memory.ram().write_obj(9u64, GuestAddress(0x2008)).unwrap();
        let mut seen = [0; 3];
        ram.read_slice(&mut seen, GuestAddress(0x1ffe)).unwrap();
        assert_eq!(seen, [7; 3]);
        assert!(log.take(&mut pages));
        assert_eq!(pages, [1, 2]);
        assert!(!log.take(&mut pages));
        memory
            .ram()
            .store(1u16, GuestAddress(0x2000), Ordering::Release)
            .unwrap();
        assert!(log.take(&mut pages));
        assert_eq!(pages, [2]);
    }

    #[test]
    fn pages_that_no_code_is_kept_from_are_left_out() {
        struct Odd;
        impl KeptCode for Odd {
            fn holds(&self, address: u64) -> bool {
                address >> 12 & 1 == 1
            }
        }
        let ram = crate::memory::create(2).unwrap();
        let memory = DeviceMemory::new(&ram, true).unwrap();
        let log = memory.log().unwrap();
        log.limit(Arc::new(Odd));
        let mut pages = Vec::new();
        memory.ram().write_obj(9u64, GuestAddress(0x2008)).unwrap();
        assert!(!log.has_any());
        assert!(!log.take(&mut pages));
        memory
            .ram()
            .write_slice(&[7; 0x3000], GuestAddress(0x2800))
            .unwrap();
        assert!(log.take(&mut pages));
        assert_eq!(pages, [3, 5]);
    }

    #[test]
    fn without_a_log_writes_just_happen() {
        let ram = crate::memory::create(1).unwrap();
        let memory = DeviceMemory::new(&ram, false).unwrap();
        memory.ram().write_obj(9u64, GuestAddress(8)).unwrap();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(8)).unwrap(), 9);
        assert!(memory.log().is_none());
    }
}
