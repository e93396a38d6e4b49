//! Exits: transitions from guest to VMM, each with a reason, and their counters.
//!
//! [`Exit`] carries what the run loop needs to act; [`ExitReason`] is its fieldless name and
//! indexes [`ExitCounts`]. A translator's callout (`Translate`, `TlbMiss`, ...) never reaches the
//! run loop and is not a VM exit: it is counted here all the same, under source `translator`.

use crate::GuestPhys;

/// Why [`crate::Vcpu::run`] returned. The run loop answers a read by filling `data` before it calls `run` again.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in` or `ins`: `data` holds one or more items of `size` bytes, to be filled.
    PioIn {
        /// The port.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        size: u8,
        /// Items to be filled.
        data: &'a mut [u8],
    },
    /// `out` or `outs`: `data` holds one or more items of `size` bytes.
    PioOut {
        /// The port.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        size: u8,
        /// Items that were written.
        data: &'a [u8],
    },
    /// Read of a guest-physical address that is not RAM; at most 8 bytes.
    MmioRead {
        /// First byte that is read.
        addr: GuestPhys,
        /// To be filled.
        data: &'a mut [u8],
        /// CR8, which the local APIC's registers follow.
        priority: u8,
    },
    /// Write to a guest-physical address that is not RAM; at most 8 bytes.
    MmioWrite {
        /// First byte that is written.
        addr: GuestPhys,
        /// What was written.
        data: &'a [u8],
    },
    /// `rdmsr` of a register that the machine keeps ([`crate::devices::lapic::owns_msr`]).
    MsrRead {
        /// Which.
        index: u32,
        /// To be filled; left empty, the guest gets #GP.
        answer: &'a mut Option<u64>,
        /// CR8, which the local APIC's registers follow.
        priority: u8,
    },
    /// `wrmsr` to a register that the machine keeps.
    MsrWrite {
        /// Which.
        index: u32,
        /// What was written.
        value: u64,
        /// The guest's time-stamp counter now; only of meaning for IA32_TSC_DEADLINE.
        tsc: u64,
        /// To be set if that is allowed; left clear, the guest gets #GP.
        accepted: &'a mut bool,
    },
    /// The guest executed `hlt` with nothing pending.
    Hlt,
    /// Interrupts can be taken now; asked for by [`crate::Vcpu::request_interrupt_window`].
    InterruptWindow,
    /// Triple fault: the guest is beyond help.
    Shutdown,
    /// A [`crate::Kick`] or a signal stopped the guest between two instructions.
    Interrupted,
    /// A step is over ([`crate::Vcpu::set_stepping`]).
    Stepped,
    /// The engine can't go on: the text says what it met (KVM_EXIT_INTERNAL_ERROR, unsupported instruction).
    Internal {
        /// What it met.
        message: String,
    },
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $kind:ident, $raw:literal;)*) => {
        /// The name of an exit or of a translator's callout, without payload.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum ExitReason { $($(#[$doc])* $name),* }

        impl ExitReason {
            /// Every reason, in index order.
            pub const ALL: &[ExitReason] = &[$(ExitReason::$name),*];

            /// The mode-neutral kind.
            pub fn kind(self) -> ExitKind {
                match self { $(ExitReason::$name => ExitKind::$kind),* }
            }

            /// The reason in the field's own terms; `kvm` says KVM_EXIT_* for the same ones.
            pub fn name(self) -> &'static str {
                match self { $(ExitReason::$name => $raw),* }
            }
        }
    };
}

reasons! {
    /// Port read.
    PioIn = Pio, "in";
    /// Port write.
    PioOut = Pio, "out";
    /// Device memory read.
    MmioRead = Mmio, "mmio-read";
    /// Device memory write.
    MmioWrite = Mmio, "mmio-write";
    /// Model-specific register read.
    MsrRead = Msr, "rdmsr";
    /// Model-specific register write.
    MsrWrite = Msr, "wrmsr";
    /// Halt.
    Hlt = Hlt, "hlt";
    /// Interrupt window opened.
    InterruptWindow = Irq, "interrupt-window";
    /// Triple fault.
    Shutdown = GuestFault, "shutdown";
    /// Kick or host signal.
    Interrupted = Irq, "interrupted";
    /// A step was over; only in lockstep.
    Stepped = Other, "stepped";
    /// The engine gave up.
    Internal = Other, "internal-error";
    /// bt: an instruction executed by a helper that has no exit of its own (lgdt, iret, ...).
    Helper = Helper, "helper";
    /// bt: `cpuid` emulated.
    Cpuid = Cpuid, "cpuid";
    /// bt: `rdmsr` or `wrmsr` emulated or handed to the machine.
    Msr = Msr, "msr";
    /// bt: control register access emulated.
    ControlRegister = Cr, "cr";
    /// bt: an exception or software interrupt delivered to the guest.
    GuestFault = GuestFault, "guest-fault";
    /// bt: an external interrupt delivered to the guest.
    Interrupt = Irq, "interrupt";
    /// bt: software TLB miss filled from the guest's page tables.
    TlbMiss = ShadowFault, "tlb-miss";
    /// bt: access completed through a bounce buffer (page crossing, device memory, code page).
    Bounce = Helper, "bounce";
    /// bt: guest memory mapped where translated code reaches it without a lookup.
    WindowFill = ShadowFault, "window-fill";
    /// bt: such mappings taken away.
    WindowDrop = ShadowFault, "window-drop";
    /// bt: an access that the window is not for, executed through the software TLB.
    WindowMiss = Helper, "window-miss";
    /// bt: a block translated.
    Translate = Translate, "translate";
    /// bt: a direct branch that was not linked, taken through the runtime.
    DirectMiss = Translate, "direct-miss";
    /// bt: a direct exit linked to its target block.
    Chain = Translate, "chain";
    /// bt: indirect branch target not in the lookup table.
    IndirectMiss = IndirectMiss, "indirect-miss";
    /// bt: blocks thrown away because the guest wrote to their code.
    SmcFlush = SmcFlush, "smc-flush";
    /// bt: code cache full, everything thrown away.
    CacheFlush = Translate, "cache-flush";
}

/// Mode-neutral kind of an exit, for charts that stand modes side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// Port I/O.
    Pio,
    /// Device memory.
    Mmio,
    /// CPUID.
    Cpuid,
    /// Model-specific register.
    Msr,
    /// Control register.
    Cr,
    /// Halt.
    Hlt,
    /// Interrupt.
    Irq,
    /// An exception that belongs to the guest.
    GuestFault,
    /// A fault that the VMM's own shadow structures (TLB, shadow page tables) took.
    ShadowFault,
    /// Hypercall.
    Hypercall,
    /// Translation.
    Translate,
    /// Indirect branch lookup.
    IndirectMiss,
    /// Self-modifying code.
    SmcFlush,
    /// Instruction emulated by a helper.
    Helper,
    /// What translated code did without leaving.
    Inline,
    /// Anything else.
    Other,
}

impl ExitKind {
    /// The name used in csv and report.
    pub fn name(self) -> &'static str {
        match self {
            ExitKind::Pio => "pio",
            ExitKind::Mmio => "mmio",
            ExitKind::Cpuid => "cpuid",
            ExitKind::Msr => "msr",
            ExitKind::Cr => "cr",
            ExitKind::Hlt => "hlt",
            ExitKind::Irq => "irq",
            ExitKind::GuestFault => "guest-fault",
            ExitKind::ShadowFault => "shadow-fault",
            ExitKind::Hypercall => "hypercall",
            ExitKind::Translate => "translate",
            ExitKind::IndirectMiss => "indirect-miss",
            ExitKind::SmcFlush => "smc-flush",
            ExitKind::Helper => "helper",
            ExitKind::Inline => "inline",
            ExitKind::Other => "other",
        }
    }
}

/// One counter per [`ExitReason`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitCounts([u64; ExitReason::ALL.len()]);

impl Default for ExitCounts {
    fn default() -> Self {
        ExitCounts([0; ExitReason::ALL.len()])
    }
}

impl ExitCounts {
    /// Adds one.
    #[inline]
    pub fn add(&mut self, reason: ExitReason) {
        self.0[reason as usize] += 1;
    }

    /// Sets one, for whoever counts it elsewhere.
    pub fn set(&mut self, reason: ExitReason, count: u64) {
        self.0[reason as usize] = count;
    }

    /// Adds many.
    pub fn add_many(&mut self, reason: ExitReason, count: u64) {
        self.0[reason as usize] += count;
    }

    /// Adds what somebody else has counted.
    pub fn merge(&mut self, other: &ExitCounts) {
        for (count, more) in self.0.iter_mut().zip(&other.0) {
            *count += more;
        }
    }

    /// Takes one back: what opens or closes a measured window is not part of it.
    pub(crate) fn remove(&mut self, reason: ExitReason) {
        self.0[reason as usize] -= 1;
    }

    /// The count of one reason.
    pub fn get(&self, reason: ExitReason) -> u64 {
        self.0[reason as usize]
    }

    /// Every reason with its count, zeros too.
    pub fn iter(&self) -> impl Iterator<Item = (ExitReason, u64)> + '_ {
        ExitReason::ALL
            .iter()
            .map(|&reason| (reason, self.get(reason)))
    }

    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &ExitCounts) -> ExitCounts {
        let mut delta = self.clone();
        for (now, before) in delta.0.iter_mut().zip(&earlier.0) {
            *now -= before;
        }
        delta
    }
}

impl Exit<'_> {
    /// The exit's name.
    pub fn reason(&self) -> ExitReason {
        match self {
            Exit::PioIn { .. } => ExitReason::PioIn,
            Exit::PioOut { .. } => ExitReason::PioOut,
            Exit::MmioRead { .. } => ExitReason::MmioRead,
            Exit::MmioWrite { .. } => ExitReason::MmioWrite,
            Exit::MsrRead { .. } => ExitReason::MsrRead,
            Exit::MsrWrite { .. } => ExitReason::MsrWrite,
            Exit::Hlt => ExitReason::Hlt,
            Exit::InterruptWindow => ExitReason::InterruptWindow,
            Exit::Shutdown => ExitReason::Shutdown,
            Exit::Interrupted => ExitReason::Interrupted,
            Exit::Stepped => ExitReason::Stepped,
            Exit::Internal { .. } => ExitReason::Internal,
        }
    }
}
