//! Ports as instructions name them, and who may access them (SDM 1 19.5).
//!
//! Neither does an access: that is the run loop's, or `vcpu/ports.rs`'s for translated code.

use iced_x86::{Instruction, OpKind};

use crate::{core::Core, fault::Fault};

impl Core {
    pub(super) fn port(&self, instr: &Instruction, operand: u32) -> u16 {
        if instr.op_kind(operand) == OpKind::Immediate8 {
            instr.immediate8().into()
        } else {
            self.gpr(2) as u16
        }
    }

    /// No map has to be asked for any port. Virtual-8086 mode always asks it.
    #[inline]
    pub(crate) fn may_access_ports(&self) -> bool {
        self.cpu.cpl() <= self.cpu.iopl() && !self.cpu.virtual_8086()
    }

    /// IOPL, then the TSS's I/O permission bitmap (SDM 1 19.5).
    #[inline]
    pub(crate) fn check_port(&self, port: u16, size: u8) -> Result<(), Fault> {
        self.watch_port(port, size);
        if self.may_access_ports() {
            return Ok(());
        }
        let tr = &self.cpu.tr;
        let map = self
            .mmu
            .read_int::<2>(&self.cpu, tr.base.wrapping_add(0x66), false)?;
        let at = map + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return Err(Fault::gp());
        }
        let bits = self
            .mmu
            .read_int::<2>(&self.cpu, tr.base.wrapping_add(at), false)?;
        let mask = (1u64 << size) - 1;
        if bits >> (port % 8) & mask != 0 {
            Err(Fault::gp())
        } else {
            Ok(())
        }
    }
}
