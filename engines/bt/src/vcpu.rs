//! The vCPU: enters translated code, answers what it leaves for, and hands the rest to the caller.

use std::sync::Arc;

use engine_core::{
    CpuState, Error, Exit, ExitCounts, ExitReason, GuestPhys, GuestRam, Kick, Vcpu,
    kick::KickHandle,
};
use iced_x86::Instruction;

use crate::{
    arena::Arena,
    cache::{Cache, Key, Refusal, Source},
    context::HOST_FAULT,
    core::{Cause, Core, Flushed, Shutdown},
    cpu::{Bits, canonical},
    decode::Mode,
    fault::{self, Fault},
    kick::Doorbell,
    lower::{self, Layout},
    mmu::{Access, Page},
    signal::{Active, Guard},
    site::{Homes, Ip, Kind, Shared, Site, Slow},
    stubs::{self, Stubs},
    system::{self, Step, Trap},
    x87,
};

/// How the translator is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Room for translated code, in bytes. Full, it is emptied and filled anew.
    pub code_cache: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            code_cache: 64 << 20,
        }
    }
}

/// Where `run` goes on.
#[derive(Clone, Copy, Debug)]
enum Resume {
    /// At the guest's RIP, with everything settled.
    Boundary,
    /// In the middle of an instruction, at this host address.
    Host(u64),
}

/// An exit that waits for its answer.
enum Pending {
    Nothing,
    /// Delivering an interrupt ended in a triple fault.
    Shutdown,
    In {
        size: u8,
    },
    InString {
        instr: Instruction,
        size: u8,
        address: u64,
    },
    /// A string instruction waits for an element from device memory.
    StringRead {
        instr: Instruction,
    },
    Device(Transfer),
}

/// An access that goes through the bounce buffer, in the middle of its device part.
#[derive(Clone, Copy)]
struct Transfer {
    site: Site,
    slow: Slow,
    write: bool,
    /// Bytes that are done.
    done: usize,
    /// Size of the device access under way.
    step: usize,
}

/// An exit before it borrows anything.
enum Stop {
    In { port: u16, size: u8 },
    Out { port: u16, size: u8, value: u32 },
    Read { phys: u64, len: usize },
    Write { phys: u64, len: usize },
    Halt,
    Window,
    Shutdown,
    Interrupted,
    Internal(String),
}

impl From<Shutdown> for Stop {
    fn from(_: Shutdown) -> Stop {
        Stop::Shutdown
    }
}

/// A vCPU whose guest code is translated.
pub struct BtVcpu {
    core: Core,
    cache: Cache,
    stubs: Stubs,
    counts: ExitCounts,
    doorbell: Arc<Doorbell>,
    window: bool,
    resume: Resume,
    /// Instructions to execute one by one.
    steps: u16,
    pending: Pending,
    /// Data of the exit under way.
    data: [u8; 8],
    /// Mode that each jump cache's entries were made in.
    jump_modes: [Option<Mode>; 2],
    /// Entries into translated code.
    entries: u64,
    // Last: everything above points into it.
    arena: Arc<Arena>,
}

impl BtVcpu {
    /// A vCPU over `ram`, to be given its first state by `set_state`.
    ///
    /// # Errors
    /// [`Error::Host`] if memory can't be mapped, [`Error::Engine`] for a code cache too small.
    pub fn new(ram: Arc<GuestRam>, options: Options) -> Result<BtVcpu, Error> {
        if options.code_cache < Cache::MINIMUM || options.code_cache > 1 << 30 {
            return Err(Error::Engine(format!(
                "code cache of {} bytes: choose {} to {}",
                options.code_cache,
                Cache::MINIMUM,
                1 << 30
            )));
        }
        let arena = Arena::new(options.code_cache).map_err(|source| Error::Host {
            operation: "map the translator's arena",
            source,
        })?;
        let arena = Arc::new(arena);
        let (stubs, code) = stubs::emit(arena.context_disp(), arena.code());
        arena.write_code(arena.code(), &code);
        let layout = Layout::new(&arena, &stubs);
        let cache = Cache::new(&arena, layout, arena.code() + code.len() as u64);
        // SAFETY: the arena is dropped last and serves this core alone.
        let mut core = unsafe { Core::new(ram, &arena) };
        core.context().mxcsr = 0x1f80;
        x87::reset(core.context());
        Ok(BtVcpu {
            core,
            cache,
            stubs,
            counts: ExitCounts::default(),
            doorbell: Arc::new(Doorbell::new(arena.clone())),
            window: false,
            resume: Resume::Boundary,
            steps: 0,
            pending: Pending::Nothing,
            data: [0; 8],
            jump_modes: [None; 2],
            entries: 0,
            arena,
        })
    }

    /// Times that translated code was entered: what a hot loop must not need.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Times the code cache was full and emptied.
    pub fn cache_flushes(&self) -> u64 {
        self.cache.emptied
    }

    /// Guest and host code of every living block in `range` of guest-virtual addresses.
    pub fn listing(&self, range: std::ops::Range<u64>) -> String {
        let mut text = String::new();
        for block in self
            .cache
            .blocks()
            .filter(|block| range.contains(&block.key.virt))
        {
            let guest_len =
                (block.guest_len as usize).min(4096 - (block.key.phys & 0xfff) as usize);
            let mut guest = vec![0; guest_len];
            self.fetch(block.key.phys, &mut guest);
            // SAFETY: a block's code lies in the cache, whose pages are readable.
            let host = unsafe {
                std::slice::from_raw_parts(block.entry as *const u8, block.code_len as usize)
            };
            let bits = match block.key.mode.bits {
                crate::cpu::Bits::Bits64 => 64,
                crate::cpu::Bits::Bits32 => 32,
                crate::cpu::Bits::Bits16 => 16,
            };
            text += &format!("block {:#x} {:?}\n", block.key.virt, block.key.mode);
            for (bits, bytes, ip) in [(bits, &guest[..], block.key.virt), (64, host, block.entry)] {
                for instr in iced_x86::Decoder::with_ip(bits, bytes, ip, 0) {
                    text += &format!("  {:#12x}  {instr}\n", instr.ip());
                }
                text += "\n";
            }
        }
        text
    }

    fn go(&mut self) -> Result<Stop, Error> {
        let active = Active {
            context: self.arena.context(),
            code_start: self.arena.code(),
            code_end: self.arena.code() + self.arena.code_bytes() as u64,
            exit_after_signal: self.stubs.exit_after_signal,
        };
        let _guard = Guard::new(active).map_err(|source| Error::Host {
            operation: "install fault handlers",
            source,
        })?;
        x87::acquire(self.arena.context());
        if let Some(stop) = self.answer() {
            return Ok(stop);
        }
        loop {
            let mut stub = self.stubs.enter;
            let entry = match self.resume {
                Resume::Host(entry) => entry,
                Resume::Boundary => match self.boundary() {
                    Ok(Some(entry)) => {
                        if lower::lend(self.core.context()) {
                            stub = self.stubs.enter_lazy;
                        }
                        entry
                    }
                    Ok(None) => continue,
                    Err(stop) => return Ok(stop),
                },
            };
            if let Err(stop) = self.enter(stub, entry) {
                return Ok(stop);
            }
        }
    }

    /// Between two instructions: finds the code to go on with. None to look again.
    fn boundary(&mut self) -> Result<Option<u64>, Stop> {
        self.settle_writes();
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        if self.window && self.interruptible() {
            self.request_interrupt_window(false);
            return Err(Stop::Window);
        }
        let single = std::mem::take(&mut self.core.cpu.shadow) || self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        match self.find(single) {
            Ok((entry, _)) => Ok(Some(entry)),
            Err(Trap::Fault(fault)) => self.raise(fault).map(|()| None),
            Err(Trap::Shutdown) => Err(Stop::Shutdown),
            Err(Trap::Unsupported(message)) => Err(Stop::Internal(message)),
        }
    }

    /// Acts on what privileged code did to memory and mappings.
    fn settle_writes(&mut self) {
        match std::mem::take(&mut self.core.flushed) {
            Flushed::Nothing => {}
            Flushed::Page(span) => self.cache.unlink_across(Some(span), &self.arena),
            Flushed::Everything => self.cache.unlink_across(None, &self.arena),
        }
        for (phys, len) in std::mem::take(&mut self.core.code_writes) {
            self.kill(phys, len);
        }
    }

    fn kill(&mut self, phys: u64, len: u64) -> usize {
        let killed = self.cache.kill(phys, len, &self.arena, &mut self.core.mmu);
        if killed > 0 {
            self.counts.add(ExitReason::SmcFlush);
        }
        killed
    }

    fn raise(&mut self, fault: Fault) -> Result<(), Stop> {
        self.counts.add(ExitReason::GuestFault);
        Ok(self.core.raise(fault)?)
    }

    /// Address of the code for RIP, and its block's number if it is one to link to.
    fn find(&mut self, single: bool) -> Result<(u64, Option<u32>), Trap> {
        let mode = Mode {
            single,
            ..self.core.mode()
        };
        let user = usize::from(mode.user);
        let virt = self.core.linear_ip();
        if !single {
            if self.jump_modes[user] != Some(mode) {
                self.core.mmu.jumps[user].flush();
                self.jump_modes[user] = Some(mode);
            } else if let Some(entry) = self.core.mmu.jumps[user].get(virt) {
                return Ok((entry, None));
            }
        }
        let number = self.block(mode, virt)?;
        let block = self.cache.block(number);
        let entry = block.lazy_entry;
        // Translated code looks a branch's offset up, which is the address only in a flat segment.
        if !single && block.second.is_none() && mode.flat {
            self.core.mmu.jumps[user].fill(virt, entry);
        }
        Ok((entry, Some(number)))
    }

    /// The block at `virt`, translated if need be.
    fn block(&mut self, mode: Mode, virt: u64) -> Result<u32, Trap> {
        let page = self
            .core
            .mmu
            .walk(&self.core.cpu, virt, Access::Fetch, mode.user)?;
        self.core.mmu.note(virt, page);
        let key = Key {
            virt,
            phys: page.phys | virt & 0xfff,
            mode,
        };
        if let Some(number) = self.cache.find(&key) {
            match self.cache.block(number).second {
                None => return Ok(number),
                Some(second) if self.next_page(virt, mode)? == second => return Ok(number),
                Some(_) => {}
            }
        }
        if self.cache.full() {
            self.counts.add(ExitReason::CacheFlush);
            self.cache.empty(&mut self.core.mmu);
        }
        self.counts.add(ExitReason::Translate);
        let room = 4096 - (virt & 0xfff) as usize;
        let mut bytes = vec![0xff; room.min(1024)];
        self.fetch(key.phys, &mut bytes);
        let source = Source {
            key,
            second: None,
            bytes: &bytes,
            ip: self.core.rip,
        };
        match self
            .cache
            .translate(&source, &self.arena, &mut self.core.mmu)
        {
            Ok(number) => return Ok(number),
            Err(Refusal::Bug(message)) => return Err(Trap::Unsupported(message)),
            Err(Refusal::Crosses) => {}
        }
        let second = self.next_page(virt, mode)?;
        let mut bytes = [0xff; 15];
        self.fetch(key.phys, &mut bytes[..room]);
        self.fetch(second, &mut bytes[room..]);
        let source = Source {
            key,
            second: Some(second),
            bytes: &bytes,
            ip: self.core.rip,
        };
        match self
            .cache
            .translate(&source, &self.arena, &mut self.core.mmu)
        {
            Ok(number) => Ok(number),
            // Fifteen bytes hold any instruction: it is one that is too long.
            Err(Refusal::Crosses) => Err(Fault::gp().into()),
            Err(Refusal::Bug(message)) => Err(Trap::Unsupported(message)),
        }
    }

    fn next_page(&self, virt: u64, mode: Mode) -> Result<u64, Fault> {
        let next = (virt & !0xfff).wrapping_add(4096);
        Ok(self
            .core
            .mmu
            .walk(&self.core.cpu, next, Access::Fetch, mode.user)?
            .phys)
    }

    /// Code bytes; memory that isn't RAM reads as all ones, as an empty bus does.
    fn fetch(&self, phys: u64, bytes: &mut [u8]) {
        if let Some(host) = self.core.mmu.host(phys, bytes.len() as u64) {
            // SAFETY: `host` covers the length.
            unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
        }
    }

    fn enter(&mut self, stub: u64, entry: u64) -> Result<(), Stop> {
        self.entries += 1;
        self.core.context().resume = entry;
        // SAFETY: the stub follows the C calling convention, and translated code reaches nothing
        // but the arena and guest RAM.
        unsafe {
            let enter: extern "C" fn() = std::mem::transmute(stub as usize);
            enter();
        }
        self.resume = Resume::Boundary;
        let number = self.core.context().site;
        if number == HOST_FAULT {
            return self.host_fault();
        }
        let index = (number >> 1) as usize;
        let site = self.cache.site(index);
        match site.kind {
            Kind::Memory(slow) if number & 1 == 0 => self.slow(site, slow),
            Kind::Memory(slow) => self.transfer(Transfer {
                site,
                slow,
                write: true,
                done: 0,
                step: 0,
            }),
            Kind::Group(shared) => {
                self.shared(site, shared);
                Ok(())
            }
            Kind::Direct { target, .. } => self.direct(index, site, target),
            Kind::Indirect { rsp } => {
                let target = self.core.context().target;
                self.settle(site.homes, target);
                self.counts.add(ExitReason::IndirectMiss);
                if self.core.cpu.bits() == Bits::Bits64 && !canonical(target) {
                    // The branch faults, not its target (SDM 2, JMP, CALL and RET).
                    let before = self.core.gpr(4).wrapping_sub(rsp as i64 as u64);
                    self.core.set_gpr(4, before);
                    self.core.rip = site.ip;
                    return self.raise(Fault::gp());
                }
                Ok(())
            }
            Kind::System { index } => {
                self.settle(site.homes, site.ip);
                let instr = self.cache.system(index);
                self.system(&instr)
            }
            Kind::Fault(fault) => {
                self.settle(site.homes, site.ip);
                self.raise(fault)
            }
        }
    }

    fn settle(&mut self, homes: Homes, ip: u64) {
        homes.settle(self.core.context());
        self.core.rip = ip;
    }

    /// A direct branch that isn't linked: finds its target and links it.
    fn direct(&mut self, index: usize, site: Site, target: u64) -> Result<(), Stop> {
        self.settle(site.homes, target);
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        let mode = self.core.mode();
        let virt = self.core.linear_ip();
        let emptied = self.cache.emptied;
        match self.block(mode, virt) {
            Ok(number) => {
                if emptied == self.cache.emptied && self.cache.link(index, number, &self.arena) {
                    self.counts.add(ExitReason::Chain);
                }
                Ok(())
            }
            Err(Trap::Fault(fault)) => self.raise(fault),
            Err(Trap::Shutdown) => Err(Stop::Shutdown),
            Err(Trap::Unsupported(message)) => Err(Stop::Internal(message)),
        }
    }

    /// Both pages of an access, each checked.
    fn pages(&self, ea: u64, slow: &Slow) -> Result<(Page, bool), Fault> {
        let access = if slow.write {
            Access::Write
        } else {
            Access::Read
        };
        let user = self.core.user();
        let check = |address| {
            self.core
                .mmu
                .walk(&self.core.cpu, address, access, user)
                .map_err(|fault| {
                    if fault.vector == fault::GP && slow.stack {
                        Fault::selector(fault::SS, 0)
                    } else {
                        fault
                    }
                })
        };
        if slow.aligned && ea & 15 != 0 {
            return Err(Fault::gp());
        }
        let crosses = (ea & 0xfff) + u64::from(slow.size) > 4096;
        let next = (ea & !0xfff).wrapping_add(4096);
        // An address that isn't canonical comes before any page fault.
        if crosses && self.core.cpu.long() && !canonical(next) {
            check(next)?;
        }
        let page = check(ea)?;
        if crosses {
            check(next)?;
        }
        Ok((page, crosses))
    }

    /// An access missed the software TLB.
    fn slow(&mut self, site: Site, slow: Slow) -> Result<(), Stop> {
        let ea = self.core.context().ea;
        let (page, crosses) = match self.pages(ea, &slow) {
            Ok(found) => found,
            Err(fault) => {
                self.settle(site.homes, site.ip);
                return self.raise(fault);
            }
        };
        let access = if slow.write {
            Access::Write
        } else {
            Access::Read
        };
        let user = self.core.user();
        if !crosses && self.core.mmu.fill(ea, page, access, user) {
            self.counts.add(ExitReason::TlbMiss);
            self.resume = Resume::Host(slow.retry);
            return Ok(());
        }
        self.counts.add(ExitReason::Bounce);
        self.transfer(Transfer {
            site,
            slow,
            write: false,
            done: 0,
            step: 0,
        })
    }

    /// A lookup for several accesses missed: fills the TLB, or has them executed one by one.
    fn shared(&mut self, site: Site, shared: Shared) {
        let ea = self.core.context().ea;
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
            self.counts.add(ExitReason::TlbMiss);
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
    fn transfer(&mut self, mut transfer: Transfer) -> Result<(), Stop> {
        let Transfer {
            site, slow, write, ..
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
            let page = match self.core.mmu.walk(&self.core.cpu, at, access, user) {
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
                let bounce = self.core.context().bounce.0[from..].as_mut_ptr();
                // SAFETY: RAM on one side, the bounce buffer with room for the largest access at
                // any offset on the other.
                unsafe {
                    if write {
                        std::ptr::copy_nonoverlapping(bounce, host, in_page);
                    } else {
                        std::ptr::copy_nonoverlapping(host, bounce, in_page);
                    }
                }
                if write && self.core.mmu.is_code(phys) {
                    killed += self.kill(phys, in_page as u64);
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
            self.pending = Pending::Device(transfer);
            return Err(if write {
                Stop::Write { phys, len: step }
            } else {
                Stop::Read { phys, len: step }
            });
        }
        if self.window && transfer.step != 0 && (!write || slow.next_ip.is_none()) {
            // The device may have an interrupt to deliver, and this instruction goes on in
            // translated code: stop that soon.
            self.doorbell.kick();
        }
        if !write {
            let context = self.core.context();
            let bounce = context.bounce.0.as_ptr() as u64 + offset as u64;
            context.gpr[usize::from(slow.register)] = bounce;
            self.resume = Resume::Host(slow.bounce);
        } else if let (true, Some(next)) = (killed > 0 || self.window, slow.next_ip) {
            // The rest of this block may be what was overwritten, or a device that was written to
            // has an interrupt to deliver.
            self.settle(slow.after, next);
            let rsp = self.core.gpr(4).wrapping_add(slow.rsp as i64 as u64);
            if slow.rsp != 0 {
                let wide = self.core.cpu.bits() == Bits::Bits64;
                self.core.set_gpr_sized(4, rsp, if wide { 8 } else { 4 });
            }
        } else {
            self.resume = Resume::Host(slow.resume);
        }
        Ok(())
    }

    fn system(&mut self, instr: &Instruction) -> Result<(), Stop> {
        self.counts.add(system::reason(instr));
        let step = match self.core.execute(instr) {
            Ok(step) => step,
            Err(Trap::Fault(fault)) => return self.raise(fault),
            Err(Trap::Shutdown) => return Err(Stop::Shutdown),
            Err(Trap::Unsupported(message)) => {
                return Err(Stop::Internal(format!(
                    "{message}: `{instr}` at rip {:#x}",
                    self.core.rip
                )));
            }
        };
        let next = instr.next_ip();
        match step {
            Step::Next => self.core.rip = next,
            Step::Yield => {
                self.core.rip = next;
                return Err(Stop::Interrupted);
            }
            Step::Jump | Step::Again => {}
            Step::Halt => {
                self.core.rip = next;
                return Err(Stop::Halt);
            }
            Step::In { port, size } => {
                self.core.rip = next;
                self.pending = Pending::In { size };
                return Err(Stop::In { port, size });
            }
            Step::Out { port, size, value } => {
                self.core.rip = next;
                return Err(Stop::Out { port, size, value });
            }
            Step::InString {
                port,
                size,
                address,
            } => {
                self.pending = Pending::InString {
                    instr: *instr,
                    size,
                    address,
                };
                return Err(Stop::In { port, size });
            }
            Step::WriteDevice { phys, size, value } => {
                return Err(self.write_element(instr, phys, size, value));
            }
            Step::ReadDevice { phys, size } => {
                self.pending = Pending::StringRead { instr: *instr };
                let len = size.into();
                return Err(Stop::Read { phys, len });
            }
            Step::OutString { port, size, value } => {
                if !self.core.finish_port_string(instr, false) {
                    self.core.rip = next;
                }
                return Err(Stop::Out { port, size, value });
            }
        }
        Ok(())
    }

    /// Leaves to write one element of a string to a device.
    fn write_element(&mut self, instr: &Instruction, phys: u64, size: u8, value: u64) -> Stop {
        if !self.core.goes_on(instr) {
            self.core.rip = instr.next_ip();
        }
        self.data = value.to_le_bytes();
        let len = size.into();
        Stop::Write { phys, len }
    }

    /// Takes in the answer to the exit that `run` returned last.
    fn answer(&mut self) -> Option<Stop> {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => None,
            Pending::Shutdown => Some(Stop::Shutdown),
            Pending::In { size } => {
                let value = u64::from_le_bytes(self.data);
                self.core.set_gpr_sized(0, value, size.into());
                None
            }
            Pending::InString {
                instr,
                size,
                address,
            } => {
                let bytes = self.data;
                let user = self.core.user();
                // Probed before the exit; should the mapping be gone, the data is lost with it.
                let _ = self.core.write(address, &bytes[..usize::from(size)], user);
                if !self.core.finish_port_string(&instr, true) {
                    self.core.rip = instr.next_ip();
                }
                None
            }
            Pending::StringRead { instr } => {
                let value = u64::from_le_bytes(self.data);
                match self.core.finish_device_read(&instr, value) {
                    Ok(Step::WriteDevice { phys, size, value }) => {
                        Some(self.write_element(&instr, phys, size, value))
                    }
                    Ok(_) => {
                        if !self.core.goes_on(&instr) {
                            self.core.rip = instr.next_ip();
                        }
                        None
                    }
                    // Checked before the device was asked; should the mapping be gone, the
                    // instruction faults as it would have without the device.
                    Err(Trap::Fault(fault)) => self.raise(fault).err(),
                    Err(Trap::Shutdown) => Some(Stop::Shutdown),
                    Err(Trap::Unsupported(message)) => Some(Stop::Internal(message)),
                }
            }
            Pending::Device(mut transfer) => {
                let ea = self.core.context().ea;
                if !transfer.write {
                    let from = (ea & 63) as usize + transfer.done;
                    let data = self.data;
                    self.core.context().bounce.0[from..from + transfer.step]
                        .copy_from_slice(&data[..transfer.step]);
                }
                transfer.done += transfer.step;
                self.transfer(transfer).err()
            }
        }
    }

    /// The host's CPU faulted in translated code.
    fn host_fault(&mut self) -> Result<(), Stop> {
        let fault = self.core.context().fault;
        let lost = |what: &str| {
            Stop::Internal(format!(
                "{what}: signal {} code {} vector {} at host {:#x}, address {:#x}",
                fault.signal, fault.code, fault.vector, fault.rip, fault.address
            ))
        };
        let Some(mark) = self.cache.mark(fault.rip) else {
            return Err(lost("a fault outside every block"));
        };
        let ip = match mark.ip {
            Ip::At(ip) => ip,
            Ip::Target => self.core.context().target,
        };
        self.settle(mark.homes, ip);
        if fault.signal == libc::SIGSEGV && self.doorbell.contains(fault.address) {
            self.doorbell.open();
            return Ok(());
        }
        if fault.signal == libc::SIGSEGV && self.doorbell.is_window(fault.address) {
            // The boundary that comes next finds the window open.
            return Ok(());
        }
        // The kernel says which exception it was; si_code alone doesn't tell #MF from #XM.
        match (fault.signal, fault.vector) {
            (libc::SIGFPE, vector @ (fault::DE | fault::MF | fault::XM)) => {
                self.raise(Fault::plain(vector))
            }
            (libc::SIGSEGV, fault::GP) => self.raise(Fault::gp()),
            (libc::SIGILL, fault::UD) => self.raise(Fault::ud()),
            _ => Err(lost("a fault that no guest instruction explains")),
        }
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        let stop = self.go()?;
        self.core.priority_matters = false;
        match stop {
            Stop::Out { value, .. } => self.data = u64::from(value).to_le_bytes(),
            Stop::In { .. } | Stop::Read { .. } => self.data = [0; 8],
            Stop::Write { .. }
            | Stop::Halt
            | Stop::Window
            | Stop::Shutdown
            | Stop::Interrupted
            | Stop::Internal(_) => {}
        }
        Ok(match stop {
            Stop::In { port, size } => Exit::PioIn {
                port,
                size,
                data: &mut self.data[..usize::from(size)],
            },
            Stop::Out { port, size, .. } => Exit::PioOut {
                port,
                size,
                data: &self.data[..usize::from(size)],
            },
            Stop::Read { phys, len } => Exit::MmioRead {
                addr: GuestPhys(phys),
                data: &mut self.data[..len],
            },
            Stop::Write { phys, len } => Exit::MmioWrite {
                addr: GuestPhys(phys),
                data: &self.data[..len],
            },
            Stop::Halt => Exit::Hlt,
            Stop::Window => Exit::InterruptWindow,
            Stop::Shutdown => Exit::Shutdown,
            Stop::Interrupted => Exit::Interrupted,
            Stop::Internal(message) => Exit::Internal { message },
        })
    }

    fn state(&self) -> Result<CpuState, Error> {
        let (gpr, flags, rip) = match &self.pending {
            // In the middle of an instruction: as before it.
            Pending::Device(transfer) => {
                let (gpr, flags) = self.core.seen_from(transfer.site.homes);
                (gpr, flags, transfer.site.ip)
            }
            Pending::Nothing
            | Pending::Shutdown
            | Pending::In { .. }
            | Pending::InString { .. }
            | Pending::StringRead { .. } => {
                let (gpr, flags) = self.core.seen_from(Homes::default());
                (gpr, flags, self.core.rip)
            }
        };
        Ok(self.core.cpu.state(gpr, rip, flags))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.core.cpu.load(state);
        for (index, &segment) in state.segments.iter().enumerate() {
            self.core.set_segment(index, segment);
        }
        for (number, &value) in state.gpr.iter().enumerate() {
            self.core.set_gpr(number, value);
        }
        self.core.set_rflags(state.rflags);
        self.core.rip = state.rip;
        self.core.flush();
        self.steps = 0;
        self.resume = Resume::Boundary;
        self.pending = Pending::Nothing;
        Ok(())
    }

    fn counts(&self) -> ExitCounts {
        self.counts.clone()
    }

    fn interruptible(&mut self) -> bool {
        matches!(self.resume, Resume::Boundary)
            && matches!(self.pending, Pending::Nothing | Pending::In { .. })
            && self.core.interrupts_enabled()
            && !self.core.cpu.shadow
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        if !self.interruptible() {
            return Err(Error::Engine(format!(
                "vector {vector} while not interruptible"
            )));
        }
        // An `in` that waits for its value is architecturally over.
        self.answer();
        self.counts.add(ExitReason::Interrupt);
        if let Err(fault) = self.core.deliver(vector, None, Cause::External)
            && self.core.raise(fault).is_err()
        {
            self.pending = Pending::Shutdown;
        }
        Ok(())
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        if self.window != wanted {
            self.window = wanted;
            self.doorbell.watch_window(wanted);
        }
    }

    fn kick_handle(&self) -> KickHandle {
        self.doorbell.clone()
    }

    fn task_priority(&mut self) -> u8 {
        self.core.priority_matters = true;
        self.core.cpu.cr8 as u8
    }

    /// Comes in the middle of the access that wrote the local APIC's register.
    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error> {
        self.core.cpu.cr8 = priority.into();
        Ok(())
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        x87::release(self.arena.context());
    }
}
