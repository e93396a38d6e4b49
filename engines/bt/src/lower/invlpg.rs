//! invlpg of ring 0: a page leaves the software TLBs.
//!
//! ```text
//!         lea   page, [guest operand]
//!         mov   at, page              ; marks: see crate::invalidation
//!         ...
//!         jne   runtime
//!         and   page, -4096
//!         mov   at, page
//!         shr   at, 8                 ; entry index * 16
//!         and   at, (entries - 1) * 16
//!         cmp   page, [at + TLB]      ; for each of them
//!         jne   next
//!         xor   page, 4096            ; the key of an empty entry: no address with its index has it
//!         mov   [at + TLB], page
//!         xor   page, 4096
//! next:   ...
//!         inc   [epoch]
//! ```

use std::mem::offset_of;

use dynasmrt::{DynasmApi, dynasm};

use super::{Lower, memory::Address};
use crate::{
    decode::Insn,
    invalidation::{Invalidation, PAGES, REGION, REGIONS},
    privileged::{Privileged, Shortcuts, count},
    tlb::TLB_ENTRIES,
};

impl Lower<'_> {
    pub(super) fn invalidate(&mut self, insn: &Insn) -> Result<(), String> {
        const NE: u8 = 5;
        let slot = |lower: &Self, offset: usize| {
            lower.layout.privileged + (offset_of!(Privileged, invalidation) + offset) as i32
        };
        let code = slot(self, offset_of!(Invalidation, code));
        let large = slot(self, offset_of!(Invalidation, large));
        let shown = slot(self, offset_of!(Invalidation, shown));
        let epoch = slot(self, offset_of!(Invalidation, epoch));
        let counter = self.shortcut(offset_of!(Shortcuts, counts) + 8 * count::INVLPG);
        self.free_flags(insn, 0);
        self.need(insn.reads);
        let page = self.take(0, insn);
        let at = self.take(1 << page, insn);
        self.address_into(Address::Operand(&insn.instr, 0), page, at, 0)?;
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(at), Rq(page)
            ; shr Rq(at), 12
            ; and Rd(at), PAGES as i32 - 1
            ; cmp BYTE [Rq(at) + code], 0
        );
        self.unless(insn, NE);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(at), Rq(page)
            ; shr Rq(at), REGION as i8
            ; and Rd(at), REGIONS as i32 - 1
            ; cmp BYTE [Rq(at) + large], 0
        );
        self.unless(insn, NE);
        dynasm!(self.asm ; .arch x64 ; cmp BYTE [Rq(at) + shown], 0);
        self.unless(insn, NE);
        dynasm!(self.asm
            ; .arch x64
            ; and Rq(page), -4096
            ; mov Rq(at), Rq(page)
            ; shr Rq(at), 8
            ; and Rd(at), (TLB_ENTRIES as i32 - 1) << 4
        );
        for table in self.layout.tlb {
            dynasm!(self.asm ; .arch x64 ; cmp Rq(page), [Rq(at) + table]);
            // Over the next three.
            self.asm.extend([0x75, 0]);
            let from = self.position();
            dynasm!(self.asm
                ; .arch x64
                ; xor Rq(page), 4096
                ; mov [Rq(at) + table], Rq(page)
                ; xor Rq(page), 4096
            );
            let length = self.position() - from;
            self.asm.patch(from - 1, [length as u8]);
        }
        dynasm!(self.asm
            ; .arch x64
            ; inc QWORD [epoch]
            ; inc QWORD [counter]
        );
        Ok(())
    }
}
