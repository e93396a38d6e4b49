//! Exit statuses.

use std::process::ExitCode;

/// The guest ended well.
pub(crate) const SUCCESS: u8 = 0;
/// The guest ended and said that it failed.
pub(crate) const FAILURE: u8 = 1;
/// The command line, or a file it names, makes no sense.
pub(crate) const USAGE: u8 = 2;
/// This host can't run the mode.
pub(crate) const UNAVAILABLE: u8 = 3;
/// The guest crashed, or the engine could not go on.
pub(crate) const CRASHED: u8 = 4;
/// A limit was reached.
pub(crate) const LIMIT: u8 = 5;

/// Ended by a host signal: 128 and its number, as shells do.
pub(crate) fn signalled(signal: u32) -> ExitCode {
    ExitCode::from(128 | (signal & 0x7f) as u8)
}

/// Of a guest that ended with `code`, as QEMU's isa-debug-exit makes it.
pub(crate) fn raw(code: u32) -> u8 {
    (code << 1 | 1) as u8
}
