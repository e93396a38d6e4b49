//! Measured windows: what was counted between two marks.
//!
//! Closing a window only takes a snapshot. It is worked out and handed to the observer when the
//! guest has time, outside of what is measured.

use crate::Vcpu;
use crate::tally::{Count, Snapshot, Tally};

/// Counters of one measured window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of the window in this run, from 0.
    pub seq: u64,
    /// What was counted between the marks, the marks left out.
    pub counts: Vec<Count>,
}

type Observer = Box<dyn FnMut(&Window) + Send>;

/// The windows of one run.
pub(crate) struct Windows {
    open: Option<Snapshot>,
    closed: Option<(Snapshot, Snapshot)>,
    next: u64,
    observer: Observer,
}

impl Default for Windows {
    fn default() -> Self {
        Windows {
            open: None,
            closed: None,
            next: 0,
            observer: Box::new(|_| ()),
        }
    }
}

impl Windows {
    /// Calls `observer` with each window soon after it has closed.
    pub(crate) fn observe(&mut self, observer: impl FnMut(&Window) + Send + 'static) {
        self.observer = Box::new(observer);
    }

    /// The guest wrote `value` to the mark port, on vCPU `cpu`.
    pub(crate) fn mark(&mut self, value: u8, tally: &mut Tally, cpu: usize, vcpu: &mut dyn Vcpu) {
        match value {
            abi::mark::BEGIN => {
                self.report(tally, vcpu);
                self.open = Some(tally.snapshot(cpu, vcpu));
            }
            abi::mark::END => {
                if let Some(begin) = self.open.take() {
                    let mut end = tally.snapshot(cpu, vcpu);
                    // The closing mark's own exit was counted already.
                    tally.forget_port_write(abi::port::MARK, &mut end);
                    self.report(tally, vcpu);
                    self.closed = Some((begin, end));
                }
            }
            // A guest may write what it likes.
            _ => {}
        }
    }

    /// Hands a closed window to the observer.
    pub(crate) fn report(&mut self, tally: &Tally, vcpu: &dyn Vcpu) {
        if let Some((begin, end)) = self.closed.take() {
            let seq = self.next;
            self.next += 1;
            let counts = tally.between(&begin, &end, vcpu);
            (self.observer)(&Window { seq, counts });
        }
    }
}
