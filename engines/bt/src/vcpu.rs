//! The vCPU: enters translated code, answers what it leaves for, and hands the rest to the caller.
//!
//! | file | what |
//! |---|---|
//! | this one | the run loop: enters the code to go on with |
//! | `access` | slow paths of memory accesses, faults of the host's CPU |
//! | `ahead` | translation without execution, for profilers |
//! | `answer` | instructions that the runtime executes, answers to exits |
//! | `boundary` | what is due between two instructions |
//! | `code` | the code to go on with: found, translated if need be |
//! | `create` | options and constructors |
//! | `interface` | what engine-core's run loop sees |
//! | `leave` | what translated code has left for |
//! | `listing` | translated code as text |
//! | `ports` | `in` and `out` |
//! | `raise` | exceptions and NMIs |
//! | `share` | the other vCPUs of the VM |
//! | `user` | ring-3 code without a kernel |
//! | `window` | accesses that the window wasn't ready or isn't for |

mod access;
mod ahead;
mod answer;
mod boundary;
mod code;
mod create;
mod interface;
mod leave;
mod listing;
mod ports;
mod raise;
mod share;
mod user;
mod window;

use std::{ptr::NonNull, sync::Arc};

use engine_core::{DeviceBus, Error, ExitCounts, Stepping};

use crate::{
    arena::Arena,
    cache::Cache,
    core::{Core, Shutdown},
    cpu::{EFER_SCE, FLAG_DF},
    decode::Mode,
    fault::Fault,
    kick::Doorbell,
    lower,
    privileged::{KERNEL, SYSCALLS, USER},
    signal::{self, Active},
    site::Homes,
    stubs::Stubs,
    system::Trap,
    tlb::{BANKS, jump_index},
    transitions::Transitions,
    x87,
};
use access::Direct;
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
    /// The x87 instruction pointer, if it is the guest's already and looks like one of translated code.
    settled_ip: Option<u64>,
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

    fn settle(&mut self, homes: Homes, ip: u64) {
        homes.settle(self.core.context());
        self.core.rip = ip;
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        x87::put_away(&self.arena);
        self.retire();
        signal::release(self.arena.context());
    }
}
