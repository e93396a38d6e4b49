//! String instructions: movs, stos, lods, scas, cmps, ins, outs, with every prefix.
//!
//! A repeated one works in pieces that stay within a page on each side, and hands back after a
//! bounded amount of work with RCX, RSI and RDI updated, so that interrupts get in and a fault in
//! the middle leaves exactly what was done (SDM 2B, REP).
//!
//! | file | what |
//! |---|---|
//! | this one | forms, registers, elements one by one |
//! | `bulk` | movs and stos on RAM |
//! | `device` | elements in device memory |

mod bulk;
mod device;

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Step, Trap, segment_index};
use crate::{core::Core, cpu::Seg, fault::Fault};

/// Elements done before the instruction is handed back.
const BATCH: u64 = 64 * 1024;

/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;

/// Address size and direction of one string instruction.
struct Form {
    size: u32,
    mask: u64,
    address_bytes: u32,
    step: u64,
    repeats: bool,
    source: Register,
}

impl Core {
    pub(super) fn string(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        let form = self.form(instr);
        use Mnemonic::*;
        let port = self.gpr(2) as u16;
        if matches!(instr.mnemonic(), Insb | Insw | Insd | Outsb | Outsw | Outsd) {
            // Before the count is looked at.
            self.check_port(port, form.size as u8)?;
        }
        if form.repeats && form.address_bytes == 4 && self.cpu.long() {
            // Processors cut the registers to 32 bits before anything else happens, as shows in
            // faults and in counts of zero: RCX always, the others for movs and stos.
            let fills = matches!(instr.mnemonic(), Stosb | Stosw | Stosd | Stosq);
            let copies = matches!(instr.mnemonic(), Movsb | Movsw | Movsd | Movsq);
            self.advance(&form, copies, copies || fills, 0);
        }
        if form.repeats && self.gpr(1) & form.mask == 0 {
            return Ok(Step::Next);
        }
        match instr.mnemonic() {
            Movsb | Movsw | Movsd | Movsq => self.copy(&form),
            Stosb | Stosw | Stosd | Stosq => self.fill(&form),
            Lodsb | Lodsw | Lodsd | Lodsq if self.device(&form, self.source(&form)?)?.is_some() => {
                self.read_device(&form)
            }
            Lodsb | Lodsw | Lodsd | Lodsq => self.each(&form, |core, form| {
                let value = core.load(core.source(form)?, form.size)?;
                core.set_gpr_sized(0, value, form.size);
                core.advance(form, true, false, 1);
                Ok(true)
            }),
            Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq
                if self.compares_device(instr, &form) =>
            {
                self.compare_device(instr, &form)
            }
            Scasb | Scasw | Scasd | Scasq => {
                let while_equal = instr.has_repe_prefix();
                self.each(&form, |core, form| {
                    let right = core.load(core.destination(form, false)?, form.size)?;
                    let left = core.gpr(0);
                    core.advance(form, false, true, 1);
                    Ok(core.compare(left, right, form.size) == while_equal)
                })
            }
            Cmpsb | Cmpsw | Cmpsd | Cmpsq => {
                let while_equal = instr.has_repe_prefix();
                self.each(&form, |core, form| {
                    // In this order, as shows when both operands fault.
                    let right = core.load(core.destination(form, false)?, form.size)?;
                    let left = core.load(core.source(form)?, form.size)?;
                    core.advance(form, true, true, 1);
                    Ok(core.compare(left, right, form.size) == while_equal)
                })
            }
            Insb | Insw | Insd => {
                let address = self.destination(&form, true)?;
                let user = self.user();
                self.probe_write(address, form.size, user)?;
                Ok(Step::InString {
                    port,
                    size: form.size as u8,
                    address,
                    count: self.port_run(&form, address, 7),
                })
            }
            Outsb | Outsw | Outsd => {
                let address = self.source(&form)?;
                self.load(address, form.size)?;
                Ok(Step::OutString {
                    port,
                    size: form.size as u8,
                    address,
                    count: self.port_run(&form, address, 6),
                })
            }
            _ => Err(Trap::Unsupported("not implemented".into())),
        }
    }

    /// Elements of ins or outs that leave for the port together: those up to the end of the page,
    /// so that what was checked for the first holds for all. `index` is RSI or RDI.
    fn port_run(&self, form: &Form, address: u64, index: usize) -> u64 {
        // A page that was read is RAM.
        let device = index == 6 && !self.mmu.was_read(address, self.user());
        if form.step != u64::from(form.size) || self.elementwise(form) || device {
            return 1;
        }
        Self::run_length(form, address, self.gpr(index), self.count(form)).max(1)
    }

    /// Moves past `count` elements of ins or outs. Returns true if it repeats.
    pub(crate) fn finish_port_string(
        &mut self,
        instr: &Instruction,
        input: bool,
        count: u64,
    ) -> bool {
        let form = self.form(instr);
        self.advance(&form, !input, input, count);
        form.repeats && self.gpr(1) & form.mask != 0
    }

    fn form(&self, instr: &Instruction) -> Form {
        use Mnemonic::*;
        let size = match instr.mnemonic() {
            Movsb | Stosb | Lodsb | Scasb | Cmpsb | Insb | Outsb => 1,
            Movsw | Stosw | Lodsw | Scasw | Cmpsw | Insw | Outsw => 2,
            Movsd | Stosd | Lodsd | Scasd | Cmpsd | Insd | Outsd => 4,
            _ => 8,
        };
        use iced_x86::OpKind::*;
        let has =
            |wanted: [iced_x86::OpKind; 3]| instr.op_kinds().any(|kind| wanted.contains(&kind));
        let (mask, address_bytes) = if has([MemorySegDI, MemorySegSI, MemoryESDI]) {
            (0xffff, 2)
        } else if has([MemorySegEDI, MemorySegESI, MemoryESEDI]) {
            (0xffff_ffff, 4)
        } else {
            (u64::MAX, 8)
        };
        let down = self.rflags() & 1 << 10 != 0;
        Form {
            size,
            mask,
            address_bytes,
            step: if down {
                0u64.wrapping_sub(size.into())
            } else {
                size.into()
            },
            repeats: instr.has_rep_prefix() || instr.has_repne_prefix(),
            source: instr.memory_segment(),
        }
    }

    fn source(&self, form: &Form) -> Result<u64, Fault> {
        self.data(self.gpr(6) & form.mask, form.source, form.size, false)
    }

    fn destination(&self, form: &Form, write: bool) -> Result<u64, Fault> {
        self.data(self.gpr(7) & form.mask, Register::ES, form.size, write)
    }

    /// True if every element has to be looked at by itself.
    fn elementwise(&self, form: &Form) -> bool {
        if self.watching() || self.stepping() {
            return true;
        }
        let limited = self.cpu.limited_segments();
        limited >> Seg::ES & 1 == 1 || limited >> segment_index(form.source) & 1 == 1
    }

    fn advance(&mut self, form: &Form, source: bool, destination: bool, count: u64) {
        let by = form.step.wrapping_mul(count);
        for (register, moves) in [(6, source), (7, destination)] {
            if moves {
                let value = self.gpr(register).wrapping_add(by);
                self.set_gpr_sized(register, value, form.address_bytes);
            }
        }
        if form.repeats {
            let left = self.gpr(1).wrapping_sub(count);
            self.set_gpr_sized(1, left, form.address_bytes);
        }
    }

    fn reaches_over(form: &Form, address: u64) -> bool {
        (address & 0xfff) + u64::from(form.size) > 4096
    }

    /// Elements to do before the instruction is handed back: a step is one, and so is what waits for
    /// devices.
    fn batch(&self) -> u64 {
        if self.stepping() || self.mmu.devices.borrow().listening() {
            1
        } else {
            BATCH
        }
    }

    /// Runs `one` per element until the count or its condition ends.
    fn each(
        &mut self,
        form: &Form,
        one: impl Fn(&mut Core, &Form) -> Result<bool, Fault>,
    ) -> Result<Step, Trap> {
        let flags = self.rflags();
        let batch = self.batch();
        for number in 0..batch {
            // A device's answers are waited for in an execution of its own. Elsewhere the execution
            // goes on, since a fault brings back the flags from before it.
            if number > 0 && self.crosses_to_device(form) {
                return Ok(Step::Again);
            }
            // A fault in the middle of scas or cmps brings back the flags from before the
            // instruction (SDM 2B, REP).
            let again = one(self, form).inspect_err(|_| self.set_arithmetic(ARITHMETIC, flags))?;
            if !form.repeats || !again || self.gpr(1) & form.mask == 0 {
                return Ok(Step::Next);
            }
        }
        Ok(Step::Again)
    }

    fn count(&self, form: &Form) -> u64 {
        if form.repeats {
            self.gpr(1) & form.mask
        } else {
            1
        }
    }

    fn next_or_again(&self, instr: &Instruction) -> Step {
        if self.goes_on(instr) {
            Step::Again
        } else {
            Step::Next
        }
    }

    /// True if a string instruction whose registers have moved has more to do.
    pub(crate) fn goes_on(&self, instr: &Instruction) -> bool {
        let form = self.form(instr);
        form.repeats && self.gpr(1) & form.mask != 0
    }

    /// cmp of two values: sets the flags, returns true if they are equal.
    fn compare(&mut self, left: u64, right: u64, size: u32) -> bool {
        let bits = size * 8;
        let mask = if bits == 64 {
            u64::MAX
        } else {
            (1 << bits) - 1
        };
        let (left, right) = (left & mask, right & mask);
        let result = left.wrapping_sub(right) & mask;
        let sign = |value: u64| value >> (bits - 1) & 1;
        let overflow = (sign(left) ^ sign(right)) & (sign(left) ^ sign(result));
        let flags = u64::from(left < right)
            | u64::from((result as u8).count_ones().is_multiple_of(2)) << 2
            | ((left ^ right ^ result) >> 4 & 1) << 4
            | u64::from(result == 0) << 6
            | sign(result) << 7
            | overflow << 11;
        self.set_arithmetic(ARITHMETIC, flags);
        result == 0
    }
}

/// True for cmps, whose other operand is memory, too.
fn compares_memory(instr: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(instr.mnemonic(), Cmpsb | Cmpsw | Cmpsd | Cmpsq)
}
