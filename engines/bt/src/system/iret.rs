//! iret: to the same ring, an outer one, virtual-8086 mode, another task, and of real-address mode (SDM
//! 2A, IRET).
//!
//! What it finds of returns to 64-bit code is remembered for the stub that does the next one
//! ([`crate::transitions`]).

use engine_core::Segment;
use iced_x86::{Instruction, Mnemonic};

use super::Trap;
use crate::{
    core::Core,
    cpu::{Bits, FLAG_AC, FLAG_ID, FLAG_IF, FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_TF, FLAG_VM, Seg},
    fault::{self, Fault},
    privileged::Return,
};

/// Flags that iret and sysret take from their image at CPL 0, besides the arithmetic ones.
pub(super) const RETURN_FLAGS: u64 =
    FLAG_TF | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_ID | FLAG_IF | FLAG_IOPL;

impl Core {
    pub(super) fn iret(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let size: u32 = match instr.mnemonic() {
            Mnemonic::Iretq => 8,
            Mnemonic::Iretd => 4,
            _ => 2,
        };
        let step = u64::from(size);
        self.unblock_nmi();
        if self.cpu.real_addressing() {
            return self.iret_real(size);
        }
        if self.cpu.flags & FLAG_NT != 0 {
            if self.cpu.long() {
                return Err(Fault::gp().into());
            }
            return Ok(self.return_from_task(instr.next_ip())?);
        }
        let rip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        let image = self.peek(2 * step, size)?;
        if image & FLAG_VM != 0 && !self.cpu.long() && self.cpu.cpl() == 0 && size == 4 {
            return self.iret_to_virtual_8086(rip, selector, image);
        }
        let cpl = self.cpu.cpl();
        let rpl = (selector & 3) as u8;
        let mut code = self.code_descriptor(selector)?;
        let conforming = code.attributes & 4 != 0;
        if rpl < cpl || !conforming && code.dpl() != rpl || conforming && code.dpl() > rpl {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        Self::present(&code)?;
        let long = self.cpu.long() && code.long();
        // 64-bit mode always takes SS:RSP from the frame (SDM 2A, IRET).
        let from_64 = self.cpu.bits() == Bits::Bits64;
        if from_64 || rpl > cpl {
            let rsp = self.peek(3 * step, size)?;
            let ss = self.peek(4 * step, size)? as u16;
            let segment = self.return_stack(ss, rpl, &code)?;
            // Behind the stack's checks (SDM 2A, IRET).
            self.check_code_target(&code, rip)?;
            code = self.accessed(code)?;
            let segment = self.accessed(segment)?;
            if from_64 && long && cpl == 0 {
                self.remember_return([selector, ss], code, segment);
            }
            self.set_segment(Seg::SS, segment);
            let narrow = !long && !segment.db();
            self.set_gpr_sized(4, rsp, if narrow { 2 } else { 8 });
        } else {
            self.check_code_target(&code, rip)?;
            code = self.accessed(code)?;
            self.pop_bytes(3 * step);
        }
        self.set_segment(Seg::CS, Segment { selector, ..code });
        self.rip = rip;
        let mut writable = crate::context::NATIVE_FLAGS | RETURN_FLAGS;
        if cpl != 0 {
            writable &= !FLAG_IOPL;
        }
        if cpl > self.cpu.iopl() {
            writable &= !FLAG_IF;
        }
        if size == 2 {
            writable &= 0xffff;
        }
        let old = self.rflags();
        self.set_rflags(old & !writable | image & writable);
        if rpl > cpl {
            self.drop_data_segments(rpl);
        }
        Ok(())
    }

    /// Remembers what a return from 64-bit code in ring 0 has loaded.
    fn remember_return(&mut self, [cs, ss]: [u16; 2], code: Segment, stack: Segment) {
        if (cs | ss) & 4 != 0 || !matches!(cs & 3, 0 | 3) || code.db() {
            return;
        }
        let raw = |selector: u16| match selector & !3 {
            0 => Ok(0),
            _ => self.raw_descriptor(selector, fault::GP),
        };
        if let (Ok(cs_raw), Ok(ss_raw)) = (raw(cs), raw(ss)) {
            self.shortcuts.returns[usize::from(cs & 3 == 3)] = Return {
                cs_selector: cs.into(),
                cs_raw,
                ss_selector: ss.into(),
                ss_raw,
                cs: Segment {
                    selector: cs,
                    ..code
                },
                ss: stack,
            };
        }
    }

    fn iret_real(&mut self, size: u32) -> Result<(), Trap> {
        let virtual_8086 = self.cpu.virtual_8086();
        if virtual_8086 && self.cpu.iopl() < 3 {
            return Err(Fault::gp().into());
        }
        let step = u64::from(size);
        let rip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        let image = self.peek(2 * step, size)?;
        self.check_target(rip)?;
        let mut writable = crate::context::NATIVE_FLAGS | RETURN_FLAGS;
        if virtual_8086 {
            writable &= !FLAG_IOPL;
        }
        if size == 2 {
            writable &= 0xffff;
        }
        self.pop_bytes(3 * step);
        let old = self.rflags();
        self.set_rflags((old & !writable | image & writable) & !FLAG_RF);
        let code = self.real_segment(Seg::CS, selector);
        self.set_segment(Seg::CS, code);
        self.rip = rip;
        Ok(())
    }

    /// SDM 3A 17.2.5.
    fn iret_to_virtual_8086(&mut self, rip: u64, cs: u16, image: u64) -> Result<(), Trap> {
        let mut values = [0; 6];
        for (slot, value) in values.iter_mut().enumerate() {
            *value = self.peek(12 + 4 * slot as u64, 4)?;
        }
        let [esp, ss, es, ds, fs, gs] = values;
        let writable = crate::context::NATIVE_FLAGS | RETURN_FLAGS | FLAG_VM;
        self.set_rflags(image & writable);
        let selectors = [es, cs.into(), ss, ds, fs, gs];
        for (index, selector) in selectors.into_iter().enumerate() {
            let segment = self.real_segment(index, selector as u16);
            self.set_segment(index, segment);
        }
        self.set_gpr(4, esp);
        self.rip = rip & 0xffff;
        Ok(())
    }
}
