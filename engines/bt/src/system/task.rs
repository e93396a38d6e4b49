//! Hardware task switches (SDM 3A chapter 8).
//!
//! Everything of the new task is read and its TSS checked before the old one is saved; from then on
//! faults belong to the new task.

use engine_core::Segment;

use crate::{
    core::Core,
    cpu::{CR0_PG, CR0_TS, FLAG_NT, FLAG_VM, Seg},
    fault::{self, Fault},
};

/// What a task is switched by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Jump,
    Call,
    /// iret with NT set.
    Return,
    /// An interrupt or exception through a task gate.
    /// With these flags added to the old task's.
    Gate(u64),
}

/// Places in a TSS.
struct Layout {
    /// Bytes of a slot.
    slot: u32,
    limit: u32,
    ip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    segment_count: usize,
    ldt: u64,
}

/// A task's state, as its TSS has it.
struct Image {
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
    /// Of 32-bit TSSs.
    cr3: Option<u64>,
}

const WIDE: Layout = Layout {
    slot: 4,
    limit: 0x67,
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
};
const NARROW: Layout = Layout {
    slot: 2,
    limit: 0x2b,
    ip: 0x0e,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
};
const CR3: u64 = 0x1c;
/// Its lowest bit asks for a debug exception when the task starts.
const TRAP: u64 = 0x64;
const BUSY: u16 = 2;

impl Layout {
    fn of(tss: &Segment) -> &'static Layout {
        if tss.attributes & 8 != 0 {
            &WIDE
        } else {
            &NARROW
        }
    }

    fn read(&self, core: &Core, tss: &Segment, at: u64) -> Result<u64, Fault> {
        let address = tss.base.wrapping_add(at) & 0xffff_ffff;
        match self.slot {
            4 => core.mmu.read_int::<4>(&core.cpu, address, false),
            _ => core.mmu.read_int::<2>(&core.cpu, address, false),
        }
    }

    /// All that a switch loads.
    fn image(&self, core: &Core, tss: &Segment) -> Result<Image, Fault> {
        let step = u64::from(self.slot);
        let mut registers = [0; 8];
        for (slot, value) in (0u64..).zip(&mut registers) {
            *value = self.read(core, tss, self.registers + slot * step)?;
        }
        let mut selectors = [0; 6];
        for (slot, value) in (0u64..).zip(&mut selectors[..self.segment_count]) {
            *value = self.read(core, tss, self.segments + slot * step)? as u16;
        }
        let wide = self.slot == 4;
        Ok(Image {
            ip: self.read(core, tss, self.ip)?,
            flags: self.read(core, tss, self.flags)?,
            registers,
            selectors,
            ldt: self.read(core, tss, self.ldt)? as u16,
            trap: wide && self.read(core, tss, TRAP)? & 1 != 0,
            cr3: wide.then(|| self.read(core, tss, CR3)).transpose()?,
        })
    }

    fn write(&self, core: &mut Core, tss: &Segment, at: u64, value: u64) -> Result<(), Fault> {
        let address = tss.base.wrapping_add(at) & 0xffff_ffff;
        core.write(address, &value.to_le_bytes()[..self.slot as usize], false)
    }
}

impl Core {
    /// The instruction after an iret with NT set goes on in the task that called this one.
    pub(super) fn return_from_task(&mut self, next_ip: u64) -> Result<(), Fault> {
        let tr = self.cpu.tr;
        let link = self.mmu.read_int::<2>(&self.cpu, tr.base, false)? as u16;
        self.switch_task(link, Way::Return, next_ip)
    }

    /// An interrupt through a task gate; the error code goes to the new task's stack.
    /// What an exception adds to the image of the flags (SDM 3B 17.3.1.1) is in the old task's TSS (SDM 3C
    /// 27.3.3, of RFLAGS.RF).
    pub(super) fn deliver_task(
        &mut self,
        selector: u16,
        error: Option<u32>,
        added: u64,
    ) -> Result<(), Fault> {
        self.switch_task(selector, Way::Gate(added), self.rip)?;
        if let Some(error) = error {
            let size = Layout::of(&self.cpu.tr).slot;
            self.push(error.into(), size)?;
        }
        Ok(())
    }

    /// Switches to the task of `selector`; the old one will go on at `ip`.
    ///
    /// # Errors
    /// #GP, #NP or #TS.
    pub(super) fn switch_task(&mut self, selector: u16, way: Way, ip: u64) -> Result<(), Fault> {
        let vector = if way == Way::Return {
            fault::TS
        } else {
            fault::GP
        };
        let bad = Fault::selector(vector, selector);
        if selector & 4 != 0 || selector & !3 == 0 {
            return Err(bad);
        }
        let mut new = self.descriptor(selector, vector)?;
        let busy = new.attributes & BUSY != 0;
        if new.attributes & 0x15 != 1 || busy != (way == Way::Return) {
            return Err(bad);
        }
        if !new.present() {
            return Err(Fault::selector(fault::NP, selector));
        }
        let layout = Layout::of(&new);
        if new.limit < layout.limit {
            return Err(Fault::selector(fault::TS, selector));
        }
        // So that what can't be read faults here.
        layout.image(self, &new)?;
        let link = self.cpu.tr.selector;
        self.save_task(way, ip)?;
        // A task may follow itself.
        let image = layout.image(self, &new)?;
        let mut flags = image.flags;
        if matches!(way, Way::Call | Way::Gate(_)) {
            self.write(new.base & 0xffff_ffff, &link.to_le_bytes(), false)?;
            flags |= FLAG_NT;
        }
        if way != Way::Return {
            self.mark_task(selector, true)?;
        }
        new.attributes |= BUSY;
        self.cpu.tr = new;
        self.task_entered();
        self.cpu.cr0 |= CR0_TS;
        if let Some(cr3) = image.cr3
            && self.cpu.cr0 & CR0_PG != 0
        {
            self.cpu.cr3 = cr3;
        }
        self.flush();

        self.rip = image.ip;
        self.set_rflags(flags);
        for (number, value) in image.registers.into_iter().enumerate() {
            self.set_gpr_sized(number, value, layout.slot);
        }
        self.load_task_segments(&image.selectors, image.ldt, flags & FLAG_VM != 0)?;
        if image.trap {
            self.task_traps();
        }
        Ok(())
    }

    /// Saves the running task's state in its TSS.
    fn save_task(&mut self, way: Way, ip: u64) -> Result<(), Fault> {
        let old = self.cpu.tr;
        let layout = Layout::of(&old);
        let step = u64::from(layout.slot);
        let mut flags = self.rflags();
        match way {
            Way::Return => flags &= !FLAG_NT,
            Way::Gate(added) => flags |= added,
            Way::Jump | Way::Call => {}
        }
        layout.write(self, &old, layout.ip, ip)?;
        layout.write(self, &old, layout.flags, flags)?;
        for number in 0..8u64 {
            let value = self.gpr(number as usize);
            layout.write(self, &old, layout.registers + number * step, value)?;
        }
        for index in 0..layout.segment_count {
            let selector = self.cpu.segments[index].selector;
            let at = old.base.wrapping_add(layout.segments + index as u64 * step) & 0xffff_ffff;
            self.write(at, &selector.to_le_bytes(), false)?;
        }
        if matches!(way, Way::Jump | Way::Return) {
            self.mark_task(old.selector, false)?;
        }
        Ok(())
    }

    /// Sets or clears a TSS descriptor's busy bit.
    fn mark_task(&mut self, selector: u16, busy: bool) -> Result<(), Fault> {
        let at = self
            .cpu
            .gdtr
            .base
            .wrapping_add(u64::from(selector & !7) + 5);
        let kind = self.mmu.read_int::<1>(&self.cpu, at, false)? as u8;
        let kind = if busy {
            kind | BUSY as u8
        } else {
            kind & !(BUSY as u8)
        };
        self.write(at, &[kind], false)
    }

    /// Loads LDTR and segments as the new task's TSS says. Faults are the new task's own.
    fn load_task_segments(
        &mut self,
        selectors: &[u16; 6],
        ldt: u16,
        virtual_8086: bool,
    ) -> Result<(), Fault> {
        let ts = |selector: u16| Fault::selector(fault::TS, selector);
        // Whatever goes wrong: nothing of the old task is left in them.
        let cpl = if virtual_8086 {
            3
        } else {
            selectors[Seg::CS] & 3
        };
        for (index, &selector) in selectors.iter().enumerate() {
            let kind = if index == Seg::SS { 0x93 | cpl << 5 } else { 0 };
            let attributes = if index == Seg::CS { 0xc09b } else { kind };
            let empty = Segment {
                selector,
                attributes,
                ..Segment::default()
            };
            self.set_segment(index, empty);
        }
        self.cpu.ldtr = Segment {
            selector: ldt,
            ..Segment::default()
        };
        if ldt & !3 != 0 {
            let segment = self.descriptor(ldt, fault::TS)?;
            if ldt & 4 != 0 || segment.attributes & 0x9f != 0x82 {
                return Err(ts(ldt));
            }
            self.cpu.ldtr = segment;
        }
        if virtual_8086 {
            for (index, &selector) in selectors.iter().enumerate() {
                let segment = self.real_segment(index, selector);
                self.set_segment(index, segment);
            }
            return Ok(());
        }
        let cs = selectors[Seg::CS];
        if cs & !3 == 0 {
            return Err(ts(cs));
        }
        let code = self.descriptor(cs, fault::TS)?;
        let conforming = code.attributes & 4 != 0;
        let level = u16::from(code.dpl());
        let allowed = if conforming {
            level <= cpl
        } else {
            level == cpl
        };
        if code.attributes & 0x18 != 0x18 || !allowed {
            return Err(ts(cs));
        }
        if !code.present() {
            return Err(Fault::selector(fault::NP, cs));
        }
        let code = self.accessed(code)?;
        self.set_segment(Seg::CS, code);
        let order = [Seg::SS, Seg::ES, Seg::DS, Seg::FS, Seg::GS];
        for index in order {
            self.load_segment(index, selectors[index])
                .map_err(|fault| match fault.vector {
                    fault::GP => Fault {
                        vector: fault::TS,
                        ..fault
                    },
                    _ => fault,
                })?;
        }
        self.check_code_target(&code, self.rip)
    }
}
