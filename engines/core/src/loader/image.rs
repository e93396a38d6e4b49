//! Reads an ELF image and copies its segments to their physical addresses.
//!
//! Both ELF classes are taken. The entry point is that of the PVH note; `e_entry` is ignored,
//! because it is a virtual address for most kernels.

use elf::abi::{EM_386, EM_X86_64, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::segment::ProgramHeader;
use elf::{ElfBytes, ParseError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{LoadError, pvh};
use crate::{GuestPhys, GuestRam};

/// XEN_ELFNOTE_PHYS32_ENTRY (Xen public/elfnote.h).
const PHYS32_ENTRY: u64 = 18;
const XEN: &[u8] = b"Xen";

/// An image that was read and found whole.
pub(super) struct Image<'a> {
    segments: Vec<(ProgramHeader, &'a [u8])>,
    entry: u32,
}

fn malformed(error: ParseError) -> LoadError {
    LoadError::Malformed(error.to_string())
}

impl<'a> Image<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, LoadError> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).map_err(malformed)?;
        match file.ehdr.e_machine {
            EM_386 | EM_X86_64 => {}
            other => return Err(LoadError::WrongMachine(other)),
        }
        let headers = file.segments().ok_or(LoadError::Empty)?;
        let mut segments = Vec::new();
        let mut entry = None;
        for header in headers.iter() {
            match header.p_type {
                PT_LOAD if header.p_memsz > 0 => {
                    let content = file.segment_data(&header).map_err(malformed)?;
                    if header.p_filesz > header.p_memsz {
                        return Err(LoadError::Malformed(
                            "a segment is larger in the file than in memory".into(),
                        ));
                    }
                    segments.push((header, content));
                }
                PT_NOTE => entry = entry.or(pvh_entry(&file, &header)?),
                _ => {}
            }
        }
        if segments.is_empty() {
            return Err(LoadError::Empty);
        }
        let entry = entry.ok_or(LoadError::NoPvhNote)?;
        let inside = |header: &ProgramHeader| {
            u64::from(entry)
                .checked_sub(header.p_paddr)
                .is_some_and(|offset| offset < header.p_memsz)
        };
        if !segments.iter().any(|(header, _)| inside(header)) {
            return Err(LoadError::EntryOutside(GuestPhys(entry.into())));
        }
        Ok(Image { segments, entry })
    }
}

/// The PVH entry point, if this note segment has one. The descriptor is 4 or 8 bytes long.
fn pvh_entry(
    file: &ElfBytes<'_, LittleEndian>,
    header: &ProgramHeader,
) -> Result<Option<u32>, LoadError> {
    for note in file.segment_data_as_notes(header).map_err(malformed)? {
        let Note::Unknown(note) = note else { continue };
        let name = note.name.strip_suffix(b"\0").unwrap_or(note.name);
        if note.n_type != PHYS32_ENTRY || name != XEN {
            continue;
        }
        let entry = match *note.desc {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            [a, b, c, d, 0, 0, 0, 0] => u32::from_le_bytes([a, b, c, d]),
            _ => {
                return Err(LoadError::Malformed(
                    "the PVH note does not hold a 32-bit address".into(),
                ));
            }
        };
        return Ok(Some(entry));
    }
    Ok(None)
}

/// Copies the image into memory and answers with its entry point.
pub(super) fn place(ram: &GuestRam, bytes: &[u8]) -> Result<u32, LoadError> {
    let image = Image::parse(bytes)?;
    // All is checked before anything is written: a refused image leaves no trace.
    for (header, _) in &image.segments {
        check_range(ram, header)?;
    }
    for (header, content) in &image.segments {
        let start = GuestAddress(header.p_paddr);
        let outside = || outside_memory(ram, header);
        ram.write_slice(content, start).map_err(|_| outside())?;
        zero(
            ram,
            header.p_paddr + header.p_filesz,
            header.p_memsz - header.p_filesz,
        )
        .ok_or_else(outside)?;
    }
    Ok(image.entry)
}

/// Clears memory page by page, since .bss can be large and RAM that was never touched is zero already.
fn zero(ram: &GuestRam, start: u64, length: u64) -> Option<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut at = start;
    let end = start.checked_add(length)?;
    while at < end {
        let chunk = (end - at).min(ZEROS.len() as u64) as usize;
        ram.write_slice(&ZEROS[..chunk], GuestAddress(at)).ok()?;
        at += chunk as u64;
    }
    Some(())
}

fn outside_memory(ram: &GuestRam, header: &ProgramHeader) -> LoadError {
    LoadError::OutsideMemory {
        start: GuestPhys(header.p_paddr),
        size: header.p_memsz,
        ram_mib: ram.iter().map(|region| region.len() >> 20).sum(),
    }
}

fn check_range(ram: &GuestRam, header: &ProgramHeader) -> Result<(), LoadError> {
    let end = header
        .p_paddr
        .checked_add(header.p_memsz)
        .ok_or_else(|| outside_memory(ram, header))?;
    let fits = ram.iter().any(|region| {
        let start = region.start_addr().0;
        start <= header.p_paddr && end <= start + region.len()
    });
    if !fits {
        return Err(outside_memory(ram, header));
    }
    if header.p_paddr < pvh::END && u64::from(pvh::START_INFO) < end {
        return Err(LoadError::OverlapsBootInfo(GuestPhys(header.p_paddr)));
    }
    Ok(())
}
