//! Ranges of a register's value, and the few of them that blocks tell each other of.

use crate::window::{REACH, SIZE};

/// What an access asks of a register, and what one block may tell the next: a set of properties, one
/// bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Nothing is known.
    Any = 0,
    /// It may serve as base.
    Base = 0b001,
    /// It may serve as index, or as base.
    Index = 0b011,
    /// It is inside the window, so what is added to it to get there is within reach.
    Inside = 0b101,
    /// Both: not negative, and so is whatever is below it.
    Low = 0b111,
}

impl Level {
    pub(super) const BASE: Range = Range::new(-REACH, SIZE as i64 + REACH);
    pub(super) const INDEX: Range = Range::new(-REACH, REACH);
    const INSIDE: Range = Range::new(0, SIZE as i64 - 1);

    pub(super) fn of(bits: u64) -> Level {
        match bits & 7 {
            0b111 => Level::Low,
            0b101 => Level::Inside,
            0b011 => Level::Index,
            0b001 => Level::Base,
            _ => Level::Any,
        }
    }

    pub(super) fn covers(self, other: Level) -> bool {
        self as u64 & other as u64 == other as u64
    }

    /// The values it stands for.
    pub(super) fn range(self) -> Option<Range> {
        match self {
            Level::Any => None,
            Level::Base => Some(Level::BASE),
            Level::Index => Some(Level::INDEX),
            Level::Inside => Some(Level::INSIDE),
            Level::Low => Some(Range::new(0, REACH)),
        }
    }

    /// True if it takes the comparison of an index to find out.
    pub(super) fn index(self) -> bool {
        self.covers(Level::Index)
    }
}

/// A level for each register: four bits each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Levels(u64);

impl Levels {
    pub(super) fn get(self, register: u8) -> Level {
        Level::of(self.0 >> (4 * register))
    }

    pub(super) fn raise(&mut self, register: u8, level: Level) {
        self.0 |= (level as u64) << (4 * register);
    }

    /// True if these tell at least as much as `other`.
    pub(crate) fn cover(self, other: Levels) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub low: i64,
    pub high: i64,
}

impl Range {
    /// Bounds beyond this are no use to anybody; within it sums of a few don't overflow.
    const LIMIT: i64 = 1 << 56;

    pub(super) const fn new(low: i64, high: i64) -> Range {
        Range { low, high }
    }

    pub(super) fn within(self, other: Range) -> bool {
        self.low >= other.low && self.high <= other.high
    }

    /// None if it says too little to be kept.
    pub(super) fn cut(self) -> Option<Range> {
        self.within(Range::new(-Range::LIMIT, Range::LIMIT))
            .then_some(self)
    }

    pub(super) fn moved(self, by: i64) -> Option<Range> {
        Range::new(self.low.checked_add(by)?, self.high.checked_add(by)?).cut()
    }

    pub(super) fn plus(self, other: Range) -> Option<Range> {
        Range::new(self.low + other.low, self.high + other.high).cut()
    }

    pub(super) fn both(self, other: Range) -> Range {
        Range::new(self.low.max(other.low), self.high.min(other.high))
    }

    pub(super) fn either(self, other: Range) -> Range {
        Range::new(self.low.min(other.low), self.high.max(other.high))
    }
}

/// A register's value at the head, and so much more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub register: u8,
    pub moved: i64,
}

impl Origin {
    pub(super) fn range(self, head: Levels) -> Option<Range> {
        head.get(self.register).range()?.moved(self.moved)
    }
}
