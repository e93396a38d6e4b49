//! Multiboot images, version 1 (Multiboot Specification 0.6.96).
//!
//! The header lies in the first 8 KiB, on a 4-byte boundary (3.1.1). Its flags 0 to 2 ask for page
//! alignment, memory information and a video mode, which is met, met and ignored; with flag 16 the
//! header itself says what to load where, else the image is an ELF file, of either class. The
//! machine starts in 32-bit protected mode without paging, with EBX leading to the boot information
//! (3.2, 3.3).
//!
//! Invariant: boot information lies in conventional memory where the image does not, at 36 KiB if it can;
//! modules lie above the image.

use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::image::{self, Image};
use super::{Boot, LoadError, modules, pvh};
use crate::{CpuState, GuestRam, memory};

const MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry.
const BOOTED: u32 = 0x2bad_b002;
const SEARCHED: usize = 8192;
/// Flags of the lower half that a loader has to refuse if it doesn't know them.
const KNOWN: u32 = 0b111;
const UNKNOWN: u32 = 0xffff & !KNOWN;
/// The address fields are valid.
const ADDRESSES: u32 = 1 << 16;

/// Where the boot information goes unless the image lies there, and where its parts are from there on.
const INFO: u64 = 0x9000;
const NAME: u64 = 0x180;
const MEMORY_MAP: u64 = 0x200;
const COMMAND_LINE: u64 = 0x1000;
const COMMAND_LINE_BYTES: usize = 0x1000;
const INFO_BYTES: u64 = COMMAND_LINE + COMMAND_LINE_BYTES as u64;
/// Other places: above what real-mode code and boot sectors use, below the extended BIOS data area.
const ELSEWHERE: Range<u64> = 0x1_0000..0x9_0000;

const LOADER: &[u8] = b"trapline\0";
const ONE_MIB: u64 = 0x10_0000;

/// A header: where it lies in the file, and the words from its flags on.
pub(super) struct Header {
    at: usize,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    addresses: [u32; 5],
}

/// The header of a Multiboot image, if `bytes` is one.
pub(super) fn find(bytes: &[u8]) -> Option<Header> {
    let searched = &bytes[..bytes.len().min(SEARCHED)];
    let word = |at: usize| {
        let word = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(word.try_into().ok()?))
    };
    (0..searched.len()).step_by(4).find_map(|at| {
        let flags = word(at + 4)?;
        let sum = word(at)?.wrapping_add(flags).wrapping_add(word(at + 8)?);
        if word(at)? != MAGIC || sum != 0 || at + 12 > SEARCHED {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & ADDRESSES != 0 {
            for (index, slot) in addresses.iter_mut().enumerate() {
                *slot = word(at + 12 + 4 * index)?;
            }
        }
        Some(Header {
            at,
            flags,
            addresses,
        })
    })
}

/// Loads the image; answers with the state of the boot processor.
pub(super) fn load(
    ram: &GuestRam,
    bytes: &[u8],
    header: &Header,
    boot: &Boot<'_>,
) -> Result<CpuState, LoadError> {
    if header.flags & UNKNOWN != 0 {
        return Err(LoadError::MultibootFlags(header.flags & UNKNOWN));
    }
    let (entry, end, info) = if header.flags & ADDRESSES != 0 {
        place_by_addresses(ram, bytes, header)?
    } else {
        let image = Image::parse(bytes)?;
        let entry = image.start()?;
        let info = room(image.ranges())?;
        image::place(ram, &image, &taken(info))?;
        (entry, image.end(), info)
    };
    let modules = modules::place(ram, end, boot.modules, &taken(info), |module| {
        // mod_start, mod_end, string, reserved
        let words = [module.start, module.start + module.bytes, module.text, 0];
        let mut entry = [0; 16];
        for (place, word) in entry.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&(word as u32).to_le_bytes());
        }
        entry
    })?;
    write_info(ram, info, boot, modules)?;
    let mut state = CpuState::pvh_entry(entry, info as u32);
    state.gpr[0] = BOOTED.into();
    Ok(state)
}

/// What boot information at `info` takes.
fn taken(info: u64) -> Range<u64> {
    info..info + INFO_BYTES
}

/// A place for the boot information that no part of the image lies in.
fn room(image: impl Iterator<Item = Range<u64>> + Clone) -> Result<u64, LoadError> {
    let step = INFO_BYTES as usize;
    std::iter::once(INFO)
        .chain(ELSEWHERE.step_by(step))
        .find(|&info| {
            let taken = taken(info);
            let mut parts = image.clone();
            !parts.any(|part| part.start < taken.end && taken.start < part.end)
        })
        .ok_or(LoadError::OverlapsBootInfo(crate::GuestPhys(INFO)))
}

/// Entry point and end of an image whose header says where it goes, and where its information does.
fn place_by_addresses(
    ram: &GuestRam,
    bytes: &[u8],
    header: &Header,
) -> Result<(u32, u64, u64), LoadError> {
    let bad = |text: &str| LoadError::Malformed(format!("Multiboot header: {text}"));
    let [header_addr, load, load_end, bss_end, entry] = header.addresses;
    let before = header_addr
        .checked_sub(load)
        .ok_or_else(|| bad("load_addr lies above header_addr"))?;
    let first = header
        .at
        .checked_sub(before as usize)
        .ok_or_else(|| bad("load_addr lies before the file"))?;
    let length = if load_end == 0 {
        bytes.len() - first
    } else {
        let length = load_end.checked_sub(load);
        length.ok_or_else(|| bad("load_end_addr lies below load_addr"))? as usize
    };
    let content = bytes
        .get(first..first + length)
        .ok_or_else(|| bad("load_end_addr lies beyond the file"))?;
    let loaded = u64::from(load) + length as u64;
    let end = loaded.max(bss_end.into());
    let size = end - u64::from(load);
    let info = room(std::iter::once(load.into()..end))?;
    image::check_range(ram, load.into(), size, &taken(info))?;
    image::write(ram, load.into(), content, size)?;
    if !(u64::from(load)..end).contains(&entry.into()) {
        return Err(LoadError::EntryOutside(crate::GuestPhys(entry.into())));
    }
    Ok((entry, end, info))
}

/// The boot information at `at` and what it leads to (3.3); the list of modules is at `modules`.
fn write_info(
    ram: &GuestRam,
    at: u64,
    boot: &Boot<'_>,
    modules: Option<u64>,
) -> Result<(), LoadError> {
    const MEMORY: u32 = 1;
    const COMMAND: u32 = 1 << 2;
    const MODULES: u32 = 1 << 3;
    const MAP: u32 = 1 << 6;
    const LOADER_NAME: u32 = 1 << 9;

    // The first word is the image's name, as with every other loader.
    let line = match (boot.name, boot.command_line) {
        (name, "") => name.to_owned(),
        (name, text) => format!("{name} {text}"),
    };
    let limit = COMMAND_LINE_BYTES - 1;
    if line.len() > limit || line.contains('\0') {
        return Err(LoadError::CommandLine {
            length: line.len(),
            limit,
        });
    }
    let map = pvh::memory_map(ram);
    let mut entries = Vec::new();
    for &(start, length, kind) in &map {
        entries.extend_from_slice(&20u32.to_le_bytes());
        entries.extend_from_slice(&start.to_le_bytes());
        entries.extend_from_slice(&length.to_le_bytes());
        entries.extend_from_slice(&kind.to_le_bytes());
    }
    // Up to the first hole above 1 MiB, in KiB.
    let low = memory::regions(ram)
        .first()
        .map_or(0, |&(_, length)| length);
    let upper = low.saturating_sub(ONE_MIB) >> 10;
    let conventional = map.first().map_or(0, |&(_, length, _)| length >> 10);
    let mut info = [0u32; 29];
    info[0] = MEMORY | COMMAND | MAP | LOADER_NAME;
    if let Some(list) = modules {
        info[0] |= MODULES;
        info[5] = boot.modules.len() as u32;
        info[6] = list as u32;
    }
    info[1] = conventional as u32;
    info[2] = upper as u32;
    info[4] = (at + COMMAND_LINE) as u32;
    info[11] = entries.len() as u32;
    info[12] = (at + MEMORY_MAP) as u32;
    info[16] = (at + NAME) as u32;
    let words =
        |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut text = line.into_bytes();
    text.push(0);
    for (offset, content) in [
        (0, words(&info)),
        (NAME, LOADER.to_vec()),
        (MEMORY_MAP, entries),
        (COMMAND_LINE, text),
    ] {
        ram.write_slice(&content, GuestAddress(at + offset))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader;

    /// A raw image whose header stands at its start, loaded at 2 MiB.
    fn raw(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
        let sum = 0u32.wrapping_sub(MAGIC.wrapping_add(flags));
        let mut bytes: Vec<u8> = [MAGIC, flags, sum]
            .into_iter()
            .chain(addresses)
            .flat_map(u32::to_le_bytes)
            .collect();
        bytes.extend_from_slice(&[0xf4; 32]);
        bytes
    }

    const AT: u32 = 0x20_0000;
    const GOOD: [u32; 5] = [AT, AT, 0, AT + 0x1000, AT + 32];

    fn boot<'a>(modules: &'a [modules::Module<'a>]) -> Boot<'a> {
        Boot {
            name: "image",
            command_line: "one two",
            modules,
            load_at: None,
            cpus: 1,
        }
    }

    #[test]
    fn an_image_with_addresses_is_loaded_with_its_information() {
        let ram = memory::create(4).unwrap();
        ram.write_obj(7u8, GuestAddress(u64::from(AT) + 0xfff))
            .unwrap();
        let image = raw(ADDRESSES | 3, GOOD);
        let page = vec![1; 4096];
        let files = [("first one", &b"module"[..]), ("", &page), ("last", b"")];
        let files = files.map(|(text, content)| modules::Module { text, content });
        let state = loader::load_kernel(&ram, &image, &boot(&files)).unwrap();
        assert_eq!(state.rip, u64::from(AT) + 32);
        assert_eq!(state.gpr[0], u64::from(BOOTED));
        let word = |at: u64| u64::from(ram.read_obj::<u32>(GuestAddress(at)).unwrap());
        let info = state.gpr[3];
        assert_eq!(word(info), 1 | 4 | 8 | 0x40 | 0x200);
        assert_eq!((word(info + 4), word(info + 8)), (639, 3 << 10));
        let mut line = [0; 14];
        ram.read_slice(&mut line, GuestAddress(word(info + 16)))
            .unwrap();
        assert_eq!(&line, b"image one two\0");
        assert_eq!(word(info + 20), 3);
        let list = word(info + 24);
        // Neither is on a page with anything else.
        let mut free = list + 0x1000;
        assert!(list >= u64::from(AT) + 0x1000);
        for (number, file) in files.iter().enumerate() {
            let [start, end, text, _] =
                std::array::from_fn(|field| word(list + 16 * number as u64 + 4 * field as u64));
            assert_eq!((start, end), (free, free + file.content.len() as u64));
            free = end.next_multiple_of(4096);
            let expected = [file.text.as_bytes(), b"\0"].concat();
            for (at, expected) in [(start, file.content), (text, &expected)] {
                let mut found = vec![0; expected.len()];
                ram.read_slice(&mut found, GuestAddress(at)).unwrap();
                assert_eq!(found, expected);
            }
        }
        assert_eq!(word(u64::from(AT) + 0xffc), 0);
        assert_eq!(word(info + 44), 3 * 24);
    }

    #[test]
    fn an_image_that_lies_where_its_information_goes_has_it_elsewhere() {
        let ram = memory::create(4).unwrap();
        let image = raw(ADDRESSES, [0x9000, 0x9000, 0, 0x1_0800, 0x9020]);
        let state = loader::load_kernel(&ram, &image, &boot(&[])).unwrap();
        let word = |at: u64| ram.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(state.gpr[3], 0x1_2000);
        assert_eq!((word(0x9000), word(0x9020)), (MAGIC, 0xf4f4_f4f4));
        let mut line = [0; 5];
        ram.read_slice(&mut line, GuestAddress(word(0x1_2010).into()))
            .unwrap();
        assert_eq!(&line, b"image");
    }

    #[test]
    fn headers_that_make_no_sense_are_refused() {
        let ram = memory::create(4).unwrap();
        let load = |image: &[u8]| loader::load_kernel(&ram, image, &boot(&[]));
        assert!(matches!(
            load(&raw(ADDRESSES | 1 << 3, GOOD)),
            Err(LoadError::MultibootFlags(8))
        ));
        for (index, value) in [(0, AT - 1), (1, AT - 4), (2, AT - 1), (2, AT + 0x1000)] {
            let mut addresses = GOOD;
            addresses[index] = value;
            let found = load(&raw(ADDRESSES, addresses));
            assert!(matches!(found, Err(LoadError::Malformed(_))), "{found:?}");
        }
        for (index, value) in [(3, 0x80_0000), (4, AT - 1)] {
            let mut addresses = GOOD;
            addresses[index] = value;
            assert!(load(&raw(ADDRESSES, addresses)).is_err(), "{index}");
        }
        let whole = vec![0; 2 << 20];
        let refused = |text| {
            let module = modules::Module {
                text,
                content: &whole,
            };
            loader::load_kernel(&ram, &raw(ADDRESSES, GOOD), &boot(&[module]))
        };
        assert!(matches!(
            refused("large"),
            Err(LoadError::OutsideMemory { .. })
        ));
        assert!(matches!(refused("a\0b"), Err(LoadError::ModuleText)));
        // One that takes all conventional memory leaves no room.
        let all = [0x9000, 0x9000, 0, 0x9_0000, 0x9000];
        assert!(matches!(
            load(&raw(ADDRESSES, all)),
            Err(LoadError::OverlapsBootInfo(_))
        ));
        assert!(find(&[0; 100]).is_none());
        assert!(find(&MAGIC.to_le_bytes()).is_none());
    }
}
