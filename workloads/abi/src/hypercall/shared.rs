//! Memory that guest and host share: events and time, the console, what the kernel is told at its
//! entry.
//!
//! Layouts alone; who writes which field is said at each.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// The time as the host keeps it, in the layout of pvclock_vcpu_time_info (Xen public/xen.h).
///
/// Read `version` before and after; odd or changed means: again. System time in ns is
/// `system_time + ((tsc - tsc_timestamp) << shift) * multiplier >> 32` (shift right if negative).
#[derive(Debug)]
#[repr(C)]
pub struct Clock {
    /// Odd while the host writes.
    pub version: AtomicU32,
    /// Unused.
    pub reserved: AtomicU32,
    /// TSC at which `system_time` held.
    pub tsc_timestamp: AtomicU64,
    /// System time in ns (the host's CLOCK_MONOTONIC).
    pub system_time: AtomicU64,
    /// ns per tick, 32 fraction bits, after the shift.
    pub multiplier: AtomicU32,
    /// Shift in its low 8 bits, signed.
    pub shift: AtomicU32,
}

/// The page that guest and host share for events and time.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct SharedInfo {
    /// Not 0: an unmasked port is pending.
    pub upcall_pending: AtomicU32,
    /// Not 0: the kernel has masked events. Its own flag (cli, sti); upcalls set it, iret clears it.
    pub upcall_mask: AtomicU32,
    /// Pending ports.
    pub pending: AtomicU64,
    /// Masked ports.
    pub mask: AtomicU64,
    /// Unused.
    pub reserved: [AtomicU64; 5],
    /// The time.
    pub clock: Clock,
}

/// The console: two rings of bytes, in the layout of xencons_interface (Xen public/io/console.h).
///
/// Indices run freely; a byte's place is its index modulo the ring's length. The guest writes
/// `input_consumer` and `output_producer`, the host the others. A producer ahead of its consumer
/// by more than the ring's length breaks the console: the host ends the guest.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct ConsoleRing {
    /// Bytes from the host.
    pub input: [core::sync::atomic::AtomicU8; 1024],
    /// Bytes to the host.
    pub output: [core::sync::atomic::AtomicU8; 2048],
    /// Bytes of input taken.
    pub input_consumer: AtomicU32,
    /// Bytes of input put there.
    pub input_producer: AtomicU32,
    /// Bytes of output taken.
    pub output_consumer: AtomicU32,
    /// Bytes of output put there.
    pub output_producer: AtomicU32,
    /// Not 0: no input will follow what is in the ring.
    pub input_ended: AtomicU32,
    /// The guest sets it to have [`evtchn::CONSOLE_PORT`](super::evtchn::CONSOLE_PORT) raised once the host has taken output.
    pub output_wanted: AtomicU32,
}

/// What the kernel is told at its entry, in `rdi`. Read-only to the guest.
///
/// The entry (`e_entry` of the image) is called as [`Start`], on a boot stack of 16 KiB.
#[derive(Debug)]
#[repr(C)]
pub struct StartInfo {
    /// [`StartInfo::MAGIC`].
    pub magic: u64,
    /// [`VERSION`](super::VERSION) of the host.
    pub version: u32,
    /// [`feature`](super::feature) bits.
    pub features: u32,
    /// Frames of guest memory.
    pub frames: u64,
    /// First frame after the image; all from here on are zero and free, and so are those before the
    /// image.
    pub first_free_frame: u64,
    /// First frame of the image.
    pub first_image_frame: u64,
    /// [`layout::DIRECT_MAP`](super::layout::DIRECT_MAP).
    pub direct_map: u64,
    /// The hypercall page.
    pub hypercall_page: u64,
    /// The shared page.
    pub shared_info: u64,
    /// The console.
    pub console: u64,
    /// Bytes of the command line.
    pub command_line_length: u64,
    /// The command line, UTF-8, without a terminator.
    pub command_line: [u8; 2048],
    /// Frame of the devices, with [`feature::DEVICES`](super::feature::DEVICES). Not among the free ones.
    pub devices: u64,
}

impl StartInfo {
    /// `b"TrapPV\0\x01"` as a little-endian number.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"TrapPV\0\x01");
}

/// The kernel's entry point.
pub type Start = unsafe extern "C" fn(info: *const StartInfo) -> !;
