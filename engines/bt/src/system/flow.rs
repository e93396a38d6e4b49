//! Far transfers: interrupts by instruction, iret, syscall and sysret, far jumps, calls, returns.

use engine_core::Segment;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Step, Trap};
use crate::{
    core::{Cause, Core},
    cpu::{
        Bits, CR0_PE, EFER_SCE, FLAG_AC, FLAG_ID, FLAG_IF, FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_TF,
        FLAG_VM, Seg, canonical,
    },
    fault::{self, Fault},
    privileged::Return,
};

/// Flags that iret and sysret take from their image at CPL 0, besides the arithmetic ones.
const RETURN_FLAGS: u64 = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_ID | FLAG_IF | FLAG_IOPL;

/// True if a return to `cpl` drops this data segment (SDM 2A, IRET).
pub(crate) fn drops(segment: &Segment, cpl: u8) -> bool {
    let conforming = segment.attributes & 0xc == 0xc;
    !conforming && segment.dpl() < cpl && segment.selector & !3 != 0
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    }
}

impl Core {
    pub(super) fn flow(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        use Mnemonic::*;
        match instr.mnemonic() {
            Int | Int3 | Int1 => {
                // int1 counts as hardware's: the gate's DPL doesn't matter (SDM 2A, INT n).
                if instr.mnemonic() == Int && self.cpu.virtual_8086() && self.cpu.iopl() < 3 {
                    return Err(Fault::gp().into());
                }
                if instr.mnemonic() == Int1 {
                    self.forget_traps();
                }
                let (vector, cause) = match instr.mnemonic() {
                    Int => (instr.immediate8(), Cause::Software),
                    Int3 => (fault::BP, Cause::Software),
                    _ => (fault::DB, Cause::External),
                };
                self.software_interrupt(vector, cause, instr.next_ip())?;
            }
            Into => {
                if self.rflags() & 1 << 11 == 0 {
                    return Ok(Step::Next);
                }
                self.software_interrupt(fault::OF, Cause::Software, instr.next_ip())?;
            }
            Iret | Iretd | Iretq => self.iret(instr)?,
            Sysenter => self.sysenter()?,
            Sysexit | Sysexitq => self.sysexit(instr.mnemonic() == Sysexitq)?,
            Syscall => self.syscall(instr)?,
            Sysret | Sysretq => self.sysret(instr.mnemonic() == Sysretq)?,
            Jmp | Call => self.far_transfer(instr)?,
            Retf => self.far_return(instr)?,
            _ => return Err(Trap::Unsupported("not implemented".into())),
        }
        Ok(Step::Jump)
    }

    /// RIP in the frame is the next instruction's, but a fault on the way is this one's.
    fn software_interrupt(&mut self, vector: u8, cause: Cause, next_ip: u64) -> Result<(), Fault> {
        let ip = std::mem::replace(&mut self.rip, next_ip);
        let task = self.cpu.tr.selector;
        self.deliver(vector, None, cause).inspect_err(|_| {
            // What a task gate has led to is the new task's own.
            if self.cpu.tr.selector == task {
                self.rip = ip;
            }
        })?;
        self.forget_step();
        if vector == fault::DB {
            self.debug_delivered();
        }
        Ok(())
    }

    fn iret(&mut self, instr: &Instruction) -> Result<(), Trap> {
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
        let code = self.code_descriptor(selector)?;
        let conforming = code.attributes & 4 != 0;
        if rpl < cpl || !conforming && code.dpl() != rpl || conforming && code.dpl() > rpl {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        if self.cpu.long() && code.long() && !canonical(rip) {
            return Err(Fault::gp().into());
        }
        let long = self.cpu.long() && code.long();
        if !long && rip > code.limit.into() {
            return Err(Fault::gp().into());
        }
        let code = self.accessed(code)?;
        // 64-bit mode always takes SS:RSP from the frame (SDM 2A, IRET).
        let from_64 = self.cpu.bits() == Bits::Bits64;
        if from_64 || rpl > cpl {
            let rsp = self.peek(3 * step, size)?;
            let ss = self.peek(4 * step, size)? as u16;
            let segment = self.return_stack(ss, rpl, &code)?;
            if from_64 && long && cpl == 0 {
                self.remember_return([selector, ss], code, segment);
            }
            self.set_segment(Seg::SS, segment);
            let narrow = !long && !segment.db();
            self.set_gpr_sized(4, rsp, if narrow { 2 } else { 8 });
        } else {
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

    /// The stack segment that a return to `rpl` loads.
    fn return_stack(&mut self, selector: u16, rpl: u8, code: &Segment) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            if code.long() && rpl != 3 {
                return Ok(flat(selector, 0xc093 | u16::from(rpl) << 5));
            }
            return Err(Fault::gp());
        }
        let segment = self.descriptor(selector, fault::GP)?;
        let writable = segment.attributes & 0x1a == 0x12;
        if selector & 3 != u16::from(rpl) || !writable || segment.dpl() != rpl {
            return Err(Fault::selector(fault::GP, selector));
        }
        if !segment.present() {
            return Err(Fault::selector(fault::SS, selector));
        }
        self.accessed(segment)
    }

    /// A return to less privilege drops segments that it may not use (SDM 2A, IRET). Their bases stay,
    /// and 64-bit code goes on to use those of fs and gs: the SDM leaves them open, processors and QEMU
    /// keep them, and kernels give ring 3 a base by MSR under a selector of ring 0.
    fn drop_data_segments(&mut self, cpl: u8) {
        for index in [Seg::ES, Seg::DS, Seg::FS, Seg::GS] {
            let segment = self.cpu.segments[index];
            if drops(&segment, cpl) {
                let base = segment.base;
                let null = Segment {
                    base,
                    ..Segment::default()
                };
                self.set_segment(index, null);
            }
        }
    }

    /// Makes the segments that STAR names (SDM 2B, SYSCALL and SYSRET).
    pub(crate) fn remember_star(&mut self) {
        let selector = (self.cpu.star >> 32) as u16 & !3;
        self.shortcuts.syscall = [
            flat(selector, 0xa09b),
            flat(selector.wrapping_add(8), 0xc093),
        ];
        let base = (self.cpu.star >> 48) as u16;
        self.shortcuts.sysret = [
            flat(base.wrapping_add(16) | 3, 0xa0fb),
            flat(base.wrapping_add(8) | 3, 0xc0f3),
        ];
    }

    /// SDM 2B and APM 3, SYSCALL.
    fn syscall(&mut self, instr: &Instruction) -> Result<(), Trap> {
        if self.cpu.efer & EFER_SCE == 0 || !self.cpu.long() {
            return Err(Fault::ud().into());
        }
        // Some processors know it in compatibility mode too, with a target of its own (APM 3, SYSCALL).
        let target = match self.cpu.bits() {
            Bits::Bits64 => self.cpu.lstar,
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

    /// SDM 2B, SYSRET.
    fn sysret(&mut self, wide: bool) -> Result<(), Trap> {
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
            self.set_segment(Seg::CS, flat(base | 3, 0xc0fb));
        }
        self.set_segment(Seg::SS, ss);
        // TF as it is at the end counts: the trap comes before the first instruction of ring 3.
        self.step_from_here();
        Ok(())
    }

    /// SDM 2B, SYSENTER.
    fn sysenter(&mut self) -> Result<(), Trap> {
        let [selector, esp, eip] = self.cpu.sysenter;
        let selector = selector as u16 & !3;
        if self.cpu.cr0 & CR0_PE == 0 || selector == 0 {
            return Err(Fault::gp().into());
        }
        let long = self.cpu.long();
        self.cpu.flags &= !FLAG_VM;
        self.set_interrupts(false);
        let code = if long { 0xa09b } else { 0xc09b };
        self.set_segment(Seg::CS, flat(selector, code));
        self.set_segment(Seg::SS, flat(selector.wrapping_add(8), 0xc093));
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.set_gpr(4, esp & mask);
        self.rip = eip & mask;
        Ok(())
    }

    /// SDM 2B, SYSEXIT.
    fn sysexit(&mut self, wide: bool) -> Result<(), Trap> {
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
        self.set_segment(Seg::CS, flat(selector.wrapping_add(by) | 3, code));
        let stack = selector.wrapping_add(by + 8) | 3;
        self.set_segment(Seg::SS, flat(stack, 0xc0f3));
        self.set_gpr(4, rsp & mask);
        self.rip = rip & mask;
        Ok(())
    }

    fn far_pointer(&self, instr: &Instruction) -> Result<(u16, u64), Fault> {
        Ok(match instr.op0_kind() {
            OpKind::FarBranch32 => (instr.far_branch_selector(), instr.far_branch32().into()),
            OpKind::FarBranch16 => (instr.far_branch_selector(), instr.far_branch16().into()),
            _ => {
                let size = instr.memory_size().size() as u32 - 2;
                let address = self.operand(instr, size + 2, false)?;
                let offset = self.load(address, size)?;
                (
                    self.load(address.wrapping_add(size.into()), 2)? as u16,
                    offset,
                )
            }
        })
    }

    /// Bytes of one slot of a far call's frame.
    fn far_size(instr: &Instruction) -> u32 {
        match instr.op0_kind() {
            OpKind::FarBranch32 => 4,
            OpKind::FarBranch16 => 2,
            _ => instr.memory_size().size() as u32 - 2,
        }
    }

    /// Far jump or call.
    fn far_transfer(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let (selector, offset) = self.far_pointer(instr)?;
        let calls = instr.mnemonic() == Mnemonic::Call;
        let size = Self::far_size(instr);
        if self.cpu.real_addressing() {
            self.check_target(offset)?;
            if calls {
                self.push_far_return(instr.next_ip(), size)?;
            }
            let code = self.real_segment(Seg::CS, selector);
            self.set_segment(Seg::CS, code);
            self.rip = offset;
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(Fault::gp().into());
        }
        let segment = self.descriptor(selector, fault::GP)?;
        if segment.attributes & 0x10 == 0 {
            return self.through_system_descriptor(instr, selector, &segment);
        }
        let code = self.code_descriptor(selector)?;
        let cpl = self.cpu.cpl();
        let conforming = code.attributes & 4 != 0;
        let rpl = (selector & 3) as u8;
        if conforming && code.dpl() > cpl || !conforming && (code.dpl() != cpl || rpl > cpl) {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        self.check_code_target(&code, offset)?;
        let code = self.accessed(code)?;
        if calls {
            self.push_far_return(instr.next_ip(), size)?;
        }
        let selector = selector & !3 | u16::from(cpl);
        self.set_segment(Seg::CS, Segment { selector, ..code });
        self.rip = offset;
        Ok(())
    }

    /// Pushes CS and the return address, both or neither.
    fn push_far_return(&mut self, next_ip: u64, size: u32) -> Result<(), Fault> {
        let cs = self.cpu.segments[Seg::CS].selector;
        let before = self.gpr(4);
        self.push(cs.into(), size)?;
        self.push(next_ip, size)
            .inspect_err(|_| self.set_gpr(4, before))
    }

    /// A target within the segment, or canonical in a 64-bit one.
    pub(super) fn check_code_target(&self, code: &Segment, target: u64) -> Result<(), Fault> {
        let good = if code.long() && self.cpu.long() {
            canonical(target)
        } else {
            target <= code.limit.into()
        };
        if good { Ok(()) } else { Err(Fault::gp()) }
    }

    fn far_return(&mut self, instr: &Instruction) -> Result<(), Trap> {
        use iced_x86::Code::*;
        let size: u32 = match instr.code() {
            Retfq | Retfq_imm16 => 8,
            Retfd | Retfd_imm16 => 4,
            _ => 2,
        };
        let extra = if instr.op_count() == 0 {
            0
        } else {
            instr.immediate16()
        };
        let step = u64::from(size);
        let rip = self.peek(0, size)?;
        let selector = self.peek(step, size)? as u16;
        if self.cpu.real_addressing() {
            self.check_target(rip)?;
            self.pop_bytes(2 * step + u64::from(extra));
            let code = self.real_segment(Seg::CS, selector);
            self.set_segment(Seg::CS, code);
            self.rip = rip;
            return Ok(());
        }
        let rpl = (selector & 3) as u8;
        let cpl = self.cpu.cpl();
        let code = self.code_descriptor(selector)?;
        let conforming = code.attributes & 4 != 0;
        if rpl < cpl || !conforming && code.dpl() != rpl || conforming && code.dpl() > rpl {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        self.check_code_target(&code, rip)?;
        let code = self.accessed(code)?;
        let past = 2 * step + u64::from(extra);
        if rpl > cpl {
            let rsp = self.peek(past, size)?;
            let ss = self.peek(past + step, size)? as u16;
            let segment = self.return_stack(ss, rpl, &code)?;
            self.set_segment(Seg::SS, segment);
            let narrow = !code.long() && !segment.db();
            let rsp = rsp.wrapping_add(extra.into());
            self.set_gpr_sized(4, rsp, if narrow { 2 } else { 8 });
            self.drop_data_segments(rpl);
        } else {
            self.pop_bytes(past);
        }
        self.set_segment(Seg::CS, Segment { selector, ..code });
        self.rip = rip;
        Ok(())
    }
}
