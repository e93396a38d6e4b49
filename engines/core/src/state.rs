//! Architectural CPU state as every engine exposes it: what a crash report prints, what a loader
//! sets at boot, what lockstep compares.

use std::fmt;

use crate::cpuid;

/// A segment register with its hidden part (SDM 3A 3.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights as in the descriptor's bits 40-55: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
}

impl Segment {
    /// A segment of all addresses.
    pub fn flat(selector: u16, attributes: u16) -> Segment {
        Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            attributes,
        }
    }

    /// LDTR without a table.
    pub fn no_ldt() -> Segment {
        Segment {
            attributes: 0x82,
            ..Segment::default()
        }
    }

    /// TR with a task state segment that has no I/O permissions, busy.
    pub fn tss(selector: u16, base: u64) -> Segment {
        Segment {
            selector,
            base,
            limit: 0x67,
            attributes: 0x8b,
        }
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// 64-bit code segment (L).
    pub fn long(&self) -> bool {
        self.attributes >> 13 & 1 == 1
    }
    /// Default operand size / big stack (D/B).
    pub fn db(&self) -> bool {
        self.attributes >> 14 & 1 == 1
    }
    /// Present bit.
    pub fn present(&self) -> bool {
        self.attributes >> 7 & 1 == 1
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Architectural state of one vCPU, without FPU and vector registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CpuState {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15: in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// es, cs, ss, ds, fs, gs: in encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Paging root.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority.
    pub cr8: u64,
    /// Extended feature enables.
    pub efer: u64,
}

impl CpuState {
    /// Index of ES in [`CpuState::segments`].
    pub const ES: usize = 0;
    /// Index of CS in [`CpuState::segments`].
    pub const CS: usize = 1;
    /// Index of SS in [`CpuState::segments`].
    pub const SS: usize = 2;
    /// Index of DS in [`CpuState::segments`].
    pub const DS: usize = 3;
    /// Index of FS in [`CpuState::segments`].
    pub const FS: usize = 4;
    /// Index of GS in [`CpuState::segments`].
    pub const GS: usize = 5;

    /// State at a PVH entry point: 32-bit protected mode, flat segments, paging off, `rbx` holding
    /// the physical address of `hvm_start_info` (Xen docs/misc/pvh.markdown).
    pub fn pvh_entry(entry: u32, start_info: u32) -> Self {
        let data = Segment::flat(0x10, 0xc093);
        let code = Segment::flat(0x08, 0xc09b);
        let mut state = CpuState {
            rip: entry.into(),
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: Segment::no_ldt(),
            tr: Segment::tss(0, 0),
            // PE and ET; everything else is off.
            cr0: 0x11,
            ..CpuState::default()
        };
        state.gpr[3] = start_info.into();
        state
    }

    /// State after INIT (SDM 3A table 10-1): real-address mode, at the reset vector.
    pub fn after_init() -> Self {
        let segment = |attributes| Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes,
        };
        let data = segment(0x93);
        let code = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            ..segment(0x9b)
        };
        let table = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        let mut state = CpuState {
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: segment(0x82),
            tr: segment(0x8b),
            gdtr: table,
            idtr: table,
            // CD, NW and ET.
            cr0: 0x6000_0010,
            ..CpuState::default()
        };
        // EDX tells the processor's signature.
        state.gpr[2] = cpuid::pinned(1, 0)[0].into();
        state
    }

    /// State in which INIT leaves a boot processor whose firmware lies in the last 64 KiB of the first
    /// MiB alone: at its reset vector there.
    pub fn at_firmware() -> Self {
        let mut state = Self::after_init();
        state.segments[Self::CS].base = 0xf_0000;
        state
    }

    /// State after INIT and a start-up IPI with `vector` (SDM 3A 10.4.4): at the start of that page
    /// below 1 MiB.
    pub fn startup(vector: u8) -> Self {
        let mut state = Self::after_init();
        let code = &mut state.segments[Self::CS];
        code.selector = u16::from(vector) << 8;
        code.base = u64::from(vector) << 12;
        state.rip = 0;
        state
    }
}

/// The names of [`CpuState::gpr`], in its order.
const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
/// The names of [`CpuState::segments`], in its order.
const SEGMENT_NAMES: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

impl fmt::Display for CpuState {
    /// Several lines, without a newline at the end: what a crash report shows.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rip={:016x} rflags={:08x}", self.rip, self.rflags)?;
        for (names, values) in GPR_NAMES.chunks(4).zip(self.gpr.chunks(4)) {
            for (column, (name, value)) in names.iter().zip(values).enumerate() {
                let space = if column == 0 { "" } else { " " };
                write!(f, "{space}{name:3}={value:016x}")?;
            }
            writeln!(f)?;
        }
        let named = SEGMENT_NAMES.into_iter().zip(self.segments);
        for (name, segment) in named.chain([("ldtr", self.ldtr), ("tr", self.tr)]) {
            writeln!(
                f,
                "{name:4}={:04x} base={:016x} limit={:08x} attributes={:04x}",
                segment.selector, segment.base, segment.limit, segment.attributes
            )?;
        }
        for (name, table) in [("gdtr", self.gdtr), ("idtr", self.idtr)] {
            writeln!(
                f,
                "{name} base={:016x} limit={:04x}",
                table.base, table.limit
            )?;
        }
        write!(
            f,
            "cr0={:08x} cr2={:016x} cr3={:016x} cr4={:08x} cr8={:x} efer={:04x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.cr8, self.efer
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_started_processor_is_in_real_mode_at_its_page() {
        let state = CpuState::startup(0x9a);
        let code = state.segments[CpuState::CS];
        assert_eq!((code.selector, code.base, state.rip), (0x9a00, 0x9_a000, 0));
        assert_eq!(state.cr0 & (1 << 31 | 1), 0);
        assert_eq!(
            CpuState::after_init().segments[CpuState::CS].base,
            0xffff_0000
        );
    }
}
