//! Operations before and after they are measured: the state that each starts from, one try to see
//! that it works, and the state that all leave.
//!
//! Invariant: an operation that does not do what it is named for is never measured.

use super::{MENDED, Machine, PAGES, PROBE_ARENA};
use crate::aware::{
    events, hypercall,
    space::{PROBE, PROBES},
    upcalls::{BREAKPOINTS, DIVISIONS, PROBE_ENTRY},
    user,
};
use core::sync::atomic::Ordering::Relaxed;
use programs::{
    Platform, Refusal,
    nano::{Operation, WORD_A, WORD_B, cpuid, syscall},
};

impl Machine {
    /// Brings about the state that an operation starts from, as [`Operation`] documents it.
    pub(super) fn start(&mut self, operation: Operation) {
        self.stop();
        self.broken = false;
        MENDED.store(0, Relaxed);
        match operation {
            Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => {
                self.modify_entry(0);
                self.read_probe();
                // Behind the host's back, as an unaware kernel does it: seen at the next flush.
                let changed = self.probe_entry(0, 1);
                self.first.tree.page(PROBE).store(changed, Relaxed);
            }
            Operation::PageFault => PROBE_ENTRY.store(self.probe_entry(0, 0), Relaxed),
            Operation::DivZero => DIVISIONS.store(true, Relaxed),
            Operation::Int3 => BREAKPOINTS.store(true, Relaxed),
            Operation::RepMovsb | Operation::RepStosq => PAGES.start(),
            Operation::PteMod => {
                // All show B, so that the first batch changes every one.
                self.changed = 0;
                self.shown = u64::MAX;
                let first = self.probe_entry(0, 1);
                let mapped = hypercall::update_va_mapping(PROBE, first, PROBES);
                self.note(mapped);
                self.check_probes();
            }
            Operation::CliSti => events::mask(),
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Out
            | Operation::Cpuid
            | Operation::CallRet
            | Operation::Cr8Write
            | Operation::PushfPopf => {}
        }
    }

    /// Faults end the application again; no probe page is mapped; events are masked.
    pub(super) fn stop(&mut self) {
        PROBE_ENTRY.store(0, Relaxed);
        DIVISIONS.store(false, Relaxed);
        BREAKPOINTS.store(false, Relaxed);
        events::mask();
        // Workloads of address spaces leave another one current, or none.
        let selected = self.first.select();
        self.note(selected);
        self.unmap_probes();
    }

    /// Has user mode read all probe pages.
    pub(super) fn check_probes(&mut self) {
        let shows = self.first.call(user::shows, PROBE_ARENA, self.shown, 1);
        self.broken |= shows != Ok(1);
    }

    /// Does the operation once.
    pub(super) fn trial(&mut self, operation: Operation) -> Result<u64, Refusal> {
        Ok(match operation {
            Operation::Syscall => self.syscalls(1)?,
            Operation::Hypercall => self.hypercall(),
            Operation::In | Operation::Cr8Write => 0,
            Operation::Out => {
                self.port_out(0xa5);
                self.scratch.into()
            }
            Operation::Cpuid => (self.cpuid() & cpuid::ALWAYS).into(),
            Operation::Cr3Reload => {
                self.reload_root();
                self.read_probe()
            }
            Operation::Invlpg => {
                self.invalidate();
                self.read_probe()
            }
            Operation::PageFault => self.page_faults(1)?,
            Operation::DivZero => {
                self.divide_errors(1)?;
                MENDED.load(Relaxed)
            }
            Operation::CallRet => self.call_return(7),
            Operation::PteMod => self.modify_entries(2 * PROBES)?,
            Operation::CliSti => {
                let works = events::works();
                self.mask_unmask();
                (works && events::unmasked()).into()
            }
            Operation::Int3 => {
                self.breakpoints(1)?;
                MENDED.load(Relaxed)
            }
            Operation::Cr3Touch => self.reload_and_touch(),
            Operation::PushfPopf => self.keep_carry(1),
            Operation::RepMovsb => self.copy_page(7),
            Operation::RepStosq => self.fill_page(7),
        })
    }
}

/// What [`Machine::trial`] returns where the operation works, and what is wrong where it returns
/// anything else.
pub(super) fn expectation(operation: Operation) -> (u64, &'static str) {
    match operation {
        Operation::Syscall => (
            syscall::answer(0),
            "syscall does not return the kernel's answer",
        ),
        Operation::Hypercall => (0, "fpu_taskswitch does not answer 0"),
        Operation::In | Operation::Cr8Write => (0, ""),
        Operation::Out => (0xa5, "the console has no doorbell"),
        Operation::Cpuid => (
            cpuid::ALWAYS.into(),
            "cpuid lacks features that every long-mode processor has",
        ),
        Operation::Cr3Reload => (WORD_B, "NEW_BASEPTR does not flush translations"),
        Operation::Invlpg => (WORD_B, "INVLPG_LOCAL does not flush the translation"),
        Operation::PageFault => (WORD_A + 1, "the page fault was not taken once"),
        Operation::DivZero => (1, "the divide error was not taken once"),
        Operation::CallRet => (22, "call and ret do not come back"),
        Operation::PteMod => (2 * PROBES, "changed page-table entries have no effect"),
        Operation::CliSti => (1, "an event is not taken at its unmasking"),
        Operation::Int3 => (1, "the breakpoint was not taken once"),
        Operation::Cr3Touch => (WORD_B, "NEW_BASEPTR does not flush translations"),
        Operation::PushfPopf => (1, "popf does not restore the flags"),
        Operation::RepMovsb => (27, "rep movsb does not copy"),
        Operation::RepStosq => (42, "rep stosq does not fill"),
    }
}
