//! What follows a block's straight line for accesses whose lookup misses: the way to the runtime, and the body
//! once more for a bounced access.
//!
//! Invariant: nothing in a body depends on where it is.

use dynasmrt::{DynasmApi, dynasm};
use std::mem::offset_of;

use super::Pending;
use crate::{
    context::Context,
    lower::Lower,
    site::{Kind, Mark, Place, Slow},
};

impl Lower<'_> {
    /// Hands the address of a lookup that missed to the runtime.
    pub(in crate::lower) fn cold_group(
        &mut self,
        site: usize,
        miss: usize,
        registers: [u8; 2],
        disp: i32,
    ) {
        self.bind(miss, self.position());
        let [register, table] = registers;
        let ea = self.layout.slot(offset_of!(Context, ea));
        dynasm!(self.asm
            ; .arch x64
            ; add Rq(register), [Rq(table) + disp]
            ; mov [ea], Rq(register)
        );
        self.exit_through(site, 0);
    }

    pub(in crate::lower) fn cold_memory(&mut self, pending: Pending) {
        let Pending {
            open,
            last_mark,
            resume,
            after,
            next_ip,
            rsp,
        } = pending;
        self.homes = open.homes;
        self.bind(open.miss, self.position());
        let (register, table) = (open.register, open.table);
        let ea = self.layout.slot(offset_of!(Context, ea));
        dynasm!(self.asm
            ; .arch x64
            ; add Rq(register), [Rq(table) + open.disp]
            ; mov [ea], Rq(register)
        );
        let bounce_later = Slow {
            size: open.size as u16,
            write: open.write,
            register,
            retry: Place::new(self.address(open.retry)),
            bounce: Place::default(),
            resume: Place::new(self.address(resume)),
            after,
            read: open.read,
            stack: open.stack,
            segment: open.limited,
            alignment: open.alignment,
            next_ip,
            rsp,
            locked: open.locked,
            relied: open.relied,
            pinned: open.pinned,
        };
        let site = self.add_site(open.ip, Kind::Memory(bounce_later));
        self.exit_through(site, 0);
        let bounce = self.position();
        let slow = Slow {
            bounce: Place::new(self.address(bounce)),
            ..bounce_later
        };
        self.sites[site].kind = Kind::Memory(slow);
        for at in open.first_mark..last_mark {
            let mark = self.marks[at];
            self.marks.push(Mark {
                offset: mark.offset - open.body as u32 + bounce as u32,
                ..mark
            });
        }
        // Nothing in a body depends on where it is.
        self.asm.repeat(open.body..resume);
        if open.write {
            self.exit_through(site, 1);
        } else {
            let target = self.address(resume);
            self.jump_to(0xe9, target);
        }
    }
}
