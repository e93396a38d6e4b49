//! Elements of strings in device memory: one at a time, each through a [`Step`] that the run loop
//! answers.
//!
//! An element across two pages, one of which is a device's, isn't dealt with here: that takes the log
//! of devices (`system/device.rs`).
//!
//! Invariant: registers move past an element when nothing about it can fail any more.

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Form, compares_memory};
use crate::{
    core::Core,
    fault::Fault,
    mmu::Access,
    system::{Step, Trap},
};

impl Core {
    /// True if the next element of a string may have to do with a device in a way that only the log of
    /// devices can see to: it lies across two pages, or goes to a port.
    pub(crate) fn logs_devices(&self, instr: &Instruction) -> bool {
        use Mnemonic::*;
        matches!(instr.mnemonic(), Outsb | Outsw | Outsd)
            || self.crosses_to_device(&self.form(instr))
    }

    /// True if the next element lies across two pages on either side, and one of them is no RAM.
    pub(super) fn crosses_to_device(&self, form: &Form) -> bool {
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

    /// Physical address of the element at `address` if it lies in device memory.
    pub(super) fn device(&self, form: &Form, address: u64) -> Result<Option<u64>, Fault> {
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

    pub(super) fn read_device(&self, form: &Form) -> Result<Step, Trap> {
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
    pub(super) fn compares_device(&self, instr: &Instruction, form: &Form) -> bool {
        let reads_device = |address: Result<u64, Fault>| {
            matches!(address.and_then(|at| self.device(form, at)), Ok(Some(_)))
        };
        reads_device(self.destination(form, false))
            || (compares_memory(instr) && reads_device(self.source(form)))
    }

    /// One element of scas or cmps with a device on either side. What devices have answered so far
    /// is in `device_values`; the next answer brings it here again.
    pub(super) fn compare_device(
        &mut self,
        instr: &Instruction,
        form: &Form,
    ) -> Result<Step, Trap> {
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
    pub(super) fn write_device(
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
}
