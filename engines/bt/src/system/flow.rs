//! Far transfers: interrupts by instruction, far jumps, calls, returns.
//!
//! iret is in `iret`, calls that ask no descriptor are in `fast_calls`.

use engine_core::Segment;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Step, Trap, segment::null_stack};
use crate::{
    core::{Cause, Core},
    cpu::{Seg, canonical},
    fault::{self, Fault},
};

/// True if a return to `cpl` drops this data segment. Of a null selector it drops the RPL (SDM 2A, IRET:
/// both become a null selector).
pub(crate) fn drops(segment: &Segment, cpl: u8) -> bool {
    if segment.selector & !3 == 0 {
        return segment.selector != 0;
    }
    let conforming = segment.attributes & 0xc == 0xc;
    !conforming && segment.dpl() < cpl
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

    /// The stack segment that a return to `rpl` loads, not accessed yet.
    pub(super) fn return_stack(
        &mut self,
        selector: u16,
        rpl: u8,
        code: &Segment,
    ) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            if self.cpu.long() && code.long() && rpl != 3 {
                return Ok(null_stack(selector, rpl));
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
        Ok(segment)
    }

    /// A return to less privilege drops segments that it may not use (SDM 2A, IRET). Their bases stay,
    /// and 64-bit code goes on to use those of fs and gs: the SDM leaves them open, processors and QEMU
    /// keep them, and kernels give ring 3 a base by MSR under a selector of ring 0.
    pub(super) fn drop_data_segments(&mut self, cpl: u8) {
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

    fn far_pointer(&self, instr: &Instruction) -> Result<(u16, u64), Fault> {
        Ok(match instr.op0_kind() {
            OpKind::FarBranch32 => (instr.far_branch_selector(), instr.far_branch32().into()),
            OpKind::FarBranch16 => (instr.far_branch_selector(), instr.far_branch16().into()),
            _ => {
                let size = instr.memory_size().size() as u32 - 2;
                let address = self.operand(instr, size + 2, false)?;
                let offset = self.load_part(instr, address, size)?;
                let selector = address.wrapping_add(size.into());
                (self.load_part(instr, selector, 2)? as u16, offset)
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
        Self::present(&code)?;
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
        let mut code = self.code_descriptor(selector)?;
        let conforming = code.attributes & 4 != 0;
        if rpl < cpl || !conforming && code.dpl() != rpl || conforming && code.dpl() > rpl {
            return Err(Fault::selector(fault::GP, selector).into());
        }
        Self::present(&code)?;
        let past = 2 * step + u64::from(extra);
        if rpl > cpl {
            let rsp = self.peek(past, size)?;
            let ss = self.peek(past + step, size)? as u16;
            let segment = self.return_stack(ss, rpl, &code)?;
            // Behind the stack's checks (SDM 2B, RET).
            self.check_code_target(&code, rip)?;
            code = self.accessed(code)?;
            let segment = self.accessed(segment)?;
            self.set_segment(Seg::SS, segment);
            let width = match (self.cpu.long() && code.long(), segment.db()) {
                (true, _) => 8,
                (false, true) => 4,
                (false, false) => 2,
            };
            self.set_gpr_sized(4, rsp.wrapping_add(extra.into()), width);
            self.drop_data_segments(rpl);
        } else {
            self.check_code_target(&code, rip)?;
            code = self.accessed(code)?;
            self.pop_bytes(past);
        }
        self.set_segment(Seg::CS, Segment { selector, ..code });
        self.rip = rip;
        Ok(())
    }
}
