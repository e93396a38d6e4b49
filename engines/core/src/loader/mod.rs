//! Putting an image into guest memory, and the CPU state it starts with.
//!
//! Images are ELF files with a PVH note (Xen docs/misc/pvh.pandoc): [`image`] reads and places
//! them, [`pvh`] writes what the guest is told about its machine. Nothing of the image is trusted:
//! every offset and address is checked before memory is touched.

mod image;
mod pvh;

use crate::{CpuState, GuestPhys, GuestRam};

/// An image can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not an ELF file, or one that ends early.
    #[error("not a loadable ELF image: {0}")]
    Malformed(String),
    /// An ELF file for another machine.
    #[error("not an x86 image: ELF machine type is {0}")]
    WrongMachine(u16),
    /// No `PT_LOAD` segment: nothing to run.
    #[error("the image has no loadable segment")]
    Empty,
    /// No XEN_ELFNOTE_PHYS32_ENTRY: nobody knows where to enter it.
    #[error("the image has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote,
    /// A segment does not fit into guest memory.
    #[error("a segment of {size:#x} bytes at {start:#x} lies outside guest memory ({ram_mib} MiB)")]
    OutsideMemory {
        /// Where the segment wants to be.
        start: GuestPhys,
        /// Its size in bytes.
        size: u64,
        /// Guest memory in MiB.
        ram_mib: u64,
    },
    /// A segment lies where the boot information is to go.
    #[error("a segment at {0:#x} overlaps the boot information below 64 KiB")]
    OverlapsBootInfo(GuestPhys),
    /// The entry point is in none of the segments.
    #[error("the entry point {0:#x} lies in no segment of the image")]
    EntryOutside(GuestPhys),
    /// The command line is too long.
    #[error("the command line has {length} bytes, at most {limit} fit")]
    CommandLine {
        /// Its length.
        length: usize,
        /// What fits.
        limit: usize,
    },
    /// Guest memory is too small for the boot information.
    #[error("guest memory is too small for the boot information")]
    NoRoom,
}

/// Loads `image` and the boot information into `ram`; answers with the state of the boot processor.
///
/// # Errors
/// [`LoadError`]: each says in one line what is wrong with the image.
pub fn load(ram: &GuestRam, image: &[u8], command_line: &str) -> Result<CpuState, LoadError> {
    let entry = image::place(ram, image)?;
    pvh::write_start_info(ram, command_line)?;
    Ok(CpuState::pvh_entry(entry, pvh::START_INFO))
}

/// Finds out whether `image` could be loaded into `ram_mib` MiB, without loading it.
///
/// # Errors
/// As [`load`].
pub fn check(image: &[u8]) -> Result<(), LoadError> {
    image::Image::parse(image).map(drop)
}
