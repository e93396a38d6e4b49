//! Indirect branches of code that uses the window.
//!
//! Such a branch puts its target into `Context::target` and jumps through a table of host addresses,
//! by the target's low 16 bits and without comparing anything. Who is jumped to makes sure that it is
//! meant, before its first instruction:
//!
//! ```text
//! branch:  mov   [target], target
//!          mov   [spill], rcx
//!          movzx ecx, target          ; 16 bits
//!          mov   ecx, [rcx * 4 + table]
//!          jmp   rcx
//!
//! checked: mov   rcx, [target]
//!          lea   rcx, [rcx - own address]
//!          jrcxz entry                ; no flag is touched on the way
//!          jmp   miss
//! entry:   mov   rcx, [spill]
//! ```
//!
//! So the flags survive without being saved, which a comparison in the branch couldn't do: what reads
//! them there is known only once the target is. Entries that nobody has filled lead to `miss`, where
//! the jump cache is looked into, with flags saved; what isn't there either leaves for the runtime,
//! through the site that the branch has stored.
//!
//! The table takes memory once code is translated that looks there: most guests have such code in one bank
//! only.
//!
//! Invariant: from then on, every entry of the table is a block's checked entry or the address of `miss`.

use std::{
    cell::{Cell, RefCell},
    mem::offset_of,
};

use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm, x64::X64Relocation};

use crate::{
    context::Context,
    tlb::{JUMP_ENTRIES, bring_in},
};

/// Entries of the table: what 16 bits can name.
pub(crate) const TARGET_ENTRIES: usize = 1 << 16;
/// Bytes of the table.
pub(crate) const TARGET_BYTES: usize = TARGET_ENTRIES * 4;

/// Emits `miss` for a context at `context` and a jump cache at `jump`, to be placed at `base`.
pub(crate) fn emit(context: i32, jump: i32, exit: u64, base: u64) -> Vec<u8> {
    let mut ops = VecAssembler::<X64Relocation>::new(base as usize);
    let slot = |offset: usize| context + offset as i32;
    let spill = slot(offset_of!(Context, spill));
    let lazy = slot(offset_of!(Context, lazy_flags));
    let target = slot(offset_of!(Context, target));
    let resume = slot(offset_of!(Context, resume));
    dynasm!(ops
        ; .arch x64
        ; mov [spill], rax
        ; lahf
        ; seto al
        ; mov [lazy], rax
        ; mov rcx, [target]
        ; mov eax, ecx
        ; and eax, JUMP_ENTRIES as i32 - 1
        ; shl eax, 4
        ; cmp rcx, [rax + jump]
        ; jne >unknown
        ; mov rcx, [rax + jump + 8]
        ; mov [resume], rcx
        ; mov rax, [spill]
        ; mov rcx, [spill + 8]
        ; jmp QWORD [resume]
        ;unknown:
        ; mov rax, [spill]
        ; mov rcx, QWORD exit as i64
        ; jmp rcx
    );
    ops.finalize().expect("every label is bound")
}

/// The table.
pub(crate) struct Targets {
    /// Host addresses, which are below 2 GiB.
    entries: *mut u32,
    miss: u32,
    ready: Cell<bool>,
    filled: RefCell<Vec<u16>>,
}

impl Targets {
    /// Takes over [`TARGET_BYTES`] of writable memory at `address`.
    ///
    /// # Safety
    /// The memory belongs to this table alone, translated code aside, and outlives it.
    pub(crate) unsafe fn new(address: usize, miss: u64) -> Targets {
        Targets {
            entries: address as *mut u32,
            miss: host(miss),
            ready: Cell::new(false),
            filled: RefCell::default(),
        }
    }

    /// To be called before code runs that looks into the table.
    #[inline]
    pub(crate) fn prepare(&self) {
        if !self.ready.replace(true) {
            self.empty();
        }
    }

    #[cold]
    fn empty(&self) {
        bring_in(self.entries as usize, TARGET_BYTES);
        (0..TARGET_ENTRIES).for_each(|index| self.put(index as u16, self.miss));
    }

    fn put(&self, index: u16, entry: u32) {
        // SAFETY: there are as many entries as an index can name.
        unsafe { *self.entries.add(index.into()) = entry };
    }

    fn at(&self, target: u64) -> u32 {
        // SAFETY: as in `put`.
        unsafe { *self.entries.add(usize::from(target as u16)) }
    }

    /// Enters the block at `target`.
    pub(crate) fn fill(&self, target: u64, checked: u64) {
        self.prepare();
        if self.at(target) == self.miss {
            self.filled.borrow_mut().push(target as u16);
        }
        self.put(target as u16, host(checked));
    }

    /// Takes the block at `target` out, if it is entered.
    pub(crate) fn remove(&self, target: u64, checked: u64) {
        if self.at(target) != host(checked) {
            return;
        }
        self.put(target as u16, self.miss);
        let mut filled = self.filled.borrow_mut();
        // It is entered again when it is filled again: forgotten here, the list stays as long as the table.
        if let Some(at) = filled.iter().rposition(|&index| index == target as u16) {
            filled.swap_remove(at);
        }
    }

    /// True if something is entered that may be the block at `target`.
    pub(crate) fn holds(&self, target: u64) -> bool {
        self.ready.get() && self.at(target) != self.miss
    }

    /// Empties every entry.
    pub(crate) fn flush(&self) {
        for index in self.filled.borrow_mut().drain(..) {
            self.put(index, self.miss);
        }
    }
}

/// A host address as an entry holds it.
fn host(address: u64) -> u32 {
    u32::try_from(address).expect("code is below 2 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_entered_is_gone_after_a_flush() {
        let mut memory = vec![0u32; TARGET_ENTRIES];
        // SAFETY: the vector outlives the table and nobody else uses it.
        let targets = unsafe { Targets::new(memory.as_mut_ptr() as usize, 7) };
        assert!(!targets.holds(0x12_3456));
        targets.fill(0x12_3456, 9);
        assert!(targets.holds(0x12_3456));
        targets.flush();
        assert!(!targets.holds(0x12_3456));
        drop(targets);
        assert!(memory.iter().all(|&entry| entry == 7));
    }
}
