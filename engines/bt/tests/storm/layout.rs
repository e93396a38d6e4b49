//! Where everything lies: what the guest's kernel needs, the frames with functions, and the regions of
//! linear addresses where frames come and go.

pub(crate) const PAGE: u64 = 4096;
pub(crate) const RAM_MIB: u64 = 16;
pub(crate) const RAM_BYTES: usize = (RAM_MIB as usize) << 20;

/// The kernel, mapped where it lies, for ring 0 alone.
pub(crate) const CODE: u64 = 0x10_0000;
pub(crate) const HANDLERS: u64 = 0x11_0000;
pub(crate) const HANDLER_STRIDE: u64 = 16;
pub(crate) const IDT: u64 = 0x20_0000;
pub(crate) const GDT: u64 = 0x20_1000;
pub(crate) const DISPATCH: u64 = 0x20_3000;
/// Whose turn it is.
pub(crate) const TICKET: u64 = 0x20_4000;
/// The part of ring 3 that is always there: a page of code and the stacks.
pub(crate) const USER_CODE: u64 = 0x40_0000;
pub(crate) const USER_END: u64 = 0x40_0000 + (MOST_CPUS as u64 + 1) * PAGE;
pub(crate) const MOST_CPUS: usize = 3;
pub(crate) const MOST_STEPS: usize = 4000;
pub(crate) const STEP_WORDS: usize = 4;
/// Page tables, one after another.
pub(crate) const TABLES: u64 = 0x68_0000;

/// What belongs to one vCPU.
#[derive(Clone, Copy)]
pub(crate) struct Own {
    pub(crate) tss: u64,
    pub(crate) descriptor: u64,
    pub(crate) stack: u64,
    pub(crate) nmi_stack: u64,
    pub(crate) user_stack: u64,
    /// What was folded before each step.
    pub(crate) trace: u64,
    /// The steps.
    pub(crate) steps: u64,
}

pub(crate) fn own(cpu: usize) -> Own {
    assert!(cpu < MOST_CPUS);
    let cpu = cpu as u64;
    Own {
        tss: 0x20_8000 + cpu * PAGE,
        descriptor: 0x21_0000 + cpu * PAGE,
        stack: 0x30_0000 + cpu * PAGE,
        nmi_stack: 0x31_0000 + cpu * PAGE,
        user_stack: USER_CODE + (cpu + 2) * PAGE,
        trace: 0x50_0000 + cpu * 0x1_0000,
        steps: 0x60_0000 + cpu * 0x2_0000,
    }
}

/// An external interrupt, and how many of it and of NMIs there were.
pub(crate) const INTERRUPT: u8 = 0x40;
pub(crate) const INTERRUPTS: u64 = 0x20_5000;

/// Ports: it isn't this vCPU's turn; a device is to write.
pub(crate) const WAIT_PORT: u16 = 0xf6;
pub(crate) const DEVICE_PORT: u16 = 0xf5;

/// Pages full of functions, in two groups, each at the start of a 2 MiB page; more than functions that
/// call each other in the next page can get through.
pub(crate) const GROUPS: [u64; 2] = [0x80_0000, 0xa0_0000];
pub(crate) const GROUP_FRAMES: u64 = 24;
pub(crate) const FRAMES: u64 = GROUP_FRAMES * GROUPS.len() as u64;

/// Physical address of frame `number`.
pub(crate) fn frame(number: u64) -> u64 {
    GROUPS[(number / GROUP_FRAMES) as usize] + number % GROUP_FRAMES * PAGE
}

/// Pages of a region that are ever mapped.
pub(crate) const REGION_PAGES: u64 = 8;

/// A piece of linear addresses that is mapped through one page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Region {
    /// One table for each space, seen at two addresses: below the window's end, and where Linux has
    /// stacks and libraries.
    Private,
    /// Mapped by a large page at times.
    Large,
    /// One table for all spaces, of global pages.
    Global,
    /// One table for each space, in the upper half.
    Upper,
}

impl Region {
    pub(crate) const ALL: [Region; 4] = [
        Region::Private,
        Region::Large,
        Region::Global,
        Region::Upper,
    ];

    /// Where it begins.
    pub(crate) fn bases(self) -> &'static [u64] {
        match self {
            Region::Private => &[0x4000_0000, 0x7f12_3440_0000],
            Region::Large => &[0x4020_0000],
            Region::Global => &[0x8000_0000],
            Region::Upper => &[0xffff_9000_0000_0000],
        }
    }
}

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
pub(crate) const USER: u64 = 4;
pub(crate) const USED: u64 = 1 << 5 | 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const GLOBAL: u64 = 1 << 8;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;

pub(crate) const CR0: u64 = 0x8000_0033;
pub(crate) const CR0_WP: u64 = 1 << 16;
/// PAE OSFXSR OSXMMEXCPT.
pub(crate) const CR4: u64 = 0x620;
pub(crate) const CR4_PGE: u64 = 1 << 7;
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR3_KEEP: u64 = 1 << 63;

pub(crate) const KERNEL_CS: u16 = 0x08;
pub(crate) const KERNEL_SS: u16 = 0x10;
pub(crate) const USER_SS: u16 = 0x1b;
pub(crate) const USER_CS: u16 = 0x23;
pub(crate) const TSS_SELECTOR: u16 = 0x28;

/// Offsets of the functions in their page; each calls or jumps to those before it alone.
pub(crate) const ENTRIES: [u64; 10] = [
    0x010, 0x040, 0x080, 0x0c0, 0x100, 0x140, 0x180, 0x1c0, 0x200, 0xff8,
];
/// In each page: a word that functions add, and the address of a function.
pub(crate) const DATA: u64 = 0x800;
pub(crate) const POINTER: u64 = 0x810;
