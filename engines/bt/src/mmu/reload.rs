//! What a load of CR3 does to translations: those stay that the tables give still, or again.
//!
//! A processor may enter a translation in its TLBs at any time, asked or not, as long as it doesn't
//! set a bit in a paging structure for it (SDM 3A 4.10.2.3). So a load looks at the entries that
//! translations came from ([`super::spaces`]): those whose entries are as they were count as made after it.
//! What is known of code (jump caches, links across pages) is what a TLB for fetches knows: it
//! stays if all of a privilege's code pages are where they were. A load that changes the
//! [bank](crate::tlb::BANKS) looks at what the one that it enters has, unless it asks to keep that.
//!
//! Invariant: each page that has entries in a jump cache or is the target of a link across pages is in
//! the privilege's [`Code`], where it was found last, or that is `lost`.

use super::{Access, LARGES, Mmu, Page, Tlb};
use crate::{
    cpu::{CR0_PG, Cpu},
    tlb::{BANKS, Span, jump_index, tlb_index},
};

/// Code pages of one privilege: with more, looking at them costs more than it saves.
const CODE: usize = 96;

/// Places for pages that need not be searched for.
const SEEN: usize = 64;
/// No page: its number is no address's.
const UNSEEN: (u64, u64) = (u64::MAX, 0);

/// Pages with code of one privilege.
pub(super) struct Code {
    /// As their entries map them, with physical addresses.
    pages: Vec<(Span, u64)>,
    /// There are more, or one has been found in two places.
    lost: bool,
    /// Changes when the list begins anew.
    number: u64,
    /// Pages of 4 KiB that are in the list for sure: number, physical address and size of the entry.
    seen: [(u64, u64); SEEN],
}

impl Code {
    pub(super) fn new() -> Code {
        Code {
            pages: Vec::new(),
            lost: false,
            number: 1,
            seen: [UNSEEN; SEEN],
        }
    }

    pub(super) fn forget(&mut self) {
        self.pages.clear();
        self.lost = false;
        self.number += 1;
        self.seen = [UNSEEN; SEEN];
    }
}

/// What the entry of a page maps, and where that begins.
fn extent(virt: u64, page: Page) -> (Span, u64) {
    let span = Span::around(virt, page.bytes);
    let phys = page.phys.wrapping_sub((virt & !0xfff) - span.start);
    (span, phys)
}

impl Mmu {
    /// Notes where a code page was found.
    pub(crate) fn fetched(&self, virt: u64, page: Page, index: usize) {
        let Code {
            pages,
            lost,
            number,
            seen,
        } = &mut *self.code[index].borrow_mut();
        // With its size: an invalidation in a large page drops all of it.
        let here = (
            virt >> 12,
            page.phys | u64::from(page.bytes.trailing_zeros()),
        );
        let seen = &mut seen[here.0 as usize % SEEN];
        if *seen == here {
            return;
        }
        self.note(virt, page);
        self.invalidation.mark_code(virt, index);
        if *lost {
            return;
        }
        *seen = here;
        let found = extent(virt, page);
        match pages.iter().find(|(span, _)| span.contains(virt)) {
            Some(&known) => *lost = known != found,
            None if pages.len() == CODE => *lost = true,
            None => {
                let mut spaces = self.spaces.borrow_mut();
                spaces.note_code(index, *number, pages.len(), page.origin);
                pages.push(found);
            }
        }
    }

    /// A jump cache has been emptied, and the links between its code are about to be undone.
    pub(super) fn forget_code(&self, index: usize) {
        self.code[index].borrow_mut().forget();
        self.invalidation.forget_code(index);
    }

    /// CR3 was loaded, and the instruction at the linear address `next` comes next. Returns which
    /// privilege's code is still where it was: its jump cache is valid, and so are its links; None if
    /// everything was dropped, in every bank.
    ///
    /// With `keep`, translations need not be dropped (SDM 3A 4.10.4.1, MOV to CR3 with bit 63): what was
    /// valid when this value was left still is, code and data.
    pub(crate) fn reload(&mut self, cpu: &Cpu, next: u64, keep: bool) -> Option<[bool; 2]> {
        if cpu.cr0 & CR0_PG == 0 || self.large.borrow().len() > LARGES {
            self.flush(cpu.bank());
            return None;
        }
        self.invalidation.next_epoch();
        self.window.flush();
        self.invalidation.forget_shown();
        self.close_guarded();
        let (root, wide) = Mmu::root(cpu);
        let bank = cpu.bank();
        self.bank = bank;
        self.spaces.get_mut().enter(root, wide, bank);
        if keep && self.resting[bank] == Some(cpu.cr3) {
            return Some([true; 2]);
        }
        let mut checked = self.spaces.get_mut().check();
        if !self.spaces.get_mut().complete(&checked) {
            // What is fetched next sets accessed bits, perhaps those that are missing. Should it
            // fault, the next boundary says so.
            let _ = self.walk(cpu, next, Access::Fetch, cpu.cpl() == 3);
            checked = self.spaces.get_mut().check();
        }
        let mut spaces = self.spaces.borrow_mut();
        let again = std::mem::take(&mut spaces.loose[bank]);
        if again {
            let tlbs = tlb_index(bank, 0)..tlb_index(bank + 1, 0);
            self.tlbs[tlbs].iter().for_each(Tlb::flush);
        }
        spaces.settle(&checked, |record, holds| {
            let tlb = &self.tlbs[tlb_index(bank, record.tlb)];
            if !holds {
                tlb.remove(record.key);
            } else if again && (record.tlb & 1 == 0 || self.claim(record.phys)) {
                tlb.fill(record.key, record.host);
            }
        });
        drop(spaces);
        if !keep {
            self.resting = [None; BANKS];
        }
        self.resting[bank] = Some(cpu.cr3);
        let kept = [false, true].map(|user| {
            let same = self.same_code(cpu, &checked, user);
            if !same {
                let index = jump_index(bank, user);
                self.jumps[index].flush();
                self.forget_code(index);
            }
            same
        });
        Some(kept)
    }

    /// True if every page of a privilege's code is where it was.
    fn same_code(&self, cpu: &Cpu, checked: &super::spaces::Checked, user: bool) -> bool {
        let list = jump_index(cpu.bank(), user);
        let code = self.code[list].borrow();
        !code.lost
            && code.pages.iter().enumerate().all(|(index, &known)| {
                let number = code.number;
                if (self.spaces.borrow()).same_code(checked, list, number, index) {
                    return true;
                }
                let virt = known.0.start;
                let Some(page) = self.peek(cpu, virt, Access::Fetch, user) else {
                    return false;
                };
                self.note(virt, page);
                let mut spaces = self.spaces.borrow_mut();
                spaces.note_code(list, number, index, page.origin);
                extent(virt, page) == known
            })
    }
}
