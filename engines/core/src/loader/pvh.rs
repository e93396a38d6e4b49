//! The PVH boot information: `hvm_start_info` version 1 with a memory map and a command line.
//!
//! Layout: Xen public/arch-x86/hvm/start_info.h. Everything lies below 64 KiB, where no image may:
//! a guest reads it early and may then use the memory.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::LoadError;
use super::modules::{self, Module};
use crate::{GuestRam, memory};

/// Physical address of `hvm_start_info`, which `rbx` holds at entry.
pub(super) const START_INFO: u32 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x7000;
const COMMAND_LINE_BYTES: usize = 0x1000;
/// Where the boot information lies.
pub(super) const TAKEN: Range<u64> = START_INFO as u64..COMMAND_LINE + COMMAND_LINE_BYTES as u64;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Where a PC's BIOS keeps its own data, and what lies up to 1 MiB: not for the guest to use as RAM.
const LOW_RAM_END: u64 = 0x9_fc00;
const ONE_MIB: u64 = 0x10_0000;

pub(super) const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// The guest's memory map: (start, length in bytes, E820 type), sorted.
pub(super) fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END, RAM),
        (LOW_RAM_END, ONE_MIB - LOW_RAM_END, RESERVED),
    ];
    for (start, length) in memory::regions(ram) {
        let first = start.0.max(ONE_MIB);
        let end = start.0 + length;
        if end > first {
            map.push((first, end - first, RAM));
        }
    }
    map
}

/// Puts modules behind `end`; answers with their number and where the list of them is.
pub(super) fn place_modules(
    ram: &GuestRam,
    end: u64,
    modules: &[Module<'_>],
) -> Result<(u32, u64), LoadError> {
    let list = modules::place(ram, end, modules, &TAKEN, |module| {
        // paddr, size, cmdline_paddr, reserved
        let words = [module.start, module.bytes, module.text, 0];
        let mut entry = [0; 32];
        for (place, word) in entry.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        entry
    })?;
    Ok((modules.len() as u32, list.unwrap_or(0)))
}

/// Writes it all, with `modules` as [`place_modules`] answers, and the ACPI tables' root pointer at `rsdp`
/// unless that is 0.
pub(super) fn write_start_info(
    ram: &GuestRam,
    command_line: &str,
    modules: (u32, u64),
    rsdp: u64,
) -> Result<(), LoadError> {
    let text = command_line.as_bytes();
    let limit = COMMAND_LINE_BYTES - 1;
    if text.len() > limit || text.contains(&0) {
        return Err(LoadError::CommandLine {
            length: text.len(),
            limit,
        });
    }
    let map = memory_map(ram);
    let mut info = Vec::with_capacity(56);
    info.extend_from_slice(&MAGIC.to_le_bytes());
    info.extend_from_slice(&VERSION.to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes()); // flags
    info.extend_from_slice(&modules.0.to_le_bytes()); // nr_modules
    info.extend_from_slice(&modules.1.to_le_bytes()); // modlist_paddr
    info.extend_from_slice(&COMMAND_LINE.to_le_bytes());
    info.extend_from_slice(&rsdp.to_le_bytes()); // rsdp_paddr
    info.extend_from_slice(&MEMORY_MAP.to_le_bytes());
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes()); // reserved

    let mut entries = Vec::with_capacity(map.len() * 24);
    for (start, length, kind) in map {
        entries.extend_from_slice(&start.to_le_bytes());
        entries.extend_from_slice(&length.to_le_bytes());
        entries.extend_from_slice(&kind.to_le_bytes());
        entries.extend_from_slice(&0u32.to_le_bytes());
    }
    let mut line = text.to_vec();
    line.push(0);
    for (at, bytes) in [
        (START_INFO.into(), &info),
        (MEMORY_MAP, &entries),
        (COMMAND_LINE, &line),
    ] {
        ram.write_slice(bytes, GuestAddress(at))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_info_points_to_map_and_command_line() {
        let ram = memory::create(4).unwrap();
        let files = [("one 1", &b"first"[..]), ("two", b"second")];
        let files = files.map(|(text, content)| Module { text, content });
        let modules = place_modules(&ram, 0x20_0001, &files).unwrap();
        write_start_info(&ram, "run alu 1 2", modules, 0xf_0000).unwrap();
        let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        let long = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        let base = u64::from(START_INFO);
        assert_eq!((word(base), word(base + 4)), (MAGIC, 1));
        let mut text = [0; 12];
        ram.read_slice(&mut text, GuestAddress(long(base + 24)))
            .unwrap();
        assert_eq!(&text, b"run alu 1 2\0");
        assert_eq!(word(base + 12), 2);
        let list = long(base + 16);
        assert_eq!(list, 0x20_1000);
        for (number, file) in files.iter().enumerate() {
            let [start, bytes, text, reserved] =
                std::array::from_fn(|field| long(list + 32 * number as u64 + 8 * field as u64));
            assert_eq!(
                (start % 4096, bytes, reserved),
                (0, file.content.len() as u64, 0)
            );
            assert_eq!(start, 0x20_2000 + 0x1000 * number as u64);
            for (at, expected) in [(start, file.content), (text, file.text.as_bytes())] {
                let mut found = vec![0; expected.len()];
                ram.read_slice(&mut found, GuestAddress(at)).unwrap();
                assert_eq!(found, expected);
            }
            let after = GuestAddress(text + file.text.len() as u64);
            assert_eq!(ram.read_obj::<u8>(after).unwrap(), 0);
        }
        assert_eq!(long(base + 32), 0xf_0000);
        let map = long(base + 40);
        assert_eq!(word(base + 48), 3);
        assert_eq!(
            (long(map + 48), long(map + 56), word(map + 64)),
            (ONE_MIB, 3 << 20, RAM)
        );
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let ram = memory::create(1).unwrap();
        assert!(write_start_info(&ram, &"x".repeat(4095), (0, 0), 0).is_ok());
        let long = "x".repeat(4096);
        assert!(matches!(
            write_start_info(&ram, &long, (0, 0), 0),
            Err(LoadError::CommandLine {
                length: 4096,
                limit: 4095
            })
        ));
    }
}
