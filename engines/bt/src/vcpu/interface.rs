//! The vCPU as the run loop of engine-core sees it.

use std::{ptr::NonNull, sync::Arc};

use engine_core::exit::ExitKind;
use engine_core::{
    CpuState, DeviceBus, Error, Exit, ExitCounts, ExitReason, GuestPhys, Vcpu, dma::KeptCode,
    kick::KickHandle, tally::HostStat,
};
use engine_core::{Stepping, Supply};

use super::{BtVcpu, Pending, Resume, Stop};
use crate::{core::Cause, cpu::FLAG_IF, lower::Path, privileged::count, site::Homes};

/// Source of what translated code counts by itself.
const TRANSLATED_CODE: &str = "translated-code";

impl BtVcpu {
    /// Runs the guest, and says what the run has ended with.
    #[inline]
    fn go_out(&mut self, bus: Option<NonNull<dyn DeviceBus>>) -> Result<Option<Exit<'_>>, Error> {
        self.bus = bus;
        let stop = self.go();
        self.bus = None;
        self.core.shortcuts.priority_matters = 0;
        match stop {
            Ok(Stop::Port) => Ok(Some(self.port_exit())),
            Ok(Stop::Answered) => Ok(None),
            Ok(stop) => Ok(Some(self.exit(stop))),
            Err(error) => Err(error),
        }
    }

    fn exit(&mut self, stop: Stop) -> Exit<'_> {
        match stop {
            Stop::Read { .. } => self.data = [0; 8],
            Stop::Port
            | Stop::Answered
            | Stop::InString { .. }
            | Stop::OutString { .. }
            | Stop::Write { .. }
            | Stop::ReadMsr { .. }
            | Stop::WriteMsr { .. }
            | Stop::Halt
            | Stop::Window
            | Stop::Shutdown
            | Stop::Interrupted
            | Stop::Stepped
            | Stop::Exception(_)
            | Stop::Internal(_) => {}
        }
        match stop {
            Stop::Port => self.port_exit(),
            // There is no exit to speak of.
            Stop::Answered => Exit::Interrupted,
            Stop::InString { port, size } => Exit::PioIn {
                port,
                size,
                data: &mut self.strings,
            },
            Stop::OutString { port, size } => Exit::PioOut {
                port,
                size,
                data: &self.strings,
            },
            Stop::Read { phys, len } => Exit::MmioRead {
                addr: GuestPhys(phys),
                data: &mut self.data[..len],
                priority: self.core.cpu.cr8 as u8,
            },
            Stop::Write { phys, len } => Exit::MmioWrite {
                addr: GuestPhys(phys),
                data: &self.data[..len],
            },
            Stop::ReadMsr { index } => Exit::MsrRead {
                index,
                answer: &mut self.msr,
                priority: self.core.cpu.cr8 as u8,
            },
            Stop::WriteMsr { index, value } => Exit::MsrWrite {
                index,
                value,
                tsc: self.core.tsc(),
                accepted: &mut self.accepted,
            },
            Stop::Halt => Exit::Hlt,
            Stop::Window => Exit::InterruptWindow,
            Stop::Shutdown => Exit::Shutdown,
            Stop::Interrupted => Exit::Interrupted,
            Stop::Stepped => Exit::Stepped,
            // Only `run_user` asks for these.
            Stop::Exception(fault) => Exit::Internal {
                message: format!("an exception that nobody intercepts: {fault:?}"),
            },
            Stop::Internal(message) => Exit::Internal { message },
        }
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        match self.go_out(None)? {
            Some(exit) => Ok(exit),
            None => Err(Error::Engine("an access that nobody has answered".into())),
        }
    }

    fn run_on(&mut self, bus: &mut dyn DeviceBus) -> Result<Option<Exit<'_>>, Error> {
        // SAFETY: only the lifetime changes, and it is forgotten before this returns.
        let bus = unsafe {
            std::mem::transmute::<NonNull<dyn DeviceBus + '_>, NonNull<dyn DeviceBus>>(
                NonNull::from(bus),
            )
        };
        // With others, the machine is anybody's while this one runs.
        self.go_out(Some(bus).filter(|_| self.alone))
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
            | Pending::ReadMsr { .. }
            | Pending::WriteMsr { .. }
            | Pending::SystemRead { .. }
            | Pending::SystemWrites { .. }
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
        self.core.forget_modes();
        self.core.remember_leaves();
        self.core.remember_star();
        self.core.flush();
        self.steps = 0;
        self.resume = Resume::Boundary;
        self.pending = Pending::Nothing;
        let _ = self.core.mmu.devices.get_mut().end();
        Ok(())
    }

    fn counts(&self) -> ExitCounts {
        let mut counts = self.counts.clone();
        let window = &self.core.mmu.window;
        counts.set(ExitReason::WindowFill, window.fills);
        counts.set(ExitReason::WindowDrop, window.drops);
        let done = &self.core.shortcuts.counts;
        counts.add_many(ExitReason::GuestFault, done[count::FAULTS]);
        counts.add_many(ExitReason::Helper, done[count::INVLPG]);
        counts.add_many(ExitReason::Cpuid, done[count::CPUID]);
        counts.add_many(ExitReason::ControlRegister, done[count::CONTROL]);
        counts.add_many(ExitReason::Msr, done[count::MSR]);
        counts
    }

    fn host_stats(&mut self) -> Vec<HostStat> {
        if !self.counting {
            return Vec::new();
        }
        let slots = self.core.context().paths;
        let paths = Path::ALL.iter().map(|path| path.name()).zip(slots);
        // The same windows' callouts, so that shares are of one run.
        let of = |reason| self.counts.get(reason);
        let missed = [
            ("direct-branch missed", of(ExitReason::DirectMiss)),
            ("indirect-branch missed", of(ExitReason::IndirectMiss)),
            (
                "access missed",
                of(ExitReason::TlbMiss) + of(ExitReason::Bounce),
            ),
        ];
        let stat = |(name, value): (&str, u64)| HostStat {
            source: TRANSLATED_CODE,
            kind: ExitKind::Inline,
            name: name.to_owned(),
            value,
        };
        paths.chain(missed).map(stat).collect()
    }

    fn interruptible(&mut self) -> bool {
        matches!(self.resume, Resume::Boundary)
            && match self.pending {
                Pending::Nothing | Pending::In { .. } => true,
                // Over, unless it is going to fault.
                Pending::ReadMsr { .. } => self.msr.is_some(),
                Pending::WriteMsr { .. } => self.accepted,
                Pending::Shutdown
                | Pending::InString { .. }
                | Pending::StringRead { .. }
                | Pending::SystemRead { .. }
                | Pending::SystemWrites { .. }
                | Pending::Device(_) => false,
            }
            && self.core.interrupts_enabled()
            && !self.core.cpu.shadow
            && !self.core.trap_due()
            && !self.core.nmi_due()
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        if !self.interruptible() {
            return Err(Error::Engine(format!(
                "vector {vector} while not interruptible"
            )));
        }
        self.join();
        // An `in` or `rdmsr` that waits for its value is architecturally over.
        self.answer();
        self.counts.add(ExitReason::Interrupt);
        if let Err(fault) = self.core.deliver(vector, None, Cause::External)
            && self.core.raise(fault).is_err()
        {
            self.pending = Pending::Shutdown;
        }
        self.part();
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), Error> {
        self.core.latch_nmi();
        Ok(())
    }

    fn nmi_blocked(&mut self) -> bool {
        self.core.nmi_blocked()
    }

    fn init(&mut self) -> Result<(), Error> {
        self.core.forget_nmis();
        self.core.forget_traps();
        self.set_state(&CpuState::after_init())
    }

    fn set_stepping(&mut self, stepping: Option<Stepping>) -> Result<(), Error> {
        self.stepping = stepping;
        self.stepped = false;
        // Nothing that leads from block to block without the runtime may be left.
        self.core.mmu.jumps.iter().for_each(|jumps| jumps.flush());
        self.cache.unlink_all(&self.arena);
        Ok(())
    }

    fn supply(&mut self, answer: Supply<'_>) -> Result<(), Error> {
        match answer {
            Supply::Nothing => {}
            Supply::Data(bytes) if matches!(self.pending, Pending::InString { .. }) => {
                self.strings.copy_from_slice(bytes);
            }
            Supply::Data(bytes) => self.data[..bytes.len()].copy_from_slice(bytes),
            Supply::Msr(value) => self.msr = value,
            Supply::Accepted(accepted) => self.accepted = accepted,
        }
        // These are over with their answer; what is in the middle of an instruction goes on in `run`.
        if matches!(
            self.pending,
            Pending::In { .. } | Pending::ReadMsr { .. } | Pending::WriteMsr { .. }
        ) && let Some(_stop) = self.answer()
        {
            self.pending = Pending::Shutdown;
        }
        Ok(())
    }

    fn keeps_code(&self) -> bool {
        true
    }

    fn kept_code(&self) -> Option<Arc<dyn KeptCode>> {
        Some(self.core.mmu.vm.clone())
    }

    fn memory_written(&mut self, pages: &[u64]) {
        for &page in pages {
            let phys = page << 12;
            if self.core.mmu.is_code(phys) && self.overwritten(phys, 4096) > 0 {
                self.stale = true;
            }
        }
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        if self.window != wanted {
            self.window = wanted;
            self.core.context().window_wanted = if wanted { FLAG_IF } else { 0 };
        }
    }

    fn kick_handle(&self) -> KickHandle {
        self.doorbell.clone()
    }

    fn task_priority(&mut self) -> u8 {
        self.core.shortcuts.priority_matters = 1;
        self.core.cpu.cr8 as u8
    }

    /// Comes in the middle of the access that wrote the local APIC's register.
    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error> {
        self.core.cpu.cr8 = priority.into();
        Ok(())
    }
}
