//! Interrupts and exceptions through the IDT, or in real-address mode through the vector table
//! (SDM 3A chapter 6 and 17.1.4).
//!
//! Invariant: a delivery that meets a fault has changed nothing.

use engine_core::Segment;

use super::{on_stack, segment::null_stack};
use crate::{
    core::{Cause, Core},
    cpu::{CR0_PE, FLAG_AC, FLAG_NT, FLAG_RF, FLAG_TF, FLAG_VM, Seg, canonical},
    fault::{self, Fault},
    privileged::{GATES, Gate},
};

/// A stack that is being filled from the top, before anything points to it.
pub(super) struct Frame {
    pub(super) ss: Segment,
    pub(super) pointer: u64,
    /// Bytes of one slot.
    pub(super) slot: u32,
    pub(super) user: bool,
}

impl Core {
    /// Goes through the IDT.
    ///
    /// # Errors
    /// The exception met on the way; nothing has changed then.
    pub(crate) fn deliver(
        &mut self,
        vector: u8,
        error: Option<u32>,
        cause: Cause,
    ) -> Result<(), Fault> {
        let delivered = if self.cpu.cr0 & CR0_PE == 0 {
            self.deliver_real(vector)
        } else if self.cpu.long() {
            self.deliver_long(vector, error, cause)
        } else {
            self.deliver_protected(vector, error, cause)
        };
        delivered.map_err(|met| match cause {
            Cause::Software => met,
            Cause::Exception | Cause::External => met.external(),
        })
    }

    fn enter_handler(&mut self) {
        self.cpu.flags &= !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM);
        self.cpu.shadow = false;
    }

    /// SDM 3A 17.1.4. Nobody gets an error code.
    fn deliver_real(&mut self, vector: u8) -> Result<(), Fault> {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.cpu.idtr.limit) {
            return Err(Fault::gp());
        }
        let at = self.cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
        let entry = self.mmu.read_int::<4>(&self.cpu, at, false)?;
        let cs = self.cpu.segments[Seg::CS];
        let frame = Frame {
            ss: self.cpu.segments[Seg::SS],
            pointer: self.gpr(4),
            slot: 2,
            user: false,
        };
        let values = [self.rflags(), cs.selector.into(), self.rip];
        let pointer = self.fill_frame(&frame, &values)?;
        self.set_gpr_sized(4, pointer, self.stack_width());
        let selector = (entry >> 16) as u16;
        let code = self.real_segment(Seg::CS, selector);
        self.set_segment(Seg::CS, code);
        self.rip = entry & 0xffff;
        self.set_interrupts(false);
        self.cpu.flags &= !FLAG_AC;
        self.enter_handler();
        Ok(())
    }

    /// SDM 3A 6.14.
    fn deliver_long(&mut self, vector: u8, error: Option<u32>, cause: Cause) -> Result<(), Fault> {
        let idt_error = |vector: u8| (u16::from(vector) << 3) | 2;
        let bad_gate = |kind| Fault {
            vector: kind,
            error: Some(idt_error(vector).into()),
            address: None,
        };
        let offset = u64::from(vector) * 16;
        if offset + 15 > u64::from(self.cpu.idtr.limit) {
            return Err(bad_gate(fault::GP));
        }
        let at = self.cpu.idtr.base.wrapping_add(offset);
        let low = self.mmu.read_int::<8>(&self.cpu, at, false)?;
        let high = self
            .mmu
            .read_int::<8>(&self.cpu, at.wrapping_add(8), false)?;
        let kind = low >> 40 & 0x1f;
        if kind != 0xe && kind != 0xf {
            return Err(bad_gate(fault::GP));
        }
        let gate_dpl = (low >> 45 & 3) as u8;
        if cause == Cause::Software && gate_dpl < self.cpu.cpl() {
            return Err(bad_gate(fault::GP));
        }
        if low >> 47 & 1 == 0 {
            return Err(bad_gate(fault::NP));
        }
        let selector = (low >> 16) as u16;
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let ist = (low >> 32 & 7) as u16;
        let code = self.code_descriptor(selector)?;
        let cpl = self.cpu.cpl();
        let conforming = code.attributes & 4 != 0;
        if !code.long() || code.db() || code.dpl() > cpl {
            return Err(Fault::selector(fault::GP, selector));
        }
        Self::present(&code)?;
        if !canonical(target) {
            return Err(Fault::gp());
        }
        let code = self.accessed(code)?;
        let new_cpl = if conforming { cpl } else { code.dpl() };
        let mut rsp = if ist != 0 {
            self.tss_qword(0x1c + 8 * u64::from(ist))?
        } else if new_cpl < cpl {
            self.tss_qword(4 + 8 * u64::from(new_cpl))?
        } else {
            self.gpr(4)
        };
        rsp &= !0xf;
        let ss = self.cpu.segments[Seg::SS];
        // RF is set in the image for faults, so that an instruction breakpoint doesn't repeat.
        let mut flags = self.rflags();
        if cause == Cause::Exception && vector != fault::DB {
            flags |= FLAG_RF;
        }
        let mut frame = [0u8; 48];
        let mut at = 0;
        let mut put = |value: u64| {
            frame[at..at + 8].copy_from_slice(&value.to_le_bytes());
            at += 8;
        };
        if let Some(error) = error {
            put(error.into());
        }
        for value in [
            self.rip,
            self.cpu.segments[Seg::CS].selector.into(),
            flags,
            self.gpr(4),
            ss.selector.into(),
        ] {
            put(value);
        }
        let rsp = rsp.wrapping_sub(at as u64);
        self.write(rsp, &frame[..at], new_cpl == 3).map_err(|met| {
            // Words are pushed from the top: the highest one that can't be is what a fault names.
            let words = (0..at).step_by(8).rev();
            let highest = words
                .map(|word| self.probe_write(rsp.wrapping_add(word as u64), 8, new_cpl == 3))
                .find_map(Result::err);
            on_stack(highest.unwrap_or(met))
        })?;
        if new_cpl < cpl {
            // A null selector with the new privilege (SDM 3A 6.14.5).
            self.set_segment(Seg::SS, null_stack(new_cpl.into(), new_cpl));
        }
        let code = Segment {
            selector: selector & !3 | u16::from(new_cpl),
            ..code
        };
        self.set_segment(Seg::CS, code);
        self.set_gpr(4, rsp);
        self.rip = target;
        if new_cpl == 0 && !conforming {
            self.remember_gate(vector, [low, high], code, target);
        }
        if kind == 0xe {
            self.set_interrupts(false);
        }
        self.enter_handler();
        Ok(())
    }

    /// Remembers a gate to ring 0, which has led to `code`.
    fn remember_gate(&mut self, vector: u8, [low, high]: [u64; 2], code: Segment, target: u64) {
        let selector = (low >> 16) as u16;
        if selector & 4 != 0 || usize::from(vector) >= GATES {
            return;
        }
        if let Ok(cs_raw) = self.raw_descriptor(selector, fault::GP) {
            let ist = low >> 32 & 7;
            self.shortcuts.gates[usize::from(vector)] = Gate {
                low,
                high,
                cs_raw,
                target,
                cs: code,
                stack: if ist == 0 { 0 } else { 0x1c + 8 * ist },
            };
        }
    }

    /// Protected mode (SDM 3A 6.12).
    fn deliver_protected(
        &mut self,
        vector: u8,
        error: Option<u32>,
        cause: Cause,
    ) -> Result<(), Fault> {
        let bad = |kind| Fault {
            vector: kind,
            error: Some(u32::from(vector) << 3 | 2),
            address: None,
        };
        let offset = u64::from(vector) * 8;
        if offset + 7 > u64::from(self.cpu.idtr.limit) {
            return Err(bad(fault::GP));
        }
        let at = self.cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
        let gate = self.mmu.read_int::<8>(&self.cpu, at, false)?;
        let kind = gate >> 40 & 0x1f;
        let slot = match kind {
            5 | 0xe | 0xf => 4,
            6 | 7 => 2,
            _ => return Err(bad(fault::GP)),
        };
        if cause == Cause::Software && ((gate >> 45 & 3) as u8) < self.cpu.cpl() {
            return Err(bad(fault::GP));
        }
        if gate >> 47 & 1 == 0 {
            return Err(bad(fault::NP));
        }
        let selector = (gate >> 16) as u16;
        // RF is set in the image for faults, so that an instruction breakpoint doesn't repeat.
        let rf = if cause == Cause::Exception && vector != fault::DB {
            FLAG_RF
        } else {
            0
        };
        if kind == 5 {
            return self.deliver_task(selector, error, rf);
        }
        let target = match slot {
            2 => gate & 0xffff,
            _ => gate & 0xffff | gate >> 32 & 0xffff_0000,
        };
        let code = self.code_descriptor(selector)?;
        let cpl = self.cpu.cpl();
        let conforming = code.attributes & 4 != 0;
        if code.dpl() > cpl {
            return Err(Fault::selector(fault::GP, selector));
        }
        Self::present(&code)?;
        let new_cpl = if conforming { cpl } else { code.dpl() };
        let virtual_8086 = self.cpu.virtual_8086();
        if virtual_8086 && new_cpl != 0 {
            return Err(Fault::selector(fault::GP, selector));
        }
        if target > code.limit.into() {
            return Err(Fault::gp());
        }
        let code = self.accessed(code)?;
        let old_ss = self.cpu.segments[Seg::SS];
        let (ss, pointer) = if new_cpl < cpl {
            self.tss_stack(new_cpl)?
        } else {
            (old_ss, self.gpr(4))
        };
        let mut values = Vec::with_capacity(10);
        if virtual_8086 {
            for index in [Seg::GS, Seg::FS, Seg::DS, Seg::ES] {
                values.push(self.cpu.segments[index].selector.into());
            }
        }
        if new_cpl < cpl {
            values.extend([old_ss.selector.into(), self.gpr(4)]);
        }
        let cs = self.cpu.segments[Seg::CS].selector;
        values.extend([self.rflags() | rf, cs.into(), self.rip]);
        values.extend(error.map(u64::from));
        let frame = Frame {
            ss,
            pointer,
            slot,
            user: new_cpl == 3,
        };
        let pointer = self.fill_frame(&frame, &values)?;
        if virtual_8086 {
            for index in [Seg::GS, Seg::FS, Seg::DS, Seg::ES] {
                self.set_segment(index, Segment::default());
            }
        }
        let code = Segment {
            selector: selector & !3 | u16::from(new_cpl),
            ..code
        };
        self.enter_handler();
        self.set_segment(Seg::SS, ss);
        self.set_segment(Seg::CS, code);
        self.set_gpr_sized(4, pointer, if ss.db() { 4 } else { 2 });
        self.rip = target;
        if matches!(kind, 6 | 0xe) {
            self.set_interrupts(false);
        }
        Ok(())
    }

    /// The stack that the TSS has for a privilege (SDM 3A 5.12.1).
    pub(super) fn tss_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Fault> {
        let tr = &self.cpu.tr;
        let bad = Fault::selector(fault::TS, tr.selector);
        let wide = tr.attributes & 8 != 0;
        let (at, bytes) = if wide {
            (4 + 8 * u32::from(cpl), 4)
        } else {
            (2 + 4 * u32::from(cpl), 2)
        };
        if at + 2 * bytes - 1 > tr.limit {
            return Err(bad);
        }
        let slot = tr.base.wrapping_add(at.into());
        let (pointer, selector) = if wide {
            let both = self.mmu.read_int::<8>(&self.cpu, slot, false)?;
            (both & 0xffff_ffff, (both >> 32) as u16)
        } else {
            let both = self.mmu.read_int::<4>(&self.cpu, slot, false)?;
            (both & 0xffff, (both >> 16) as u16)
        };
        let bad = Err(Fault::selector(fault::TS, selector));
        if selector & !3 == 0 {
            return bad;
        }
        let ss = self.descriptor(selector, fault::TS)?;
        let writable = ss.attributes & 0x1a == 0x12;
        if selector & 3 != u16::from(cpl) || ss.dpl() != cpl || !writable {
            return bad;
        }
        if !ss.present() {
            return Err(Fault::selector(fault::SS, selector));
        }
        Ok((self.accessed(ss)?, pointer))
    }

    /// Writes values from the top of a stack down; where the pointer is then.
    ///
    /// # Errors
    /// #SS beyond the segment, page faults; nothing has been written then.
    pub(super) fn fill_frame(&mut self, frame: &Frame, values: &[u64]) -> Result<u64, Fault> {
        let mask = if frame.ss.db() { 0xffff_ffff } else { 0xffff };
        let slot = u64::from(frame.slot);
        let limit = u64::from(frame.ss.limit);
        let down = frame.ss.attributes & 0xc == 4;
        let top = if frame.ss.db() { 0xffff_ffff } else { 0xffff };
        let mut addresses = Vec::with_capacity(values.len());
        for number in 1..=values.len() as u64 {
            let at = frame.pointer.wrapping_sub(number * slot) & mask;
            let last = at + slot - 1;
            let inside = if down {
                at > limit && last <= top
            } else {
                last <= limit
            };
            if !inside {
                let selector = if frame.ss.selector == self.cpu.segments[Seg::SS].selector {
                    0
                } else {
                    frame.ss.selector
                };
                return Err(Fault::selector(fault::SS, selector));
            }
            let address = frame.ss.base.wrapping_add(at) & 0xffff_ffff;
            self.probe_write(address, frame.slot, frame.user)?;
            addresses.push(address);
        }
        for (address, value) in addresses.into_iter().zip(values) {
            self.write(address, &value.to_le_bytes()[..slot as usize], frame.user)?;
        }
        Ok(frame.pointer.wrapping_sub(values.len() as u64 * slot) & mask)
    }

    pub(super) fn tss_qword(&self, offset: u64) -> Result<u64, Fault> {
        if offset + 7 > u64::from(self.cpu.tr.limit) {
            return Err(Fault::selector(fault::TS, self.cpu.tr.selector));
        }
        self.mmu
            .read_int::<8>(&self.cpu, self.cpu.tr.base.wrapping_add(offset), false)
    }
}
