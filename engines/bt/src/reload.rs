//! What a load of CR3 does to translations: drops them all, and looks those up again at once that were
//! in use, while that is cheap.
//!
//! A processor may enter a translation in its TLBs at any time, asked or not, as long as it doesn't
//! set a bit in a paging structure for it (SDM 3A 4.10.2.3). So every page that is looked up here is
//! looked up in the tables as they are after the load, and only counts if its accessed bits are set, and
//! for writes its dirty bit. What is known of code (jump caches, links across pages) is what a TLB
//! for fetches knows: it stays if all of a privilege's code pages are still where they were.
//!
//! Invariant: each page that has entries in a jump cache or is the target of a link across pages is in
//! the privilege's [`Code`], where it was found last, or that is `lost`.

use std::cell::{Cell, RefCell};

use crate::{
    cpu::Cpu,
    mmu::{Access, Mmu},
};

/// Pages of data that are looked up again.
const DATA: usize = 24;
/// Code pages of one privilege: with more, looking up costs more than it saves.
const CODE: usize = 64;
/// Loads after which the pages of data are forgotten, to be those that are in use then.
const AGE: u32 = 64;

/// Pages with code of one privilege.
#[derive(Default)]
struct Code {
    /// (virtual, physical) addresses.
    pages: Vec<(u64, u64)>,
    /// There are more, or one has been found in two places.
    lost: bool,
}

/// The pages in use.
#[derive(Default)]
pub(crate) struct Recent {
    /// (virtual address, write, user), the first since they were forgotten.
    data: RefCell<Vec<(u64, bool, bool)>>,
    code: [RefCell<Code>; 2],
    loads: Cell<u32>,
}

impl Recent {
    /// Notes an entry of a software TLB.
    pub(crate) fn filled(&self, page: u64, write: bool, user: bool) {
        let mut data = self.data.borrow_mut();
        if data.len() < DATA && !data.contains(&(page, write, user)) {
            data.push((page, write, user));
        }
    }

    /// Notes where a code page was found.
    pub(crate) fn fetched(&self, virt: u64, phys: u64, user: bool) {
        let Code { pages, lost } = &mut *self.code[usize::from(user)].borrow_mut();
        let virt = virt & !0xfff;
        if *lost {
            return;
        }
        match pages.iter().find(|page| page.0 == virt) {
            Some(page) => *lost = page.1 != phys,
            None if pages.len() == CODE => *lost = true,
            None => pages.push((virt, phys)),
        }
    }

    /// Forgets the code of a privilege: its jump cache and links are emptied.
    pub(crate) fn forget_code(&self, user: bool) {
        let mut code = self.code[usize::from(user)].borrow_mut();
        code.pages.clear();
        code.lost = false;
    }
}

impl Mmu {
    /// Drops every translation after CR3 was loaded, and enters those that were in use as they are now.
    /// Returns which privilege's code is still where it was: its jump cache is valid, and so are its
    /// links.
    ///
    /// A load of the same value is how a kernel flushes: what it goes on to touch is what it has changed,
    /// a page or two, and looking up all others would cost more.
    pub(crate) fn reload(&mut self, cpu: &Cpu, same: bool) -> [bool; 2] {
        self.flush_data();
        let kept = [false, true].map(|user| {
            let same = self.same_code(cpu, user);
            if !same {
                self.jumps[usize::from(user)].flush();
                self.recent.forget_code(user);
            }
            same
        });
        let data = self.recent.data.take();
        let loads = self.recent.loads.get().wrapping_add(1);
        self.recent.loads.set(loads);
        if same || loads.is_multiple_of(AGE) {
            return kept;
        }
        for (virt, write, user) in data {
            let access = if write { Access::Write } else { Access::Read };
            if let Some(page) = self.peek(cpu, virt, access, user)
                && !page.guarded
            {
                self.fill(virt, page, access, user);
            }
        }
        kept
    }

    fn same_code(&self, cpu: &Cpu, user: bool) -> bool {
        let code = self.recent.code[usize::from(user)].borrow();
        !code.lost
            && code.pages.iter().all(|&(virt, phys)| {
                let found = self.peek(cpu, virt, Access::Fetch, user);
                found.is_some_and(|page| {
                    self.note(virt, page);
                    page.phys == phys
                })
            })
    }
}
