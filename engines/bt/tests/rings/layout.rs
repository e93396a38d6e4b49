//! Where everything lies.
//!
//! ```text
//! 0x0_8000  handlers of 32-bit code, 16 bytes each     0x8_2000  the executive's own task
//! 0x0_9000  handlers of 64-bit code                    0x9_f000  its stack, growing down
//! 0x1_0000  sandbox, 64 KiB                            0x10_0000 image: code, sandboxes, cases
//! 0x4_0000  sandbox as it was                          0x8_1000  header of the case under way
//! 0x8_0000  what the case left
//! ```

/// Handlers, by vector.
pub(crate) const HANDLERS: u32 = 0x8000;
pub(crate) const LONG_HANDLERS: u32 = 0x9000;
pub(crate) const HANDLER_STEP: u32 = 16;

/// What cases may change.
pub(crate) const SANDBOX: u32 = 0x1_0000;
pub(crate) const SANDBOX_SIZE: u32 = 0x1_0000;
pub(crate) const BEFORE: u32 = 0x4_0000;

pub(crate) const SAVED: u32 = 0x8_0000;
pub(crate) const SAVED_WORDS: u32 = 64;
pub(crate) const HEADER: u32 = 0x8_1000;
pub(crate) const OWN_TSS: u32 = 0x8_2000;
/// Index of the case under way, and whether there is one.
pub(crate) const INDEX: u32 = 0x8_3000;
pub(crate) const UNDER_WAY: u32 = 0x8_3004;
/// Where the next case's record lies.
pub(crate) const NEXT: u32 = 0x8_3008;
/// A case is under way, or over.
pub(crate) const MAGIC: u32 = 0x5afe_ca5e;
pub(crate) const DONE: u32 = 0x0d0_0ced;
pub(crate) const STACK: u32 = 0x9_f000;

pub(crate) const IMAGE: u32 = 0x10_0000;
/// Within the image: how many cases, the first to run, sandboxes, cases.
pub(crate) const COUNT: u32 = IMAGE + 0x8000;
pub(crate) const FIRST: u32 = IMAGE + 0x8004;
pub(crate) const FIRST_RECORD: u32 = IMAGE + 0x8008;
/// Pointers to the executive's descriptor tables, and the GDT.
pub(crate) const OWN_GDT: u32 = IMAGE + 0x8100;
pub(crate) const OWN_IDT: u32 = IMAGE + 0x8110;
pub(crate) const OWN_GDT_TABLE: u32 = IMAGE + 0x8400;
pub(crate) const OWN_TASK_STATE: u32 = IMAGE + 0x8200;
pub(crate) const DIGITS: u32 = IMAGE + 0x8120;
pub(crate) const IMAGE_HANDLERS: u32 = IMAGE + 0xa000;
pub(crate) const TEMPLATES: u32 = IMAGE + 0x1_0000;
pub(crate) const CASES: u32 = IMAGE + 0x3_0000;

/// Offsets in the sandbox.
pub(crate) mod at {
    pub(crate) const GDT: u32 = 0;
    pub(crate) const LDT: u32 = 0x400;
    pub(crate) const TSS: u32 = 0x600;
    pub(crate) const TSS_B: u32 = 0x700;
    pub(crate) const TSS_C: u32 = 0x800;
    pub(crate) const TSS_16: u32 = 0x900;
    pub(crate) const IDT: u32 = 0x1000;
    pub(crate) const TABLES: u32 = 0x2000;
    pub(crate) const CODE: u32 = 0x6000;
    /// Places that far transfers go to.
    pub(crate) const PADS: u32 = 0x6800;
    pub(crate) const STACKS: u32 = 0x7000;
    pub(crate) const STACK: u32 = 0x7800;
    pub(crate) const DATA: u32 = 0x7c00;
}

/// The executive's selectors, in every GDT.
pub(crate) const OWN_CODE: u16 = 0x380;
pub(crate) const OWN_DATA: u16 = 0x388;
pub(crate) const OWN_CODE_64: u16 = 0x390;
pub(crate) const OWN_TASK: u16 = 0x3a0;

/// Offsets of the header's fields.
pub(crate) mod header {
    /// 0 for 32-bit tables, 1 for IA-32e mode.
    pub(crate) const LONG: u32 = 0;
    pub(crate) const CR0: u32 = 4;
    pub(crate) const CR3: u32 = 8;
    pub(crate) const CR4: u32 = 12;
    pub(crate) const EFER: u32 = 16;
    pub(crate) const GDTR: u32 = 20;
    pub(crate) const IDTR: u32 = 28;
    pub(crate) const LDTR: u32 = 36;
    pub(crate) const TR: u32 = 40;
    /// 1 to enter by iret, 0 by a far jump in ring 0.
    pub(crate) const BY_IRET: u32 = 44;
    pub(crate) const FLAGS: u32 = 48;
    pub(crate) const IP: u32 = 52;
    pub(crate) const CS: u32 = 56;
    pub(crate) const SP: u32 = 60;
    pub(crate) const SS: u32 = 64;
    pub(crate) const DS: u32 = 68;
    pub(crate) const ES: u32 = 72;
    pub(crate) const FS: u32 = 76;
    pub(crate) const GS: u32 = 80;
    pub(crate) const DR0: u32 = 84;
    pub(crate) const DR1: u32 = 88;
    pub(crate) const DR7: u32 = 92;
    /// Values of [`MSRS`], 8 bytes each.
    pub(crate) const MSR: u32 = 96;
    /// 16 of 8 bytes each.
    pub(crate) const GPR: u32 = 160;
    pub(crate) const PATCHES: u32 = 288;
    pub(crate) const SIZE: u32 = 292;
}

pub(crate) const MSRS: [u32; 8] = [
    0x174,
    0x175,
    0x176,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

/// Offsets in what a case leaves.
pub(crate) mod saved {
    /// Vector in the upper half, DS in the lower.
    pub(crate) const VECTOR: u32 = 0;
    /// 16 of 8 bytes each.
    pub(crate) const GPR: u32 = 8;
    /// In the order of their numbers, without DS.
    pub(crate) const ES: u32 = 136;
    pub(crate) const CS: u32 = 140;
    pub(crate) const SS: u32 = 144;
    pub(crate) const FS: u32 = 148;
    pub(crate) const GS: u32 = 152;
    pub(crate) const FLAGS: u32 = 156;
    pub(crate) const CR0: u32 = 160;
    pub(crate) const CR2: u32 = 164;
    pub(crate) const CR3: u32 = 172;
    pub(crate) const CR4: u32 = 176;
    pub(crate) const DR6: u32 = 180;
    pub(crate) const DR7: u32 = 184;
    pub(crate) const TR: u32 = 188;
    pub(crate) const LDTR: u32 = 192;
    pub(crate) const GDTR: u32 = 196;
    pub(crate) const IDTR: u32 = 208;
    pub(crate) const FS_BASE: u32 = 220;
    pub(crate) const GS_BASE: u32 = 228;
    pub(crate) const KERNEL_GS_BASE: u32 = 236;
    pub(crate) const EFER: u32 = 244;
    pub(crate) const ERROR: u32 = 252;
}
