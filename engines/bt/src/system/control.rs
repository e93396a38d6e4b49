//! Control registers, debug registers, MSRs, CPUID.

use iced_x86::{Instruction, OpKind, Register};

use super::{Step, Trap, segment_index};
use crate::{
    core::Core,
    cpu::{
        Bits, CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_PG, CR4_ANNOUNCED, CR4_OSXSAVE, CR4_PAE,
        CR4_PCIDE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE,
        Seg, canonical,
    },
    fault::Fault,
    mmu::PHYSICAL_BITS,
};

/// CR0 bits that exist (SDM 3A 2.5).
const CR0_DEFINED: u64 = 0xe005_003f;

impl Core {
    /// mov to or from a segment, control or debug register.
    pub(super) fn mov_system(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        let (to, from) = (instr.op0_register(), instr.op1_register());
        if instr.op0_kind() == OpKind::Register && to.is_segment_register() {
            let index = segment_index(to);
            if index == Seg::CS {
                return Err(Fault::ud().into());
            }
            let selector = self.value(instr, 1)? as u16;
            self.load_segment(index, selector)?;
            self.cpu.shadow = index == Seg::SS;
            self.debug.blocked = index == Seg::SS;
            return Ok(Step::Next);
        }
        if instr.op1_kind() == OpKind::Register && from.is_segment_register() {
            let selector = self.cpu.segments[segment_index(from)].selector;
            self.store(instr, selector.into())?;
            return Ok(Step::Next);
        }
        let width = if self.cpu.bits() == Bits::Bits64 {
            u64::MAX
        } else {
            0xffff_ffff
        };
        if to.is_cr() {
            let value = self.gpr(from.full_register().number()) & width;
            match to {
                Register::CR0 => self.set_cr0(value)?,
                Register::CR2 => self.cpu.cr2 = value,
                Register::CR3 => self.set_cr3(value, instr)?,
                Register::CR4 => self.set_cr4(value, instr)?,
                Register::CR8 if value < 16 => {
                    let falls = value < self.cpu.cr8;
                    self.cpu.cr8 = value;
                    if falls && self.shortcuts.priority_matters != 0 {
                        return Ok(Step::Yield);
                    }
                }
                Register::CR8 => return Err(Fault::gp().into()),
                _ => return Err(Fault::ud().into()),
            }
        } else if from.is_cr() {
            let value = match from {
                Register::CR0 => self.cpu.cr0,
                Register::CR2 => self.cpu.cr2,
                Register::CR3 => self.cpu.cr3,
                Register::CR4 => self.cpu.cr4,
                Register::CR8 => self.cpu.cr8,
                _ => return Err(Fault::ud().into()),
            };
            self.set_gpr(to.full_register().number(), value & width);
        } else if to.is_dr() {
            let value = self.gpr(from.full_register().number()) & width;
            let number = self.debug_register(to.number())?;
            if number >= 6 && value >> 32 != 0 {
                return Err(Fault::gp().into());
            }
            self.cpu.dr[number] = match number {
                6 => value & 0xe00f | 0xffff_0ff0,
                7 => value & 0xffff_23ff | 0x400,
                _ => value,
            };
            self.forget_modes();
        } else {
            let number = self.debug_register(from.number())?;
            let value = self.cpu.dr[number];
            self.set_gpr(to.full_register().number(), value & width);
        }
        Ok(Step::Next)
    }

    /// Writes CR0, with what follows from it.
    ///
    /// # Errors
    /// #GP for combinations that SDM 3A 2.5 forbids.
    pub(super) fn set_cr0(&mut self, value: u64) -> Result<(), Fault> {
        let old = self.cpu.cr0;
        let value = value & (CR0_DEFINED | !0xffff_ffff) | CR0_ET;
        let paging = value & CR0_PG != 0;
        if value >> 32 != 0
            || paging && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
        {
            return Err(Fault::gp());
        }
        if paging && old & CR0_PG == 0 {
            if self.cpu.efer & EFER_LME != 0 {
                if self.cpu.cr4 & CR4_PAE == 0 || self.cpu.segments[Seg::CS].long() {
                    return Err(Fault::gp());
                }
                self.cpu.efer |= EFER_LMA;
            } else {
                self.check_pointers(self.cpu.cr3, self.cpu.cr4)?;
            }
        } else if !paging && old & CR0_PG != 0 {
            if self.cpu.bits() == Bits::Bits64 || self.cpu.cr4 & CR4_PCIDE != 0 {
                return Err(Fault::gp());
            }
            self.cpu.efer &= !EFER_LMA;
        }
        self.cpu.cr0 = value;
        self.forget_modes();
        if (old ^ value) & (CR0_PG | CR0_PE | crate::cpu::CR0_WP) != 0 {
            self.flush();
        }
        Ok(())
    }

    /// With PAE paging, page-directory pointers are loaded with CR3 (SDM 3A 4.4.1).
    fn check_pointers(&self, cr3: u64, cr4: u64) -> Result<(), Fault> {
        if cr4 & CR4_PAE != 0 && !self.cpu.long() && self.mmu.bad_pointers(cr3) {
            return Err(Fault::gp());
        }
        Ok(())
    }

    fn set_cr3(&mut self, value: u64, instr: &Instruction) -> Result<(), Fault> {
        // With PCIDs, bit 63 asks to keep translations.
        let keep = u64::from(self.cpu.cr4 & CR4_PCIDE != 0) << 63;
        let kept = value & keep != 0;
        let value = value & !keep;
        if value >> PHYSICAL_BITS != 0 {
            return Err(Fault::gp());
        }
        if self.cpu.cr0 & CR0_PG != 0 {
            self.check_pointers(value, self.cpu.cr4)?;
        }
        let bank = self.cpu.bank();
        self.cpu.cr3 = value;
        self.change_bank(bank);
        self.reload(self.linear_after(instr), kept);
        Ok(())
    }

    /// Linear address of the instruction behind `instr`.
    fn linear_after(&self, instr: &Instruction) -> u64 {
        match self.cpu.bits() {
            Bits::Bits64 => instr.next_ip(),
            Bits::Bits32 | Bits::Bits16 => {
                let base = self.cpu.segments[Seg::CS].base;
                instr.next_ip().wrapping_add(base) & 0xffff_ffff
            }
        }
    }

    fn set_cr4(&mut self, value: u64, instr: &Instruction) -> Result<(), Fault> {
        /// What decides how tables are read, and who may do what with a page.
        const READING: u64 = CR4_PSE | CR4_PAE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE;
        if value & !cr4_announced() != 0 || self.cpu.long() && value & CR4_PAE == 0 {
            return Err(Fault::gp());
        }
        let new = value & !self.cpu.cr4;
        if new & CR4_PCIDE != 0 && (!self.cpu.long() || self.cpu.cr3 & 0xfff != 0) {
            return Err(Fault::gp());
        }
        if new & CR4_PAE != 0 && self.cpu.cr0 & CR0_PG != 0 {
            self.check_pointers(self.cpu.cr3, value)?;
        }
        let changed = value ^ self.cpu.cr4;
        self.cpu.cr4 = value;
        self.remember_leaves();
        self.forget_modes();
        if changed & READING != 0 {
            self.flush();
        } else {
            // Global pages have no translations of their own here: PGE, there and back, is how systems drop
            // all of them (SDM 3A 4.10.4.1), and the tables mostly give what they gave.
            self.reload(self.linear_after(instr), false);
        }
        Ok(())
    }

    /// SDM 2A, INVPCID. More than what is named may go: everything does that the tables give no longer.
    pub(super) fn invpcid(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let kind = self.gpr(instr.op0_register().full_register().number());
        let kind = if self.cpu.bits() == Bits::Bits64 {
            kind
        } else {
            kind & 0xffff_ffff
        };
        let at = self.operand(instr, 16, false)?;
        let pcid = self.load_part(instr, at, 8)?;
        let address = self.load_part(instr, at.wrapping_add(8), 8)?;
        let enabled = self.cpu.cr4 & CR4_PCIDE != 0;
        let one = kind <= 1;
        if kind > 3
            || pcid >> 12 != 0
            || one && !enabled && pcid != 0
            || kind == 0 && !canonical(address)
        {
            return Err(Fault::gp());
        }
        self.reload(self.linear_after(instr), false);
        Ok(())
    }

    pub(super) fn read_msr(&self, index: u32) -> Result<u64, Fault> {
        let cpu = &self.cpu;
        Ok(match index {
            0x10 => self.tsc(),
            0x3b => cpu.tsc_adjust,
            0x1d9 => 0,
            // Microcode revision, platform id, feature control: nothing to report.
            0x8b | 0x17 => 0,
            // MTRRs: none variable, fixed ones off.
            0xfe => 0,
            0x2ff => cpu.mtrr_def_type,
            0x174..=0x176 => cpu.sysenter[index as usize - 0x174],
            // Machine-check capabilities and status: no banks.
            0x179 | 0x17a => 0,
            0x1a0 => cpu.misc_enable,
            0x277 => cpu.pat,
            0xc000_0080 => cpu.efer,
            0xc000_0081 => cpu.star,
            0xc000_0082 => cpu.lstar,
            0xc000_0083 => cpu.cstar,
            0xc000_0084 => cpu.fmask,
            0xc000_0100 => cpu.segments[Seg::FS].base,
            0xc000_0101 => cpu.segments[Seg::GS].base,
            0xc000_0102 => cpu.kernel_gs_base,
            0xc000_0103 => cpu.tsc_aux,
            _ => return Err(Fault::gp()),
        })
    }

    pub(super) fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        let canonical = (value as i64) << 16 >> 16 == value as i64;
        let needs_canonical = matches!(
            index,
            0x175 | 0x176 | 0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102
        );
        if needs_canonical && !canonical {
            return Err(Fault::gp());
        }
        let cpu = &mut self.cpu;
        match index {
            0x10 => {
                let by = value.wrapping_sub(self.tsc());
                self.move_tsc(by);
            }
            0x3b => {
                let by = value.wrapping_sub(cpu.tsc_adjust);
                self.move_tsc(by);
            }
            // Nothing of what it switches on is there.
            0x1d9 if value == 0 => {}
            0x8b | 0x17a => {}
            0x2ff => cpu.mtrr_def_type = value & 0xcff,
            0x174..=0x176 => cpu.sysenter[index as usize - 0x174] = value,
            0x1a0 => cpu.misc_enable = value,
            0x277 => {
                let valid = value
                    .to_le_bytes()
                    .iter()
                    .all(|&kind| matches!(kind, 0 | 1 | 4..=7));
                if !valid {
                    return Err(Fault::gp());
                }
                cpu.pat = value;
            }
            0xc000_0080 => {
                let writable = EFER_SCE | EFER_LME | EFER_NXE;
                if value & !(writable | EFER_LMA) != 0
                    || (value ^ cpu.efer) & EFER_LME != 0 && cpu.cr0 & CR0_PG != 0
                {
                    return Err(Fault::gp());
                }
                cpu.efer = value & writable | cpu.efer & EFER_LMA;
                self.forget_modes();
                self.flush();
            }
            0xc000_0081 => {
                cpu.star = value;
                self.remember_star();
            }
            0xc000_0082 => cpu.lstar = value,
            0xc000_0083 => cpu.cstar = value,
            0xc000_0084 => cpu.fmask = value & 0xffff_ffff,
            0xc000_0100 => self.set_segment_base(Seg::FS, value),
            0xc000_0101 => self.set_segment_base(Seg::GS, value),
            0xc000_0102 => cpu.kernel_gs_base = value,
            0xc000_0103 => {
                if value >> 32 != 0 {
                    return Err(Fault::gp());
                }
                cpu.tsc_aux = value;
            }
            _ => return Err(Fault::gp()),
        }
        Ok(())
    }

    /// The guest's time-stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        engine_core::clock::tsc().wrapping_add(self.cpu.tsc_offset)
    }

    /// Moves the time-stamp counter. IA32_TSC_ADJUST keeps account (SDM 3B 18.17.3).
    fn move_tsc(&mut self, by: u64) {
        self.cpu.tsc_offset = self.cpu.tsc_offset.wrapping_add(by);
        self.cpu.tsc_adjust = self.cpu.tsc_adjust.wrapping_add(by);
        self.forget_modes();
    }

    /// rdpkru and wrpkru (SDM 2B).
    pub(super) fn key_rights(&mut self, write: bool) -> Result<(), Fault> {
        if self.cpu.cr4 & CR4_PKE == 0 {
            return Err(Fault::ud());
        }
        if self.gpr(1) as u32 != 0 || write && self.gpr(2) as u32 != 0 {
            return Err(Fault::gp());
        }
        if write {
            self.set_key_rights(self.gpr(0) as u32);
        } else {
            self.set_gpr(0, self.cpu.pkru.into());
            self.set_gpr(2, 0);
        }
        Ok(())
    }

    pub(super) fn set_key_rights(&mut self, rights: u32) {
        if rights != std::mem::replace(&mut self.cpu.pkru, rights) {
            // Fetches don't ask for them (SDM 3A 4.6.2).
            self.mmu.flush_data();
        }
    }

    /// The pinned CPUID, with the bits that follow the CPU's state.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let osxsave = self.cpu.cr4 & CR4_OSXSAVE != 0;
        let mut registers =
            engine_core::cpuid::with_state(self.place, leaf, subleaf, osxsave, self.cpu.xcr0);
        if (leaf, subleaf) == (7, 0) && self.cpu.cr4 & CR4_PKE != 0 {
            // OSPKE.
            registers[2] |= 1 << 4;
        }
        if leaf == 1 && self.cpu.apic_off {
            registers[3] &= !(1 << 9);
        }
        registers
    }
}

/// CR4 bits that may be set.
fn cr4_announced() -> u64 {
    let xsave = engine_core::cpuid::pinned(1, 0)[2] >> 26 & 1 == 1;
    CR4_ANNOUNCED | if xsave { CR4_OSXSAVE } else { 0 }
}
