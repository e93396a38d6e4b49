//! Where everything lies, on the host and in the guest alike, and the states before and after a
//! sequence.
//!
//! All addresses are below 2 GiB, so absolute displacements reach them, unless the tests were built with
//! another place for the data. Between and around the pages named here nothing is mapped on either side.

use iced_x86::{MemoryOperand, Register};

pub(crate) const PAGE: u64 = 4096;

/// Code: one slot for each sequence of a batch, four executable pages and four unmapped ones each.
pub(crate) const CODE: u64 = 0x1000_0000;
pub(crate) const SLOTS: usize = 256;
pub(crate) const SLOT_STRIDE: u64 = 8 * PAGE;
pub(crate) const SLOT_BYTES: usize = 4 * PAGE as usize;

/// True where there is code of some sequence of a batch.
pub(crate) fn in_code(address: u64) -> bool {
    let at = address.wrapping_sub(CODE);
    at < SLOTS as u64 * SLOT_STRIDE && at % SLOT_STRIDE < SLOT_BYTES as u64
}

/// Data, as eight pages of which [`DATA_PAGES`] are mapped, besides those at [`EDGE`] and [`FAR`].
pub(crate) const DATA: u64 = match option_env!("TRAPLINE_ORACLE_DATA") {
    Some(digits) => hexadecimal(digits.as_bytes()),
    None => 0x2000_0000,
};

const fn hexadecimal(mut digits: &[u8]) -> u64 {
    let mut value = 0;
    while let [first, rest @ ..] = digits {
        value = value << 4
            | match *first {
                digit @ b'0'..=b'9' => digit - b'0',
                digit @ b'a'..=b'f' => digit - b'a' + 10,
                _ => panic!("not a hexadecimal digit"),
            } as u64;
        digits = rest;
    }
    value
}

/// An operand that leads to `address` of the data without a register: absolute, or by GS.
pub(crate) fn operand(address: u64) -> MemoryOperand {
    match i32::try_from(address) {
        Ok(_) => MemoryOperand::with_displ(address, 8),
        Err(_) => {
            let offset = address.wrapping_sub(GS_BASE) as i64;
            MemoryOperand::with_base_displ_size_bcst_seg(
                Register::None,
                offset,
                8,
                false,
                Register::GS,
            )
        }
    }
}

/// Two pages on both sides of the window's end, unless the data is somewhere there.
pub(crate) const EDGE: u64 = if DATA >> 38 == 0 {
    (1 << 39) - PAGE
} else {
    0x5000_0000
};
/// A page that is farther away than anything the window's base and its guards span.
pub(crate) const FAR: u64 = if DATA >> 38 == 0 {
    1 << 46
} else {
    0x6000_0000
};

const fn number(address: u64) -> u64 {
    address.wrapping_sub(DATA) / PAGE
}

/// (page number from DATA, writable).
pub(crate) const DATA_PAGES: [(u64, bool); 9] = [
    (0, true),
    (1, true),
    (2, true),
    (3, true),
    (4, false),
    (6, true),
    (number(EDGE), true),
    (number(EDGE + PAGE), true),
    (number(FAR), true),
];

/// Address of the data's page with this number.
pub(crate) const fn data_page(number: u64) -> u64 {
    DATA.wrapping_add(number.wrapping_mul(PAGE))
}
pub(crate) const DATA_BYTES: usize = DATA_PAGES.len() * PAGE as usize;
/// Base of GS.
pub(crate) const GS_BASE: u64 = DATA + 0x1800;

/// The code that loads a [`Start`], executable.
pub(crate) const PROLOGUE: u64 = 0x3000_0000;
/// What it loads from, writable.
pub(crate) const CONTROL: u64 = 0x3001_0000;

/// Behind the [`Start`]: where a program goes on after its next fault, or 0; where that fault is noted; and the
/// notes: general registers in encoding order, RIP, vector, DF.
pub(crate) const LANDING: u64 = CONTROL + 0x500;
pub(crate) const NOTED: u64 = CONTROL + 0x508;
pub(crate) const NOTES: u64 = CONTROL + 0x510;
pub(crate) type Note = [u64; 19];
pub(crate) const NOTE_RIP: usize = 16;
pub(crate) const NOTE_VECTOR: usize = 17;
pub(crate) const NOTE_DIRECTION: usize = 18;
/// Faults that a program goes on after.
pub(crate) const MOST_NOTES: usize = 6;
pub(crate) const DIRECTION: u64 = 1 << 10;
/// RFLAGS where it goes on.
pub(crate) const LANDING_FLAGS: u64 = 0x202;

/// Selectors, as Linux gives them to a 64-bit process (arch/x86/include/asm/segment.h).
pub(crate) const USER_CS: u16 = 0x33;
pub(crate) const USER_SS: u16 = 0x2b;

/// Arithmetic flags and DF.
pub(crate) const COMPARED_FLAGS: u64 = 0xcd5;

/// Bytes of an XSAVE area with x87, SSE and AVX state (SDM 1 13.4).
pub(crate) const FX_BYTES: usize = 832;
/// Where its XSTATE_BV is, and the upper halves of the YMM registers.
pub(crate) const FX_PRESENT: usize = 512;
pub(crate) const FX_AVX: usize = 576;

/// True if host and guest have AVX: without it fxsave serves.
pub(crate) fn avx() -> bool {
    engine_core::cpuid::pinned(1, 0)[2] >> 28 & 1 == 1
}

/// Registers before the first instruction.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub(crate) struct Start {
    /// In the layout of xsave64, standard form, x87, SSE and AVX.
    pub(crate) fx: [u8; FX_BYTES],
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
}

/// How a sequence ended: always in an exception.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub(crate) struct End {
    /// In the layout of xsave64, standard form, x87, SSE and AVX.
    pub(crate) fx: [u8; FX_BYTES],
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    pub(crate) cr2: u64,
    /// One of the `OUTCOME_` constants.
    pub(crate) outcome: u64,
    pub(crate) memory: [u8; DATA_BYTES],
    /// Of the faults that it went on after.
    pub(crate) notes: [Note; MOST_NOTES],
}

pub(crate) const OUTCOME_NONE: u64 = 0;
pub(crate) const OUTCOME_ENDED: u64 = 1;
/// It made a system call; there is nothing to compare.
pub(crate) const OUTCOME_SYSTEM_CALL: u64 = 2;

impl End {
    pub(crate) fn new() -> End {
        End {
            fx: [0; FX_BYTES],
            gpr: [0; 16],
            rflags: 0,
            rip: 0,
            vector: 0,
            error: 0,
            cr2: 0,
            outcome: OUTCOME_NONE,
            memory: [0; DATA_BYTES],
            notes: [[0; _]; MOST_NOTES],
        }
    }
}

/// Address of the first byte of a slot.
pub(crate) fn slot(index: usize) -> u64 {
    CODE + index as u64 * SLOT_STRIDE
}

/// Names of general registers in encoding order.
pub(crate) const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
