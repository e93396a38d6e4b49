//! The slow paths of translated code: accesses that miss, bounce or reach a device, and faults of the
//! host's CPU.
//!
//! An access to RAM that the software TLB can't serve (a write to translated code, for one) runs on
//! the memory itself, [directly](Direct): so what is atomic stays atomic. Only device memory, and
//! accesses across two pages that don't follow each other in memory, run on a bounce buffer;
//! [`Transfer`] is one that is being copied, and may wait for a device in the middle. If they are
//! atomic, the two pages are mapped next to each other. This file decides nothing about where the
//! guest goes on but through [`Resume`].
//!
//! Invariant: every page of an access was checked before any of its bytes is moved.

use engine_core::{After, ExitReason, GuestPhys, Kick};

use super::{BtVcpu, Pending, Resume, Stop};
use crate::{
    cache::Slot,
    context::HostFault,
    cpu::{Bits, CR4_OSXMMEXCPT, canonical},
    fault::{self, Fault},
    guest,
    mmu::{Access, Page},
    site::{Homes, Ip, Shared, Site, Slow},
    transitions::Transitions,
    vm::Guarantee,
};

/// An access whose body runs on the memory itself.
#[derive(Clone, Copy)]
pub(super) struct Direct {
    /// Where its bytes are: (address, length) for each page.
    parts: [(u64, u64); 2],
}

/// An access that goes through the bounce buffer, in the middle of its device part.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    /// Which site that is.
    pub(super) index: usize,
    pub(super) site: Site,
    pub(super) slow: Slow,
    pub(super) write: bool,
    /// Bytes that are done.
    pub(super) done: usize,
    /// Size of the device access under way.
    pub(super) step: usize,
}

impl BtVcpu {
    /// The page of an access, and the next one if it crosses, each checked.
    pub(super) fn pages(&self, ea: u64, slow: &Slow) -> Result<(Page, Option<Page>), Fault> {
        let access = if slow.write {
            Access::Write
        } else {
            Access::Read
        };
        let user = self.core.user();
        let check = |address| {
            self.core
                .mmu
                .translate(&self.core.cpu, address, access, user)
                .map_err(|fault| slow.of_stack(fault))
        };
        if ea & u64::from(slow.alignment - 1) != 0 {
            // fxrstor looks at its address first.
            let nowhere = slow.size == 512 && self.core.cpu.long() && !canonical(ea);
            let fault = Fault::gp();
            return Err(if nowhere { slow.of_stack(fault) } else { fault });
        }
        let crosses = (ea & 0xfff) + u64::from(slow.size) > 4096;
        let next = (ea & !0xfff).wrapping_add(4096);
        // An address that isn't canonical comes before any page fault.
        if crosses && self.core.cpu.long() && !canonical(next) {
            check(next)?;
        }
        let page = check(ea)?;
        let second = if crosses { Some(check(next)?) } else { None };
        Ok((page, second))
    }

    /// An access missed the software TLB.
    pub(super) fn slow(&mut self, index: usize, site: Site, slow: Slow) -> Result<(), Stop> {
        let ea = self.missed(slow.register, slow.table, slow.write);
        if let Some(segment) = slow.segment {
            let index = usize::from(segment);
            let offset = ea.wrapping_sub(self.core.cpu.segments[index].base);
            let size = slow.size.into();
            let checked = self
                .core
                .check_segment(index, offset, size, slow.write)
                .and_then(|()| self.core.check_alignment(ea, size));
            if slow.read {
                self.core.watch(ea, size.into(), false);
            }
            if slow.write {
                self.core.watch(ea, size.into(), true);
            }
            if let Err(fault) = checked {
                self.settle(site.homes, site.ip);
                return self.raise(fault);
            }
        }
        self.direct = None;
        let access = if slow.write {
            Access::Write
        } else {
            Access::Read
        };
        let user = self.core.user();
        // The check of a limited segment has to be done again next time.
        let usual = slow.segment.is_none()
            && ea & u64::from(slow.alignment - 1) == 0
            && (ea & 0xfff) + u64::from(slow.size) <= 4096;
        let found = if usual {
            match self.core.mmu.admit(&self.core.cpu, ea, access, user) {
                Ok(None) => {
                    self.tlb_missed();
                    self.resume = Resume::Host(slow.retry.address());
                    return Ok(());
                }
                Ok(Some(page)) => Ok((page, None)),
                Err(fault) => Err(slow.of_stack(fault)),
            }
        } else {
            self.pages(ea, &slow)
        };
        let (page, second) = match found {
            Ok(found) => found,
            Err(fault) => {
                self.settle(site.homes, site.ip);
                return self.raise(fault);
            }
        };
        self.settle_marked();
        self.counts.add(ExitReason::Bounce);
        if let Some(host) = self.directly(ea, &slow, page, second) {
            self.core.context().gpr[usize::from(slow.register)] = slow.lead(ea, host as u64);
            self.resume = Resume::Host(self.body(index, &slow));
            return Ok(());
        }
        self.transfer(Transfer {
            index,
            site,
            slow,
            write: false,
            done: 0,
            step: 0,
        })
    }

    /// The address that a lookup has missed with, remembered in the context: translated code has taken the key
    /// of an entry from it.
    fn missed(&mut self, register: u8, table: u8, write: bool) -> u64 {
        let user = self.core.user();
        let [rest, offset] =
            [register, table].map(|number| self.core.context().gpr[usize::from(number)]);
        let ea = if register == table {
            rest
        } else {
            rest.wrapping_add(self.core.mmu.key_at(offset, write, user))
        };
        self.core.context().ea = ea;
        ea
    }

    /// Where the body of an access runs that the runtime has found an address for.
    fn body(&mut self, index: usize, slow: &Slow) -> u64 {
        if !slow.write {
            return slow.body.address();
        }
        match self.cache.bounced(index) {
            Slot::Made(at) => return at,
            // The x87 instruction pointer may lead to the body that goes.
            Slot::Taken => self.settle_x87(),
            Slot::Free => {}
        }
        self.cache.bounce(index, slow, &self.arena)
    }

    /// Host address for an access to RAM, and what to know when it is done.
    fn directly(
        &mut self,
        ea: u64,
        slow: &Slow,
        page: Page,
        second: Option<Page>,
    ) -> Option<*mut u8> {
        let size = u64::from(slow.size);
        let phys = page.phys | ea & 0xfff;
        let (parts, host) = match second {
            None => ([(phys, size), (phys, 0)], self.core.mmu.host(phys, size)?),
            Some(second) => {
                let first = 4096 - (ea & 0xfff);
                let host = if second.phys == page.phys + 4096 {
                    self.core.mmu.host(phys, size)?
                } else if slow.locked {
                    let base = self.core.mmu.side_by_side(page.phys, second.phys)?;
                    base.wrapping_add((ea & 0xfff) as usize)
                } else {
                    return None;
                };
                ([(phys, first), (second.phys, size - first)], host)
            }
        };
        if self.core.mmu.vm.without(Guarantee::Atomicity) {
            return None;
        }
        if slow.write {
            for (phys, _) in parts {
                self.core.mmu.claim(phys);
            }
        }
        self.direct = Some(Direct { parts });
        Some(host)
    }

    /// The body of a direct access has written.
    pub(super) fn written(&mut self, slow: Slow) {
        let parts = self
            .direct
            .take()
            .map_or([(0, 0); 2], |direct| direct.parts);
        let mut killed = 0;
        for (phys, len) in parts {
            if len != 0 && self.core.mmu.is_code(phys) {
                killed += self.overwritten(phys, len);
            }
        }
        self.after_write(slow, killed > 0);
    }

    /// Goes on after a write has arrived, behind the instruction if `leaves`.
    fn after_write(&mut self, slow: Slow, leaves: bool) {
        let waiting = self.window || self.core.nmi_due();
        if let (true, Some(next)) = (leaves || waiting || self.stale, slow.next_ip) {
            // The rest of this block may be what was overwritten, by this access or by the device
            // that it reached, or a device that was written to has an interrupt to deliver.
            self.settle(slow.after, next);
            let rsp = self.core.gpr(4).wrapping_add(slow.rsp as i64 as u64);
            if slow.rsp != 0 {
                let wide = self.core.cpu.bits() == Bits::Bits64;
                self.core.set_gpr_sized(4, rsp, if wide { 8 } else { 4 });
            }
        } else {
            self.stop_soon();
            self.resume = Resume::Host(slow.resume.address());
        }
    }

    /// A lookup for several accesses missed: fills the TLB, or has them executed one by one.
    pub(super) fn shared(&mut self, site: Site, shared: Shared) {
        let ea = self.missed(shared.register, shared.table, shared.write);
        let access = if shared.write {
            Access::Write
        } else {
            Access::Read
        };
        let user = self.core.user();
        if (ea & 0xfff) + u64::from(shared.size) <= 4096
            && let Ok(page) = self.core.mmu.walk(&self.core.cpu, ea, access, user)
            && self.core.mmu.fill(ea, page, access, user)
        {
            self.tlb_missed();
            self.resume = Resume::Host(shared.retry);
            return;
        }
        self.counts.add(ExitReason::Bounce);
        self.settle(site.homes, site.ip);
        self.steps = shared.steps;
        self.cache.strike(site.block, &self.arena, &self.core.mmu);
    }

    /// Copies between the bounce buffer and wherever the access belongs, until a device has to be
    /// asked or it is done.
    pub(super) fn transfer(&mut self, mut transfer: Transfer) -> Result<(), Stop> {
        let Transfer {
            index,
            site,
            slow,
            write,
            ..
        } = transfer;
        let ea = self.core.context().ea;
        let size = usize::from(slow.size);
        let offset = (ea & 63) as usize;
        let mut killed = 0;
        while transfer.done < size {
            let at = ea.wrapping_add(transfer.done as u64);
            let access = if slow.write {
                Access::Write
            } else {
                Access::Read
            };
            let user = self.core.user();
            let page = match self.core.mmu.translate(&self.core.cpu, at, access, user) {
                Ok(page) => page,
                // Checked before the body ran, and nothing ran in between.
                Err(fault) => {
                    self.settle(site.homes, site.ip);
                    return self.raise(fault);
                }
            };
            let phys = page.phys | at & 0xfff;
            let in_page = (4096 - (at & 0xfff) as usize).min(size - transfer.done);
            let from = offset + transfer.done;
            if let Some(host) = self.core.mmu.host(phys, in_page as u64) {
                let code = write && !self.core.mmu.claim(phys);
                let bounce = &mut self.core.context().bounce.0[from..from + in_page];
                // SAFETY: `host` leads to as many bytes of RAM.
                unsafe {
                    if write {
                        guest::write(host, bounce);
                    } else {
                        guest::read(host, bounce);
                    }
                }
                if code {
                    killed += self.overwritten(phys, in_page as u64);
                }
                transfer.done += in_page;
                continue;
            }
            let step = in_page.min(8);
            if !write && !slow.read {
                transfer.done += step;
                continue;
            }
            if write {
                self.data[..step].copy_from_slice(&self.core.context().bounce.0[from..from + step]);
            }
            transfer.step = step;
            let answered = self.ask_device(phys, step, write);
            if answered == Some(After::Enter) {
                self.take_device(&mut transfer);
                continue;
            }
            self.pending = Pending::Device(transfer);
            return Err(if answered.is_some() {
                Stop::Answered
            } else if write {
                Stop::Write { phys, len: step }
            } else {
                Stop::Read { phys, len: step }
            });
        }
        let waiting = self.window || self.core.nmi_due();
        if waiting && transfer.step != 0 && (!write || slow.next_ip.is_none()) {
            // The device may have an interrupt to deliver, and this instruction goes on in
            // translated code: stop that soon.
            self.doorbell.kick();
        }
        if !write {
            let context = self.core.context();
            let bounce = context.bounce.0.as_ptr() as u64 + offset as u64;
            context.gpr[usize::from(slow.register)] = slow.lead(ea, bounce);
            self.resume = Resume::Host(self.body(index, &slow));
        } else {
            // What a device was told is not what it says.
            let elsewhere = slow.relied && transfer.step != 0;
            self.after_write(slow, killed > 0 || elsewhere);
        }
        Ok(())
    }

    /// Asks the device at `phys` at once, for what `data` holds or is to hold, if it is at hand.
    fn ask_device(&mut self, phys: u64, len: usize, write: bool) -> Option<After> {
        let mut bus = self.bus?;
        // SAFETY: whoever runs this vCPU has lent it for as long as the run lasts.
        let bus = unsafe { bus.as_mut() };
        // As at the end of every run.
        self.core.shortcuts.priority_matters = 0;
        let data = &mut self.data[..len];
        Some(if write {
            bus.memory_write(GuestPhys(phys), data)
        } else {
            bus.memory_read(GuestPhys(phys), data, self.core.cpu.cr8 as u8)
        })
    }

    /// The device part of an access that is under way is over.
    pub(super) fn take_device(&mut self, transfer: &mut Transfer) {
        if !transfer.write {
            let context = self.core.context();
            let from = (context.ea & 63) as usize + transfer.done;
            context.bounce.0[from..from + transfer.step]
                .copy_from_slice(&self.data[..transfer.step]);
        }
        transfer.done += transfer.step;
    }

    /// True for a fault on a page that was taken away: somebody wants to be heard between two
    /// instructions.
    fn rung(&self, fault: &HostFault) -> bool {
        if fault.signal != libc::SIGSEGV {
            return false;
        }
        let rung = self.doorbell.contains(fault.address);
        if rung {
            self.doorbell.open();
        }
        rung
    }

    /// The host's CPU faulted in translated code.
    pub(super) fn host_fault(&mut self) -> Result<(), Stop> {
        let fault = self.core.context().fault;
        let lost = |what: &str| {
            Stop::Internal(format!(
                "{what}: signal {} code {} vector {} at host {:#x}, address {:#x}",
                fault.signal, fault.code, fault.vector, fault.rip, fault.address
            ))
        };
        let in_stub = |stubs: &Transitions| (stubs.syscall..stubs.end).contains(&fault.rip);
        if self.transitions.iter().any(in_stub) {
            // Their work is done before they touch a page that may be taken away.
            let target = self.core.context().target;
            self.settle(Homes::MEETING, target);
            return if self.rung(&fault) {
                Ok(())
            } else {
                Err(lost("a fault in a stub"))
            };
        }
        let Some((mark, block)) = self.cache.mark(fault.rip) else {
            return Err(lost("a fault outside every block"));
        };
        let ip = match mark.ip {
            Ip::At(ip) => ip,
            Ip::Target => self.core.context().target,
        };
        if fault.signal == libc::SIGSEGV
            && fault.vector == fault::PF
            && let Some(address) = self.core.mmu.window.guest(fault.address)
        {
            self.window_fault(address, mark, block, ip);
            return Ok(());
        }
        self.settle(mark.homes, ip);
        if self.rung(&fault) {
            return Ok(());
        }
        // The kernel says which exception it was; si_code alone doesn't tell #MF from #XM.
        match (fault.signal, fault.vector) {
            // Without CR4.OSXMMEXCPT a SIMD exception is an invalid opcode (SDM 3A 2.5).
            (libc::SIGFPE, fault::XM) if self.core.cpu.cr4 & CR4_OSXMMEXCPT == 0 => {
                self.raise(Fault::ud())
            }
            (libc::SIGFPE, vector @ (fault::DE | fault::MF | fault::XM)) => {
                self.raise(Fault::plain(vector))
            }
            (libc::SIGSEGV, fault::GP) => self.raise(Fault::gp()),
            (libc::SIGILL, fault::UD) => self.raise(Fault::ud()),
            _ => Err(lost("a fault that no guest instruction explains")),
        }
    }
}
