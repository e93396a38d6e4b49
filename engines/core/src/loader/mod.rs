//! Putting an image into guest memory, and the CPU state it starts with.
//!
//! Images are ELF files with a PVH note (Xen docs/misc/pvh.pandoc), Multiboot images, or flat
//! binaries. [`image`] reads and places ELF files, [`pvh`] and [`multiboot`] write what the guest is
//! told about its machine, [`modules`] what comes with it, `tables` and `bios` what it may look for without being told. Nothing of the
//! image is trusted: every offset and address is checked before memory is touched.

mod bios;
mod image;
mod modules;
mod multiboot;
mod pvh;
mod tables;

use crate::{CpuState, GuestPhys, GuestRam};
pub use modules::Module;

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
    /// Linux as boot loaders for real mode want it, which isn't a flat binary.
    #[error(
        "this is a bzImage, which unpacks itself: give the vmlinux that is in it (extract-vmlinux, in the scripts \
         of the kernel's sources), which has a PVH entry"
    )]
    BzImage,
    /// A Multiboot header demands what isn't known here.
    #[error("the Multiboot header demands unknown features: flags {0:#x}")]
    MultibootFlags(u32),
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
    #[error("a segment at {0:#x} overlaps the boot information in low memory")]
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
    /// What the kernel is told of a module contains a zero byte.
    #[error("a module's name contains a zero byte")]
    ModuleText,
    /// Guest memory is too small for the boot information.
    #[error("guest memory is too small for the boot information")]
    NoRoom,
}

/// How a kernel is to be booted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Boot<'a> {
    /// What a Multiboot image's command line begins with.
    pub name: &'a str,
    /// The command line.
    pub command_line: &'a str,
    /// Modules for the kernel.
    pub modules: &'a [Module<'a>],
    /// Physical address of a flat binary, whatever the file looks like.
    pub load_at: Option<u64>,
    /// Processors to be told of by ACPI and MultiProcessor tables; 0 leaves them out, and what a BIOS
    /// leaves in low memory.
    pub cpus: u8,
}

/// Where a flat binary goes unless told otherwise.
pub const FLAT: u64 = 0x10_0000;

/// Loads a bare-metal kernel of any kind into `ram`; answers with the state of the boot processor.
///
/// An image with a Multiboot header is loaded as such, an ELF file otherwise as a PVH image, and
/// anything else as a flat binary: at [`FLAT`] or [`Boot::load_at`], entered at its first byte in
/// the state that PVH defines.
///
/// # Errors
/// [`LoadError`]: each says in one line what is wrong with the image.
pub fn load_kernel(ram: &GuestRam, image: &[u8], boot: &Boot<'_>) -> Result<CpuState, LoadError> {
    // Before the image, which may want the memory for itself.
    let mut rsdp = 0;
    if boot.cpus > 0 {
        tables::write(ram, boot.cpus)?;
        bios::write(ram)?;
        rsdp = tables::RSDP;
    }
    let mut state = place_kernel(ram, image, boot, rsdp)?;
    if boot.cpus > 0 {
        bios::hand_over(&mut state);
    }
    Ok(state)
}

/// As [`load_kernel`], with ACPI's root pointer at `rsdp`.
fn place_kernel(
    ram: &GuestRam,
    image: &[u8],
    boot: &Boot<'_>,
    rsdp: u64,
) -> Result<CpuState, LoadError> {
    let elf = image.starts_with(b"\x7fELF");
    let flat = boot.load_at.is_some();
    if let Some(header) = multiboot::find(image).filter(|_| !flat) {
        return multiboot::load(ram, image, &header, boot);
    }
    // Magic number of the setup header (Linux, Documentation/arch/x86/boot.rst).
    if !flat && image.get(0x202..0x206) == Some(b"HdrS") {
        return Err(LoadError::BzImage);
    }
    let (entry, end) = if elf && !flat {
        let image = image::Image::parse(image)?;
        let entry = image.pvh_entry()?;
        image::place(ram, &image, &pvh::TAKEN)?;
        (entry, image.end())
    } else {
        let start = boot.load_at.unwrap_or(FLAT);
        let size = image.len() as u64;
        if size == 0 {
            return Err(LoadError::Empty);
        }
        image::check_range(ram, start, size, &pvh::TAKEN)?;
        image::write(ram, start, image, size)?;
        let entry = u32::try_from(start).map_err(|_| LoadError::EntryOutside(GuestPhys(start)))?;
        (entry, start + size)
    };
    let modules = pvh::place_modules(ram, end, boot.modules)?;
    pvh::write_start_info(ram, boot.command_line, modules, rsdp)?;
    Ok(CpuState::pvh_entry(entry, pvh::START_INFO))
}

/// Loads a PVH image and the boot information into `ram`; answers with the state of the boot
/// processor.
///
/// # Errors
/// [`LoadError`]: each says in one line what is wrong with the image.
pub fn load(ram: &GuestRam, image: &[u8], command_line: &str) -> Result<CpuState, LoadError> {
    let image = image::Image::parse(image)?;
    let entry = image.pvh_entry()?;
    image::place(ram, &image, &pvh::TAKEN)?;
    pvh::write_start_info(ram, command_line, (0, 0), 0)?;
    Ok(CpuState::pvh_entry(entry, pvh::START_INFO))
}

/// Finds out whether a PVH `image` could be loaded, without loading it.
///
/// # Errors
/// As [`load`].
pub fn check(image: &[u8]) -> Result<(), LoadError> {
    image::Image::parse(image)?.pvh_entry().map(drop)
}
