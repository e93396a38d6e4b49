//! Why a run has no checksum, in words that need no formatting machinery.
//!
//! The guest's kernel prints these without `core::fmt`: that is precompiled with SSE, which a
//! kernel stays away from (see the guest's build flags).

use crate::Ring;
use core::fmt;

/// An exception that the guest's kernel took while a workload ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it was taken.
    pub ring: Ring,
    /// Exception vector.
    pub vector: u8,
    /// Error code, 0 where the vector has none.
    pub error: u64,
    /// Instruction that faulted.
    pub rip: u64,
    /// CR2; means something for page faults only.
    pub address: u64,
}

/// Why a run has no checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The size is beyond what the workload takes.
    Beyond {
        /// The size asked for.
        size: u64,
        /// The largest there is.
        most: u64,
    },
    /// The size needs more memory than there is.
    TooLarge {
        /// The size asked for.
        size: u64,
        /// Words needed; `u64::MAX` on overflow.
        words: u64,
        /// Words there are.
        available: u64,
    },
    /// By design: the operation has no meaning here.
    Unsupported(&'static str),
    /// The trial before the window showed that the operation does not work here.
    Broken(&'static str),
    /// A device reported an error, or did not answer in time.
    Device {
        /// What happened, with the device's name.
        what: &'static str,
        /// The device's own error code.
        code: u64,
    },
    /// An exception ended the run.
    Fault(Fault),
}

/// A part of a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Literal text.
    Text(&'static str),
    /// A number in decimal.
    Decimal(u64),
    /// A number in hexadecimal, after `0x`.
    Hex(u64),
}

impl Refusal {
    /// The word of the console protocol that announces it.
    #[inline]
    pub fn word(&self) -> &'static str {
        match self {
            Refusal::Unsupported(_) => abi::word::UNSUPPORTED,
            Refusal::Beyond { .. }
            | Refusal::TooLarge { .. }
            | Refusal::Broken(_)
            | Refusal::Device { .. }
            | Refusal::Fault(_) => abi::word::FAILED,
        }
    }

    /// Says the reason, piece by piece.
    #[inline]
    pub fn say(&self, mut sink: impl FnMut(Piece)) {
        use Piece::{Decimal, Hex, Text};
        match *self {
            Refusal::Beyond { size, most: 1 } => {
                sink(Text("size "));
                sink(Decimal(size));
                sink(Text(" of a workload that takes no size"));
            }
            Refusal::Beyond { size, most } => {
                sink(Text("size "));
                sink(Decimal(size));
                sink(Text(" is beyond "));
                sink(Decimal(most));
            }
            Refusal::TooLarge {
                size,
                words,
                available,
            } => {
                sink(Text("size "));
                sink(Decimal(size));
                sink(Text(" needs "));
                sink(Decimal(words));
                sink(Text(" words of memory, there are "));
                sink(Decimal(available));
            }
            Refusal::Unsupported(why) | Refusal::Broken(why) => sink(Text(why)),
            Refusal::Device { what, code } => {
                sink(Text(what));
                sink(Text(" "));
                sink(Hex(code));
            }
            Refusal::Fault(fault) => {
                sink(Text("fault in ring "));
                sink(Decimal(match fault.ring {
                    Ring::User => 3,
                    Ring::Kernel => 0,
                }));
                sink(Text(": vector "));
                sink(Decimal(fault.vector.into()));
                sink(Text(" error "));
                sink(Hex(fault.error));
                sink(Text(" rip "));
                sink(Hex(fault.rip));
                sink(Text(" address "));
                sink(Hex(fault.address));
            }
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut result = Ok(());
        self.say(|piece| {
            if result.is_ok() {
                result = match piece {
                    Piece::Text(text) => f.write_str(text),
                    Piece::Decimal(value) => write!(f, "{value}"),
                    Piece::Hex(value) => write!(f, "{value:#x}"),
                };
            }
        });
        result
    }
}

impl core::error::Error for Refusal {}
