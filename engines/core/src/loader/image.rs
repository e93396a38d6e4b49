//! Reads an ELF image and copies its segments to their physical addresses.
//!
//! Both ELF classes are taken. A PVH image is entered where its note says, for `e_entry` is a virtual
//! address for most kernels; a Multiboot image at `e_entry`, brought to physical addresses by the
//! segment that it lies in.

use elf::abi::{EM_386, EM_X86_64, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::segment::ProgramHeader;
use elf::{ElfBytes, ParseError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use std::ops::Range;

use super::LoadError;
use crate::{GuestPhys, GuestRam};

/// XEN_ELFNOTE_PHYS32_ENTRY (Xen public/elfnote.h).
const PHYS32_ENTRY: u64 = 18;
const XEN: &[u8] = b"Xen";

/// An image that was read and found whole.
pub(super) struct Image<'a> {
    segments: Vec<(ProgramHeader, &'a [u8])>,
    note: Option<u32>,
    start: u64,
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
        Ok(Image {
            segments,
            note: entry,
            start: file.ehdr.e_entry,
        })
    }

    /// Where the PVH note says to enter it.
    pub(super) fn pvh_entry(&self) -> Result<u32, LoadError> {
        let entry = self.note.ok_or(LoadError::NoPvhNote)?;
        self.inside(entry.into())
    }

    /// `e_entry` as a physical address.
    pub(super) fn start(&self) -> Result<u32, LoadError> {
        let physical = self.segments.iter().find_map(|(header, _)| {
            let offset = self.start.checked_sub(header.p_vaddr)?;
            (offset < header.p_memsz).then(|| header.p_paddr.wrapping_add(offset))
        });
        self.inside(physical.unwrap_or(self.start))
    }

    fn inside(&self, entry: u64) -> Result<u32, LoadError> {
        let outside = LoadError::EntryOutside(GuestPhys(entry));
        let holds = |header: &ProgramHeader| {
            entry
                .checked_sub(header.p_paddr)
                .is_some_and(|offset| offset < header.p_memsz)
        };
        match u32::try_from(entry) {
            Ok(entry) if self.segments.iter().any(|(header, _)| holds(header)) => Ok(entry),
            Ok(_) | Err(_) => Err(outside),
        }
    }

    /// What each segment takes, as far as it is there at all.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + Clone {
        self.segments
            .iter()
            .map(|(header, _)| header.p_paddr..header.p_paddr.saturating_add(header.p_memsz))
    }

    /// First address after the highest segment.
    pub(super) fn end(&self) -> u64 {
        let ends = self.segments.iter();
        ends.map(|(header, _)| header.p_paddr.saturating_add(header.p_memsz))
            .max()
            .unwrap_or(0)
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

/// Copies the image into memory, none of it into `taken`.
pub(super) fn place(
    ram: &GuestRam,
    image: &Image<'_>,
    taken: &Range<u64>,
) -> Result<(), LoadError> {
    // All is checked before anything is written: a refused image leaves no trace.
    for (header, _) in &image.segments {
        check_range(ram, header.p_paddr, header.p_memsz, taken)?;
    }
    for (header, content) in &image.segments {
        write(ram, header.p_paddr, content, header.p_memsz)?;
    }
    Ok(())
}

/// Puts `content` at `start`, and zeros up to `size` bytes.
pub(super) fn write(
    ram: &GuestRam,
    start: u64,
    content: &[u8],
    size: u64,
) -> Result<(), LoadError> {
    let outside = || outside_memory(ram, start, size);
    ram.write_slice(content, GuestAddress(start))
        .map_err(|_| outside())?;
    let length = content.len() as u64;
    zero(ram, start + length, size.saturating_sub(length)).ok_or_else(outside)
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

fn outside_memory(ram: &GuestRam, start: u64, size: u64) -> LoadError {
    LoadError::OutsideMemory {
        start: GuestPhys(start),
        size,
        ram_mib: ram.iter().map(|region| region.len() >> 20).sum(),
    }
}

/// Refuses a range that isn't RAM, or that overlaps `taken`.
pub(super) fn check_range(
    ram: &GuestRam,
    start: u64,
    size: u64,
    taken: &Range<u64>,
) -> Result<(), LoadError> {
    let outside = || outside_memory(ram, start, size);
    let end = start.checked_add(size).ok_or_else(outside)?;
    let fits = ram.iter().any(|region| {
        let first = region.start_addr().0;
        first <= start && end <= first + region.len()
    });
    if !fits {
        return Err(outside());
    }
    if start < taken.end && taken.start < end {
        return Err(LoadError::OverlapsBootInfo(GuestPhys(start)));
    }
    Ok(())
}
