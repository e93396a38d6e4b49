//! Both sides of batches, and what was counted.

use std::fmt::Write;
use std::time::Duration;

use engine_core::kick::Watch;

use crate::layout::{End, OUTCOME_SYSTEM_CALL};
use crate::native::{Lost, Native};
use crate::table::Table;
use crate::translated::Translated;

/// What runs for longer when translated has no end.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Sides {
    pub(crate) table: Table,
    pub(crate) native: Native,
    pub(crate) translated: Translated,
    pub(crate) watch: Watch,
    pub(crate) batches: u64,
    pub(crate) rejected: u64,
    pub(crate) vectors: [u64; 32],
}

impl Sides {
    pub(crate) fn new() -> Sides {
        Sides {
            table: Table::new(),
            native: Native::new(),
            translated: Translated::new(),
            watch: Watch::new(LIMIT),
            batches: 0,
            rejected: 0,
            vectors: [0; 32],
        }
    }

    /// Forgets all translations; in one batch of four the cache of code is tight.
    pub(crate) fn reset(&mut self) {
        self.translated.reset(self.batches.is_multiple_of(4));
    }

    /// How slot `index` of a batch ended natively, counted. None if the native side was lost before, or
    /// if it made a system call.
    pub(crate) fn native_end(&mut self, index: usize, lost: Option<&Lost>) -> Option<End> {
        if let Some(Lost::Endless(at) | Lost::Died(at)) = lost
            && index >= *at
        {
            return None;
        }
        let end = self.native.end(index).clone();
        if end.outcome == OUTCOME_SYSTEM_CALL {
            self.rejected += 1;
            return None;
        }
        self.vectors[end.vector as usize & 31] += 1;
        Some(end)
    }

    /// Waits for what runs natively alone, in slot `index`: its end, unless it made a system call.
    pub(crate) fn finish_alone(&mut self, index: usize) -> Option<End> {
        self.native.finish().ok()?;
        let end = self.native.end(index).clone();
        (end.outcome != OUTCOME_SYSTEM_CALL).then_some(end)
    }

    /// What was thrown away, and how the rest ended.
    pub(crate) fn ends(&self) -> String {
        let mut text = format!("{} thrown away; ends by vector:", self.rejected);
        let met = self.vectors.iter().enumerate();
        for (vector, count) in met.filter(|(_, count)| **count > 0) {
            let _ = write!(text, " {vector}: {count}");
        }
        text
    }
}
