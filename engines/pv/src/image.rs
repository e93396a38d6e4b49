//! Reads an `aware` image and lays it out in guest memory.
//!
//! Nothing of the image is trusted: every offset and address is checked before memory is touched.

use std::fs::File;
use std::os::unix::fs::FileExt;

use abi::hypercall::{self, feature, layout, note};
use elf::ElfBytes;
use elf::abi::{EM_X86_64, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE};
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::segment::ProgramHeader;

use crate::wire::{PAGE, SEGMENTS, Segment};

/// An image can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not an ELF file, or one that ends early.
    #[error("not a loadable ELF image: {0}")]
    Malformed(String),
    /// An ELF file for another machine.
    #[error("not an x86-64 image: ELF machine type is {0}")]
    WrongMachine(u16),
    /// No `PT_LOAD` segment: nothing to run.
    #[error("the image has no loadable segment")]
    Empty,
    /// More segments than a guest kernel may have.
    #[error("the image has {0} loadable segments, at most {SEGMENTS} can be mapped")]
    TooManySegments(usize),
    /// No Trapline note: not an `aware` image.
    #[error("the image has no Trapline note: it is not an aware one")]
    NoNote,
    /// It wants another version of the hypercall ABI.
    #[error(
        "the image wants hypercall ABI version {wanted}, this is version {}",
        hypercall::VERSION
    )]
    Version {
        /// The wanted version.
        wanted: u32,
    },
    /// It can't do without features that this host has not.
    #[error("the image wants features {wanted:#x}, there are {available:#x}")]
    Features {
        /// What it can't do without.
        wanted: u32,
        /// What there is.
        available: u32,
    },
    /// A segment does not fit into guest memory.
    #[error("a segment of {size:#x} bytes at {start:#x} lies outside guest memory ({ram_mib} MiB)")]
    OutsideMemory {
        /// Where the segment wants to be.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// Guest memory in MiB.
        ram_mib: u64,
    },
    /// A segment's virtual address is not one that a kernel may use.
    #[error("a segment at virtual address {0:#x} lies outside the kernel's addresses")]
    Address(u64),
    /// Two segments share a page of addresses or of memory, or one lies at addresses that differ within a page.
    #[error("the segment at {0:#x} does not lie on pages of its own")]
    Overlap(u64),
    /// A segment can be written to and executed.
    #[error("the segment at {0:#x} is both writable and executable")]
    WritableCode(u64),
    /// The entry point is in no executable segment.
    #[error("the entry point {0:#x} lies in no executable segment of the image")]
    EntryOutside(u64),
    /// The command line is too long.
    #[error("the command line has {length} bytes, at most {limit} fit")]
    CommandLine {
        /// Its length.
        length: usize,
        /// What fits.
        limit: usize,
    },
    /// Guest memory could not be written.
    #[error("writing the image to guest memory: {0}")]
    Write(#[source] std::io::Error),
}

/// An image that was read and found whole.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    loads: Vec<(ProgramHeader, &'a [u8])>,
    pub(crate) entry: u64,
}

fn malformed(error: elf::ParseError) -> ImageError {
    ImageError::Malformed(error.to_string())
}

/// Features that this host gives to guests.
pub(crate) fn features() -> u32 {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: reads the process's own auxiliary vector.
    let hardware = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    let bases = if hardware & HWCAP2_FSGSBASE != 0 {
        feature::SEGMENT_BASE
    } else {
        0
    };
    bases | feature::LARGE_PAGES | feature::ACCESSED_DIRTY
}

impl<'a> Image<'a> {
    /// Reads an image; nothing that depends on guest memory is checked yet.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).map_err(malformed)?;
        if file.ehdr.e_machine != EM_X86_64 {
            return Err(ImageError::WrongMachine(file.ehdr.e_machine));
        }
        let headers = file.segments().ok_or(ImageError::Empty)?;
        let mut loads = Vec::new();
        let mut wanted = None;
        for header in headers.iter() {
            match header.p_type {
                PT_LOAD if header.p_memsz > 0 => {
                    let content = file.segment_data(&header).map_err(malformed)?;
                    if header.p_filesz > header.p_memsz {
                        return Err(ImageError::Malformed(
                            "a segment is larger in the file than in memory".into(),
                        ));
                    }
                    loads.push((header, content));
                }
                PT_NOTE => wanted = wanted.or(read_note(&file, &header)?),
                _ => {}
            }
        }
        if loads.is_empty() {
            return Err(ImageError::Empty);
        }
        if loads.len() > SEGMENTS {
            return Err(ImageError::TooManySegments(loads.len()));
        }
        let (version, wanted) = wanted.ok_or(ImageError::NoNote)?;
        if version != hypercall::VERSION {
            return Err(ImageError::Version { wanted: version });
        }
        let available = features();
        if wanted & !available != 0 {
            return Err(ImageError::Features { wanted, available });
        }
        loads.sort_by_key(|(header, _)| header.p_vaddr);
        let entry = file.ehdr.e_entry;
        let image = Image { loads, entry };
        image.check()?;
        Ok(image)
    }

    fn check(&self) -> Result<(), ImageError> {
        let mut end = 0;
        let mut entered = false;
        for (header, _) in &self.loads {
            let ProgramHeader {
                p_vaddr,
                p_paddr,
                p_memsz,
                p_flags,
                ..
            } = *header;
            let next = p_vaddr
                .checked_add(p_memsz)
                .filter(|&next| next <= layout::USER_END && p_vaddr >= layout::USER_START)
                .ok_or(ImageError::Address(p_vaddr))?;
            if p_vaddr % PAGE != p_paddr % PAGE || p_vaddr / PAGE * PAGE < end {
                return Err(ImageError::Overlap(p_vaddr));
            }
            if p_flags & (PF_W | PF_X) == PF_W | PF_X {
                return Err(ImageError::WritableCode(p_vaddr));
            }
            entered |= p_flags & PF_X != 0 && (p_vaddr..next).contains(&self.entry);
            end = next.next_multiple_of(PAGE);
        }
        // Nor may two be the same memory at two addresses: one would be written over the other.
        let mut segments = self.segments();
        segments.sort_by_key(|segment| segment.offset);
        for pair in segments.windows(2) {
            if pair[1].offset - pair[0].offset < pair[0].length {
                return Err(ImageError::Overlap(pair[1].address));
            }
        }
        if entered {
            Ok(())
        } else {
            Err(ImageError::EntryOutside(self.entry))
        }
    }

    /// The segments as K maps them, in whole pages.
    pub(crate) fn segments(&self) -> Vec<Segment> {
        self.loads
            .iter()
            .map(|(header, _)| {
                let start = header.p_vaddr / PAGE * PAGE;
                let end = (header.p_vaddr + header.p_memsz).next_multiple_of(PAGE);
                let right = |flag, right: i32| {
                    if header.p_flags & flag != 0 {
                        right as u64
                    } else {
                        0
                    }
                };
                Segment {
                    address: start,
                    length: end - start,
                    offset: header.p_paddr / PAGE * PAGE,
                    rights: right(PF_R, libc::PROT_READ)
                        | right(PF_W, libc::PROT_WRITE)
                        | right(PF_X, libc::PROT_EXEC),
                }
            })
            .collect()
    }

    /// Writes the image into guest memory of `ram` bytes, which is all zero.
    pub(crate) fn place(&self, memory: &File, ram: u64) -> Result<(), ImageError> {
        for segment in self.segments() {
            let end = segment.offset.checked_add(segment.length);
            if end.is_none_or(|end| end > ram) {
                return Err(ImageError::OutsideMemory {
                    start: segment.offset,
                    size: segment.length,
                    ram_mib: ram >> 20,
                });
            }
        }
        for (header, content) in &self.loads {
            memory
                .write_all_at(content, header.p_paddr)
                .map_err(ImageError::Write)?;
        }
        Ok(())
    }
}

/// (version, features) of the Trapline note, if this note segment has one.
fn read_note(
    file: &ElfBytes<'_, LittleEndian>,
    header: &ProgramHeader,
) -> Result<Option<(u32, u32)>, ImageError> {
    for found in file.segment_data_as_notes(header).map_err(malformed)? {
        let Note::Unknown(found) = found else {
            continue;
        };
        let name = found.name.strip_suffix(b"\0").unwrap_or(found.name);
        if found.n_type != u64::from(note::TYPE) || Some(name) != note::NAME.strip_suffix(b"\0") {
            continue;
        }
        let word = |at: usize| {
            let bytes = found.desc.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        return match (word(0), word(4)) {
            (Some(version), Some(features)) => Ok(Some((version, features))),
            _ => Err(ImageError::Malformed(
                "the Trapline note does not hold two words".into(),
            )),
        };
    }
    Ok(None)
}
