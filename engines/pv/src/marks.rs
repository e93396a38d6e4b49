//! Windows between a guest's marks.
//!
//! Closing one takes a snapshot alone; it is worked out and reported when V has nothing else to do,
//! outside of what is measured.

use engine_core::machine::Window;

use crate::count::Snapshot;

/// Who is told of windows.
pub(crate) type Observer = Box<dyn FnMut(&Window)>;

/// Windows between marks. A closed one is worked out and reported when V has nothing else to do.
#[derive(Default)]
pub(crate) struct Marks {
    open: Option<Snapshot>,
    closed: Option<(Snapshot, Snapshot)>,
    next: u64,
    pub(crate) observer: Option<Observer>,
}

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Marks({})", self.next)
    }
}

impl Marks {
    /// Takes the value of a mark; `now` is what is counted so far.
    pub(crate) fn mark(&mut self, value: u64, mut now: Snapshot) {
        if value == u64::from(abi::mark::BEGIN) {
            self.report();
            self.open = Some(now);
        } else if let Some(begin) = self.open.take() {
            now.forget_mark();
            self.report();
            self.closed = Some((begin, now));
        }
    }

    /// Tells the observer of the window that has closed, if one has.
    pub(crate) fn report(&mut self) {
        let Some((begin, end)) = self.closed.take() else {
            return;
        };
        let window = Window {
            seq: self.next,
            counts: end.since(&begin),
        };
        self.next += 1;
        if let Some(observer) = &mut self.observer {
            observer(&window);
        }
    }

    /// True if a window has closed of which nobody has been told.
    pub(crate) fn unreported(&self) -> bool {
        self.closed.is_some()
    }
}
