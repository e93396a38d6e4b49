//! Guest memory as the guest's page tables show it: walker, software TLBs, code pages.
//!
//! The walker follows SDM 3A chapter 4: 32-bit, PAE and 4-level paging, permissions, accessed and
//! dirty bits. Results go to the software TLBs of [`crate::tlb`], which behave as a processor's:
//! a changed page-table entry is seen after an invalidation and not before.
//!
//! Invariant: a write TLB never holds a page with translated code on it, this vCPU's or another's, so
//! every write to code takes the slow path and finds the blocks that it kills.

mod reload;
mod spaces;
mod walk;

use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use engine_core::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{
    arena::Arena,
    cpu::{
        CR0_PG, CR0_WP, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, Cpu, EFER_NXE, FLAG_AC,
        canonical,
    },
    fault::Fault,
    guest,
    invalidation::Invalidation,
    pages::Set,
    pair::Pair,
    privileged::Placed,
    system::DeviceLog,
    tlb::{BANKS, JumpCache, Span, TLB_KINDS, Tlb, tlb_index, tlb_kind},
    vm::{Guarantee, Vm},
    window::{Piece, SIZE, Window},
};
use reload::Code;
use spaces::{Origin, Spaces};

/// Physical address width that the pinned CPUID announces.
pub(crate) const PHYSICAL_BITS: u32 = 40;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// Translations remembered besides the TLBs.
const OTHERS: usize = 8;
/// Large pages in use, beyond which all is forgotten at the next load of CR3.
const LARGES: usize = 256;

/// Kind of access, for permissions and error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// What a page of guest-virtual memory is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// Physical address of the 4 KiB page.
    pub phys: u64,
    /// Bytes that the page-table entry maps.
    pub bytes: u64,
    /// Writes by the same privilege need no other walk: allowed, and the dirty bit is set.
    pub writable: bool,
    /// Supervisor accesses depend on EFLAGS.AC (CR4.SMAP): a TLB may hold it for them while that is
    /// set.
    pub guarded: bool,
    /// What it follows from.
    origin: Origin,
}

/// A translation that no TLB holds.
struct Other {
    /// Page and access, and the epoch that it is from.
    key: Cell<(u64, u64)>,
    page: Cell<Page>,
}

impl Other {
    /// None: there is no epoch 0.
    fn none() -> Other {
        Other {
            key: Cell::new((0, 0)),
            page: Cell::new(Page {
                phys: 0,
                bytes: 0,
                writable: false,
                guarded: false,
                origin: Origin::NONE,
            }),
        }
    }
}

#[derive(Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
    /// Descriptor and offset of the file behind it.
    file: Option<(i32, u64)>,
}

/// RAM, TLBs and the knowledge of which pages hold translated code.
pub(crate) struct Mmu {
    regions: Vec<Region>,
    _ram: Arc<GuestRam>,
    tlbs: [Tlb; BANKS * TLB_KINDS],
    /// Whose of them are in use.
    bank: usize,
    /// User accesses at host addresses of their own.
    pub window: Window,
    /// Jump caches for supervisor and user code, at [`jump_index`](crate::tlb::jump_index).
    pub jumps: [JumpCache; 2 * BANKS],
    /// Translations of pages without RAM, and of code pages: what the TLBs don't hold.
    others: [Other; OTHERS],
    /// What translated code knows of invalidations.
    invalidation: Placed<Invalidation>,
    /// The entries that translations come from.
    spaces: RefCell<Spaces>,
    /// Where the code behind each jump cache was found.
    code: [RefCell<Code>; 2 * BANKS],
    /// The value of CR3 that each bank's code was valid at when it was left, if nothing but what was
    /// named has been invalidated since.
    resting: [Option<u64>; BANKS],
    /// Large pages with translations in the tables above or in links between blocks.
    large: RefCell<Vec<Span>>,
    /// Guarded pages in the supervisor's TLBs, which go when EFLAGS.AC does.
    guarded: RefCell<Vec<u64>>,
    /// Entries whose accessed or dirty bit was set where code was translated from.
    marked: RefCell<Vec<u64>>,
    pub vm: Arc<Vm>,
    /// This vCPU's number.
    pub me: usize,
    pair: Pair,
    /// What the instruction that the runtime executes has to do with devices.
    pub devices: RefCell<DeviceLog>,
}

impl Mmu {
    /// The MMU of vCPU `me` of `vm`, over `ram`, with its tables in `arena`.
    ///
    /// # Safety
    /// `arena` outlives the MMU, and no other MMU uses it.
    pub(crate) unsafe fn new(ram: Arc<GuestRam>, arena: &Arena, vm: Arc<Vm>, me: usize) -> Mmu {
        let regions: Vec<Region> = ram
            .iter()
            .map(|region| Region {
                start: region.start_addr().0,
                len: region.len(),
                host: region
                    .get_host_address(MemoryRegionAddress(0))
                    .expect("a mapped region has a host address"),
                file: region
                    .file_offset()
                    .map(|file| (file.file().as_raw_fd(), file.start())),
            })
            .collect();
        // SAFETY: each table gets its own part of the arena.
        let tlbs = std::array::from_fn(|index| unsafe { Tlb::new(arena.tlb(index)) });
        // SAFETY: as above.
        let jumps = std::array::from_fn(|index| unsafe { JumpCache::new(arena.jump(index)) });
        // SAFETY: an address inside the arena.
        let marks = unsafe { &raw mut (*arena.privileged()).invalidation };
        // SAFETY: a part of the arena that is nobody else's.
        let invalidation = unsafe { Placed::new(marks, Invalidation::new()) };
        Mmu {
            regions,
            _ram: ram,
            tlbs,
            bank: 0,
            window: Window::new(),
            jumps,
            others: std::array::from_fn(|_| Other::none()),
            invalidation,
            spaces: RefCell::new(Spaces::new()),
            code: std::array::from_fn(|_| RefCell::new(Code::new())),
            resting: [None; BANKS],
            large: RefCell::default(),
            guarded: RefCell::default(),
            marked: RefCell::default(),
            vm,
            me,
            pair: Pair::default(),
            devices: RefCell::default(),
        }
    }

    /// A guest-virtual address at which the software TLBs have the byte at `host`.
    pub(crate) fn address_of(&self, host: u64) -> Option<u64> {
        let (page, offset) = (host & !0xfff, host & 0xfff);
        let tlbs = (0..TLB_KINDS).map(|kind| &self.tlbs[tlb_index(self.bank, kind)]);
        let mut keys = tlbs.filter_map(|tlb| tlb.key_of(page));
        keys.next().map(|key| key | offset)
    }

    fn region(&self, phys: u64, len: u64) -> Option<(usize, u64)> {
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let offset = phys.checked_sub(region.start)?;
            (offset < region.len && len <= region.len - offset).then_some((index, offset))
        })
    }

    /// Host address of `len` bytes of RAM at `phys`, or None if they aren't RAM.
    pub(crate) fn host(&self, phys: u64, len: u64) -> Option<*mut u8> {
        let (index, offset) = self.region(phys, len)?;
        // SAFETY: the offset lies inside the region's mapping.
        Some(unsafe { self.regions[index].host.add(offset as usize) })
    }

    /// True if `host` is an address of RAM's mapping.
    pub(crate) fn is_ram_at(&self, host: u64) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| {
            let first = region.host as u64;
            (first..first + region.len).contains(&host)
        })
    }

    /// Maps two pages of RAM next to each other, for an atomic access across both. Valid until the
    /// next call. None if they can't be mapped again.
    pub(crate) fn side_by_side(&mut self, first: u64, second: u64) -> Option<*mut u8> {
        let [first, second] = [first, second].map(|phys| {
            let (index, offset) = self.region(phys, 4096)?;
            let (fd, start) = self.regions[index].file?;
            Some((fd, start + offset))
        });
        self.pair.map([first?, second?])
    }

    /// The software TLB of the bank in use for these accesses.
    fn tlb(&self, user: bool, write: bool) -> &Tlb {
        &self.tlbs[tlb_index(self.bank, tlb_kind(user, write))]
    }

    /// Forgets every translation of data addresses and every branch target, since what the tables mean
    /// may have changed. `bank` is the one in use from now on.
    pub(crate) fn flush(&mut self, bank: usize) {
        self.bank = bank;
        self.invalidation.next_epoch();
        self.spaces.borrow_mut().forget();
        self.resting = [None; BANKS];
        self.tlbs.iter().for_each(Tlb::flush);
        self.window.flush();
        self.invalidation.forget_shown();
        self.large.borrow_mut().clear();
        self.invalidation.forget_large();
        self.guarded.borrow_mut().clear();
        self.jumps.iter().for_each(JumpCache::flush);
        self.code.iter().for_each(|code| code.borrow_mut().forget());
    }

    /// Forgets every translation of data addresses, since what may be done with pages has changed. What the
    /// tables give hasn't, nor where code is.
    pub(crate) fn flush_data(&mut self) {
        self.invalidation.next_epoch();
        self.spaces.borrow_mut().forget_records();
        self.tlbs.iter().for_each(Tlb::flush);
        self.window.flush();
        self.invalidation.forget_shown();
        self.guarded.borrow_mut().clear();
    }

    fn epoch(&self) -> u64 {
        self.invalidation.epoch.get()
    }

    /// EFLAGS.AC has been cleared: the supervisor may no longer touch guarded pages.
    pub(crate) fn close_guarded(&self) {
        for key in self.guarded.borrow_mut().drain(..) {
            for bank in 0..BANKS {
                for write in [false, true] {
                    self.tlbs[tlb_index(bank, tlb_kind(false, write))].remove(key);
                }
            }
        }
    }

    /// Forgets the page around `address`, however large it was when it was last looked at.
    pub(crate) fn invalidate(&mut self, address: u64) -> Span {
        let large = self
            .large
            .borrow()
            .iter()
            .copied()
            .find(|span| span.contains(address));
        let span = large.unwrap_or(Span::around(address, 4096));
        for tlb in &self.tlbs {
            match large {
                Some(span) => {
                    tlb.remove_span(span);
                }
                None => tlb.remove(span.start),
            }
        }
        self.window.remove_span(span);
        self.invalidation.next_epoch();
        self.jumps.iter().for_each(|jumps| jumps.remove_span(span));
        span
    }

    /// Remembers that translations of a large page are in use: an invalidation of any address in
    /// it drops them all (SDM 3A 4.10.4.1).
    pub(crate) fn note(&self, address: u64, page: Page) {
        if page.bytes == 4096 {
            return;
        }
        let mut large = self.large.borrow_mut();
        if !large
            .iter()
            .any(|span| span.contains(address) && span.bytes >= page.bytes)
        {
            let span = Span::around(address, page.bytes);
            self.invalidation.mark_large(span.start, span.bytes);
            large.push(span);
        }
    }

    /// True if anybody has translated code from the page at `phys`.
    pub(crate) fn is_code(&self, phys: u64) -> bool {
        self.vm.pages.is_code(phys)
    }

    /// True if this vCPU has [entered](Mmu::enter) the page at `phys`, and not left it.
    pub(crate) fn holds(&self, phys: u64) -> bool {
        self.vm.pages.holds(phys, self.me)
    }

    /// Claims the page at `phys` for writing without a word. False if it holds code: then what is
    /// written has to be told.
    pub(crate) fn claim(&self, phys: u64) -> bool {
        self.vm.pages.claim(phys, self.me)
    }

    /// Notes that code from the page at `phys` is about to be translated. Answers who else may be
    /// writing to it unseen; this vCPU is not.
    pub(crate) fn enter(&mut self, phys: u64) -> Set {
        let mine = 1 << self.me;
        let entered = self.vm.pages.enter(phys, self.me);
        if entered.writers & mine != 0 {
            self.give_up(phys);
        } else if entered.new && self.vm.alone() {
            // The window of an only vCPU claims nothing.
            self.window.protect(phys & !0xfff);
        }
        entered.writers & !mine
    }

    /// Takes back a claim: nothing translated leads to the page any more that could be written through.
    pub(crate) fn give_up(&mut self, phys: u64) {
        self.drop_writable();
        self.window.protect(phys & !0xfff);
        self.vm.pages.disclaim(phys, self.me);
    }

    /// Notes that no translated code from the page at `phys` is left.
    pub(crate) fn leave(&self, phys: u64) {
        self.vm.pages.leave(phys, self.me);
    }

    /// Empties the write TLBs. Any alias of a page may be in them; which, nobody knows.
    pub(crate) fn drop_writable(&self) {
        for bank in 0..BANKS {
            for user in [false, true] {
                self.tlbs[tlb_index(bank, tlb_kind(user, true))].flush();
            }
        }
    }

    /// Enters a page into the TLB that an access of this kind looks into. Returns false if the
    /// page must stay on the slow path: device memory, or a write to a page with code.
    pub(crate) fn fill(&self, address: u64, page: Page, access: Access, user: bool) -> bool {
        let Some(host) = self.host(page.phys, 4096) else {
            return false;
        };
        let write = access == Access::Write;
        if write && !self.claim(page.phys) {
            return false;
        }
        self.note(address, page);
        let key = address & !0xfff;
        if page.guarded && !user {
            // It is gone before the next load of CR3 looks.
            self.guarded.borrow_mut().push(key);
        } else {
            let mut spaces = self.spaces.borrow_mut();
            let kind = tlb_kind(user, write);
            spaces.record(kind, key, host as u64, page.phys, page.origin);
        }
        self.tlb(user, write).fill(key, host as u64);
        true
    }

    /// Maps the page around `address` in the window, for accesses by user code, and what its entry maps
    /// besides. Returns false if the access must take another way: a fault, device memory, a write to a
    /// page with code, or the host refuses.
    pub(crate) fn fill_window(&mut self, cpu: &Cpu, address: u64, write: bool) -> bool {
        if address >= SIZE {
            return false;
        }
        let access = if write { Access::Write } else { Access::Read };
        let Ok(page) = self.walk(cpu, address, access, true) else {
            return false;
        };
        let Some((index, offset)) = self.region(page.phys, 4096) else {
            return false;
        };
        let region = self.regions[index];
        let Some((fd, start)) = region.file else {
            return false;
        };
        let claimed = page.writable && self.claim(page.phys);
        if write && !claimed {
            return false;
        }
        self.note(address, page);
        let entry = Span::around(address, page.bytes);
        self.invalidation.mark_shown(entry.start, entry.bytes);
        let here = address & !0xfff;
        let single = Piece {
            virt: here,
            bytes: 4096,
            phys: page.phys,
            fd,
            offset: start + offset,
            writable: claimed,
        };
        // A hole where code was, in an extent that is mapped already.
        if self.window.shows(here, page.phys, page.writable) {
            return self.window.fill_hole(single);
        }
        let span = Span::around(address, page.bytes.min(self.vm.pages.most_at_once()));
        let before = (here - span.start).min(offset);
        let after = (span.bytes - (here - span.start))
            .min(region.len - offset)
            .min(SIZE - here);
        let whole = Piece {
            virt: here - before,
            bytes: before + after,
            phys: page.phys - before,
            fd,
            offset: start + offset - before,
            writable: page.writable,
        };
        let mut code = Vec::new();
        if page.writable {
            code = self.vm.pages.claim_all(whole.phys, whole.bytes, self.me);
        }
        // So many holes aren't worth it.
        if code.len() > 64 {
            return self.window.fill(single, &[]);
        }
        self.window.fill(whole, &code)
    }

    /// Copies guest-virtual memory out, with the given privilege.
    ///
    /// # Errors
    /// The first page fault. Device memory is read as [`DeviceLog`] says.
    pub(crate) fn read(
        &self,
        cpu: &Cpu,
        address: u64,
        bytes: &mut [u8],
        user: bool,
    ) -> Result<(), Fault> {
        let mut done = 0;
        let last = address.wrapping_add(bytes.len() as u64 - 1);
        // An address that isn't canonical comes before any page fault.
        if cpu.long() && !canonical(last) {
            return Err(Fault::gp());
        }
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let len = (4096 - (at & 0xfff) as usize).min(bytes.len() - done);
            let here = &mut bytes[done..done + len];
            let host = match self.tlb(user, false).get(at & !0xfff) {
                Some(host) => Some((host + (at & 0xfff)) as *mut u8),
                None => {
                    let page = self.walk(cpu, at, Access::Read, user)?;
                    self.fill(at, page, Access::Read, user);
                    let phys = page.phys | at & 0xfff;
                    let host = self.host(phys, len as u64);
                    if host.is_none() {
                        self.devices.borrow_mut().read(phys, here)?;
                    }
                    host
                }
            };
            if let Some(host) = host {
                // SAFETY: inside RAM.
                unsafe { guest::read(host, here) };
            }
            done += len;
        }
        Ok(())
    }

    /// True if this privilege has read from the page of RAM around `address`, as far as the TLB
    /// knows.
    pub(crate) fn was_read(&self, address: u64, user: bool) -> bool {
        self.tlb(user, false).get(address & !0xfff).is_some()
    }

    /// The key of the TLB entry that lies so many bytes from the first.
    pub(crate) fn key_at(&self, offset: u64, write: bool, user: bool) -> u64 {
        self.tlb(user, write).key_at(offset)
    }

    /// Host address of a page that this privilege has written before, if the TLB still knows.
    pub(crate) fn written(&self, address: u64, user: bool) -> Option<*mut u8> {
        let host = self.tlb(user, true).get(address & !0xfff)?;
        Some((host + (address & 0xfff)) as *mut u8)
    }

    /// Reads a little-endian integer of `N` bytes.
    ///
    /// # Errors
    /// The page fault.
    pub(crate) fn read_int<const N: usize>(
        &self,
        cpu: &Cpu,
        address: u64,
        user: bool,
    ) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read(cpu, address, &mut bytes[..N], user)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
