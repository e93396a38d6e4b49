//! Far jumps and calls through call gates, task gates and TSSs (SDM 3A 5.8.4, 8.3; APM 2 4.8).

use engine_core::Segment;
use iced_x86::{Instruction, Mnemonic};

use super::{Trap, deliver::Frame, segment::null_stack, task::Way};
use crate::{
    core::Core,
    cpu::Seg,
    fault::{self, Fault},
};

/// Descriptor types, as system segments encode them.
const TSS_16: u16 = 1;
const CALL_GATE_16: u16 = 4;
const TASK_GATE: u16 = 5;
const TSS_32: u16 = 9;
const CALL_GATE: u16 = 0xc;

impl Core {
    /// A far jump or call whose selector names no code segment.
    pub(super) fn through_system_descriptor(
        &mut self,
        instr: &Instruction,
        selector: u16,
        segment: &Segment,
    ) -> Result<(), Trap> {
        let bad = Err(Fault::selector(fault::GP, selector).into());
        let level = self.cpu.cpl().max((selector & 3) as u8);
        if segment.dpl() < level {
            return bad;
        }
        let kind = segment.attributes & 0xf;
        let known = match kind {
            CALL_GATE => true,
            TSS_16 | CALL_GATE_16 | TASK_GATE | TSS_32 => !self.cpu.long(),
            _ => false,
        };
        if !known {
            return bad;
        }
        if !segment.present() {
            return Err(Fault::selector(fault::NP, selector).into());
        }
        let calls = instr.mnemonic() == Mnemonic::Call;
        let raw = self.raw_descriptor(selector, fault::GP)?;
        match kind {
            CALL_GATE | CALL_GATE_16 => self.call_gate(instr, selector, raw, calls),
            _ => {
                let task = if kind == TASK_GATE {
                    (raw >> 16) as u16
                } else {
                    selector
                };
                let way = if calls { Way::Call } else { Way::Jump };
                Ok(self.switch_task(task, way, instr.next_ip())?)
            }
        }
    }

    fn call_gate(
        &mut self,
        instr: &Instruction,
        gate: u16,
        raw: u64,
        calls: bool,
    ) -> Result<(), Trap> {
        let long = self.cpu.long();
        let selector = (raw >> 16) as u16;
        let mut target = raw & 0xffff | raw >> 32 & 0xffff_0000;
        let slot = match (long, raw >> 40 & 0xf) {
            (true, _) => {
                let upper = self.raw_descriptor(gate.wrapping_add(8), fault::GP)?;
                // The upper half's type has to be zero.
                if upper >> 40 & 0x1f != 0 {
                    return Err(Fault::selector(fault::GP, gate).into());
                }
                target |= upper << 32;
                8
            }
            (false, 4) => {
                target &= 0xffff;
                2
            }
            (false, _) => 4,
        };
        let code = self.code_descriptor(selector)?;
        let cpl = self.cpu.cpl();
        let conforming = code.attributes & 4 != 0;
        let inner = calls && !conforming && code.dpl() < cpl;
        let allowed = if calls || conforming {
            code.dpl() <= cpl
        } else {
            code.dpl() == cpl
        };
        if !allowed || long && (!code.long() || code.db()) {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        Self::present(&code)?;
        self.check_code_target(&code, target)?;
        let code = self.accessed(code)?;
        let cs = self.cpu.segments[Seg::CS].selector;
        let values = [cs.into(), instr.next_ip()];
        let new_cpl = if inner { code.dpl() } else { cpl };
        if inner {
            self.call_inner(raw, slot, new_cpl, &values)?;
        } else if calls {
            let before = self.gpr(4);
            for value in values {
                self.push(value, slot)
                    .inspect_err(|_| self.set_gpr(4, before))?;
            }
        }
        let selector = selector & !3 | u16::from(new_cpl);
        self.set_segment(Seg::CS, Segment { selector, ..code });
        self.rip = target;
        Ok(())
    }

    /// A call to more privilege: another stack, with the old one's place and parameters on it.
    fn call_inner(&mut self, raw: u64, slot: u32, cpl: u8, values: &[u64; 2]) -> Result<(), Fault> {
        let old = self.cpu.segments[Seg::SS].selector;
        let mut frame = vec![old.into(), self.gpr(4)];
        if self.cpu.long() {
            let rsp = self.tss_qword(4 + 8 * u64::from(cpl))?;
            frame.extend(values);
            let mut image = Vec::new();
            for value in frame.iter().rev() {
                image.extend_from_slice(&value.to_le_bytes());
            }
            let rsp = rsp.wrapping_sub(image.len() as u64);
            self.write(rsp, &image, false).map_err(super::on_stack)?;
            self.set_segment(Seg::SS, null_stack(cpl.into(), cpl));
            self.set_gpr(4, rsp);
            return Ok(());
        }
        let parameters = raw >> 32 & 0x1f;
        for number in (0..parameters).rev() {
            frame.push(self.peek(number * u64::from(slot), slot)?);
        }
        frame.extend(values);
        let (ss, pointer) = self.tss_stack(cpl)?;
        let place = Frame {
            ss,
            pointer,
            slot,
            user: false,
        };
        let pointer = self.fill_frame(&place, &frame)?;
        self.set_segment(Seg::SS, ss);
        self.set_gpr_sized(4, pointer, if ss.db() { 4 } else { 2 });
        Ok(())
    }
}
