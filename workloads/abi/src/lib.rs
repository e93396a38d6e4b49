//! What a guest and whoever runs it agree on: I/O ports, marks and the console protocol.
//!
//! This is the only crate that host and guest share. It holds constants, words and the layout of
//! what is shared, no behaviour. [`hypercall`] is what the `aware` flavour has instead of ports.
//! All but [`hypercall`] works on a foreign VMM too: ports that it does not know are ignored by it,
//! and the console is a plain 16550.
//!
//! # Console protocol
//!
//! One line per message, `\n` at its end. The host sends to the guest's serial port:
//!
//! | host sends | guest answers |
//! |---|---|
//! | `run WORKLOAD SIZE ITERATIONS` | `begin`, then `end`, then `done CHECKSUM CYCLES` |
//! | `list` | one `workload NAME` per workload, then `listed` |
//! | `quit CODE` | nothing: writes CODE to [`port::EXIT`]; an aware guest shuts down with it |
//!
//! The guest greets with `ready VERSION FLAVOUR`. SIZE 0 and ITERATIONS 0 stand for the
//! catalogue's defaults. CHECKSUM is 16 hex digits, CYCLES decimal (guest TSC ticks of the window).
//! Instead of `begin` or `done` the guest may answer `failed REASON`, `unsupported REASON` or
//! `unknown WORKLOAD`; the rest of the line is the reason. `begin` and `end` bracket the
//! measured window for a host that has nothing but the console: the window opens when the
//! newline of `begin` arrives and closes when the first byte of `end` does. A run that goes wrong
//! inside its window answers `begin`, `end`, `failed REASON`, and the guest takes the next line. A
//! guest whose kernel is beyond help says one line `failed kernel ...` and writes 1 to
//! [`port::EXIT`].
//!
//! Between `end` and `done`, a run whose requests were timed one by one says how long they took, in
//! nanoseconds of the guest's own clock:
//!
//! ```text
//! latency COUNT LEAST MOST
//! bucket LOW HIGH COUNT
//! ```
//!
//! `latency` comes once, with the number of values and the exact least and greatest; then one
//! `bucket` for each range LOW to HIGH (both belong to it) that holds values, ascending, without
//! overlap. The counts of all buckets add up to COUNT. A range is at most 1/32 of its LOW wide (to
//! the nanosecond), so a percentile read from the buckets is off by no more than that. A run
//! without `latency` has none, and neither has a run that failed.
//!
//! The workload `console` is the one exception to the rule that nothing stands between `begin` and
//! `end`: it says lines there that start with [`DATA`]. The window closes when the first byte of a
//! line arrives that does not, which is `end`. What the lines hold, and the checksum of what a host
//! has received, stand in `programs::io::console`.
//!
//! A guest whose command line holds `run WORKLOAD SIZE ITERATIONS` obeys that after its greeting,
//! as if it came from the console, and ends: with 0 after `done`, else with 1.
#![no_std]

pub mod device;
pub mod hypercall;
pub mod net;

/// First byte of a line that the workload `console` says inside its window.
pub const DATA: u8 = b':';

/// Version of this protocol, sent in the greeting.
pub const PROTOCOL_VERSION: u32 = 1;

/// I/O ports of the guest's machine.
pub mod port {
    /// First port of the 16550 UART that is the console.
    pub const COM1: u16 = 0x3f8;
    /// A write ends the guest: 0 is success, anything else failure (QEMU's isa-debug-exit).
    pub const EXIT: u16 = 0xf4;
    /// A write of [`super::mark`] values brackets the measured window; unassigned on a PC.
    pub const MARK: u16 = 0x2f0;
}

/// Values written to [`port::MARK`], as 8-bit writes.
pub mod mark {
    /// The measured window opens.
    pub const BEGIN: u8 = 1;
    /// The measured window closes.
    pub const END: u8 = 2;
}

/// Words of the console protocol; see the crate documentation for the grammar.
pub mod word {
    /// Greeting of the guest.
    pub const READY: &str = "ready";
    /// The measured window opens at this line's newline.
    pub const BEGIN: &str = "begin";
    /// The measured window closed at this line's first byte.
    pub const END: &str = "end";
    /// How many requests were timed, the shortest and the longest time.
    pub const LATENCY: &str = "latency";
    /// How many requests took how long.
    pub const BUCKET: &str = "bucket";
    /// A run has ended well.
    pub const DONE: &str = "done";
    /// A run was tried and went wrong.
    pub const FAILED: &str = "failed";
    /// A run has no meaning in this flavour.
    pub const UNSUPPORTED: &str = "unsupported";
    /// No workload has that name.
    pub const UNKNOWN: &str = "unknown";
    /// One entry of the answer to `list`.
    pub const WORKLOAD: &str = "workload";
    /// End of the answer to `list`.
    pub const LISTED: &str = "listed";
    /// Host command: run a workload.
    pub const RUN: &str = "run";
    /// Host command: name the workloads.
    pub const LIST: &str = "list";
    /// Host command: end the guest.
    pub const QUIT: &str = "quit";
}

/// Environment variables by which the native process learns its inherited descriptors, as decimal
/// numbers. Without one of them it has no such device.
pub mod descriptor {
    /// The disk: a file, open for reading, or for reading and writing.
    pub const DISK: &str = "TRAPLINE_DISK";
    /// The network: a connected datagram socket, one Ethernet frame a datagram.
    pub const NET: &str = "TRAPLINE_NET";
}
