//! What a machine knows of its vCPUs' threads: how to reach them, which of them rest, and when they
//! have to look at their task priority again.
//!
//! Invariant: whoever rests was told so under the machine's lock, and is told of what comes for it
//! by its own events; so nobody sleeps through anything.

use std::io;
use std::sync::Arc;

use crate::host::events::{Events, flag};

/// What a vCPU's thread does while it runs no guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// It is in its guest, or about to be.
    None,
    /// It holds a guest that polls for input.
    Nap,
    /// The guest has halted, with interrupts enabled or not.
    Halt { interruptible: bool },
    /// The guest waits for a start-up IPI.
    Stop,
}

#[derive(Debug)]
struct Seat {
    events: Arc<Events>,
    rest: Rest,
    /// When to look at the task priority again, while it holds an interrupt back.
    recheck: Option<u64>,
}

/// The vCPUs of a machine.
#[derive(Debug)]
pub(crate) struct Seats(Vec<Seat>);

impl Seats {
    /// `count` vCPUs. The first one's events are the machine's.
    pub(crate) fn new(first: &Arc<Events>, count: u8) -> io::Result<Self> {
        let others = (1..count).map(|_| Events::new().map(Arc::new));
        let seat = |events: Arc<Events>| Seat {
            events,
            rest: Rest::None,
            recheck: None,
        };
        std::iter::once(Ok(Arc::clone(first)))
            .chain(others)
            .map(|events| Ok(seat(events?)))
            .collect::<io::Result<_>>()
            .map(Seats)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The events of `cpu`.
    pub(crate) fn events(&self, cpu: usize) -> Arc<Events> {
        Arc::clone(&self.0[cpu].events)
    }

    /// Says what the thread of `cpu` does from now on.
    pub(crate) fn set_rest(&mut self, cpu: usize, rest: Rest) {
        self.0[cpu].rest = rest;
    }

    /// Lets `cpu` look at what has come for it.
    pub(crate) fn tell(&mut self, cpu: usize, flags: u32) {
        let Seat { events, rest, .. } = &mut self.0[cpu];
        if *rest == Rest::None {
            events.kick(flags);
        } else {
            // It is as good as up: nobody may take it for one that rests.
            *rest = Rest::None;
            events.wake(flags);
        }
    }

    /// Wakes whoever holds a guest that polls, but for `cpu`.
    pub(crate) fn wake_naps(&mut self, cpu: usize) {
        for other in 0..self.0.len() {
            if other != cpu && self.0[other].rest == Rest::Nap {
                self.tell(other, flag::SOMETHING);
            }
        }
    }

    /// Makes all but `cpu` end.
    pub(crate) fn stop_others(&mut self, cpu: usize) {
        for other in 0..self.0.len() {
            if other != cpu {
                self.0[other].events.raise(flag::STOP);
            }
        }
    }

    /// True if nobody but `cpu` runs a guest or is about to.
    pub(crate) fn others_rest(&self, cpu: usize) -> bool {
        let mut others = self.0.iter().enumerate().filter(|(other, _)| *other != cpu);
        others.all(|(_, seat)| matches!(seat.rest, Rest::Halt { .. } | Rest::Stop))
    }

    /// True if somebody has halted with interrupts enabled.
    pub(crate) fn some_interruptible(&self) -> bool {
        let awaits = Rest::Halt {
            interruptible: true,
        };
        self.0.iter().any(|seat| seat.rest == awaits)
    }

    /// `cpu` wants to look at its task priority at `time`.
    pub(crate) fn set_recheck(&mut self, cpu: usize, time: Option<u64>) {
        self.0[cpu].recheck = time;
    }

    /// When `cpu` wants to.
    pub(crate) fn recheck(&self, cpu: usize) -> Option<u64> {
        self.0[cpu].recheck
    }

    /// When the first of them wants to.
    pub(crate) fn first_recheck(&self) -> Option<u64> {
        self.0.iter().filter_map(|seat| seat.recheck).min()
    }

    /// Lets everybody look at the task priority whose time has come.
    pub(crate) fn recheck_due(&mut self, cpu: usize, now: u64) {
        for other in 0..self.0.len() {
            if self.0[other].recheck.is_some_and(|time| time <= now) {
                self.0[other].recheck = None;
                if other == cpu {
                    self.0[other].events.note(flag::SOMETHING);
                } else {
                    self.tell(other, flag::SOMETHING);
                }
            }
        }
    }
}
