//! The guest's CPU outside translated code: registers, memory, and exception delivery.
//!
//! [`Core`] is what `system/` and the run loop work on. Register values are read and written in
//! the [`Context`], after the site's homes are settled.

use std::sync::Arc;

use engine_core::{CpuState, GuestRam, Segment};

use crate::{
    arena::Arena,
    context::{Context, NATIVE_FLAGS, flags_from_lazy},
    cpu::{
        Bits, CR0_EM, CR0_MP, CR0_PE, CR0_TS, CR4_OSFXSR, CR4_TSD, Cpu, FLAG_IF, FLAG_NT, FLAG_RF,
        FLAG_TF, FLAG_VM, SYSTEM_FLAGS, Seg, canonical,
    },
    decode::{Fpu, Mode},
    fault::{self, Fault},
    mmu::{Access, Mmu},
    site::Homes,
    system::on_stack,
    tlb::Span,
};

/// Registers and memory of one guest CPU.
pub(crate) struct Core {
    context: *mut Context,
    pub cpu: Cpu,
    pub mmu: Mmu,
    pub rip: u64,
    /// Address translations were dropped: links between pages have to go too.
    pub flushed: Flushed,
    /// What [`Core::mode`] said last, until something that it depends on changes.
    pub mode: Option<Mode>,
    /// Somebody asked for the task priority since `run` last returned: an interrupt waits for it to
    /// fall, so writing CR8 has to end the run.
    pub priority_matters: bool,
    /// RAM with translated code that was written since the run loop last looked.
    pub code_writes: Vec<(u64, u64)>,
}

/// Address translations dropped since the run loop last looked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Flushed {
    #[default]
    Nothing,
    Page(Span),
    Everything,
}

/// The guest is beyond help: a fault while delivering a double fault.
#[derive(Debug)]
pub(crate) struct Shutdown;

/// What caused a delivery, where it matters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Exception,
    External,
    /// `int n`, `int3`, `into`: the gate's DPL is checked.
    Software,
}

impl Core {
    /// A CPU over `ram` whose register slots are in `arena`.
    ///
    /// # Safety
    /// `arena` outlives the core and serves no other.
    pub(crate) unsafe fn new(ram: Arc<GuestRam>, arena: &Arena) -> Core {
        Core {
            context: arena.context(),
            cpu: Cpu::new(&CpuState::default()),
            // SAFETY: the caller's promise.
            mmu: unsafe { Mmu::new(ram, arena) },
            rip: 0,
            flushed: Flushed::Nothing,
            mode: None,
            priority_matters: false,
            code_writes: Vec::new(),
        }
    }

    /// The shared slots.
    pub(crate) fn context(&mut self) -> &mut Context {
        // SAFETY: the arena outlives self, and translated code isn't running while Rust is.
        unsafe { &mut *self.context }
    }

    fn slots(&self) -> &Context {
        // SAFETY: as in `context`.
        unsafe { &*self.context }
    }

    pub(crate) fn gpr(&self, number: usize) -> u64 {
        self.slots().gpr[number]
    }

    pub(crate) fn set_gpr(&mut self, number: usize, value: u64) {
        self.context().gpr[number] = value;
    }

    /// Writes the low `size` bytes of a register; 4 bytes clear the rest, as instructions do.
    pub(crate) fn set_gpr_sized(&mut self, number: usize, value: u64, size: u32) {
        let slot = &mut self.context().gpr[number];
        *slot = match size {
            1 => *slot & !0xff | value & 0xff,
            2 => *slot & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    pub(crate) fn rflags(&self) -> u64 {
        let slots = self.slots();
        slots.flags & NATIVE_FLAGS | self.cpu.flags | slots.interrupt_flag << 9 | 2
    }

    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.context().flags = value & NATIVE_FLAGS | 0x202;
        self.cpu.flags = value & SYSTEM_FLAGS;
        self.set_interrupts(value & FLAG_IF != 0);
        self.mode = None;
    }

    /// Maskable interrupts are enabled.
    pub(crate) fn interrupts_enabled(&self) -> bool {
        self.slots().interrupt_flag != 0
    }

    pub(crate) fn set_interrupts(&mut self, enabled: bool) {
        self.context().interrupt_flag = enabled.into();
    }

    /// General registers and RFLAGS with `homes` taken into account.
    pub(crate) fn seen_from(&self, homes: Homes) -> ([u64; 16], u64) {
        let slots = self.slots();
        let gpr = std::array::from_fn(|register| {
            if homes.spilled >> register & 1 == 1 {
                slots.spill[register]
            } else {
                slots.gpr[register]
            }
        });
        let native = if homes.lazy {
            slots.flags & !0x8d5 | flags_from_lazy(slots.lazy_flags)
        } else {
            slots.flags
        };
        (gpr, native & NATIVE_FLAGS | self.rflags() & !NATIVE_FLAGS)
    }

    /// Arithmetic flags alone.
    pub(crate) fn set_arithmetic(&mut self, mask: u64, value: u64) {
        let context = self.context();
        context.flags = context.flags & !mask | value & mask;
    }

    pub(crate) fn user(&self) -> bool {
        self.cpu.cpl() == 3
    }

    pub(crate) fn set_segment(&mut self, index: usize, segment: Segment) {
        self.mode = None;
        self.cpu.segments[index] = segment;
        self.context().segment_base[index] = segment.base;
    }

    pub(crate) fn set_segment_base(&mut self, index: usize, base: u64) {
        self.mode = None;
        self.cpu.segments[index].base = base;
        self.context().segment_base[index] = base;
    }

    /// What translation depends on, now.
    pub(crate) fn mode(&mut self) -> Mode {
        if let Some(mode) = self.mode {
            return mode;
        }
        let mode = self.current_mode();
        self.mode = Some(mode);
        mode
    }

    fn current_mode(&self) -> Mode {
        let cpu = &self.cpu;
        let user = self.user();
        Mode {
            bits: cpu.bits(),
            user,
            flat: cpu.long() && cpu.bits() == Bits::Bits64
                || [Seg::ES, Seg::CS, Seg::SS, Seg::DS]
                    .iter()
                    .all(|&index| cpu.segments[index].base == 0),
            fpu: Fpu {
                emulated: cpu.cr0 & CR0_EM != 0,
                switched: cpu.cr0 & CR0_TS != 0,
                monitored: cpu.cr0 & (CR0_TS | CR0_MP) == CR0_TS | CR0_MP,
                sse: cpu.cr4 & CR4_OSFXSR != 0,
            },
            tsc: cpu.cr4 & CR4_TSD == 0 || !user,
            interrupts: cpu.cpl() <= cpu.iopl(),
            single: false,
        }
    }

    /// Linear address of the next instruction.
    pub(crate) fn linear_ip(&self) -> u64 {
        match self.cpu.bits() {
            Bits::Bits64 => self.rip,
            Bits::Bits32 | Bits::Bits16 => {
                self.rip.wrapping_add(self.cpu.segments[Seg::CS].base) & 0xffff_ffff
            }
        }
    }

    pub(crate) fn flush(&mut self) {
        self.mode = None;
        self.mmu.flush();
        self.flushed = Flushed::Everything;
    }

    /// Writes guest-virtual memory, all of it or none.
    ///
    /// # Errors
    /// The first page fault. Writes to device memory are dropped.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8], user: bool) -> Result<(), Fault> {
        let last = address.wrapping_add(bytes.len() as u64 - 1);
        if self.cpu.long() && !canonical(last) {
            return Err(Fault::gp());
        }
        // A page in a write TLB holds no translated code.
        if last & !0xfff == address & !0xfff
            && let Some(host) = self.mmu.written(address, user)
        {
            // SAFETY: `host` is in a page of RAM, and the bytes stay within it.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
            return Ok(());
        }
        let mut parts = [(0u64, 0usize, 0usize); 2];
        let first_len = (4096 - (address & 0xfff) as usize).min(bytes.len());
        let page = self.mmu.walk(&self.cpu, address, Access::Write, user)?;
        self.mmu.fill(address, page, Access::Write, user);
        parts[0] = (page.phys | address & 0xfff, 0, first_len);
        if first_len < bytes.len() {
            let page = self
                .mmu
                .walk(&self.cpu, last & !0xfff, Access::Write, user)?;
            parts[1] = (page.phys, first_len, bytes.len());
        }
        for (phys, from, to) in parts {
            if from < to {
                self.write_phys(phys, &bytes[from..to]);
            }
        }
        Ok(())
    }

    /// Writes RAM and notes the write if translated code lies there.
    pub(crate) fn write_phys(&mut self, phys: u64, bytes: &[u8]) {
        let Some(host) = self.mmu.host(phys, bytes.len() as u64) else {
            return;
        };
        // SAFETY: `host` covers the length; guest RAM is never borrowed as Rust memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
        if self.mmu.is_code(phys) {
            self.code_writes.push((phys, bytes.len() as u64));
        }
    }

    /// Delivers `fault`, or what becomes of it.
    ///
    /// # Errors
    /// [`Shutdown`] on a triple fault.
    pub(crate) fn raise(&mut self, fault: Fault) -> Result<(), Shutdown> {
        let mut fault = fault;
        loop {
            if let Some(address) = fault.address {
                self.cpu.cr2 = address;
            }
            let met = match self.deliver(fault.vector, fault.error, Cause::Exception) {
                Ok(()) => return Ok(()),
                Err(met) => met,
            };
            // A page fault leaves its address even if it turns into something else.
            if let Some(address) = met.address {
                self.cpu.cr2 = address;
            }
            fault = fault.then(met).ok_or(Shutdown)?;
        }
    }

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
        if self.cpu.cr0 & CR0_PE == 0 {
            // Real mode isn't entered by any image that boots here yet.
            return Err(Fault {
                vector: fault::DF,
                error: Some(0),
                address: None,
            });
        }
        if self.cpu.long() {
            self.deliver_long(vector, error, cause)
        } else {
            self.deliver_protected(vector, error, cause)
        }
    }

    /// SDM 3A 6.14.
    fn deliver_long(&mut self, vector: u8, error: Option<u32>, cause: Cause) -> Result<(), Fault> {
        let idt_error = |vector: u8| (u16::from(vector) << 3) | 2;
        let external = u16::from(cause == Cause::External);
        let bad_gate = |kind| Fault {
            vector: kind,
            error: Some(u32::from(idt_error(vector) | external)),
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
            let null = Segment {
                selector: new_cpl.into(),
                base: 0,
                limit: u32::MAX,
                attributes: 0xc093 | u16::from(new_cpl) << 5,
            };
            self.set_segment(Seg::SS, null);
        }
        let code = Segment {
            selector: selector & !3 | u16::from(new_cpl),
            ..code
        };
        self.set_segment(Seg::CS, code);
        self.set_gpr(4, rsp);
        self.rip = target;
        if kind == 0xe {
            self.set_interrupts(false);
        }
        self.cpu.flags &= !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM);
        self.cpu.shadow = false;
        Ok(())
    }

    /// 32-bit gates (SDM 3A 6.12).
    fn deliver_protected(
        &mut self,
        vector: u8,
        error: Option<u32>,
        cause: Cause,
    ) -> Result<(), Fault> {
        let bad = |kind| Fault {
            vector: kind,
            error: Some(u32::from(vector) << 3 | 2 | u32::from(cause == Cause::External)),
            address: None,
        };
        let offset = u64::from(vector) * 8;
        if offset + 7 > u64::from(self.cpu.idtr.limit) {
            return Err(bad(fault::GP));
        }
        let at = self.cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
        let gate = self.mmu.read_int::<8>(&self.cpu, at, false)?;
        let kind = gate >> 40 & 0x1f;
        if kind != 0xe && kind != 0xf {
            return Err(bad(fault::GP));
        }
        if cause == Cause::Software && ((gate >> 45 & 3) as u8) < self.cpu.cpl() {
            return Err(bad(fault::GP));
        }
        if gate >> 47 & 1 == 0 {
            return Err(bad(fault::NP));
        }
        let selector = (gate >> 16) as u16;
        let target = gate & 0xffff | gate >> 32 & 0xffff_0000;
        let code = self.code_descriptor(selector)?;
        let cpl = self.cpu.cpl();
        if code.dpl() > cpl {
            return Err(Fault::selector(fault::GP, selector));
        }
        let new_cpl = if code.attributes & 4 != 0 {
            cpl
        } else {
            code.dpl()
        };
        let old_ss = self.cpu.segments[Seg::SS];
        let old_esp = self.gpr(4) as u32;
        let (ss, esp) = if new_cpl < cpl {
            let slot = self.cpu.tr.base.wrapping_add(4 + 8 * u64::from(new_cpl));
            let esp = self.mmu.read_int::<4>(&self.cpu, slot, false)? as u32;
            let ss = self
                .mmu
                .read_int::<2>(&self.cpu, slot.wrapping_add(4), false)? as u16;
            (self.descriptor(ss, fault::TS)?, esp)
        } else {
            (old_ss, old_esp)
        };
        let mut frame = Vec::with_capacity(24);
        let mut put = |value: u32| frame.extend_from_slice(&value.to_le_bytes());
        if let Some(error) = error {
            put(error);
        }
        put(self.rip as u32);
        put(self.cpu.segments[Seg::CS].selector.into());
        put(self.rflags() as u32
            | if cause == Cause::Exception {
                FLAG_RF as u32
            } else {
                0
            });
        if new_cpl < cpl {
            put(old_esp);
            put(old_ss.selector.into());
        }
        let esp = esp.wrapping_sub(frame.len() as u32);
        let at = ss.base.wrapping_add(esp.into()) & 0xffff_ffff;
        self.write(at, &frame, new_cpl == 3)?;
        self.set_segment(Seg::SS, ss);
        self.set_segment(
            Seg::CS,
            Segment {
                selector: selector & !3 | u16::from(new_cpl),
                ..code
            },
        );
        self.set_gpr(4, esp.into());
        self.rip = target;
        if kind == 0xe {
            self.set_interrupts(false);
        }
        self.cpu.flags &= !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM);
        self.cpu.shadow = false;
        Ok(())
    }

    fn tss_qword(&self, offset: u64) -> Result<u64, Fault> {
        if offset + 7 > u64::from(self.cpu.tr.limit) {
            return Err(Fault::selector(fault::TS, self.cpu.tr.selector));
        }
        self.mmu
            .read_int::<8>(&self.cpu, self.cpu.tr.base.wrapping_add(offset), false)
    }
}
