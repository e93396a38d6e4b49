//! Tiny guests, put together on the fly: for tests of the run loop and of every engine. [`scripted`]
//! has a vCPU that needs no engine.
//!
//! [`Guest`] builds an ELF image with a PVH note around machine code. [`Guest::protected`] starts
//! the code where PVH does, in 32-bit protected mode; [`Guest::long`] puts a boot stub before it
//! that enters 64-bit mode with an identity map of the first GiB, and of the last one below 4 GiB
//! where devices are; both open to ring 3.
//!
//! ```
//! use engine_core::testing::{Guest, end};
//!
//! let image = Guest::long(|asm| end(asm, 0)).elf();
//! assert!(engine_core::loader::check(&image).is_ok());
//! ```

pub mod scripted;

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, cr0, cr3, cr4, eax, ecx, edx, ptr, rsp};

/// Physical address at which the code of a tiny guest lies.
pub const CODE: u64 = 0x10_0000;
/// Physical address of the tables that [`Guest::long`] brings along.
pub const TABLES: u64 = 0x20_0000;
/// First stack address of [`Guest::long`]; it grows down.
pub const STACK: u64 = 0x30_0000;
/// Bytes mapped from address 0 in [`Guest::long`].
pub const MAPPED: u64 = 1 << 30;

/// Selectors of the GDT of [`Guest::long`].
pub mod selector {
    /// Ring-0 64-bit code.
    pub const CODE: u16 = 0x08;
    /// Ring-0 data.
    pub const DATA: u16 = 0x10;
    /// Ring-3 data, with its RPL.
    pub const USER_DATA: u16 = 0x18 | 3;
    /// Ring-3 64-bit code, with its RPL.
    pub const USER_CODE: u16 = 0x20 | 3;
}

const PAGE: u64 = 0x1000;
const PML4: u64 = TABLES;
const PDPT: u64 = TABLES + PAGE;
const PD: u64 = TABLES + 2 * PAGE;
const DEVICE_PD: u64 = TABLES + 3 * PAGE;
const GDT: u64 = TABLES + 4 * PAGE;
const GDT_ENTRIES: [u64; 5] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
const GDT_POINTER: u64 = GDT + 0x100;
const TABLES_END: u64 = GDT + PAGE;

/// EFER and its LME bit.
const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;
const CR4_PAE_OSFXSR: u32 = 1 << 5 | 1 << 9;
const CR0_PG_WP_MP_PE: u32 = 1 << 31 | 1 << 16 | 1 << 1 | 1;

/// A tiny guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// (physical address, content, size in memory) of each segment.
    pub segments: Vec<(u64, Vec<u8>, u64)>,
    /// Entry point of the PVH note; no note without it.
    pub entry: Option<u32>,
}

/// Assembles code for `bits` mode at `address`.
///
/// # Panics
/// If it can't be assembled: the code is part of a test.
pub fn assemble(
    bits: u32,
    address: u64,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut asm = CodeAssembler::new(bits).expect("16, 32 or 64 bits");
    body(&mut asm).expect("the code can be assembled");
    asm.assemble(address).expect("the code can be encoded")
}

impl Guest {
    /// A guest of this code, entered in 32-bit protected mode at [`CODE`].
    pub fn from_code(code: &[u8]) -> Self {
        Guest {
            segments: vec![(CODE, code.to_vec(), code.len() as u64)],
            entry: Some(CODE as u32),
        }
    }

    /// A guest of 32-bit code.
    pub fn protected(body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        Self::from_code(&assemble(32, CODE, body))
    }

    /// A guest of 64-bit ring-0 code, entered with a stack, an identity map and no IDT.
    pub fn long(body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        // The far jump needs to know where the 64-bit code begins; its length does not depend on it.
        let length = assemble(32, CODE, |asm| boot_stub(asm, CODE)).len() as u64;
        let start = CODE + length;
        let mut code = assemble(32, CODE, |asm| boot_stub(asm, start));
        code.extend(assemble(64, start, |asm| {
            asm.mov(rsp, STACK)?;
            body(asm)
        }));
        let mut guest = Self::from_code(&code);
        let tables = tables();
        guest.segments.push((TABLES, tables, TABLES_END - TABLES));
        guest
    }

    /// The image as an ELF64 file.
    pub fn elf(&self) -> Vec<u8> {
        const HEADER: usize = 64;
        const PROGRAM_HEADER: usize = 56;
        let note = self.entry.map(|entry| {
            let mut note = Vec::new();
            for word in [4u32, 4, 18] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Xen\0");
            note.extend_from_slice(&entry.to_le_bytes());
            note
        });
        let count = self.segments.len() + usize::from(note.is_some());
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&2u16.to_le_bytes()); // ET_EXEC
        file.extend_from_slice(&62u16.to_le_bytes()); // EM_X86_64
        file.extend_from_slice(&1u32.to_le_bytes());
        for word in [u64::from(self.entry.unwrap_or(0)), HEADER as u64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [HEADER, PROGRAM_HEADER, count, 64, 0, 0] {
            file.extend_from_slice(&(half as u16).to_le_bytes());
        }
        let mut content = Vec::new();
        let base = HEADER + PROGRAM_HEADER * count;
        let note = note.map(|note| (4u32, 0, note.len() as u64, note));
        let loads = self
            .segments
            .iter()
            .map(|(address, bytes, size)| (1u32, *address, *size, bytes.clone()));
        for (kind, address, size, bytes) in note.into_iter().chain(loads) {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&7u32.to_le_bytes()); // flags
            content.resize(content.len().next_multiple_of(4), 0);
            let offset = (base + content.len()) as u64;
            for word in [offset, address, address, bytes.len() as u64, size, 4] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            content.extend_from_slice(&bytes);
        }
        file.extend(content);
        file
    }
}

/// Ends the guest with `code`; clobbers eax.
///
/// # Errors
/// iced's, as every assembling function.
pub fn end(asm: &mut CodeAssembler, code: u32) -> Result<(), IcedError> {
    asm.mov(eax, code)?;
    asm.out(u32::from(abi::port::EXIT), eax)
}

/// An ELF image of 32-bit code, entered at its first byte.
pub fn tiny_elf(code32: &[u8]) -> Vec<u8> {
    Guest::from_code(code32).elf()
}

fn boot_stub(asm: &mut CodeAssembler, long_mode: u64) -> Result<(), IcedError> {
    use iced_x86::code_asm::{ds, es, ss};
    asm.mov(eax, CR4_PAE_OSFXSR)?;
    asm.mov(cr4, eax)?;
    asm.mov(eax, PML4 as u32)?;
    asm.mov(cr3, eax)?;
    asm.mov(ecx, EFER)?;
    asm.mov(eax, EFER_LME)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.lgdt(ptr(GDT_POINTER as u32))?;
    asm.mov(eax, CR0_PG_WP_MP_PE)?;
    asm.mov(cr0, eax)?;
    asm.mov(eax, u32::from(selector::DATA))?;
    asm.mov(ds, eax)?;
    asm.mov(es, eax)?;
    asm.mov(ss, eax)?;
    // jmp far CODE:long_mode, for which the assembler has no form.
    let mut jump = vec![0xea];
    jump.extend_from_slice(&(long_mode as u32).to_le_bytes());
    jump.extend_from_slice(&selector::CODE.to_le_bytes());
    asm.db(&jump)
}

/// Page tables (2 MiB pages, present, writable, user) and GDT, as they lie from [`TABLES`] on.
pub fn tables() -> Vec<u8> {
    const TABLE_BITS: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    const UNCACHED: u64 = 1 << 4;
    let mut bytes = vec![0; (TABLES_END - TABLES) as usize];
    let mut put = |address: u64, value: u64| {
        let at = (address - TABLES) as usize;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(PML4, PDPT | TABLE_BITS);
    put(PDPT, PD | TABLE_BITS);
    // Entry 3 maps 3 to 4 GiB, uncached.
    put(PDPT + 3 * 8, DEVICE_PD | TABLE_BITS);
    for index in 0..512 {
        put(PD + index * 8, index << 21 | LARGE | TABLE_BITS);
        let device = 3 << 30 | index << 21;
        put(
            DEVICE_PD + index * 8,
            device | UNCACHED | LARGE | TABLE_BITS,
        );
    }
    for (index, entry) in GDT_ENTRIES.iter().enumerate() {
        put(GDT + index as u64 * 8, *entry);
    }
    // Limit in the low 16 bits, base after it.
    let limit = GDT_ENTRIES.len() as u64 * 8 - 1;
    put(GDT_POINTER, GDT << 16 | limit);
    bytes
}
