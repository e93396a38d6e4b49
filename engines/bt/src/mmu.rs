//! Guest memory as the guest's page tables show it: walker, software TLBs, code pages.
//!
//! The walker follows SDM 3A chapter 4: 32-bit, PAE and 4-level paging, permissions, accessed and
//! dirty bits. Results go to the software TLBs of [`crate::tlb`], which behave as a processor's:
//! a changed page-table entry is seen after an invalidation and not before.
//!
//! Invariant: a write TLB never holds a page with translated code on it, this vCPU's or another's, so
//! every write to code takes the slow path and finds the blocks that it kills.

use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

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
    pages::Set,
    pair::Pair,
    reload::Recent,
    system::DeviceLog,
    tlb::{JumpCache, Span, Tlb, tlb_index},
    vm::{Guarantee, Vm},
    window::{Piece, SIZE, Window},
};

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
/// None: no key has its bit 3 set.
const NO_OTHERS: [(u64, Page); OTHERS] = [(
    8,
    Page {
        phys: 0,
        bytes: 0,
        writable: false,
        guarded: false,
    },
); OTHERS];

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
    tlbs: [Tlb; 4],
    /// User accesses at host addresses of their own.
    pub window: Window,
    /// Jump caches for supervisor and user code.
    pub jumps: [JumpCache; 2],
    /// Translations of pages without RAM, and of code pages: what the TLBs don't hold.
    others: Cell<[(u64, Page); OTHERS]>,
    /// Large pages with translations in the tables above or in links between blocks.
    large: RefCell<Vec<Span>>,
    /// What a load of CR3 looks up again.
    pub recent: Recent,
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
        Mmu {
            regions,
            _ram: ram,
            tlbs,
            window: Window::new(),
            jumps,
            others: Cell::new(NO_OTHERS),
            large: RefCell::default(),
            recent: Recent::default(),
            guarded: RefCell::default(),
            marked: RefCell::default(),
            vm,
            me,
            pair: Pair::default(),
            devices: RefCell::default(),
        }
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

    /// Forgets every translation of data addresses and every branch target.
    pub(crate) fn flush(&mut self) {
        self.flush_data();
        self.jumps.iter().for_each(JumpCache::flush);
        self.recent.forget_code(false);
        self.recent.forget_code(true);
    }

    /// Forgets every translation, but not the branch targets.
    pub(crate) fn flush_data(&mut self) {
        self.tlbs.iter().for_each(Tlb::flush);
        self.window.flush();
        self.others.set(NO_OTHERS);
        self.large.borrow_mut().clear();
        self.guarded.borrow_mut().clear();
    }

    /// EFLAGS.AC has been cleared: the supervisor may no longer touch guarded pages.
    pub(crate) fn close_guarded(&self) {
        for key in self.guarded.borrow_mut().drain(..) {
            for write in [false, true] {
                self.tlbs[tlb_index(false, write)].remove(key);
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
        self.others.set(NO_OTHERS);
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
            large.push(Span::around(address, page.bytes));
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
        self.tlbs[tlb_index(false, true)].flush();
        self.tlbs[tlb_index(true, true)].flush();
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
            self.guarded.borrow_mut().push(key);
        }
        self.tlbs[tlb_index(user, write)].fill(key, host as u64);
        self.recent.filled(key, write, user);
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

    /// As [`Mmu::walk`], and remembers what no TLB holds until the next invalidation.
    ///
    /// # Errors
    /// As [`Mmu::walk`].
    pub(crate) fn translate(
        &self,
        cpu: &Cpu,
        address: u64,
        access: Access,
        user: bool,
    ) -> Result<Page, Fault> {
        let key = address & !0xfff | (access as u64) << 1 | u64::from(user);
        let slot = ((address >> 12) as usize ^ access as usize) % OTHERS;
        let mut others = self.others.get();
        if others[slot].0 == key {
            return Ok(others[slot].1);
        }
        let page = self.walk(cpu, address, access, user)?;
        if !page.guarded && (access == Access::Fetch || self.region(page.phys, 4096).is_none()) {
            others[slot] = (key, page);
            self.others.set(others);
        }
        Ok(page)
    }

    /// Translates `address` for an access by the current or an implied privilege.
    ///
    /// # Errors
    /// The page fault, or #GP for an address that isn't canonical.
    pub(crate) fn walk(
        &self,
        cpu: &Cpu,
        address: u64,
        access: Access,
        user: bool,
    ) -> Result<Page, Fault> {
        loop {
            if let Some(page) = self.descend(cpu, address, access, user, true)? {
                return Ok(page);
            }
        }
    }

    /// As [`Mmu::walk`], of a processor that guesses: changes nothing, and None if it would have to, or
    /// if the access would fault.
    pub(crate) fn peek(&self, cpu: &Cpu, address: u64, access: Access, user: bool) -> Option<Page> {
        self.descend(cpu, address, access, user, false)
            .ok()
            .flatten()
    }

    /// One walk from the root. None if an entry has changed under it, or it would have to change one
    /// and may not.
    fn descend(
        &self,
        cpu: &Cpu,
        address: u64,
        access: Access,
        user: bool,
        sets: bool,
    ) -> Result<Option<Page>, Fault> {
        if cpu.cr0 & CR0_PG == 0 {
            return Ok(Some(Page {
                phys: address & 0xffff_f000,
                bytes: 4096,
                writable: true,
                guarded: false,
            }));
        }
        let write = access == Access::Write;
        let nx = cpu.efer & EFER_NXE != 0;
        let smep = cpu.cr4 & CR4_SMEP != 0;
        let fault = |present: bool, reserved: bool, locked: bool| {
            let nx = nx && cpu.cr4 & CR4_PAE != 0;
            let fetch = access == Access::Fetch && (nx || smep);
            Fault::page(
                address,
                u32::from(present)
                    | u32::from(write) << 1
                    | u32::from(user) << 2
                    | u32::from(reserved) << 3
                    | u32::from(fetch) << 4
                    | u32::from(locked) << 5,
            )
        };
        let (mut level, mut table, wide) = if cpu.long() {
            if !canonical(address) {
                return Err(Fault::gp());
            }
            (4u32, cpu.cr3 & 0x000f_ffff_ffff_f000, true)
        } else if cpu.cr4 & CR4_PAE != 0 {
            (3, cpu.cr3 & 0xffff_ffe0, true)
        } else {
            (2, cpu.cr3 & 0xffff_f000, false)
        };
        let pae = wide && !cpu.long();
        let mut rights = WRITABLE | USER;
        let mut executable = true;
        loop {
            let entry_at = if wide {
                table + (address >> (12 + 9 * (level - 1)) & 0x1ff) * 8
            } else {
                table + (address >> (12 + 10 * (level - 1)) & 0x3ff) * 4
            };
            let entry = self.entry(entry_at, wide);
            if entry & PRESENT == 0 {
                return Err(fault(false, false, false));
            }
            // PDPTEs of PAE paging have no rights of their own.
            let pointer_only = pae && level == 3;
            if wide {
                let above = !((1u64 << PHYSICAL_BITS) - 1) & 0x000f_ffff_ffff_ffff;
                let bad_nx = entry & NO_EXECUTE != 0 && !nx;
                let bad_size = level == 4 && entry & LARGE != 0;
                if entry & above != 0 || bad_nx || bad_size {
                    return Err(fault(true, true, false));
                }
            }
            if !pointer_only {
                rights &= entry;
                executable &= entry & NO_EXECUTE == 0;
            }
            let large = level > 1
                && entry & LARGE != 0
                && !pointer_only
                && (wide || cpu.cr4 & CR4_PSE != 0);
            if level > 1 && !large {
                if !pointer_only
                    && entry & ACCESSED == 0
                    && !(sets && self.set_bits(entry_at, wide, entry, ACCESSED))
                {
                    return Ok(None);
                }
                table = entry
                    & if wide {
                        0x000f_ffff_ffff_f000
                    } else {
                        0xffff_f000
                    };
                level -= 1;
                continue;
            }
            let span = 1u64 << (12 + (level - 1) * if wide { 9 } else { 10 });
            // Bits 13 up to the page size are reserved in a large entry (bit 12 is PAT); without
            // PAE, bits 13 to 20 are more of the address.
            let reserved = if wide { !0x1fff } else { 1 << 21 };
            if large && entry & (span - 1) & reserved != 0 {
                return Err(fault(true, true, false));
            }
            let keyed = cpu.cr4 & CR4_PKE != 0 && cpu.long() && rights & USER != 0;
            let locked = keyed && self.locked(cpu, entry, access, user);
            if user && rights & USER == 0 {
                return Err(fault(true, false, locked));
            }
            let can_write = rights & WRITABLE != 0 || (!user && cpu.cr0 & CR0_WP == 0);
            if write && !can_write {
                return Err(fault(true, false, locked));
            }
            let of_user = rights & USER != 0;
            if access == Access::Fetch && (!executable || smep && !user && of_user) {
                return Err(fault(true, false, locked));
            }
            let guarded = cpu.cr4 & CR4_SMAP != 0 && of_user;
            // Accesses that ring 3 causes without making them (to descriptor tables, say) are
            // guarded whatever AC says (SDM 3A 4.6.1).
            let open = cpu.flags & FLAG_AC != 0 && cpu.cpl() != 3;
            if access != Access::Fetch && !user && guarded && !open {
                return Err(fault(true, false, locked));
            }
            if locked {
                return Err(fault(true, false, locked));
            }
            let set = ACCESSED | if write { DIRTY } else { 0 };
            if entry & set != set && !(sets && self.set_bits(entry_at, wide, entry, set)) {
                return Ok(None);
            }
            let base = if wide {
                entry & 0x000f_ffff_ffff_f000 & !(span - 1)
            } else if large {
                // PSE-36: bits 13-20 are address bits 32-39.
                entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
            } else {
                entry & 0xffff_f000
            };
            let phys = (base | address & (span - 1)) & !0xfff;
            return Ok(Some(Page {
                phys,
                bytes: span,
                writable: can_write
                    && (write || entry & DIRTY != 0)
                    && !(keyed && self.locked(cpu, entry, Access::Write, user)),
                guarded,
            }));
        }
    }

    /// True if the protection key of a user page forbids the access (SDM 3A 4.6.2).
    fn locked(&self, cpu: &Cpu, entry: u64, access: Access, user: bool) -> bool {
        let rights = cpu.pkru >> (2 * (entry >> 59 & 0xf));
        let (none, read_only) = (rights & 1 != 0, rights & 2 != 0);
        match access {
            Access::Fetch => false,
            Access::Read => none,
            Access::Write => none || read_only && (user || cpu.cr0 & CR0_WP != 0),
        }
    }

    fn entry(&self, at: u64, wide: bool) -> u64 {
        match self.host(at, if wide { 8 } else { 4 }) {
            // SAFETY: inside RAM; entries are naturally aligned, and atomic because a guest's
            // other CPUs may change them.
            Some(host) if wide => unsafe { &*host.cast::<AtomicU64>() }.load(Ordering::Relaxed),
            // SAFETY: as above.
            Some(host) => u64::from(unsafe { &*host.cast::<AtomicU32>() }.load(Ordering::Relaxed)),
            // Page tables outside RAM read as all ones do on a bus: present, reserved bits set.
            None => u64::MAX,
        }
    }

    /// Sets `bits` in the entry at `at`. False if it isn't `entry` any more: another CPU has changed
    /// it, and what was read from it holds no longer (SDM 3A 4.8, 4.10.4.2).
    fn set_bits(&self, at: u64, wide: bool, entry: u64, bits: u64) -> bool {
        if entry & bits == bits {
            return true;
        }
        let set = self.exchange_bits(at, wide, entry, bits);
        if set && self.is_code(at) {
            self.marked.borrow_mut().push(at);
        }
        set
    }

    /// True if walks have written to where code was translated from.
    pub(crate) fn has_marked(&self) -> bool {
        !self.marked.borrow().is_empty()
    }

    /// Addresses of the entries that walks have written to where code was translated from: 8 bytes
    /// each at most.
    pub(crate) fn take_marked(&self) -> Vec<u64> {
        self.marked.take()
    }

    fn exchange_bits(&self, at: u64, wide: bool, entry: u64, bits: u64) -> bool {
        let Some(host) = self.host(at, if wide { 8 } else { 4 }) else {
            return true;
        };
        let new = entry | bits;
        if self.vm.without(Guarantee::EntryBits) {
            // SAFETY: as in `entry`.
            unsafe { &*host.cast::<AtomicU32>() }.store(new as u32, Ordering::Relaxed);
            return true;
        }
        if wide {
            // SAFETY: as in `entry`.
            let slot = unsafe { &*host.cast::<AtomicU64>() };
            let (old, new) = (entry, new);
            slot.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        } else {
            // SAFETY: as in `entry`.
            let slot = unsafe { &*host.cast::<AtomicU32>() };
            let (old, new) = (entry as u32, new as u32);
            slot.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        }
    }

    /// True if a page-directory pointer of PAE paging has reserved bits set: loading CR3 faults.
    pub(crate) fn bad_pointers(&self, cr3: u64) -> bool {
        const RESERVED: u64 = 0x1e6 | !((1 << PHYSICAL_BITS) - 1);
        (0..4).any(|index| {
            let entry = self.entry((cr3 & 0xffff_ffe0) + index * 8, true);
            entry & PRESENT != 0 && entry & RESERVED != 0
        })
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
            let host = match self.tlbs[tlb_index(user, false)].get(at & !0xfff) {
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
        self.tlbs[tlb_index(user, false)]
            .get(address & !0xfff)
            .is_some()
    }

    /// Host address of a page that this privilege has written before, if the TLB still knows.
    pub(crate) fn written(&self, address: u64, user: bool) -> Option<*mut u8> {
        let host = self.tlbs[tlb_index(user, true)].get(address & !0xfff)?;
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
