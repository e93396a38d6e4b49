//! What a PC's BIOS would have done to the board before it starts a kernel.
//!
//! Kernels set up interrupt controllers and timer by themselves before they let interrupts in, but
//! real-mode code relies on them as they are: vectors 8h to Fh and 70h to 77h, and 18.2 ticks a second
//! (IBM PC/AT Technical Reference; the handlers are [`loader`](crate::loader)'s).

use super::Machine;

/// (port, value) in order: both 8259s, with the timer's line and the cascade open, then counter 0 as a
/// rate generator of the longest period.
const WRITES: [(u16, u8); 13] = [
    (0x20, 0x11),
    (0x21, 0x08),
    (0x21, 0x04),
    (0x21, 0x01),
    (0xa0, 0x11),
    (0xa1, 0x70),
    (0xa1, 0x02),
    (0xa1, 0x01),
    (0x21, 0xfa),
    (0xa1, 0xff),
    (0x43, 0x34),
    (0x40, 0),
    (0x40, 0),
];

impl Machine {
    /// Leaves the board as firmware does. Controllers in the host's kernel stand as after power-up.
    pub(super) fn set_up_board(&mut self) {
        for (port, value) in WRITES {
            // None of these registers asks for anything.
            let _ = self.port_out_elsewhere(port, 1, &[value]);
        }
    }
}
