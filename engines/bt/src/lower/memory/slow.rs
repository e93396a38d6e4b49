//! What follows a block's straight line for accesses whose lookup misses: the way to the runtime.
//!
//! Invariant: nothing in a body depends on where it is, and that of a write fits into a
//! [slot](crate::cache::Bounces).

use super::Pending;
use crate::{
    cache::BODY,
    lower::Lower,
    site::{Kind, Place, Slow},
};

impl Lower<'_> {
    pub(in crate::lower) fn cold_memory(&mut self, pending: Pending) -> Result<(), String> {
        let Pending {
            open,
            resume,
            after,
            next_ip,
            rsp,
        } = pending;
        self.homes = open.homes;
        self.bind(open.miss, self.position());
        let slow = Slow {
            size: open.size as u16,
            write: open.write,
            register: open.register,
            table: open.table,
            retry: Place::new(self.address(open.retry)),
            body: Place::new(self.address(open.body)),
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
        let site = self.add_site(open.ip, Kind::Memory(slow));
        self.exit_through(site, 0);
        if open.write && resume - open.body > BODY {
            return Err(format!("a body of {} bytes", resume - open.body));
        }
        Ok(())
    }
}
