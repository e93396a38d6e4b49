//! System state of the guest's CPU: everything that ordinary instructions don't touch.
//!
//! Plain data and its architectural predicates. Loading a value with its side effects (flushes,
//! faults) is `system/`'s business.

use engine_core::{CpuState, DescriptorTable, Segment};

/// CR0.PE: protection.
pub(crate) const CR0_PE: u64 = 1;
/// CR0.NE and the bits a processor without them set would fault on.
pub(crate) const CR0_ET: u64 = 1 << 4;
/// CR0.WP: supervisor writes obey read-only pages.
pub(crate) const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
pub(crate) const CR0_PG: u64 = 1 << 31;
/// CR0.AM: ring 3 may ask for alignment checks.
pub(crate) const CR0_AM: u64 = 1 << 18;
/// CR0.NW and CR0.CD, which exclude each other in one direction.
pub(crate) const CR0_NW: u64 = 1 << 29;
pub(crate) const CR0_CD: u64 = 1 << 30;
/// CR0.MP, CR0.EM and CR0.TS: FPU instructions fault.
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_EM: u64 = 1 << 2;
pub(crate) const CR0_TS: u64 = 1 << 3;
pub(crate) const CR4_TSD: u64 = 1 << 2;
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub(crate) const CR4_UMIP: u64 = 1 << 11;
pub(crate) const CR4_FSGSBASE: u64 = 1 << 16;
pub(crate) const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4 bits that the pinned CPUID announces on every host: VME PVI TSD DE PSE PAE MCE PGE PCE
/// OSFXSR OSXMMEXCPT UMIP FSGSBASE PCIDE SMEP SMAP PKE. OSXSAVE joins them where CPUID has XSAVE.
pub(crate) const CR4_ANNOUNCED: u64 =
    0x7ff | CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE;
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR4_PKE: u64 = 1 << 22;
/// XCR0: x87, SSE, AVX and PKRU state (SDM 1 13.3).
pub(crate) const XCR0_X87: u64 = 1;
pub(crate) const XCR0_SSE: u64 = 2;
pub(crate) const XCR0_AVX: u64 = 4;
pub(crate) const XCR0_PKRU: u64 = 1 << 9;
pub(crate) const EFER_SCE: u64 = 1;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const EFER_NXE: u64 = 1 << 11;

pub(crate) const FLAG_TF: u64 = 1 << 8;
pub(crate) const FLAG_IF: u64 = 1 << 9;
/// String instructions go down. It is in the host's flags while the guest runs.
pub(crate) const FLAG_DF: u64 = 1 << 10;
pub(crate) const FLAG_IOPL: u64 = 3 << 12;
pub(crate) const FLAG_NT: u64 = 1 << 14;
pub(crate) const FLAG_RF: u64 = 1 << 16;
pub(crate) const FLAG_VM: u64 = 1 << 17;
pub(crate) const FLAG_AC: u64 = 1 << 18;
pub(crate) const FLAG_ID: u64 = 1 << 21;
/// RFLAGS bits that are kept here, because the host's own must not take their values.
/// IF has a slot in the context.
pub(crate) const SYSTEM_FLAGS: u64 =
    FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_VM | FLAG_AC | FLAG_ID;

/// Index of segment registers, as instructions encode them.
pub(crate) use engine_core::CpuState as Seg;

/// Width of code, from EFER.LMA and the code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bits {
    Bits16,
    Bits32,
    Bits64,
}

/// True for linear addresses that 4-level paging can translate (SDM 1 3.3.7.1).
pub(crate) fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// System registers of one CPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cpu {
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// Bits of [`SYSTEM_FLAGS`].
    pub flags: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter: [u64; 3],
    pub tsc_aux: u64,
    /// What the guest's time-stamp counter is ahead of the host's.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// Rights of the protection keys.
    pub pkru: u32,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub xcr0: u64,
    /// IA32_APIC_BASE, which the machine keeps, switches the local APIC off: CPUID has none.
    pub apic_off: bool,
    /// Debug registers.
    pub dr: [u64; 8],
    /// No interrupt before the next instruction has ended (sti, mov ss, pop ss: SDM 3A 6.8.3).
    pub shadow: bool,
}

impl Cpu {
    /// Which bank of [`crate::tlb`] code belongs to.
    pub(crate) fn bank(&self) -> usize {
        const OTHER_HALF: u64 = 1 << 11;
        usize::from(self.cr4 & CR4_PCIDE != 0 && self.cr3 & OTHER_HALF != 0)
    }

    /// A CPU in the given architectural state, MSRs as after reset (SDM 3A table 10-1).
    pub(crate) fn new(state: &CpuState) -> Cpu {
        Cpu {
            segments: state.segments,
            ldtr: state.ldtr,
            tr: state.tr,
            gdtr: state.gdtr,
            idtr: state.idtr,
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: state.cr8,
            efer: state.efer,
            flags: state.rflags & SYSTEM_FLAGS,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            xcr0: XCR0_X87,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            ..Cpu::default()
        }
    }

    /// Takes over an architectural state; what it doesn't cover stays.
    pub(crate) fn load(&mut self, state: &CpuState) {
        let old = std::mem::take(self);
        *self = Cpu {
            star: old.star,
            lstar: old.lstar,
            cstar: old.cstar,
            fmask: old.fmask,
            kernel_gs_base: old.kernel_gs_base,
            sysenter: old.sysenter,
            tsc_aux: old.tsc_aux,
            tsc_offset: old.tsc_offset,
            tsc_adjust: old.tsc_adjust,
            pkru: old.pkru,
            pat: old.pat,
            misc_enable: old.misc_enable,
            mtrr_def_type: old.mtrr_def_type,
            xcr0: old.xcr0.max(XCR0_X87),
            apic_off: old.apic_off,
            dr: old.dr,
            ..Cpu::new(state)
        };
    }

    /// Current privilege level: SS.DPL in protected mode (SDM 3A 5.5).
    pub(crate) fn cpl(&self) -> u8 {
        if self.cr0 & CR0_PE == 0 {
            0
        } else {
            self.segments[Seg::SS].dpl()
        }
    }

    /// True in virtual-8086 mode.
    pub(crate) fn virtual_8086(&self) -> bool {
        self.flags & FLAG_VM != 0 && self.cr0 & CR0_PE != 0
    }

    /// True where selectors are addresses: real-address and virtual-8086 mode.
    pub(crate) fn real_addressing(&self) -> bool {
        self.cr0 & CR0_PE == 0 || self.flags & FLAG_VM != 0
    }

    /// Segments, one bit each, that hold less than all of memory or not for every access.
    pub(crate) fn limited_segments(&self) -> u8 {
        if self.bits() == Bits::Bits64 {
            return 0;
        }
        let whole = |segment: &Segment| {
            // Present, data, expand-up, writable.
            segment.attributes & 0x9e == 0x92 && segment.limit == u32::MAX
        };
        self.segments
            .iter()
            .enumerate()
            .filter(|(_, segment)| !whole(segment))
            .fold(0, |mask, (index, _)| mask | 1 << index)
    }

    /// True in IA-32e mode.
    pub(crate) fn long(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Width of the code that CS names.
    pub(crate) fn bits(&self) -> Bits {
        let cs = &self.segments[Seg::CS];
        if self.long() && cs.long() {
            Bits::Bits64
        } else if cs.db() {
            Bits::Bits32
        } else {
            Bits::Bits16
        }
    }

    /// I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        (self.flags >> 12 & 3) as u8
    }

    /// The part that engine-core exposes; registers and flags are the caller's.
    pub(crate) fn state(&self, gpr: [u64; 16], rip: u64, rflags: u64) -> CpuState {
        CpuState {
            gpr,
            rip,
            rflags,
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.cr8,
            efer: self.efer,
        }
    }
}
