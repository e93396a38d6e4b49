//! movs and stos on RAM: as many elements at once as stay within a page on each side.
//!
//! What lies in device memory is handed to `device`.
//!
//! Invariant: memory is as if the elements had been written one by one, in the instruction's
//! direction.

use super::Form;
use crate::{
    core::Core,
    fault::Fault,
    mmu::Access,
    system::{Step, Trap},
};

/// Fills `target` with copies of the first N bytes of `value`: with a constant N it is one wide loop.
fn repeat<const N: usize>(target: &mut [u8], value: [u8; 8]) {
    let mut element = [0; N];
    element.copy_from_slice(&value[..N]);
    target
        .chunks_exact_mut(N)
        .for_each(|chunk| chunk.copy_from_slice(&element));
}

impl Core {
    pub(super) fn fill(&mut self, form: &Form) -> Result<Step, Trap> {
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

    pub(super) fn copy(&mut self, form: &Form) -> Result<Step, Trap> {
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

    /// Elements from `address` to the page's end in the direction of `form`, at most `count`; 0 if
    /// the first one crosses the page. `index` is the register behind the address: where that wraps
    /// around the address size, so does the string.
    pub(super) fn run_length(form: &Form, address: u64, index: u64, count: u64) -> u64 {
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
}
