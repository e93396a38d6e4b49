//! The page walk: SDM 3A chapter 4, with permissions, accessed and dirty bits.
//!
//! A walk begins at the table with the last entry, where the way there is known ([`Upper`]); if it
//! fails there it begins again at the root, as a page fault demands (SDM 3A 4.10.4.1).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{
    spaces::{Origin, Upper},
    *,
};

/// What is looked up.
#[derive(Clone, Copy)]
struct Query {
    address: u64,
    access: Access,
    user: bool,
    /// Accessed and dirty bits may be set.
    sets: bool,
}

/// The table that a walk begins at, its level, and whether entries have 8 bytes.
fn root(cpu: &Cpu) -> (u32, u64, bool) {
    if cpu.long() {
        (4, cpu.cr3 & 0x000f_ffff_ffff_f000, true)
    } else if cpu.cr4 & CR4_PAE != 0 {
        (3, cpu.cr3 & 0xffff_ffe0, true)
    } else {
        (2, cpu.cr3 & 0xffff_f000, false)
    }
}

impl Query {
    fn fault(self, cpu: &Cpu, present: bool, reserved: bool, locked: bool) -> Fault {
        let nx = cpu.efer & EFER_NXE != 0 && cpu.cr4 & CR4_PAE != 0;
        let smep = cpu.cr4 & CR4_SMEP != 0;
        let fetch = self.access == Access::Fetch && (nx || smep);
        Fault::page(
            self.address,
            u32::from(present)
                | u32::from(self.access == Access::Write) << 1
                | u32::from(self.user) << 2
                | u32::from(reserved) << 3
                | u32::from(fetch) << 4
                | u32::from(locked) << 5,
        )
    }
}

impl Mmu {
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
        let (other, key) = self.other(address, access, user);
        if other.key.get() == key {
            return Ok(other.page.get());
        }
        let page = self.walk(cpu, address, access, user)?;
        self.remember(other, key, page, access);
        Ok(page)
    }

    /// Looks up `address` and [fills](Mmu::fill) a TLB with what is found, or answers with it if that may
    /// not be.
    ///
    /// # Errors
    /// As [`Mmu::walk`].
    #[inline(never)]
    pub(crate) fn admit(
        &self,
        cpu: &Cpu,
        address: u64,
        access: Access,
        user: bool,
    ) -> Result<Option<Page>, Fault> {
        let (other, key) = self.other(address, access, user);
        if other.key.get() == key {
            return Ok(Some(other.page.get()));
        }
        let query = Query {
            address,
            access,
            user,
            sets: true,
        };
        let page = match self.walk_rest(cpu, query) {
            Some(ended) => ended?,
            None => self.walk(cpu, address, access, user)?,
        };
        if self.fill(address, page, access, user) {
            return Ok(None);
        }
        self.remember(other, key, page, access);
        Ok(Some(page))
    }

    /// Remembers a translation that no TLB holds.
    fn remember(&self, other: &Other, key: (u64, u64), page: Page, access: Access) {
        if !page.guarded && (access == Access::Fetch || self.region(page.phys, 4096).is_none()) {
            other.key.set(key);
            other.page.set(page);
        }
    }

    /// Where the translation would be that no TLB holds, and as what, if it is valid.
    fn other(&self, address: u64, access: Access, user: bool) -> (&Other, (u64, u64)) {
        let key = address & !0xfff | (access as u64) << 1 | u64::from(user);
        let other = &self.others[((address >> 12) as usize ^ access as usize) % OTHERS];
        (other, (key, self.epoch()))
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
        let query = Query {
            address,
            access,
            user,
            sets: true,
        };
        if let Some(ended) = self.walk_rest(cpu, query) {
            return ended;
        }
        loop {
            if let Some(page) = self.descend(cpu, query)? {
                return Ok(page);
            }
        }
    }

    /// As [`Mmu::walk`], of a processor that guesses: changes nothing, and None if it would have to, or
    /// if the access would fault.
    pub(crate) fn peek(&self, cpu: &Cpu, address: u64, access: Access, user: bool) -> Option<Page> {
        let query = Query {
            address,
            access,
            user,
            sets: false,
        };
        match self.walk_rest(cpu, query) {
            Some(ended) => ended.ok(),
            None => self.descend(cpu, query).ok().flatten(),
        }
    }

    /// The end of a walk whose way is known. None if it has to begin at the root.
    ///
    /// In line, so that what it finds needs no copies: they would wait for the store buffer.
    #[inline(always)]
    fn walk_rest(&self, cpu: &Cpu, query: Query) -> Option<Result<Page, Fault>> {
        if cpu.cr0 & CR0_PG == 0 {
            return None;
        }
        let (_, root, wide) = root(cpu);
        let mut spaces = self.spaces.borrow_mut();
        let (number, upper) = spaces.upper(root, query.address, self.epoch())?;
        let at = entry_at(upper, query.address, wide);
        let entry = self.entry(at, wide);
        let ended = if entry & PRESENT == 0 {
            Err(query.fault(cpu, false, false, false))
        } else if upper.level > 1 && entry & LARGE == 0 {
            return None;
        } else {
            self.last(cpu, query, upper, wide, at, entry)
        };
        match ended {
            Ok(Some((mut page, value))) => {
                let host = self.host(at, if wide { 8 } else { 4 })? as u64;
                page.origin = spaces.origin(number, host, value);
                Some(Ok(page))
            }
            Ok(None) => None,
            // So would a walk from the root, which sees the same.
            Err(fault) => upper.holds(wide).then_some(Err(fault)),
        }
    }

    /// One walk from the root. None if an entry has changed under it, or it would have to change one
    /// and may not.
    fn descend(&self, cpu: &Cpu, query: Query) -> Result<Option<Page>, Fault> {
        let address = query.address;
        if cpu.cr0 & CR0_PG == 0 {
            return Ok(Some(Page {
                phys: address & 0xffff_f000,
                bytes: 4096,
                writable: true,
                guarded: false,
                origin: Origin::NONE,
            }));
        }
        if cpu.long() && !canonical(address) {
            return Err(Fault::gp());
        }
        let (level, root, wide) = root(cpu);
        let pae = wide && !cpu.long();
        let mut upper = Upper::root(level, root, WRITABLE | USER);
        // Every table is in RAM.
        let mut known = true;
        loop {
            let at = entry_at(&upper, address, wide);
            let entry = self.entry(at, wide);
            if entry & PRESENT == 0 {
                return Err(query.fault(cpu, false, false, false));
            }
            // PDPTEs of PAE paging have no rights of their own.
            let pointer_only = pae && upper.level == 3;
            let large = upper.level > 1
                && entry & LARGE != 0
                && !pointer_only
                && (wide || cpu.cr4 & CR4_PSE != 0);
            if upper.level == 1 || large {
                let Some((mut page, value)) = self.last(cpu, query, &upper, wide, at, entry)?
                else {
                    return Ok(None);
                };
                if known && let Some(host) = self.host(at, if wide { 8 } else { 4 }) {
                    let mut spaces = self.spaces.borrow_mut();
                    let number = spaces.learn(root, wide, address, self.epoch(), upper);
                    page.origin = spaces.origin(number, host as u64, value);
                }
                return Ok(Some(page));
            }
            if wide && self.reserved(cpu, entry, upper.level) {
                return Err(query.fault(cpu, true, true, false));
            }
            let set = if pointer_only { 0 } else { ACCESSED };
            if entry & set != set && !(query.sets && self.set_bits(at, wide, entry, set)) {
                return Ok(None);
            }
            if !pointer_only {
                upper.rights &= entry;
                upper.executable &= entry & NO_EXECUTE == 0;
            }
            let host = self.host(at, if wide { 8 } else { 4 });
            known &= host.is_some();
            upper.above[upper.count] = (host.map_or(0, |host| host as u64), entry | set);
            upper.count += 1;
            upper.table = entry
                & if wide {
                    0x000f_ffff_ffff_f000
                } else {
                    0xffff_f000
                };
            upper.level -= 1;
        }
    }

    /// True if bits are set that may not, at any level.
    fn reserved(&self, cpu: &Cpu, entry: u64, level: u32) -> bool {
        let above = !((1u64 << PHYSICAL_BITS) - 1) & 0x000f_ffff_ffff_ffff;
        let bad_nx = entry & NO_EXECUTE != 0 && cpu.efer & EFER_NXE == 0;
        let bad_size = level == 4 && entry & LARGE != 0;
        entry & above != 0 || bad_nx || bad_size
    }

    /// The last step of a walk, and what the entry is after it. None if the entry, which is `entry` at
    /// `at`, isn't that any more, or would have to change and may not.
    #[inline(always)]
    fn last(
        &self,
        cpu: &Cpu,
        query: Query,
        upper: &Upper,
        wide: bool,
        at: u64,
        entry: u64,
    ) -> Result<Option<(Page, u64)>, Fault> {
        let Query {
            address,
            access,
            user,
            sets,
        } = query;
        let write = access == Access::Write;
        let fault = |present, reserved, locked| query.fault(cpu, present, reserved, locked);
        let level = upper.level;
        if wide && self.reserved(cpu, entry, level) {
            return Err(fault(true, true, false));
        }
        let rights = upper.rights & entry;
        let executable = upper.executable && entry & NO_EXECUTE == 0;
        let large = level > 1;
        let span = 1u64 << (12 + (level - 1) * if wide { 9 } else { 10 });
        // Bit 12 is PAT. With PSE-36, bits 13 to 20 are more of the address.
        let unused = if wide { !0x1fff } else { 1 << 21 };
        if large && entry & (span - 1) & unused != 0 {
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
        let smep = cpu.cr4 & CR4_SMEP != 0;
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
        if entry & set != set && !(sets && self.set_bits(at, wide, entry, set)) {
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
        let page = Page {
            phys,
            bytes: span,
            writable: can_write
                && (write || entry & DIRTY != 0)
                && !(keyed && self.locked(cpu, entry, Access::Write, user)),
            guarded,
            origin: Origin::NONE,
        };
        Ok(Some((page, entry | set)))
    }

    /// The table that walks begin at, and whether its entries have 8 bytes.
    pub(super) fn root(cpu: &Cpu) -> (u64, bool) {
        let (_, table, wide) = root(cpu);
        (table, wide)
    }

    /// True if the protection key of a user page forbids the access (SDM 3A 4.6.2).
    pub(super) fn locked(&self, cpu: &Cpu, entry: u64, access: Access, user: bool) -> bool {
        let rights = cpu.pkru >> (2 * (entry >> 59 & 0xf));
        let (none, read_only) = (rights & 1 != 0, rights & 2 != 0);
        match access {
            Access::Fetch => false,
            Access::Read => none,
            Access::Write => none || read_only && (user || cpu.cr0 & CR0_WP != 0),
        }
    }

    pub(super) fn entry(&self, at: u64, wide: bool) -> u64 {
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
    pub(super) fn set_bits(&self, at: u64, wide: bool, entry: u64, bits: u64) -> bool {
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

    pub(super) fn exchange_bits(&self, at: u64, wide: bool, entry: u64, bits: u64) -> bool {
        let Some(host) = self.host(at, if wide { 8 } else { 4 }) else {
            return true;
        };
        let new = entry | bits;
        // An only CPU has nobody to compete with. The bits are in the entry's lower half.
        if self.vm.alone() || self.vm.without(Guarantee::EntryBits) {
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
}

/// Guest-physical address of the entry for `address` in the last table of `upper`.
fn entry_at(upper: &Upper, address: u64, wide: bool) -> u64 {
    if wide {
        upper.table + (address >> (12 + 9 * (upper.level - 1)) & 0x1ff) * 8
    } else {
        upper.table + (address >> (12 + 10 * (upper.level - 1)) & 0x3ff) * 4
    }
}
