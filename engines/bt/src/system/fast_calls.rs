//! System calls that ask no descriptor: syscall and sysret, sysenter and sysexit.
//!
//! The usual ones of 64-bit code never come here: [`crate::transitions`] has stubs for them, which use
//! the segments that are made here from STAR.
//!
//! Invariant: nothing changes before the last check.

use iced_x86::Instruction;

use engine_core::Segment;

use super::{Trap, iret::RETURN_FLAGS};
use crate::{
    core::Core,
    cpu::{Bits, CR0_PE, EFER_SCE, FLAG_RF, FLAG_TF, FLAG_VM, Seg, canonical},
    fault::Fault,
};

impl Core {
    /// Makes the segments that STAR names (SDM 2B, SYSCALL and SYSRET).
    pub(crate) fn remember_star(&mut self) {
        let selector = (self.cpu.star >> 32) as u16 & !3;
        self.shortcuts.syscall = [
            Segment::flat(selector, 0xa09b),
            Segment::flat(selector.wrapping_add(8), 0xc093),
        ];
        let base = (self.cpu.star >> 48) as u16;
        self.shortcuts.sysret = [
            Segment::flat(base.wrapping_add(16) | 3, 0xa0fb),
            Segment::flat(base.wrapping_add(8) | 3, 0xc0f3),
        ];
    }

    /// SDM 2B and APM 3, SYSCALL.
    pub(super) fn syscall(&mut self, instr: &Instruction) -> Result<(), Trap> {
        if self.cpu.efer & EFER_SCE == 0 || !self.cpu.long() {
            return Err(Fault::ud().into());
        }
        // In compatibility mode it is #UD on the processor that CPUID describes (SDM 2B), and some
        // kernels leave CSTAR as reset does when they see that processor: a process could end them
        // by a jump to 0. Where a kernel gives a target it means to be called (APM 3, SYSCALL).
        let target = match self.cpu.bits() {
            Bits::Bits64 => self.cpu.lstar,
            Bits::Bits32 | Bits::Bits16 if self.cpu.cstar == 0 => return Err(Fault::ud().into()),
            Bits::Bits32 | Bits::Bits16 => self.cpu.cstar,
        };
        let flags = self.rflags();
        self.set_gpr(1, instr.next_ip());
        self.set_gpr(11, flags & !FLAG_RF);
        self.rip = target;
        self.set_rflags(flags & !self.cpu.fmask & !FLAG_RF);
        if self.cpu.flags & FLAG_TF == 0 {
            self.forget_step();
        }
        let [cs, ss] = self.shortcuts.syscall;
        self.set_segment(Seg::CS, cs);
        self.set_segment(Seg::SS, ss);
        Ok(())
    }

    /// SDM 2B, SYSRET. Where it isn't known it is undefined in every ring.
    pub(super) fn sysret(&mut self, wide: bool) -> Result<(), Trap> {
        if self.cpu.efer & EFER_SCE == 0 || self.cpu.bits() != Bits::Bits64 {
            return Err(Fault::ud().into());
        }
        if self.cpu.cpl() != 0 {
            return Err(Fault::gp().into());
        }
        let target = self.gpr(1);
        if wide && !canonical(target) {
            return Err(Fault::gp().into());
        }
        let [cs, ss] = self.shortcuts.sysret;
        let writable = crate::context::NATIVE_FLAGS | RETURN_FLAGS;
        self.set_rflags(self.gpr(11) & writable & !FLAG_RF);
        if wide {
            self.rip = target;
            self.set_segment(Seg::CS, cs);
        } else {
            self.rip = target & 0xffff_ffff;
            let base = (self.cpu.star >> 48) as u16;
            self.set_segment(Seg::CS, Segment::flat(base | 3, 0xc0fb));
        }
        self.set_segment(Seg::SS, ss);
        // TF as it is at the end counts: the trap comes before the first instruction of ring 3.
        self.step_from_here();
        Ok(())
    }

    /// SDM 2B, SYSENTER.
    pub(super) fn sysenter(&mut self) -> Result<(), Trap> {
        let [selector, esp, eip] = self.cpu.sysenter;
        let selector = selector as u16 & !3;
        if self.cpu.cr0 & CR0_PE == 0 || selector == 0 {
            return Err(Fault::gp().into());
        }
        let long = self.cpu.long();
        self.cpu.flags &= !FLAG_VM;
        self.set_interrupts(false);
        let code = if long { 0xa09b } else { 0xc09b };
        self.set_segment(Seg::CS, Segment::flat(selector, code));
        self.set_segment(Seg::SS, Segment::flat(selector.wrapping_add(8), 0xc093));
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.set_gpr(4, esp & mask);
        self.rip = eip & mask;
        Ok(())
    }

    /// SDM 2B, SYSEXIT.
    pub(super) fn sysexit(&mut self, wide: bool) -> Result<(), Trap> {
        let selector = self.cpu.sysenter[0] as u16 & !3;
        if self.cpu.cr0 & CR0_PE == 0 || self.cpu.cpl() != 0 || selector == 0 {
            return Err(Fault::gp().into());
        }
        let (rip, rsp) = (self.gpr(2), self.gpr(1));
        let (code, by, mask) = if wide {
            if !canonical(rip) || !canonical(rsp) {
                return Err(Fault::gp().into());
            }
            (0xa0fb, 32, u64::MAX)
        } else {
            (0xc0fb, 16, 0xffff_ffff)
        };
        self.set_segment(Seg::CS, Segment::flat(selector.wrapping_add(by) | 3, code));
        let stack = selector.wrapping_add(by + 8) | 3;
        self.set_segment(Seg::SS, Segment::flat(stack, 0xc0f3));
        self.set_gpr(4, rsp & mask);
        self.rip = rip & mask;
        Ok(())
    }
}
