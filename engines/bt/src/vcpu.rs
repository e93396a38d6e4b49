//! The vCPU: enters translated code, answers what it leaves for, and hands the rest to the caller.
//!
//! | file | what |
//! |---|---|
//! | this one | the run loop: enters the code to go on with, links it |
//! | `code` | finds it, translated if need be |
//! | `ahead` | translation without execution, for profilers |
//! | `access` | slow paths of memory accesses, faults of the host's CPU |
//! | `create` | options and constructors |
//! | `answer` | instructions that the runtime executes, answers to exits |
//! | `interface` | what engine-core's run loop sees |
//! | `listing` | translated code as text |
//! | `ports` | `in` and `out` |
//! | `share` | the other vCPUs of the VM |
//! | `user` | ring-3 code without a kernel |
//! | `window` | accesses that the window wasn't ready or isn't for |

mod access;
mod ahead;
mod answer;
mod code;
mod create;
mod interface;
mod listing;
mod ports;
mod share;
mod user;
mod window;

use std::{ptr::NonNull, sync::Arc};

use engine_core::{DeviceBus, Error, ExitCounts, ExitReason, Stepping, Vcpu};

use crate::{
    arena::Arena,
    cache::{Cache, Dropped, Key, Refusal, Source},
    context::HOST_FAULT,
    core::{Core, Flushed, Shutdown},
    cpu::{Bits, EFER_SCE, FLAG_DF, Seg, canonical},
    decode::Mode,
    fault::Fault,
    features::uses_vectors,
    guest,
    kick::Doorbell,
    lower,
    mmu::Access,
    privileged::{KERNEL, SYSCALLS, USER},
    signal::{self, Active},
    site::{Homes, Kind, Site},
    stubs::Stubs,
    system::Trap,
    tlb::{BANKS, jump_index},
    transitions::{BOUNDARY, FROM_USER, HAS_ERROR, RAISING, Transitions},
    x87,
};
use access::{Direct, Transfer};
use answer::Pending;
pub use create::Options;
use ports::PortAccess;
use share::Told;
pub use user::{Extended, UserStop};

/// Where `run` goes on.
#[derive(Clone, Copy, Debug)]
enum Resume {
    /// At the guest's RIP, with everything settled.
    Boundary,
    /// In the middle of an instruction, at this host address.
    Host(u64),
    /// In a stub, with everything where [`Homes::MEETING`] says.
    Stub(u64),
}

/// An exit before it borrows anything.
enum Stop {
    /// `in` or `out`, as `port_access` says.
    Port,
    /// An access is over that the bus has answered, and there is something to do.
    Answered,
    /// Of as many bytes as `strings` holds, as `OutString`.
    InString {
        port: u16,
        size: u8,
    },
    OutString {
        port: u16,
        size: u8,
    },
    ReadMsr {
        index: u32,
    },
    WriteMsr {
        index: u32,
        value: u64,
    },
    Read {
        phys: u64,
        len: usize,
    },
    Write {
        phys: u64,
        len: usize,
    },
    Halt,
    Window,
    Shutdown,
    Interrupted,
    Stepped,
    /// An exception, while they are intercepted.
    Exception(Fault),
    Internal(String),
}

impl From<Shutdown> for Stop {
    fn from(_: Shutdown) -> Stop {
        Stop::Shutdown
    }
}

/// Why there is no code to go on with.
enum Missing {
    Trap(Trap),
    /// Somebody wants this vCPU to stop, and it was waiting for others.
    Kicked,
}

impl<T: Into<Trap>> From<T> for Missing {
    fn from(trap: T) -> Missing {
        Missing::Trap(trap.into())
    }
}

/// A vCPU whose guest code is translated.
pub struct BtVcpu {
    core: Core,
    cache: Cache,
    stubs: Stubs,
    /// Of each bank.
    transitions: [Transitions; BANKS],
    counts: ExitCounts,
    /// Translated code counts its own branches and accesses.
    counting: bool,
    doorbell: Arc<Doorbell>,
    window: bool,
    /// Exceptions end the run instead of going through the IDT.
    intercept: bool,
    resume: Resume,
    /// Misses of the software TLB.
    misses: u32,
    /// The exception that a stub was asked to deliver last.
    raising: Option<Fault>,
    /// Instructions to execute one by one.
    steps: u16,
    /// Every step ends the run.
    stepping: Option<Stepping>,
    /// The step under way has begun.
    stepped: bool,
    pending: Pending,
    /// The port that is being accessed.
    port_access: PortAccess,
    /// Who answers accesses while `run` is under way, if anybody does.
    bus: Option<NonNull<dyn DeviceBus>>,
    /// The machine's answer to `rdmsr`.
    msr: Option<u64>,
    /// The machine's answer to `wrmsr`.
    accepted: bool,
    /// Data of the exit under way.
    data: [u8; 8],
    /// Data of the exit under way, for `ins` and `outs`.
    strings: Vec<u8>,
    /// A device has overwritten code, and the block under way may be a part of it.
    stale: bool,
    /// Mode that each jump cache's entries were made in.
    jump_modes: [Option<Mode>; 2 * BANKS],
    /// The number that it had when it was last compared ([`Core::known_mode`]).
    jump_serials: [u64; 2 * BANKS],
    /// Entries into translated code.
    entries: u64,
    /// There is no other vCPU.
    alone: bool,
    /// What the others have been told.
    told: Told,
    /// The access under way whose body runs on the memory itself.
    direct: Option<Direct>,
    // Last: everything above points into it.
    arena: Arc<Arena>,
}

// SAFETY: what its pointers lead to is its own arena, which only the thread that has the vCPU uses,
// and guest memory, which is anybody's. x87 state that waits in a thread's registers is looked after
// by `x87`.
unsafe impl Send for BtVcpu {}

impl BtVcpu {
    /// Times that translated code was entered: what a hot loop must not need.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Times the code cache was full and emptied.
    pub fn cache_flushes(&self) -> u64 {
        self.cache.emptied
    }

    fn go(&mut self) -> Result<Stop, Error> {
        if self.alone {
            // Its result is written where it is wanted: to copy it would wait for the store buffer.
            return self.go_on();
        }
        self.join();
        let stop = self.go_on();
        x87::put_away(&self.arena);
        self.part();
        stop
    }

    #[inline(never)]
    fn go_on(&mut self) -> Result<Stop, Error> {
        if !signal::is_active(self.arena.context()) {
            self.activate()?;
        }
        self.core.mmu.window.activate();
        x87::acquire(&self.arena)?;
        if let Some(stop) = self.answer() {
            return Ok(stop);
        }
        loop {
            self.core.follow_window();
            let mut lazy = false;
            let mut vectors = None;
            let entry = match self.resume {
                Resume::Host(entry) => entry,
                Resume::Stub(entry) => {
                    lazy = true;
                    // It brings them in itself.
                    vectors = Some(false);
                    entry
                }
                Resume::Boundary => {
                    let entry = match self.quick() {
                        Some(entry) => entry,
                        None => match self.boundary() {
                            Ok(Some(entry)) => entry,
                            Ok(None) => continue,
                            Err(stop) => return Ok(stop),
                        },
                    };
                    lower::lend(self.core.context());
                    lazy = true;
                    entry
                }
            };
            if !self.core.settled {
                self.settle_shortcuts();
            }
            let vectors =
                vectors.unwrap_or_else(|| self.core.vectors[usize::from(self.core.user())]);
            let [privileged, user] = self.core.vectors.map(|used| used && !vectors);
            self.core.shortcuts.due = [privileged.into(), user.into()];
            let stubs = if lazy {
                self.stubs.enter_lazy
            } else {
                self.stubs.enter
            };
            self.enter(stubs[usize::from(vectors)], entry);
            if let Some(stop) = self.left_for_port() {
                return Ok(stop);
            }
            if let Err(stop) = self.left() {
                return Ok(stop);
            }
        }
    }

    #[cold]
    fn activate(&self) -> Result<(), Error> {
        let active = Active {
            context: self.arena.context(),
            code_start: self.arena.code(),
            code_end: self.arena.code() + self.arena.code_bytes() as u64,
            exit_after_signal: self.stubs.exit_after_signal,
        };
        signal::activate(active).map_err(|source| Error::Host {
            operation: "install fault handlers",
            source,
        })
    }

    /// As [`BtVcpu::boundary`], where nothing has to be looked at and the code is known.
    fn quick(&mut self) -> Option<u64> {
        let quiet = self.alone
            && matches!(self.core.flushed, Flushed::Nothing)
            && self.core.code_writes.is_empty()
            && !self.core.mmu.has_marked()
            && self.steps == 0
            && !self.window
            && !self.core.cpu.shadow
            && !self.doorbell.rang()
            && !self.core.debugging()
            && !self.core.nmi_due();
        if !quiet {
            return None;
        }
        let (index, serial) = self.core.known_mode()?;
        // With a window, where RSP points belongs to the mode.
        let window = self.jump_modes[index].is_none_or(|mode| mode.window);
        if self.jump_serials[index] != serial || window {
            return None;
        }
        let entry = self.core.mmu.jumps[index].get(self.core.linear_ip(), false)?;
        self.stale = false;
        Some(entry)
    }

    /// Between two instructions: finds the code to go on with. None to look again.
    fn boundary(&mut self) -> Result<Option<u64>, Stop> {
        self.settle_writes();
        self.stale = false;
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        // After the doorbell's page may have been opened, which forgets who rang.
        if !self.alone && !self.agree() {
            return Ok(None);
        }
        let debugging = self.core.debugging();
        if debugging && let Some(trap) = self.core.take_trap() {
            return self.raise(trap).map(|()| None);
        }
        if self.core.nmi_due() {
            return self.deliver_nmi().map(|()| None);
        }
        if self.window && self.interruptible() {
            self.request_interrupt_window(false);
            return Err(Stop::Window);
        }
        if self.stepping.is_some() && std::mem::take(&mut self.stepped) {
            return Err(Stop::Stepped);
        }
        self.stepped = true;
        let mut single = matches!(
            self.stepping,
            Some(Stepping::Instruction | Stepping::Towards(_))
        );
        if debugging {
            match self.core.debug_instruction() {
                Ok(alone) => single = alone,
                Err(fault) => return self.raise(fault).map(|()| None),
            }
        }
        single |= std::mem::take(&mut self.core.cpu.shadow) || self.steps > 0;
        self.steps = self.steps.saturating_sub(1);
        match self.find(single) {
            Ok((entry, _)) => Ok(Some(entry)),
            Err(missing) => self.missing(missing).map(|()| None),
        }
    }

    fn missing(&mut self, missing: Missing) -> Result<(), Stop> {
        match missing {
            Missing::Trap(Trap::Fault(fault)) => self.raise(fault),
            Missing::Trap(Trap::Shutdown) => Err(Stop::Shutdown),
            Missing::Trap(Trap::Unsupported(message)) => Err(Stop::Internal(message)),
            // The boundary that comes next answers.
            Missing::Kicked => Ok(()),
        }
    }

    /// Acts on what privileged code did to memory and mappings.
    fn settle_writes(&mut self) {
        match self.core.flushed {
            Flushed::Nothing => {}
            Flushed::Page(span) => self.cache.unlink_across(Dropped::Span(span), &self.arena),
            Flushed::User(bank) => self.cache.unlink_across(Dropped::User(bank), &self.arena),
            Flushed::Bank(bank) => self.cache.unlink_across(Dropped::Bank(bank), &self.arena),
            Flushed::Everything => self.cache.unlink_across(Dropped::All, &self.arena),
        }
        self.core.flushed = Flushed::Nothing;
        while let Some((phys, len)) = self.core.code_writes.pop() {
            self.overwritten(phys, len);
        }
        self.settle_marked();
    }

    /// Drops code that page walks have set bits in. A block that is running goes on to its end: when
    /// a processor sets these bits is its own affair (SDM 3A 4.8).
    fn settle_marked(&mut self) {
        if !self.core.mmu.has_marked() {
            return;
        }
        for at in self.core.mmu.take_marked() {
            self.overwritten(at, 8);
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
        if self.deliver(fault) {
            return Ok(());
        }
        self.raise_here(fault)
    }

    /// Has `fault` delivered by the stub, if that may succeed. Whether it does shows at the next exit.
    fn deliver(&mut self, fault: Fault) -> bool {
        let known = (self.core.shortcuts.gates.get(usize::from(fault.vector)))
            .is_some_and(|gate| gate.low != 0);
        // With other vCPUs the boundary before the handler has more to do.
        if !known || !self.alone || self.intercept || !self.core.settled || self.core.debugging() {
            return false;
        }
        let mode = self.core.mode();
        if self.core.shortcuts.enabled & KERNEL == 0
            || mode.bits != Bits::Bits64
            || !(mode.ring_0 || mode.user)
            || fault.vector == crate::fault::DB
        {
            return false;
        }
        self.core.forget_traps();
        self.core.cpu.shadow = false;
        if let Some(address) = fault.address {
            self.core.cpu.cr2 = address;
        }
        let mut delivery = i32::from(fault.vector) | if mode.user { FROM_USER } else { 0 };
        if let Some(error) = fault.error {
            self.core.shortcuts.error = error;
            delivery |= HAS_ERROR;
        }
        let rip = self.core.rip;
        let context = self.core.context();
        lower::lend(context);
        context.gpr[12] = rip;
        context.gpr[13] = delivery as u64;
        context.site = RAISING;
        self.raising = Some(fault);
        self.resume = Resume::Stub(self.transitions[self.core.cpu.bank()].deliver);
        true
    }

    fn raise_here(&mut self, fault: Fault) -> Result<(), Stop> {
        self.counts.add(ExitReason::GuestFault);
        if self.intercept {
            self.core.forget_traps();
            return Err(Stop::Exception(fault));
        }
        Ok(self.core.raise(fault)?)
    }

    fn deliver_nmi(&mut self) -> Result<(), Stop> {
        self.counts.add(ExitReason::Interrupt);
        match self.core.deliver_nmi() {
            Ok(()) => Ok(()),
            Err(fault) => self.raise(fault),
        }
    }

    /// Says what privilege changes translated code may make by itself.
    #[cold]
    fn settle_shortcuts(&mut self) {
        self.core.settled = true;
        let enabled = match self.core.usual_modes() {
            Some([kernel, user]) if !self.intercept => {
                let bank = self.core.cpu.bank();
                let [privileged, unprivileged] =
                    [false, true].map(|user| self.jump_modes[jump_index(bank, user)]);
                let syscalls = self.core.cpu.efer & EFER_SCE != 0;
                // Where RSP has to be inside the window, the stubs look. Code without the window is
                // right wherever RSP points.
                let stack = unprivileged.is_some_and(|mode| mode.stack);
                let window = user.window && unprivileged.is_some_and(|mode| mode.window);
                let user = Mode {
                    stack,
                    window,
                    ..user
                };
                self.core.context().stack_limit = if stack {
                    crate::window::SIZE - 1
                } else {
                    u64::MAX
                };
                (if privileged == Some(kernel) {
                    KERNEL
                } else {
                    0
                }) | (if unprivileged == Some(user) { USER } else { 0 })
                    | (if syscalls { SYSCALLS } else { 0 })
            }
            Some(_) | None => 0,
        };
        self.core.shortcuts.enabled = enabled;
    }

    /// Executes translated code until it leaves.
    #[inline]
    fn enter(&mut self, stub: u64, entry: u64) {
        self.entries += 1;
        // Who debugs is told of every access in the run loop. Nothing that translated code does changes
        // whether somebody does.
        let owner = match self.bus {
            Some(_) if !self.core.debugging() => std::ptr::from_mut(self) as u64,
            Some(_) | None => 0,
        };
        let context = self.core.context();
        context.owner = owner;
        context.resume = entry;
        context.direction = context.flags & FLAG_DF;
        // SAFETY: the stub follows the C calling convention, and translated code reaches nothing
        // but the arena and guest RAM. If it calls out, it is with this vCPU, and nobody else uses it
        // meanwhile.
        unsafe {
            let enter: extern "C" fn() = std::mem::transmute(stub as usize);
            enter();
        }
        let context = self.core.context();
        debug_assert_eq!(
            context.flags & FLAG_DF,
            context.direction,
            "DF changes together with its slot"
        );
        self.resume = Resume::Boundary;
    }

    /// Acts on what translated code has left for.
    fn left(&mut self) -> Result<(), Stop> {
        let number = self.core.context().site;
        if number == HOST_FAULT {
            return self.host_fault();
        }
        if number == BOUNDARY {
            let target = self.core.context().target;
            self.settle(Homes::MEETING, target);
            self.counts.add(ExitReason::Helper);
            return Ok(());
        }
        if number == RAISING {
            let rip = self.core.rip;
            self.settle(Homes::MEETING, rip);
            return match self.raising.take() {
                Some(fault) => self.raise_here(fault),
                None => Err(Stop::Internal("nothing was being raised".into())),
            };
        }
        let index = (number >> 1) as usize;
        let site = self.cache.site(index);
        match site.kind {
            Kind::Memory(slow) if number & 1 == 0 => self.slow(site, slow),
            Kind::Memory(slow) if self.direct.is_some() => {
                self.written(slow);
                Ok(())
            }
            Kind::Memory(slow) => self.transfer(Transfer {
                site,
                slow,
                write: true,
                done: 0,
                step: 0,
            }),
            Kind::Outside { steps, missed } => {
                self.outside(site, steps, missed);
                Ok(())
            }
            Kind::Group(shared) => {
                self.shared(site, shared);
                Ok(())
            }
            Kind::Direct { target, .. } => self.direct(index, site, target),
            Kind::Guess(_) => Err(Stop::Internal("a guess isn't left through".into())),
            Kind::Indirect { rsp, gate } => {
                let target = self.core.context().target;
                self.settle(site.homes, target);
                self.counts.add(ExitReason::IndirectMiss);
                let long = self.core.cpu.bits() == Bits::Bits64;
                let good = if long {
                    canonical(target)
                } else {
                    self.core.check_target(target).is_ok()
                };
                if !good {
                    // The branch faults, not its target (SDM 2, JMP, CALL and RET).
                    let before = self.core.gpr(4).wrapping_sub(rsp as i64 as u64);
                    self.core.set_gpr_sized(4, before, if long { 8 } else { 4 });
                    self.core.rip = site.ip;
                    return self.raise(Fault::gp());
                }
                if gate.is_some() {
                    return self.guess(index);
                }
                Ok(())
            }
            Kind::System { index } => {
                self.settle(site.homes, site.ip);
                let instr = self.cache.system(index);
                let key = self.cache.block(site.block).key;
                if !key.mode.vectors && uses_vectors(&instr) {
                    self.bring_vectors(key.mode);
                    return Ok(());
                }
                self.system(&instr)
            }
            Kind::Port(port) => {
                self.settle(site.homes, site.ip);
                match self.port(port) {
                    Ok(()) => Err(Stop::Port),
                    Err(fault) => {
                        self.counts.add(ExitReason::Helper);
                        self.raise(fault)
                    }
                }
            }
            Kind::Window => {
                // The boundary that comes next finds the window open.
                self.settle(site.homes, site.ip);
                self.counts.add(ExitReason::Helper);
                Ok(())
            }
            Kind::Fault(fault) => {
                self.settle(site.homes, site.ip);
                self.raise(fault)
            }
        }
    }

    /// Code of `mode` has met its first vector instruction, at RIP: goes on there in code that has the
    /// vector registers, without looking left or right, as within an instruction.
    fn bring_vectors(&mut self, mode: Mode) {
        self.core.vectors[usize::from(mode.user)] = true;
        self.core.forget_modes();
        // RSP may have left the window since the block began: code that relies on it must not follow.
        let inside = mode.bits != Bits::Bits64 || self.core.gpr(4) < crate::window::SIZE;
        let mode = Mode {
            vectors: true,
            window: mode.window && inside,
            stack: mode.stack && inside,
            ..mode
        };
        let virt = self.core.linear_ip();
        // It was just executed from: should it be gone all the same, the next boundary says so.
        if let Ok(number) = self.block(mode, virt) {
            lower::lend(self.core.context());
            self.resume = Resume::Host(self.cache.block(number).entry());
        }
    }

    fn settle(&mut self, homes: Homes, ip: u64) {
        homes.settle(self.core.context());
        self.core.rip = ip;
    }

    /// A return that has guesses left to make, at site `index`, leads to RIP.
    fn guess(&mut self, index: usize) -> Result<(), Stop> {
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        let mode = self.core.mode_here();
        let virt = self.core.linear_ip();
        let emptied = self.cache.emptied;
        match self.block(mode, virt) {
            Ok(number) => {
                if self.stepping.is_none() && emptied == self.cache.emptied {
                    self.cache.guess(index, self.core.rip, number, &self.arena);
                }
                Ok(())
            }
            Err(missing) => self.missing(missing),
        }
    }

    /// A direct branch that isn't linked: finds its target and links it.
    fn direct(&mut self, index: usize, site: Site, target: u64) -> Result<(), Stop> {
        self.settle(site.homes, target);
        self.counts.add(ExitReason::DirectMiss);
        if self.doorbell.answer() {
            return Err(Stop::Interrupted);
        }
        let mode = self.core.mode_here();
        let virt = self.core.linear_ip();
        let emptied = self.cache.emptied;
        match self.block(mode, virt) {
            Ok(number) => {
                if self.stepping.is_none()
                    && emptied == self.cache.emptied
                    && self.cache.link(index, number, &self.arena)
                {
                    self.counts.add(ExitReason::Chain);
                }
                Ok(())
            }
            Err(missing) => self.missing(missing),
        }
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        x87::put_away(&self.arena);
        self.retire();
        signal::release(self.arena.context());
    }
}
