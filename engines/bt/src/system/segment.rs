//! Segment registers and descriptors (SDM 3A chapters 3 and 5).

use engine_core::Segment;
use iced_x86::{Instruction, Mnemonic};

use crate::{
    core::Core,
    cpu::{Bits, CR4_FSGSBASE, Seg, canonical},
    fault::{self, Fault},
};

/// A null SS of this privilege: 64-bit code has its stack all the same, other code finds none.
pub(crate) fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        attributes: 0x4093 | u16::from(cpl) << 5,
    }
}

impl Core {
    /// Reads the descriptor that `selector` names.
    ///
    /// # Errors
    /// Exception `vector` with the selector if it lies outside its table; page faults.
    pub(crate) fn raw_descriptor(&self, selector: u16, vector: u8) -> Result<u64, Fault> {
        let (base, limit) = if selector & 4 == 0 {
            (self.cpu.gdtr.base, u64::from(self.cpu.gdtr.limit))
        } else {
            (self.cpu.ldtr.base, u64::from(self.cpu.ldtr.limit))
        };
        let offset = u64::from(selector & !7);
        if offset + 7 > limit || selector & 4 != 0 && !self.cpu.ldtr.present() {
            return Err(Fault::selector(vector, selector));
        }
        self.mmu
            .read_int::<8>(&self.cpu, base.wrapping_add(offset), false)
    }

    /// As `raw_descriptor`, unpacked.
    pub(crate) fn descriptor(&self, selector: u16, vector: u8) -> Result<Segment, Fault> {
        Ok(unpack(selector, self.raw_descriptor(selector, vector)?))
    }

    /// A code segment to transfer to: not null, code. That it is present is checked behind its privilege
    /// ([`Core::present`]).
    ///
    /// # Errors
    /// #GP with the selector.
    pub(crate) fn code_descriptor(&self, selector: u16) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            return Err(Fault::gp());
        }
        let segment = self.descriptor(selector, fault::GP)?;
        let both = self.cpu.long() && segment.long() && segment.db();
        if segment.attributes & 0x18 != 0x18 || both {
            return Err(Fault::selector(fault::GP, selector));
        }
        Ok(segment)
    }

    /// # Errors
    /// #NP with the selector.
    pub(super) fn present(segment: &Segment) -> Result<(), Fault> {
        if segment.present() {
            Ok(())
        } else {
            Err(Fault::selector(fault::NP, segment.selector))
        }
    }

    /// Sets the accessed bit of a descriptor that is being loaded, in its table (SDM 3A 3.4.5.1).
    ///
    /// # Errors
    /// Page faults.
    pub(super) fn accessed(&mut self, mut segment: Segment) -> Result<Segment, Fault> {
        if segment.attributes & 1 == 0 {
            segment.attributes |= 1;
            let table = if segment.selector & 4 == 0 {
                self.cpu.gdtr.base
            } else {
                self.cpu.ldtr.base
            };
            let at = table.wrapping_add(u64::from(segment.selector & !7) + 5);
            self.write(at, &[segment.attributes as u8], false)?;
        }
        Ok(segment)
    }

    /// Loads es, ss, ds, fs or gs as an instruction does.
    ///
    /// # Errors
    /// #GP, #NP or #SS with the selector.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Fault> {
        if self.cpu.real_addressing() {
            let segment = self.real_segment(index, selector);
            self.set_segment(index, segment);
            return Ok(());
        }
        let cpl = self.cpu.cpl();
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            let null = if index == Seg::SS {
                if self.cpu.bits() != Bits::Bits64 || cpl == 3 || rpl != cpl {
                    return Err(Fault::gp());
                }
                null_stack(selector, cpl)
            } else {
                // No base either.
                Segment {
                    selector,
                    ..Segment::default()
                }
            };
            self.set_segment(index, null);
            return Ok(());
        }
        let segment = self.descriptor(selector, fault::GP)?;
        let bad = Err(Fault::selector(fault::GP, selector));
        let kind = segment.attributes & 0x1f;
        let code = kind & 8 != 0;
        if kind & 0x10 == 0 {
            return bad;
        }
        if index == Seg::SS {
            let writable = !code && kind & 2 != 0;
            if !writable || rpl != cpl || segment.dpl() != cpl {
                return bad;
            }
            if !segment.present() {
                return Err(Fault::selector(fault::SS, selector));
            }
        } else {
            let readable = !code || kind & 2 != 0;
            let conforming = code && kind & 4 != 0;
            if !readable || !conforming && segment.dpl() < cpl.max(rpl) {
                return bad;
            }
            if !segment.present() {
                return Err(Fault::selector(fault::NP, selector));
            }
        }
        let segment = self.accessed(segment)?;
        self.set_segment(index, segment);
        Ok(())
    }

    /// What a selector means where it is an address. In real-address mode limit and size stay what
    /// protected mode left there; virtual-8086 mode starts afresh (SDM 3A 17.1, 17.2.1).
    pub(crate) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.cpu.virtual_8086() {
            return Segment {
                selector,
                base,
                limit: 0xffff,
                attributes: 0xf3,
            };
        }
        let old = self.cpu.segments[index];
        let kind = if index == Seg::CS { 0x9b } else { 0x93 };
        Segment {
            selector,
            base,
            limit: old.limit,
            attributes: old.attributes & 0xf000 | kind,
        }
    }

    /// The descriptor that lar, lsl, verr and verw look at: None if it may not be seen (SDM 2A, LAR
    /// and LSL; 2B, VERR). Page faults aside nothing faults.
    fn visible(&self, selector: u16) -> Result<Option<(u64, Segment)>, Fault> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let raw = match self.raw_descriptor(selector, fault::GP) {
            Ok(raw) => raw,
            Err(fault) if fault.vector == fault::GP => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let segment = unpack(selector, raw);
        let conforming = segment.attributes & 0x1c == 0x1c;
        let level = self.cpu.cpl().max((selector & 3) as u8);
        Ok((conforming || segment.dpl() >= level).then_some((raw, segment)))
    }

    /// lar and lsl: access rights or limit, None where ZF is to be cleared.
    pub(crate) fn rights_or_limit(&self, selector: u16, limit: bool) -> Result<Option<u64>, Fault> {
        let Some((raw, segment)) = self.visible(selector)? else {
            return Ok(None);
        };
        let system = segment.attributes & 0x10 == 0;
        // LDT, and TSSs available and busy; lar sees call gates too. 16-bit ones and task gates
        // are invalid in IA-32e mode.
        let known = match segment.attributes & 0xf {
            2 | 9 | 0xb => true,
            0xc => !limit,
            1 | 3 => !self.cpu.long(),
            4 | 5 => !limit && !self.cpu.long(),
            _ => false,
        };
        if system && !known {
            return Ok(None);
        }
        Ok(Some(if limit {
            segment.limit.into()
        } else {
            // With the limit's upper bits, which the SDM leaves open and processors show (APM 3, LAR).
            raw >> 32 & 0x00ff_ff00
        }))
    }

    /// verr and verw: whether a segment can be read or written from here.
    pub(crate) fn accessible(&self, selector: u16, write: bool) -> Result<bool, Fault> {
        let Some((_, segment)) = self.visible(selector)? else {
            return Ok(false);
        };
        let kind = segment.attributes;
        let code = kind & 8 != 0;
        Ok(kind & 0x10 != 0
            && if write {
                !code && kind & 2 != 0
            } else {
                !code || kind & 2 != 0
            })
    }

    /// A system descriptor (LDT, TSS) of one of these types, 16 bytes long in IA-32e mode.
    ///
    /// # Errors
    /// #GP or #NP with the selector; page faults.
    pub(crate) fn system_descriptor(&self, selector: u16, types: &[u16]) -> Result<Segment, Fault> {
        let bad = Err(Fault::selector(fault::GP, selector));
        if selector & 4 != 0 {
            return bad;
        }
        let mut segment = self.descriptor(selector, fault::GP)?;
        if !types.contains(&(segment.attributes & 0x1f)) {
            return bad;
        }
        if self.cpu.long() {
            let offset = u64::from(selector & !7) + 8;
            if offset + 7 > u64::from(self.cpu.gdtr.limit) {
                return bad;
            }
            let at = self.cpu.gdtr.base.wrapping_add(offset);
            let upper = self.mmu.read_int::<8>(&self.cpu, at, false)?;
            segment.base |= upper << 32;
            // The upper half's type has to be zero (SDM 2A, LTR).
            if upper >> 40 & 0x1f != 0 || !canonical(segment.base) {
                return bad;
            }
        }
        Self::present(&segment)?;
        Ok(segment)
    }

    /// rdfsbase and its kin (SDM 2B).
    pub(super) fn segment_base(&mut self, instr: &Instruction) -> Result<(), Fault> {
        use Mnemonic::*;
        if self.cpu.cr4 & CR4_FSGSBASE == 0 || self.cpu.bits() != Bits::Bits64 {
            return Err(Fault::ud());
        }
        let index = match instr.mnemonic() {
            Rdfsbase | Wrfsbase => Seg::FS,
            _ => Seg::GS,
        };
        let register = instr.op0_register();
        let number = register.full_register().number();
        if matches!(instr.mnemonic(), Rdfsbase | Rdgsbase) {
            let base = self.cpu.segments[index].base;
            self.set_gpr_sized(number, base, register.size() as u32);
        } else {
            let base = match register.size() {
                4 => self.gpr(number) & 0xffff_ffff,
                _ => self.gpr(number),
            };
            if !canonical(base) {
                return Err(Fault::gp());
            }
            self.set_segment_base(index, base);
        }
        Ok(())
    }
}

/// Unpacks an 8-byte descriptor.
fn unpack(selector: u16, raw: u64) -> Segment {
    // Bits 40-47 to 0-7 and 52-55 to 12-15, where `Segment` keeps them.
    let attributes = (raw >> 40 & 0xff) as u16 | ((raw >> 52 & 0xf) as u16) << 12;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
        limit: if attributes >> 15 == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        attributes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_long_mode_code_descriptor_unpacks() {
        let segment = unpack(8, 0x00af_9b00_0000_ffff);
        assert_eq!(segment.limit, u32::MAX);
        assert!(segment.long() && !segment.db() && segment.present());
        assert_eq!(
            (segment.base, segment.dpl(), segment.attributes),
            (0, 0, 0xa09b)
        );
    }
}
