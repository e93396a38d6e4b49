//! String instructions: movs, stos, lods, scas, cmps, ins, outs, with every prefix.
//!
//! A repeated one works in pieces that stay within a page on each side, and hands back after a
//! bounded amount of work with RCX, RSI and RDI updated, so that interrupts get in and a fault in
//! the middle leaves exactly what was done (SDM 2B, REP).

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Step, Trap, segment_index};
use crate::{core::Core, cpu::Seg, fault::Fault, mmu::Access};

/// Elements done before the instruction is handed back.
const BATCH: u64 = 64 * 1024;

/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;

/// Fills `target` with copies of the first N bytes of `value`: with a constant N it is one wide loop.
fn repeat<const N: usize>(target: &mut [u8], value: [u8; 8]) {
    let mut element = [0; N];
    element.copy_from_slice(&value[..N]);
    target
        .chunks_exact_mut(N)
        .for_each(|chunk| chunk.copy_from_slice(&element));
}

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

    /// True if the next element of a string may have to do with a device in a way that only the log of
    /// devices can see to: it lies across two pages, or goes to a port.
    pub(crate) fn logs_devices(&self, instr: &Instruction) -> bool {
        use Mnemonic::*;
        matches!(instr.mnemonic(), Outsb | Outsw | Outsd)
            || self.crosses_to_device(&self.form(instr))
    }

    fn reaches_over(form: &Form, address: u64) -> bool {
        (address & 0xfff) + u64::from(form.size) > 4096
    }

    /// True if the next element lies across two pages on either side, and one of them is no RAM.
    fn crosses_to_device(&self, form: &Form) -> bool {
        let source = self.linear(self.gpr(6) & form.mask, form.source);
        let destination = self.linear(self.gpr(7) & form.mask, Register::ES);
        [source, destination].into_iter().any(|address| {
            let last = address.wrapping_add(u64::from(form.size) - 1);
            Self::reaches_over(form, address)
                && [address, last].into_iter().any(|at| {
                    let page = self.mmu.walk(&self.cpu, at, Access::Read, self.user());
                    page.is_ok_and(|page| self.mmu.host(page.phys, 1).is_none())
                })
        })
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

    /// Elements from `address` to the page's end in the direction of `form`, at most `count`; 0 if
    /// the first one crosses the page. `index` is the register behind the address: where that wraps
    /// around the address size, so does the string.
    fn run_length(form: &Form, address: u64, index: u64, count: u64) -> u64 {
        let size = u64::from(form.size);
        let offset = address & 0xfff;
        if offset + size > 4096 {
            return 0;
        }
        let index = index & form.mask;
        let before_wrap = if form.step == size {
            (form.mask - index) / size
        } else {
            index / size
        };
        let count = count.min(before_wrap.saturating_add(1));
        let room = if form.step == size {
            (4096 - offset) / size
        } else {
            offset / size + 1
        };
        room.min(count)
    }

    fn count(&self, form: &Form) -> u64 {
        if form.repeats {
            self.gpr(1) & form.mask
        } else {
            1
        }
    }

    fn fill(&mut self, form: &Form) -> Result<Step, Trap> {
        let size = form.size as usize;
        let value = self.gpr(0).to_le_bytes();
        let elementwise = self.elementwise(form);
        // A step is one element.
        let batch = self.batch();
        let mut done = 0;
        while done < batch {
            let address = self.destination(form, true)?;
            let most = if elementwise { 1 } else { self.count(form) };
            let run = Self::run_length(form, address, self.gpr(7), most);
            if run == 0 && done > 0 && self.crosses_to_device(form) {
                return Ok(Step::Again);
            }
            if run == 0 {
                let user = self.user();
                self.write(address, &value[..size], user)?;
                self.advance(form, false, true, 1);
                done += 1;
            } else {
                let (low, bytes) = Self::span(form, address, run);
                self.watch(low, bytes as u64, true);
                let host = self.writable(address, low, bytes)?;
                if host.is_none() {
                    let value = self.gpr(0);
                    return self.write_device(form, address, value, false);
                }
                if let Some(host) = host {
                    // SAFETY: `bytes` bytes of RAM within one page.
                    let target = unsafe { std::slice::from_raw_parts_mut(host, bytes) };
                    match size {
                        1 => target.fill(value[0]),
                        2 => repeat::<2>(target, value),
                        4 => repeat::<4>(target, value),
                        _ => repeat::<8>(target, value),
                    }
                }
                self.advance(form, false, true, run);
                done += run;
            }
            if !form.repeats || self.gpr(1) & form.mask == 0 {
                return Ok(Step::Next);
            }
        }
        Ok(Step::Again)
    }

    fn copy(&mut self, form: &Form) -> Result<Step, Trap> {
        let size = form.size as usize;
        let elementwise = self.elementwise(form);
        // A step is one element.
        let batch = self.batch();
        let mut done = 0;
        while done < batch {
            let (from, to) = (self.source(form)?, self.destination(form, true)?);
            let most = if elementwise { 1 } else { self.count(form) };
            let run = Self::run_length(form, to, self.gpr(7), most);
            let run = Self::run_length(form, from, self.gpr(6), run);
            if run == 0 && done > 0 && self.crosses_to_device(form) {
                return Ok(Step::Again);
            }
            let hosts = if run == 0 {
                None
            } else {
                let (low, bytes) = Self::span(form, from, run);
                self.watch(low, bytes as u64, false);
                let page = self.mmu.walk(&self.cpu, from, Access::Read, self.user())?;
                let source = self.mmu.host(page.phys | low & 0xfff, bytes as u64);
                self.mmu.fill(from, page, Access::Read, self.user());
                let (low, bytes) = Self::span(form, to, run);
                self.watch(low, bytes as u64, true);
                let target = self.writable(to, low, bytes)?;
                source
                    .zip(target)
                    .map(|(source, target)| (source, target, bytes))
            };
            match hosts {
                Some((source, target, bytes)) => {
                    let distance = (source as usize).abs_diff(target as usize);
                    if distance >= bytes {
                        // SAFETY: two ranges of RAM that don't overlap.
                        unsafe { std::ptr::copy_nonoverlapping(source, target, bytes) };
                    } else {
                        // Overlap replicates, element by element, in the instruction's direction.
                        for index in 0..run as usize {
                            let at = if form.step == u64::from(form.size) {
                                index * size
                            } else {
                                bytes - (index + 1) * size
                            };
                            // SAFETY: inside both ranges; one element at a time.
                            unsafe { std::ptr::copy(source.add(at), target.add(at), size) };
                        }
                    }
                    self.advance(form, true, true, run);
                    done += run;
                }
                None if self.device(form, from)?.is_some() => {
                    let user = self.user();
                    self.probe_write(to, form.size, user)?;
                    return self.read_device(form);
                }
                None if run != 0 => {
                    let value = self.load(from, form.size)?;
                    return self.write_device(form, to, value, true);
                }
                None => {
                    let value = self.load(from, form.size)?.to_le_bytes();
                    let user = self.user();
                    self.write(to, &value[..size], user)?;
                    self.advance(form, true, true, 1);
                    done += 1;
                }
            }
            if !form.repeats || self.gpr(1) & form.mask == 0 {
                return Ok(Step::Next);
            }
        }
        Ok(Step::Again)
    }

    /// Physical address of the element at `address` if it lies in device memory.
    fn device(&self, form: &Form, address: u64) -> Result<Option<u64>, Fault> {
        if Self::reaches_over(form, address)
            || self.mmu.devices.borrow().listening()
            || self.mmu.was_read(address, self.user())
        {
            return Ok(None);
        }
        let page = self
            .mmu
            .walk(&self.cpu, address, Access::Read, self.user())?;
        let phys = page.phys | address & 0xfff;
        let ram = self.mmu.host(phys, form.size.into()).is_some();
        Ok((!ram).then_some(phys))
    }

    fn read_device(&self, form: &Form) -> Result<Step, Trap> {
        let address = self.source(form)?;
        let page = self
            .mmu
            .walk(&self.cpu, address, Access::Read, self.user())?;
        Ok(Step::ReadDevice {
            phys: page.phys | address & 0xfff,
            size: form.size as u8,
        })
    }

    /// True if scas or cmps reads its next element from a device. An element that can't be read at
    /// all is none: reading it raises the fault, the destination's before the source's.
    fn compares_device(&self, instr: &Instruction, form: &Form) -> bool {
        let reads_device = |address: Result<u64, Fault>| {
            matches!(address.and_then(|at| self.device(form, at)), Ok(Some(_)))
        };
        reads_device(self.destination(form, false))
            || (compares_memory(instr) && reads_device(self.source(form)))
    }

    /// One element of scas or cmps with a device on either side. What devices have answered so far
    /// is in `device_values`; the next answer brings it here again.
    fn compare_device(&mut self, instr: &Instruction, form: &Form) -> Result<Step, Trap> {
        let compares = compares_memory(instr);
        let mut answers = std::mem::take(&mut self.device_values).into_iter();
        let mut values = Vec::with_capacity(2);
        let mut known = Vec::with_capacity(2);
        for from_source in [false, true].into_iter().take(1 + usize::from(compares)) {
            let address = if from_source {
                self.source(form)?
            } else {
                self.destination(form, false)?
            };
            let value = match self.device(form, address)? {
                None => self.load(address, form.size)?,
                Some(phys) => match answers.next() {
                    Some(value) => {
                        known.push(value);
                        value
                    }
                    None => {
                        self.device_values = known;
                        let size = form.size as u8;
                        return Ok(Step::ReadDevice { phys, size });
                    }
                },
            };
            values.push(value);
        }
        let left = values.get(1).copied().unwrap_or_else(|| self.gpr(0));
        let while_equal = instr.has_repe_prefix();
        self.advance(form, compares, true, 1);
        let again = self.compare(left, values[0], form.size) == while_equal;
        if form.repeats && again && self.gpr(1) & form.mask != 0 {
            Ok(Step::Again)
        } else {
            Ok(Step::Next)
        }
    }

    /// Hands one element to a device; `copies` if it came from RSI.
    fn write_device(
        &mut self,
        form: &Form,
        address: u64,
        value: u64,
        copies: bool,
    ) -> Result<Step, Trap> {
        let page = self
            .mmu
            .walk(&self.cpu, address, Access::Write, self.user())?;
        self.advance(form, copies, true, 1);
        Ok(Step::WriteDevice {
            phys: page.phys | address & 0xfff,
            size: form.size as u8,
            value,
        })
    }

    /// Takes in what a device answered to `Step::ReadDevice`; the step that remains.
    pub(crate) fn finish_device_read(
        &mut self,
        instr: &Instruction,
        value: u64,
    ) -> Result<Step, Trap> {
        use Mnemonic::*;
        let form = self.form(instr);
        if compares_memory(instr) || matches!(instr.mnemonic(), Scasb | Scasw | Scasd | Scasq) {
            self.device_values.push(value);
            return self.compare_device(instr, &form);
        }
        if matches!(instr.mnemonic(), Lodsb | Lodsw | Lodsd | Lodsq) {
            self.set_gpr_sized(0, value, form.size);
            self.advance(&form, true, false, 1);
            return Ok(self.next_or_again(instr));
        }
        let to = self.destination(&form, true)?;
        if self.device(&form, to)?.is_some() {
            return self.write_device(&form, to, value, true);
        }
        let user = self.user();
        self.write(to, &value.to_le_bytes()[..form.size as usize], user)?;
        self.advance(&form, true, true, 1);
        Ok(self.next_or_again(instr))
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

    /// Lowest address and length of `run` elements from `address` on.
    fn span(form: &Form, address: u64, run: u64) -> (u64, usize) {
        let bytes = run * u64::from(form.size);
        let low = if form.step == u64::from(form.size) {
            address
        } else {
            address.wrapping_sub(bytes - u64::from(form.size))
        };
        (low, bytes as usize)
    }

    /// Host address for writing `bytes` from `low` on, within the page of `first`, the element that
    /// a fault names; the write counts as one to code if it is. None for device memory.
    fn writable(&mut self, first: u64, low: u64, bytes: usize) -> Result<Option<*mut u8>, Fault> {
        let user = self.user();
        let page = self.mmu.walk(&self.cpu, first, Access::Write, user)?;
        let phys = page.phys | low & 0xfff;
        // The next string there is translated code's affair alone, unless this can't be.
        if !self.mmu.fill(first, page, Access::Write, user) && !self.mmu.claim(phys) {
            self.code_writes.push((phys, bytes as u64));
        }
        Ok(self.mmu.host(phys, bytes as u64))
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
