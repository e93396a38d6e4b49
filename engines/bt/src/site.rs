//! Sites: the places where translated code leaves for the runtime, and what the runtime needs to
//! know there.
//!
//! Translated code says no more than a site number; everything else about it was known when the
//! block was translated and waits here: the guest's instruction, where each register's true value
//! is, where to go on.

use crate::{
    checks::{Levels, Outside},
    context::{Context, flags_from_lazy},
    fault::{self, Fault},
};

/// Where the guest's registers and flags are at a point of translated code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Homes {
    /// Registers whose value is in `Context::spill`; the host register holds scratch.
    pub spilled: u16,
    /// The arithmetic flags are in `Context::lazy_flags`; the host's are scratch.
    pub lazy: bool,
    /// CF alone is there; the others are in the host's.
    pub carry: bool,
    /// What RSP has still to move by. At marks only.
    pub rsp: i8,
}

impl Homes {
    /// Where blocks and the stubs of [`crate::transitions`] meet.
    pub(crate) const MEETING: Homes = Homes {
        spilled: 1 << 12 | 1 << 13,
        lazy: true,
        carry: false,
        rsp: 0,
    };

    /// The arithmetic flags, if the host's are `flags` and the slot holds `lazy_flags`.
    pub(crate) fn flags(self, flags: u64, lazy_flags: u64) -> u64 {
        let waiting = match self {
            Homes { lazy: true, .. } => 0x8d5,
            Homes { carry: true, .. } => 1,
            Homes { .. } => return flags,
        };
        flags & !waiting | flags_from_lazy(lazy_flags) & waiting
    }

    /// Brings every register and flag home to `gpr` and `flags`.
    pub(crate) fn settle(self, context: &mut Context) {
        let mut spilled = self.spilled;
        while spilled != 0 {
            let register = spilled.trailing_zeros() as usize;
            spilled &= spilled - 1;
            context.gpr[register] = context.spill[register];
        }
        let rsp = &mut context.gpr[4];
        *rsp = rsp.wrapping_add(self.rsp as i64 as u64);
        context.flags = self.flags(context.flags, context.lazy_flags);
    }
}

/// Why a site leaves translated code.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// An access missed the software TLB; phase 1 is a bounced write, whose body is done.
    Memory(Slow),
    /// A register is too large for the window: `steps` instructions are executed one by one.
    /// `missed` says who relied on it.
    Outside { steps: u16, missed: Outside },
    /// A lookup for several accesses missed.
    Group(Shared),
    /// A direct branch that isn't linked yet: `patch` is the address of its rel32.
    /// `stub` is what the rel32 leads to until then, `known` what holds of the registers here. The
    /// flags are in `Context::lazy_flags` if `lazy`.
    Direct {
        target: u64,
        patch: u64,
        stub: u64,
        known: Levels,
        lazy: bool,
    },
    /// An indirect branch whose target (`Context::target`) isn't in the jump cache. RSP has moved
    /// by `rsp`, which is taken back should the target not be canonical. Through a gate, a guess is to be
    /// made as well.
    Indirect { rsp: i32, gate: Option<Gate> },
    /// A place that a return may lead to. Never left through.
    Guess(Guess),
    /// Instruction `index` of the side list is the runtime's to execute.
    System { index: u32 },
    /// The instruction reads or writes a port; phase 1 is one that is over.
    Port(Port),
    /// Interrupts were enabled before this place, and one is waiting.
    Window,
    /// The instruction raises an exception.
    Fault(Fault),
}

/// Guesses of one return.
pub(crate) const GUESSES: usize = 2;

/// A return address that is compared with a constant, and the branch behind that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guess {
    /// It is made.
    pub made: bool,
    /// Address of the constant.
    pub compared: u64,
    /// Address of the branch's rel32, which is 0 if it isn't linked.
    pub patch: u64,
    /// The flags are in `Context::lazy_flags`; if not, they are lost.
    pub lazy: bool,
    /// Site of the gate.
    pub gate: u32,
}

/// Five bytes behind the guesses of a return: a jump to the exit, or nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    pub at: u64,
    /// Where it leads while it is closed.
    pub stub: u64,
    /// Site of the first guess.
    pub first: u32,
}

/// `in` or `out`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Port {
    /// None for DX.
    pub number: Option<u8>,
    pub size: u8,
    pub write: bool,
    /// Guest instruction pointer behind it.
    pub next: u64,
    /// Host address behind it, if the block goes on there.
    pub resume: u64,
}

/// A host address in the code cache, which lies below 2 GiB. There is hardly anything of which there are more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place(u32);

impl Place {
    pub(crate) fn new(address: u64) -> Place {
        debug_assert!(address <= u32::MAX.into());
        Place(address as u32)
    }

    pub(crate) fn address(self) -> u64 {
        self.0.into()
    }
}

/// An access on its slow path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slow {
    pub size: u16,
    pub write: bool,
    /// The body reads the operand (and may write it as well).
    pub read: bool,
    /// Host register that holds the operand's host address in the body. Where a lookup has missed, the address
    /// less the key of the entry that was looked at...
    pub register: u8,
    /// ... whose place in the TLB this one holds. The same one for both where the address was known when the block
    /// was made: the body has the page's host address there, and who has missed the address.
    pub table: u8,
    /// Computes the address again and looks it up.
    pub retry: Place,
    /// The body, which doesn't depend on where it is.
    pub body: Place,
    /// Just after it.
    pub resume: Place,
    /// Where things are after the body.
    pub after: Homes,
    /// The access is to the stack: #SS instead of #GP.
    pub stack: bool,
    /// Segment whose limit and kind are looked at for this access.
    pub segment: Option<u8>,
    /// The address has to be a multiple of this.
    pub alignment: u8,
    /// Guest instruction pointer after the body, None if more of the instruction is to come.
    pub next_ip: Option<u64>,
    /// How far RSP still has to move before `next_ip`.
    pub rsp: i32,
    /// The body is atomic.
    pub locked: bool,
    /// The block relies on what it has written to be there.
    pub relied: bool,
    /// The block is still to write through an address that it looked up before this access.
    pub pinned: bool,
}

impl Slow {
    /// What the register holds for a body whose operand, at `ea`, is at `host`.
    pub(crate) fn lead(&self, ea: u64, host: u64) -> u64 {
        if self.register == self.table {
            host.wrapping_sub(ea & 0xfff)
        } else {
            host
        }
    }

    /// `fault`, as this access raises it.
    pub(crate) fn of_stack(&self, fault: Fault) -> Fault {
        if self.stack && fault.vector == fault::GP {
            Fault::selector(fault::SS, 0)
        } else {
            fault
        }
    }
}

/// A lookup that stands for the accesses of several instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared {
    pub size: u16,
    pub write: bool,
    /// Computes the address again and looks it up.
    pub retry: u64,
    /// As of a [`Slow`].
    pub register: u8,
    pub table: u8,
    /// Instructions to execute one by one if the lookup can't succeed.
    pub steps: u16,
}

/// A place where translated code leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    /// Index of the block it belongs to.
    pub block: u32,
    /// The guest instruction.
    pub ip: u64,
    pub homes: Homes,
    pub kind: Kind,
}

/// A place in translated code where the host may fault: from `offset` to the next one's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    /// Offset from the block's first byte.
    pub offset: u32,
    pub ip: Ip,
    pub homes: Homes,
    /// Which instruction of its block this is.
    pub at: u8,
}

/// The guest instruction pointer at a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ip {
    /// This one.
    At(u64),
    /// `Context::target`.
    Target,
}

/// Site number as translated code stores it.
pub(crate) fn number(index: usize, phase: u64) -> i32 {
    ((index as u64) << 1 | phase) as i32
}
