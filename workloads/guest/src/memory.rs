//! Memory: rights of the image's pages, the arena and stack of ring 3, and the probe page.
//!
//! The map stands at the head of this crate. Invariant: no page is both writable and executable,
//! and ring 3 reaches the programs' code and constants, its stack and its arena, nothing else.

use crate::{cpu, start_info::Memory};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Frames of the storm's pages, one after another; see spaces.rs.
pub(crate) const STORM_FRAMES: u64 = 4 << 20;
/// Frames for address spaces, one after another; see spaces.rs.
pub(crate) const POOL: u64 = 5 << 20;
/// Number of those.
pub(crate) const POOL_FRAMES: u64 = 256;
/// Where the arena starts in physical memory; the image, ring 3's stack and the frames of spaces.rs
/// lie below.
pub(crate) const ARENA_PHYSICAL: u64 = 6 << 20;
/// Where the arena starts for ring 3.
pub(crate) const ARENA: u64 = 0x4000_0000;
/// Largest arena.
const ARENA_MOST: u64 = 64 << 20;
/// Smallest arena: what 64 MiB of memory leave, less what firmware keeps for itself.
const ARENA_LEAST: u64 = 56 << 20;
/// The probe page, whose entry the nano workloads change.
pub(crate) const PROBE: u64 = 0x7fe0_0000;
/// Where the storm's pages start; asm/traps.s knows the address.
pub(crate) const STORM: u64 = 0x7fa0_0000;
/// Where device memory starts that is mapped as itself, in large pages.
const DEVICES: u64 = 0xfea0_0000;
/// Physical memory that is mapped as itself.
const REACH: u64 = 1 << 30;

pub(crate) const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
pub(crate) const USER: u64 = 4;
const LARGE: u64 = 0x80;
/// Not cached: write-through and cache-disable (SDM 3A 4.9.2).
const UNCACHED: u64 = 0x18;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// The bits of an entry that are an address.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(crate) type Table = [AtomicU64; 512];

unsafe extern "C" {
    static boot_pdpt: Table;
    static device_directory: Table;
    static low_directory: Table;
    static low_table: Table;
    static user_directory: Table;
    static probe_table: Table;
    static storm_table: Table;
    static probe_frame_a: [AtomicU64; 512];
    static probe_frame_b: [AtomicU64; 512];
    // Section borders, from the linker script.
    static text_start: u8;
    static text_end: u8;
    static utext_start: u8;
    static utext_end: u8;
    static rodata_start: u8;
    static rodata_end: u8;
    static urodata_start: u8;
    static urodata_end: u8;
}

/// The probe page's entry for frame A; the page-fault handler stores it.
#[unsafe(no_mangle)]
static probe_entry_a: AtomicU64 = AtomicU64::new(0);
/// The probe page's entry for frame B.
static PROBE_ENTRY_B: AtomicU64 = AtomicU64::new(0);

/// Physical memory, mapped as itself by the boot tables: to be read before [`protect`], which
/// takes page 0 away. QEMU's firmware leaves the memory map there.
pub(crate) struct Physical;

impl Memory for Physical {
    fn byte(&self, address: u64) -> Option<u8> {
        // Rust can't read address 0, and no structure starts there.
        if !(1..REACH).contains(&address) {
            return None;
        }
        // SAFETY: below REACH everything is mapped, and reading memory that Rust does not know of
        // as bytes disturbs nothing.
        Some(unsafe { (address as *const u8).read_volatile() })
    }
}

/// Gives the image's pages the rights of their sections, and takes away the right to execute the
/// low memory around them.
pub(crate) fn protect() {
    // SAFETY: symbols of the linker script: only their addresses are taken. The tables are
    // written by the processor's walker alone besides.
    let (sections, table, directory) = unsafe {
        (
            [
                (&raw const text_start, &raw const text_end, 0),
                (&raw const utext_start, &raw const utext_end, USER),
                (&raw const rodata_start, &raw const rodata_end, NO_EXECUTE),
                (
                    &raw const urodata_start,
                    &raw const urodata_end,
                    NO_EXECUTE | USER,
                ),
            ],
            &low_table,
            &low_directory,
        )
    };
    for (start, end, rights) in sections {
        let (mut page, end) = (start as u64, end as u64);
        while page < end {
            if let Some(entry) = table.get((page / PAGE) as usize) {
                entry.store(page | PRESENT | rights, Relaxed);
            }
            page += PAGE;
        }
    }
    directory[0].store(table.as_ptr() as u64 | PRESENT | WRITABLE | USER, Relaxed);
    // SAFETY: the same root; the new rights let this code execute and its stack be written.
    unsafe { cpu::set_root(cpu::root()) };
}

/// Maps the memory of devices: virtio-mmio, I/O APIC and local APIC lie in 6 MiB from [`DEVICES`] on, in
/// every space: whatever space is current, the console may be a device there.
pub(crate) fn map_devices() {
    // SAFETY: the tables are written here and read by the processor's walker alone.
    let (upper, directory) = unsafe { (&boot_pdpt, &device_directory) };
    for (index, entry) in (0..3).zip(&directory[(DEVICES >> 21 & 511) as usize..]) {
        let rights = PRESENT | WRITABLE | LARGE | UNCACHED | NO_EXECUTE;
        entry.store((DEVICES + index * LARGE_PAGE) | rights, Relaxed);
    }
    upper[3].store(directory.as_ptr() as u64 | PRESENT | WRITABLE, Relaxed);
}

/// Reads a register of a device that [`map_devices`] maps.
#[inline(always)]
pub(crate) fn register(address: u64) -> u32 {
    let value;
    // SAFETY: device memory, mapped; reading it changes no memory that Rust knows of.
    unsafe {
        core::arch::asm!("mov {:e}, [{}]", out(reg) value, in(reg) address,
            options(nostack, preserves_flags));
    }
    value
}

/// Writes a register of a device that [`map_devices`] maps.
#[inline(always)]
pub(crate) fn set_register(address: u64, value: u32) {
    // SAFETY: device memory, mapped. What the device does to memory then is its driver's to know.
    unsafe {
        core::arch::asm!("mov [{}], {:e}", in(reg) address, in(reg) value,
            options(nostack, preserves_flags));
    }
}

/// Physical address of a word of the arena, which is its address in ring 0.
#[inline(always)]
pub(crate) fn arena_word(word: u64) -> u64 {
    ARENA_PHYSICAL + 8 * word
}

/// Maps the arena and the stack of ring 3, given the end of the usable memory from
/// [`ARENA_PHYSICAL`] on. Returns the arena's size in words.
///
/// # Errors
/// There is too little memory.
pub(crate) fn map_user(usable_end: u64) -> Result<u64, &'static str> {
    let usable = usable_end.saturating_sub(ARENA_PHYSICAL) / LARGE_PAGE * LARGE_PAGE;
    if usable < ARENA_LEAST {
        return Err("less than 64 MiB of memory");
    }
    let size = usable.min(ARENA_MOST);
    // SAFETY: the table is written here and read by the processor's walker alone.
    let directory = unsafe { &user_directory };
    let rights = PRESENT | WRITABLE | USER | LARGE | NO_EXECUTE;
    for (index, entry) in (0..size / LARGE_PAGE).zip(directory) {
        entry.store((ARENA_PHYSICAL + index * LARGE_PAGE) | rights, Relaxed);
    }
    // The storm's pages, ring 3's stack and the probe page are the last three entries.
    // SAFETY: its address alone.
    let storm = unsafe { storm_table.as_ptr() } as u64;
    directory[509].store(storm | PRESENT | WRITABLE | USER, Relaxed);
    directory[510].store(LARGE_PAGE | rights, Relaxed);
    // SAFETY: as above.
    let probe = unsafe { probe_table.as_ptr() } as u64;
    directory[511].store(probe | PRESENT | WRITABLE, Relaxed);

    // SAFETY: the frames are read through the probe page and written here alone.
    let (a, b) = unsafe { (&probe_frame_a, &probe_frame_b) };
    a[0].store(programs::nano::WORD_A, Relaxed);
    b[0].store(programs::nano::WORD_B, Relaxed);
    let entry = |frame: &Table| frame.as_ptr() as u64 | PRESENT | NO_EXECUTE;
    probe_entry_a.store(entry(a), Relaxed);
    PROBE_ENTRY_B.store(entry(b), Relaxed);
    Ok(size / 8)
}

/// The probe page's entry for frame A (even) or B (odd).
pub(crate) fn probe_entry(which: u64) -> u64 {
    if which & 1 == 0 {
        probe_entry_a.load(Relaxed)
    } else {
        PROBE_ENTRY_B.load(Relaxed)
    }
}

/// Sets the probe page's entry, and flushes nothing.
#[inline(always)]
pub(crate) fn set_probe_entry(entry: u64) {
    // SAFETY: the table is written here, by the fault handler, and by the processor's walker.
    unsafe { probe_table[0].store(entry, Relaxed) };
}

/// Reads the probe page.
#[inline(always)]
pub(crate) fn read_probe() -> u64 {
    let word;
    // SAFETY: the page is mapped to a frame of the image, or the fault handler maps it.
    unsafe {
        core::arch::asm!("mov {}, [{}]", out(reg) word, in(reg) PROBE,
            options(nostack, preserves_flags));
    }
    word
}
