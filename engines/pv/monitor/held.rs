//! What a user process has mapped for each leaf of its tables.
//!
//! A word per entry: nothing, a frame with access, a frame whose access was taken away while the
//! mapping stays (parked), or the frame that was unmapped there last (gone).
//!
//! Parking a page and giving it back is one mprotect each, where unmapping it and mapping it again
//! costs the host an area and a fault. But mapping another frame over a parked one costs more than
//! mapping it where nothing is. So pages are parked in tables where pages that went away used to come
//! back with the same frame: [`Frame::returns`]. A parked page counts for nothing else: it is given back
//! only if the guest's tables name the same frame again, with the rights that they say then.
//!
//! Records hold for one epoch of their space: taking everything from a process starts the next.

use crate::State;
use crate::tables::Frame;
use crate::wire::k;

/// Bytes of the record of one table.
pub(crate) const RECORD: u64 = 512 * 4;

/// What a process has for a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    Nothing,
    /// This frame.
    Live(u64),
    /// This frame, without any access.
    Parked(u64),
    /// Nothing any more; this frame last.
    Gone(u64),
}

const PARKED: u32 = 1 << 31;
const GONE: u32 = 1 << 30;
/// The most that [`Frame::returns`] counts, and from where pages are parked.
const RETURNS: u8 = 2;

impl Held {
    fn word(self) -> u32 {
        match self {
            Held::Nothing => 0,
            Held::Live(frame) => frame as u32 + 1,
            Held::Parked(frame) => frame as u32 + 1 | PARKED,
            Held::Gone(frame) => frame as u32 + 1 | GONE,
        }
    }

    fn of(word: u32) -> Self {
        let frame = u64::from(word & !(PARKED | GONE)).wrapping_sub(1);
        match word {
            0 => Held::Nothing,
            _ if word & PARKED != 0 => Held::Parked(frame),
            _ if word & GONE != 0 => Held::Gone(frame),
            _ => Held::Live(frame),
        }
    }
}

impl State {
    fn record(&self, table: u64, index: u64) -> *mut u32 {
        assert!(table < self.frames && index < 512);
        (k::MAPPED + table * RECORD + index * 4) as *mut u32
    }

    /// What the process of the table's space may have for a leaf.
    pub(crate) fn held(&self, table: u64, index: u64) -> Held {
        let Frame { slot, epoch, .. } = *self.frame(table);
        if epoch != self.spaces[usize::from(slot)].epoch {
            return Held::Nothing;
        }
        // SAFETY: one record per frame was mapped.
        Held::of(unsafe { self.record(table, index).read() })
    }

    /// Whether it may have access.
    pub(crate) fn is_live(&self, table: u64, index: u64) -> bool {
        matches!(self.held(table, index), Held::Live(_))
    }

    /// Notes what it has.
    pub(crate) fn hold(&mut self, table: u64, index: u64, held: Held) {
        let frame = self.frame(table);
        let slot = usize::from(frame.slot);
        if frame.epoch != self.spaces[slot].epoch {
            frame.epoch = self.spaces[slot].epoch;
            // SAFETY: one record per frame was mapped.
            unsafe { self.record(table, 0).write_bytes(0, 512) };
        }
        self.spaces[slot].mapped |= held != Held::Nothing;
        // SAFETY: as above.
        unsafe { self.record(table, index).write(held.word()) };
    }

    /// Notes whether a page that comes back has the frame that it had.
    pub(crate) fn learn(&mut self, table: u64, held: Held, target: u64) {
        if let Held::Parked(frame) | Held::Gone(frame) = held {
            let returns = &mut self.frame(table).returns;
            *returns = if frame == target {
                RETURNS.min(*returns + 1)
            } else {
                0
            };
        }
    }

    /// Whether a page that goes away should be parked.
    pub(crate) fn returns(&self, table: u64) -> bool {
        self.frame(table).returns >= RETURNS
    }
}
