//! A case's memory: page tables, descriptor tables and pages, laid out in guest RAM, and the
//! registers that go with them.
//!
//! Pages of a large range get memory when they are first touched, which whoever runs the case has to
//! ask for ([`Memory::touch`]).
//!
//! Invariant: behind [`Memory::clear`] all that a case could reach is zero.

use std::{collections::BTreeMap, sync::Arc};

use engine_core::{CpuState, DescriptorTable, Error, GuestRam, Segment, memory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{Case, CaseError};
use crate::cpu::canonical;

const PAGE: u64 = 4096;
/// Guest-physical address of the top page table; everything else follows.
const ROOT: u64 = PAGE;
/// Where ring 3 can't see it: descriptor tables.
const KERNEL: u64 = 0xffff_fe00_0000_0000;
const TSS_OFFSET: u64 = 0x800;
/// Bytes of a range from which on pages are mapped when they are touched.
const SPARSE: u64 = 16 << 20;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;

/// Selectors, as Linux gives them to a 64-bit process.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// The memory of one case after the other.
pub(super) struct Memory {
    ram: Arc<GuestRam>,
    mib: u64,
    /// Pages of the case: guest-virtual to guest-physical.
    pages: BTreeMap<u64, u64>,
    /// Ranges of the case whose pages are mapped as they are touched: first and last byte.
    sparse: Vec<(u64, u64)>,
    /// First guest-physical page that isn't in use.
    next: u64,
}

impl Memory {
    /// Zeroed memory with nothing laid out.
    ///
    /// # Errors
    /// [`Error`] if the host has no room for it.
    pub(super) fn new() -> Result<Memory, Error> {
        let mib = memory::limit_mib().min(1024);
        let ram = memory::create(mib)
            .map_err(|error| Error::Engine(format!("memory for cases: {error}")))?;
        Ok(Memory {
            ram,
            mib,
            pages: BTreeMap::new(),
            sparse: Vec::new(),
            next: ROOT,
        })
    }

    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Zeroes what the last case used.
    pub(super) fn clear(&mut self) -> Result<(), CaseError> {
        const SMALL: u64 = 1 << 20;
        let used = self.next - ROOT;
        let region = self.ram.iter().next();
        let host = region.and_then(|region| region.get_host_address(MemoryRegionAddress(0)).ok());
        if let Some(host) = host {
            // SAFETY: pages of guest RAM that no Rust reference covers; the vCPU isn't running.
            unsafe {
                let from = host.add(ROOT as usize);
                if used <= SMALL {
                    std::ptr::write_bytes(from, 0, used as usize);
                } else if libc::madvise(from.cast(), used as usize, libc::MADV_REMOVE) != 0 {
                    return Err(CaseError::Engine(Error::Host {
                        operation: "clear the case's memory",
                        source: std::io::Error::last_os_error(),
                    }));
                }
            }
        }
        self.pages.clear();
        self.sparse.clear();
        self.next = ROOT;
        Ok(())
    }

    pub(super) fn lay_out(&mut self, case: &Case) -> Result<(), CaseError> {
        if case.code.is_empty() {
            return Err(CaseError::Empty);
        }
        let root = self.page()?;
        debug_assert_eq!(root, ROOT);
        let kernel = self.page()?;
        self.enter(KERNEL, kernel, WRITABLE)?;
        for (selector, descriptor) in [
            (0x10u64, 0x00af_9b00_0000_ffffu64),
            (0x18, 0x00cf_9300_0000_ffff),
            // 32-bit code, data, 64-bit code of ring 3.
            (0x20, 0x00cf_fb00_0000_ffff),
            (0x28, 0x00cf_f300_0000_ffff),
            (0x30, 0x00af_fb00_0000_ffff),
        ] {
            self.put(kernel + selector, &descriptor.to_le_bytes());
        }
        // No I/O permission bitmap.
        self.put(kernel + TSS_OFFSET + 0x66, &0x68u16.to_le_bytes());
        for &(address, bytes) in &case.map {
            self.map(address, bytes)?;
        }
        let code = (case.load, &case.code);
        let contents = case.mem.iter().map(|(address, bytes)| (*address, bytes));
        for (address, bytes) in contents.chain([code]) {
            self.map(address, bytes.len() as u64)?;
            self.fill(address, bytes);
        }
        Ok(())
    }

    /// True if the page around `address` gets its memory when it is touched, and hasn't yet.
    pub(super) fn waits(&self, address: u64) -> bool {
        let page = address & !(PAGE - 1);
        let mut ranges = self.sparse.iter();
        !self.pages.contains_key(&page)
            && ranges.any(|&(first, last)| (first..=last).contains(&page))
    }

    /// Maps the page around `address`.
    pub(super) fn touch(&mut self, address: u64) -> Result<(), CaseError> {
        let page = address & !(PAGE - 1);
        let phys = self.page()?;
        self.enter(page, phys, WRITABLE | USER)?;
        self.pages.insert(page, phys);
        Ok(())
    }

    /// As [`super::Bench::read`].
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let room = (PAGE - at % PAGE) as usize;
            let len = room.min(bytes.len() - done);
            let phys = self.pages.get(&(at & !(PAGE - 1)))? + at % PAGE;
            self.ram
                .read_slice(&mut bytes[done..done + len], GuestAddress(phys))
                .ok()?;
            done += len;
        }
        Some(())
    }

    /// Maps the pages around a range.
    fn map(&mut self, address: u64, bytes: u64) -> Result<(), CaseError> {
        let Some(more) = bytes.checked_sub(1) else {
            return Ok(());
        };
        let wrong = CaseError::Address { address, bytes };
        let (first, last) = match address.checked_add(more) {
            Some(last) => (address & !(PAGE - 1), last & !(PAGE - 1)),
            None => return Err(wrong),
        };
        // A range within either half never leaves it in between.
        let same_half = first >> 63 == last >> 63;
        let hidden = (first..=last).contains(&KERNEL);
        if !canonical(first) || !canonical(last) || !same_half || hidden {
            return Err(wrong);
        }
        if last - first >= SPARSE {
            self.sparse.push((first, last));
            return Ok(());
        }
        let mut page = first;
        loop {
            if !self.pages.contains_key(&page) {
                self.touch(page)?;
            }
            if page == last {
                return Ok(());
            }
            page += PAGE;
        }
    }

    /// A zeroed page of guest-physical memory.
    fn page(&mut self) -> Result<u64, CaseError> {
        let page = self.next;
        if page + PAGE > self.mib << 20 {
            return Err(CaseError::Memory { mib: self.mib });
        }
        self.next += PAGE;
        Ok(page)
    }

    /// Enters a page into the page tables.
    fn enter(&mut self, virt: u64, phys: u64, rights: u64) -> Result<(), CaseError> {
        let ram = Arc::clone(&self.ram);
        let entry = phys | rights | PRESENT;
        enter(&ram, ROOT, virt, entry, || self.page())
    }

    /// Writes to pages that are mapped.
    fn fill(&mut self, address: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            let len = ((PAGE - at % PAGE) as usize).min(bytes.len() - done);
            let phys = self.pages[&(at & !(PAGE - 1))] + at % PAGE;
            self.put(phys, &bytes[done..done + len]);
            done += len;
        }
    }

    fn put(&self, phys: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(phys))
            .expect("pages are handed out inside RAM");
    }
}

/// Enters a page into the 4-level tables at `root`, whose upper levels allow everything. Tables that
/// aren't there yet are zeroed pages from `page`.
///
/// # Errors
/// Those of `page`.
pub fn enter<E>(
    ram: &GuestRam,
    root: u64,
    virt: u64,
    entry: u64,
    mut page: impl FnMut() -> Result<u64, E>,
) -> Result<(), E> {
    const INSIDE: &str = "tables are inside RAM";
    let put = |at: u64, entry: u64| ram.write_obj(entry, GuestAddress(at)).expect(INSIDE);
    let mut table = root;
    for level in (1..4).rev() {
        let at = table + (virt >> (12 + 9 * level) & 0x1ff) * 8;
        let entry: u64 = ram.read_obj(GuestAddress(at)).expect(INSIDE);
        table = if entry & PRESENT == 0 {
            let fresh = page()?;
            put(at, fresh | PRESENT | WRITABLE | USER);
            fresh
        } else {
            entry & 0x000f_ffff_ffff_f000
        };
    }
    put(table + (virt >> 12 & 0x1ff) * 8, entry);
    Ok(())
}

/// The state of a process at its first instruction.
pub(super) fn start(rip: u64) -> CpuState {
    let flat = Segment::flat;
    let null = Segment::default();
    let xsave = engine_core::cpuid::pinned(1, 0)[2] >> 26 & 1;
    CpuState {
        rip,
        rflags: 0x202,
        segments: [
            null,
            flat(USER_CS, 0xa0fb),
            flat(USER_SS, 0xc0f3),
            null,
            null,
            null,
        ],
        ldtr: Segment::no_ldt(),
        tr: Segment::tss(0x40, KERNEL + TSS_OFFSET),
        gdtr: DescriptorTable {
            base: KERNEL,
            limit: 0x3f,
        },
        idtr: DescriptorTable {
            base: KERNEL,
            limit: 0,
        },
        // PE MP ET NE WP AM PG.
        cr0: 0x8005_0033,
        cr3: ROOT,
        // PAE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE.
        cr4: 0x1_0e20 | u64::from(xsave) << 18,
        // LME LMA NXE, and no SCE.
        efer: 0xd00,
        ..CpuState::default()
    }
}
