//! Extended state: XCR0, the XSAVE family, fxsave, and the x87 saves that show where the last
//! instruction was (SDM 1 chapter 13, SDM 2 on each).
//!
//! XMM and YMM registers are in the [`Context`] while this runs; x87 state is fetched from the
//! host's registers and put back. The last x87 instruction's address, which in the host's register
//! is that of the translated one, has been turned into the guest's by the run loop.
//!
//! XINUSE is worked out from the registers' contents, so a component is in its initial
//! configuration exactly if it holds the initial values. XSAVEOPT knows the init optimization and
//! leaves the modified optimization out, as a processor may (SDM 1 13.9).
//!
//! [`Context`]: crate::context::Context

use engine_core::cpuid::xsave_bytes;
use iced_x86::{Instruction, Mnemonic};

use crate::{
    core::Core,
    cpu::{Bits, CR0_TS, CR4_OSXSAVE, Seg, XCR0_AVX, XCR0_PKRU, XCR0_SSE, XCR0_X87, canonical},
    fault::{self, Fault},
    x87::{self, FCW, FDP, FIP, FOP, FSW, FTW, MXCSR, ST},
};

/// Offsets in an XSAVE area.
const XMM: usize = 160;
const HEADER: usize = 512;
const AVX: usize = 576;
const AVX_END: usize = 832;
/// PKRU and as much that is reserved.
const PKRU_BYTES: usize = 8;

const MXCSR_RESET: u32 = 0x1f80;
const COMPACTED: u64 = 1 << 63;

/// True for instructions that store the address of the last x87 instruction.
pub(crate) fn stores_x87_pointers(instr: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        instr.mnemonic(),
        Fxsave
            | Fxsave64
            | Fnsave
            | Fnstenv
            | Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
    )
}

impl Core {
    pub(super) fn xgetbv(&mut self) -> Result<(), Fault> {
        if self.cpu.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::ud());
        }
        let value = match self.gpr(1) as u32 {
            0 => self.cpu.xcr0,
            1 => {
                x87::fetch(self.context());
                self.cpu.xcr0 & self.in_use()
            }
            _ => return Err(Fault::gp()),
        };
        self.set_gpr(0, value & 0xffff_ffff);
        self.set_gpr(2, value >> 32);
        Ok(())
    }

    /// The caller has seen to the privilege.
    pub(super) fn xsetbv(&mut self) -> Result<(), Fault> {
        if self.cpu.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::ud());
        }
        if self.cpu.cpl() != 0 {
            return Err(Fault::gp());
        }
        let value = self.gpr(0) & 0xffff_ffff | self.gpr(2) << 32;
        let known = u64::from(engine_core::cpuid::pinned(0xd, 0)[0]);
        let alone = value & (XCR0_SSE | XCR0_AVX) == XCR0_AVX;
        if self.gpr(1) as u32 != 0 || value & !known != 0 || value & XCR0_X87 == 0 || alone {
            return Err(Fault::gp());
        }
        self.set_xcr0(value);
        Ok(())
    }

    /// Components that differ from their initial configuration.
    fn in_use(&mut self) -> u64 {
        let context = self.context();
        let area = &context.x87.0;
        let control = u16::from_le_bytes([area[FCW], area[FCW + 1]]) != 0x37f;
        let rest = area[FSW..MXCSR].iter().chain(&area[ST..XMM]);
        let x87 = control || rest.copied().any(|byte| byte != 0);
        let sse = context.xmm.0.iter().any(|&xmm| xmm != [0; 2]);
        let avx = context.upper != 0 && context.ymm_high.0.iter().any(|&high| high != [0; 2]);
        let pkru = self.cpu.pkru != 0;
        [
            (x87, XCR0_X87),
            (sse, XCR0_SSE),
            (avx, XCR0_AVX),
            (pkru, XCR0_PKRU),
        ]
        .into_iter()
        .filter_map(|(used, bit)| used.then_some(bit))
        .sum()
    }

    /// The legacy area as fxsave would store it, XMM registers included.
    fn legacy_area(&mut self, wide: bool) -> [u8; HEADER] {
        let context = self.context();
        x87::fetch(context);
        let mut area = context.x87.0;
        area[MXCSR..MXCSR + 4].copy_from_slice(&context.mxcsr.to_le_bytes());
        for (at, xmm) in area[XMM..416].chunks_exact_mut(16).zip(context.xmm.0) {
            at[..8].copy_from_slice(&xmm[0].to_le_bytes());
            at[8..].copy_from_slice(&xmm[1].to_le_bytes());
        }
        if !wide {
            // 32-bit offsets and selectors; the latter are no longer stored (CPUID.7.EBX[13]).
            area[FIP + 4..FIP + 8].fill(0);
            area[FDP + 4..FDP + 8].fill(0);
        }
        area
    }

    pub(super) fn fxsave(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let at = self.operand(instr, 512, true)?;
        self.check_area(instr, at, 16)?;
        let area = self.legacy_area(instr.mnemonic() == Mnemonic::Fxsave64);
        let long = self.cpu.bits() == Bits::Bits64;
        let user = self.user();
        self.probe_write(at, 512, user)
            .map_err(|fault| self.on_operand(instr, fault))?;
        self.write(at, &area[..if long { 416 } else { 288 }], user)
    }

    /// What every instruction of the family checks first; the area's address.
    fn xsave_area(&self, instr: &Instruction) -> Result<u64, Fault> {
        if self.cpu.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::ud());
        }
        if self.cpu.cr0 & CR0_TS != 0 {
            return Err(Fault::plain(fault::NM));
        }
        let at = self.operand(instr, 576, false)?;
        self.check_area(instr, at, 64)?;
        Ok(at)
    }

    /// Refuses an area at `at` that isn't aligned; that there is no such address comes first.
    fn check_area(&self, instr: &Instruction, at: u64, alignment: u64) -> Result<(), Fault> {
        let fault = Fault::gp();
        match at.is_multiple_of(alignment) {
            true => Ok(()),
            false if canonical(at) => Err(fault),
            false => Err(self.on_operand(instr, fault)),
        }
    }

    fn requested(&self) -> u64 {
        (self.gpr(0) & 0xffff_ffff | self.gpr(2) << 32) & self.cpu.xcr0
    }

    /// xsave, xsaveopt, xsavec (SDM 1 13.7, 13.9, 13.10).
    pub(super) fn xsave(&mut self, instr: &Instruction) -> Result<(), Fault> {
        use Mnemonic::*;
        let at = self.xsave_area(instr)?;
        let wide = matches!(instr.mnemonic(), Xsave64 | Xsaveopt64 | Xsavec64);
        let compacts = matches!(instr.mnemonic(), Xsavec | Xsavec64);
        let optimizes = compacts || matches!(instr.mnemonic(), Xsaveopt | Xsaveopt64);
        let user = self.user();
        let requested = self.requested();
        let size = xsave_bytes(requested, compacts);
        self.probe_write(at, size, user)
            .map_err(|fault| self.on_operand(instr, fault))?;
        let area = self.legacy_area(wide);
        let mut in_use = self.in_use();
        if compacts && self.context().mxcsr != MXCSR_RESET {
            in_use |= XCR0_SSE;
        }
        let saved = if optimizes {
            requested & in_use
        } else {
            requested
        };
        let long = self.cpu.bits() == Bits::Bits64;
        let put = |core: &mut Core, from: usize, bytes: &[u8]| {
            core.write(at.wrapping_add(from as u64), bytes, user)
        };
        if saved & XCR0_X87 != 0 {
            put(self, 0, &area[..MXCSR])?;
            put(self, ST, &area[ST..XMM])?;
        }
        let control = if compacts {
            saved & XCR0_SSE
        } else {
            requested & (XCR0_SSE | XCR0_AVX)
        };
        if control != 0 {
            put(self, MXCSR, &area[MXCSR..ST])?;
        }
        if saved & XCR0_SSE != 0 {
            put(self, XMM, &area[XMM..if long { 416 } else { 288 }])?;
        }
        if saved & XCR0_AVX != 0 {
            let registers = if long { 16 } else { 8 };
            for register in 0..registers {
                let [_, _, low, high] = self.ymm(register);
                let place = AVX + 16 * register;
                put(self, place, &low.to_le_bytes())?;
                put(self, place + 8, &high.to_le_bytes())?;
            }
        }
        if saved & XCR0_PKRU != 0 {
            let rights = u64::from(self.cpu.pkru);
            let place = size as usize - PKRU_BYTES;
            put(self, place, &rights.to_le_bytes())?;
        }
        let header = at.wrapping_add(HEADER as u64);
        let before = if compacts { 0 } else { self.load(header, 8)? };
        let present = before & !requested | requested & in_use;
        put(self, HEADER, &present.to_le_bytes())?;
        if compacts {
            put(self, HEADER + 8, &(requested | COMPACTED).to_le_bytes())?;
        }
        Ok(())
    }

    /// SDM 1 13.8.
    pub(super) fn xrstor(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let at = self.xsave_area(instr)?;
        let requested = self.requested();
        let user = self.user();
        let on_operand = |core: &Core, fault| core.on_operand(instr, fault);
        let mut area = [0u8; AVX_END];
        // The header decides what else is read.
        self.mmu
            .read(&self.cpu, at, &mut area[..AVX], user)
            .map_err(|fault| on_operand(self, fault))?;
        let word =
            |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| area[HEADER + at + byte]));
        let (present, layout) = (word(0), word(8));
        let compacted = layout & COMPACTED != 0;
        let bad = if compacted {
            layout & !COMPACTED & !self.cpu.xcr0 != 0
                || present & !layout != 0
                || (16..64).step_by(8).any(|at| word(at) != 0)
        } else {
            present & !self.cpu.xcr0 != 0 || layout != 0 || word(16) != 0
        };
        let loads_control = if compacted {
            requested & present & XCR0_SSE != 0
        } else {
            requested & (XCR0_SSE | XCR0_AVX) != 0
        };
        let control = u32::from_le_bytes(std::array::from_fn(|byte| area[MXCSR + byte]));
        if bad || loads_control && control & !0xffff != 0 {
            return Err(Fault::gp());
        }
        if requested & present & XCR0_AVX != 0 {
            let rest = at.wrapping_add(AVX as u64);
            self.mmu
                .read(&self.cpu, rest, &mut area[AVX..], user)
                .map_err(|fault| on_operand(self, fault))?;
        }
        let mut rights = [0; PKRU_BYTES];
        if requested & present & XCR0_PKRU != 0 {
            // What lies before it in a compacted area is what the area has, wanted or not.
            let before = if compacted { layout } else { XCR0_PKRU };
            let end = u64::from(xsave_bytes(before | XCR0_PKRU, compacted));
            let place = at.wrapping_add(end - PKRU_BYTES as u64);
            self.mmu
                .read(&self.cpu, place, &mut rights, user)
                .map_err(|fault| on_operand(self, fault))?;
        }
        let wide = instr.mnemonic() == Mnemonic::Xrstor64;
        let registers = if self.cpu.bits() == Bits::Bits64 {
            16
        } else {
            8
        };
        if requested & XCR0_X87 != 0 {
            let context = self.context();
            x87::reset(&mut context.x87);
            if present & XCR0_X87 != 0 {
                context.x87.0[..MXCSR].copy_from_slice(&area[..MXCSR]);
                context.x87.0[ST..XMM].copy_from_slice(&area[ST..XMM]);
                if !wide {
                    context.x87.0[FIP + 4..FIP + 8].fill(0);
                    context.x87.0[FDP + 4..FDP + 8].fill(0);
                }
            }
            x87::store(context);
        }
        if loads_control {
            self.context().mxcsr = control;
        } else if compacted && requested & XCR0_SSE != 0 {
            self.context().mxcsr = MXCSR_RESET;
        }
        let pair = |at: usize| {
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| area[at + byte]));
            [word(at), word(at + 8)]
        };
        for register in 0..registers {
            let [a, b, c, d] = self.ymm(register);
            let (mut low, mut high) = ([a, b], [c, d]);
            if requested & XCR0_SSE != 0 {
                low = if present & XCR0_SSE != 0 {
                    pair(XMM + 16 * register)
                } else {
                    [0; 2]
                };
            }
            if requested & XCR0_AVX != 0 {
                high = if present & XCR0_AVX != 0 {
                    pair(AVX + 16 * register)
                } else {
                    [0; 2]
                };
            }
            self.context().xmm.0[register] = low;
            if high != [c, d] {
                self.set_ymm(register, [low[0], low[1], high[0], high[1]]);
            }
        }
        if requested & XCR0_PKRU != 0 {
            let [a, b, c, d, ..] = rights;
            self.set_key_rights(u32::from_le_bytes([a, b, c, d]));
        }
        Ok(())
    }

    /// The last x87 opcode (SDM 1 8.1.9) of the instruction at `ip` of the running code, as far as its
    /// bytes can still be read.
    pub(crate) fn x87_opcode(&self, ip: u64) -> Option<u16> {
        let long = self.cpu.bits() == Bits::Bits64;
        let base = self.cpu.segments[Seg::CS].base;
        let byte = |at: u64| {
            let address = match ip.wrapping_add(at) {
                offset if long => offset,
                offset => offset.wrapping_add(base) & 0xffff_ffff,
            };
            // Code of ring 3 can be read whatever SMAP says.
            let read = |user| self.mmu.read_int::<1>(&self.cpu, address, user);
            let byte = read(true).or_else(|_| read(false));
            byte.ok().map(|byte| byte as u8)
        };
        x87::opcode(byte, long)
    }

    /// fnstenv and fnsave (SDM 1 8.1.10).
    pub(super) fn x87_environment(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let all = instr.mnemonic() == Mnemonic::Fnsave;
        let size = instr.memory_size().size() as u32;
        let narrow = matches!(size, 14 | 94);
        let context = self.context();
        x87::fetch(context);
        let area = context.x87.0;
        let half = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| area[at + byte]));
        let control = half(FCW);
        let opcode = half(FOP) & 0x7ff;
        let fields = [control, half(FSW), x87::full_tags(&area)];
        let mut image = Vec::with_capacity(size as usize);
        if narrow {
            for field in fields.into_iter().chain([half(FIP), 0, half(FDP), 0]) {
                image.extend(field.to_le_bytes());
            }
        } else {
            for field in fields {
                // The upper halves read as ones on every processor since the 387.
                image.extend((u32::from(field) | 0xffff_0000).to_le_bytes());
            }
            image.extend(word(FIP).to_le_bytes());
            image.extend((u32::from(opcode) << 16).to_le_bytes());
            image.extend(word(FDP).to_le_bytes());
            image.extend(0xffff_0000u32.to_le_bytes());
        }
        if all {
            for register in 0..8 {
                let at = ST + 16 * register;
                image.extend(&area[at..at + 10]);
            }
        }
        let at = self.operand(instr, size, true)?;
        let user = self.user();
        self.write(at, &image, user)
            .map_err(|fault| self.on_operand(instr, fault))?;
        let context = self.context();
        if all {
            x87::reset(&mut context.x87);
            // finit leaves the registers' contents, empty as they are. The area is in the order of the
            // stack, whose top is register 0 now.
            let top = usize::from(half(FSW) >> 11 & 7);
            for register in 0..8 {
                let (from, to) = (ST + 16 * ((register + 8 - top) % 8), ST + 16 * register);
                context.x87.0[to..to + 16].copy_from_slice(&area[from..from + 16]);
            }
        } else {
            // All exceptions masked, so none is pending.
            context.x87.0[FCW] |= 0x3f;
            context.x87.0[FSW] &= !0x80;
            context.x87.0[FSW + 1] &= !0x80;
        }
        debug_assert!(context.x87.0[FTW] == area[FTW] || all);
        x87::store(context);
        Ok(())
    }
}
