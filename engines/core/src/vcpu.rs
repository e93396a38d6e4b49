//! The boundary between the run loop and an engine.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use crate::{
    CpuState, Doorbells, Exit, ExitCounts, ExitReason, GuestPhys, Interrupts, dma::KeptCode,
    kick::KickHandle, tally::HostStat,
};

/// Where a machine's interrupt controllers and their timer are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Irqchip {
    /// In the VMM: the same in every mode.
    #[default]
    User,
    /// In the host's kernel, where an engine has them there.
    Kernel,
}

impl Irqchip {
    /// The name that stands in labels and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Irqchip::User => "user",
            Irqchip::Kernel => "kernel",
        }
    }
}

/// How far one step goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepping {
    /// One instruction.
    Instruction,
    /// One instruction; an engine that loses its single step on some of them stops at this linear
    /// address at the latest.
    Towards(u64),
    /// What the engine makes one piece of: a translator's block, otherwise one instruction.
    Block,
}

/// What a read that is under way is answered with, where the exit itself is not at hand any more.
#[derive(Clone, Copy, Debug)]
pub enum Supply<'a> {
    /// For writes.
    Nothing,
    /// For [`Exit::PioIn`] and [`Exit::MmioRead`].
    Data(&'a [u8]),
    /// For [`Exit::MsrRead`].
    Msr(Option<u64>),
    /// For [`Exit::MsrWrite`].
    Accepted(bool),
}

/// The machine's devices, for an engine whose guest reaches the VMM by a call: it may have an access
/// answered before its run ends. Each is an exit all the same, and counted as one.
pub trait DeviceBus {
    /// Answers [`Exit::PioIn`] of one item.
    fn port_in(&mut self, port: u16, data: &mut [u8]) -> After;

    /// Answers [`Exit::PioOut`] of one item.
    fn port_out(&mut self, port: u16, data: &[u8]) -> After;

    /// Answers [`Exit::MmioRead`]; `priority` is CR8.
    fn memory_read(&mut self, addr: GuestPhys, data: &mut [u8], priority: u8) -> After;

    /// Answers [`Exit::MmioWrite`].
    fn memory_write(&mut self, addr: GuestPhys, data: &[u8]) -> After;
}

/// What comes after an access that a [`DeviceBus`] has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The guest may go on at once: nobody wants anything between this exit and the next entry.
    Enter,
    /// There is something for the run loop to do first.
    Return,
}

/// One virtual CPU of one engine. Used by the run loop alone; `dyn` at this crate boundary.
///
/// A machine has one or several. Each is used by one thread, which need not be the one that made
/// it: vCPU 0 by the caller of the run loop, the others by threads of their own. Its number is its
/// local APIC's id ([`Place`](crate::cpuid::Place)). Memory is shared: an atomic access of one vCPU
/// is atomic for all, and code that one of them changes is changed for all.
pub trait Vcpu: Send {
    /// Runs the guest until something needs the VMM. State that an [`Exit`] borrows belongs to
    /// the vCPU; a read's data is consumed by the next call.
    fn run(&mut self) -> Result<Exit<'_>, Error>;

    /// As [`run`](Vcpu::run), with the devices at hand. `None` after an access that `bus` has answered
    /// with [`After::Return`]: that exit is over, and counted.
    ///
    /// # Errors
    /// As there.
    fn run_on(&mut self, _bus: &mut dyn DeviceBus) -> Result<Option<Exit<'_>>, Error> {
        self.run().map(Some)
    }

    /// Architectural state, exact between two instructions.
    fn state(&self) -> Result<CpuState, Error>;

    /// Replaces the architectural state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), Error>;

    /// The translator's callouts; empty for engines without a translator. VM exits are counted by the run loop.
    fn counts(&self) -> ExitCounts {
        ExitCounts::default()
    }

    /// True when an interrupt could be delivered before the next instruction (IF set, no shadow).
    fn interruptible(&mut self) -> bool;

    /// Delivers external interrupt `vector` before the next instruction.
    ///
    /// # Errors
    /// [`Error::Engine`] if the vCPU is not [`interruptible`](Vcpu::interruptible).
    fn interrupt(&mut self, vector: u8) -> Result<(), Error>;

    /// Makes an NMI pending. It is delivered at the first boundary at which the processor takes one:
    /// not before the next `iret` after an NMI was delivered, nor in the shadow of `mov ss`. One waits
    /// at most: another while one is pending is lost (SDM 3A 6.7.1). A vCPU that left with
    /// [`Exit::Hlt`] goes on behind its `hlt`.
    ///
    /// # Errors
    /// The engine's.
    fn nmi(&mut self) -> Result<(), Error>;

    /// True from the delivery of an NMI to the `iret` that ends its handler. Asked of halted vCPUs
    /// alone: one that halts in its handler isn't woken by the next.
    fn nmi_blocked(&mut self) -> bool;

    /// Brings the vCPU into the state that INIT leaves (SDM 3A table 10-1), whatever it was doing: an
    /// access that waits for its completion is over, interrupts and NMIs that were pending or in
    /// service are forgotten. Extended state and most MSRs stay. What comes next is
    /// [`set_state`](Vcpu::set_state) with [`CpuState::startup`].
    ///
    /// # Errors
    /// The engine's.
    fn init(&mut self) -> Result<(), Error> {
        self.set_state(&CpuState::after_init())
    }

    /// Makes [`run`](Vcpu::run) return [`Exit::InterruptWindow`] as soon as the vCPU is interruptible.
    fn request_interrupt_window(&mut self, wanted: bool);

    /// The interrupt controllers that the engine brings along ([`Irqchip::Kernel`]): the machine's
    /// own are left out then, and the engine delivers interrupts and halts by itself.
    fn controller(&self) -> Option<Arc<dyn Interrupts>> {
        None
    }

    /// Lets writes to each of `ports` and the three after it wait for the guest's next exit, as many
    /// at any time as `postable` says: they come as one exit with many items, before that exit or with
    /// it. For machines with one vCPU. Engines for which that is no gain leave it at that.
    fn post_writes(&mut self, _ports: &[u16], _postable: &Arc<AtomicU32>) {}

    /// The doorbells that the engine's host kernel takes, if it does ([`Doorbell::Eventfd`]).
    ///
    /// [`Doorbell::Eventfd`]: crate::Doorbell::Eventfd
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    /// A handle that stops this vCPU from elsewhere.
    fn kick_handle(&self) -> KickHandle;

    /// Task priority (CR8), for engines whose guest changes it without an exit.
    fn task_priority(&mut self) -> u8;

    /// Sets the task priority (CR8), when the guest writes it through the local APIC. Called while
    /// the access that caused it may still wait for its completion by [`run`](Vcpu::run), which it
    /// must not disturb.
    ///
    /// # Errors
    /// The engine's.
    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error>;

    /// True if the engine keeps code that it made from guest memory, and so has to hear of what
    /// devices write there.
    fn keeps_code(&self) -> bool {
        false
    }

    /// The pages that [`memory_written`](Vcpu::memory_written) wants to hear of, if it isn't all of them.
    fn kept_code(&self) -> Option<Arc<dyn KeptCode>> {
        None
    }

    /// Devices have written these pages of guest memory (page numbers) since the last call: code
    /// kept of them is out of date. Called between two exits, before the guest runs on; of several
    /// vCPUs one is told, and the engine lets the others know.
    fn memory_written(&mut self, _pages: &[u64]) {}

    /// From now on [`run`](Vcpu::run) returns [`Exit::Stepped`] after each step; `None` ends that.
    ///
    /// # Errors
    /// [`Error::Engine`] from engines that can't.
    fn set_stepping(&mut self, _stepping: Option<Stepping>) -> Result<(), Error> {
        Err(Error::Engine("this engine has no single step".into()))
    }

    /// Answers the exit under way as if by its own reference. The access is over then, and the state
    /// that behind it, where the engine can bring that about at once.
    ///
    /// # Errors
    /// The engine's.
    fn supply(&mut self, _answer: Supply<'_>) -> Result<(), Error> {
        Err(Error::Engine("this engine has no single step".into()))
    }

    /// What this engine calls an exit to the VMM.
    fn exit_name(&self, reason: ExitReason) -> &'static str {
        reason.name()
    }

    /// Statistics kept by the host's kernel for this VM and vCPU, or by the guest's own code where the
    /// engine makes it.
    fn host_stats(&mut self) -> Vec<HostStat> {
        Vec::new()
    }
}

/// An engine failed; not the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host system call failed.
    #[error("{operation}: {source}")]
    Host {
        /// What was tried, in the field's terms ("KVM_RUN").
        operation: &'static str,
        /// The host's error.
        #[source]
        source: std::io::Error,
    },
    /// The engine met something that it can't go on from.
    #[error("{0}")]
    Engine(String),
}

/// A mode can't run on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{probe}: {reason}; {fix}")]
pub struct Unavailable {
    /// The probe that failed ("open /dev/kvm").
    pub probe: String,
    /// What it said.
    pub reason: String,
    /// How to mend it.
    pub fix: String,
}
