//! Interrupt lines: how a device asks for attention without knowing which controller is behind.
//!
//! A [`Line`] is one wire from a device to one input of the machine's interrupt controllers. The
//! controllers may be this crate's own (8259 pair, I/O APIC, local APIC) or live in the host's
//! kernel; both are an [`Interrupts`]. Numbers are those of the ISA bus, which are also the global
//! system interrupts of a PC.
//!
//! What this does not do: share a wire between devices, invert it, or know about triggering, which
//! is the controllers' business.
//!
//! Invariant: a controller hears of a line only when its level changes.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The inputs of a machine's interrupt controllers.
pub trait Interrupts: Send + Sync {
    /// Drives input `number` (global system interrupt, for the lowest 16 also the ISA IRQ). Called
    /// on the vCPU's thread or on any other.
    fn set_line(&self, number: u8, level: bool);
}

/// One wire to an interrupt controller. Clones are the same wire; at most one thread at a time
/// sets it.
#[derive(Clone)]
pub struct Line {
    controller: Option<Arc<dyn Interrupts>>,
    number: u8,
    level: Arc<AtomicBool>,
}

impl Line {
    /// The wire to input `number` of `controller`, low.
    pub fn new(controller: Arc<dyn Interrupts>, number: u8) -> Self {
        Line {
            controller: Some(controller),
            number,
            level: Arc::default(),
        }
    }

    /// A wire that leads nowhere.
    pub fn disconnected() -> Self {
        Line {
            controller: None,
            number: 0,
            level: Arc::default(),
        }
    }

    /// Drives the wire. Costs one load when the level stays.
    #[inline]
    pub fn set(&self, level: bool) {
        if self.level.load(Ordering::Relaxed) == level {
            return;
        }
        self.level.store(level, Ordering::Relaxed);
        if let Some(controller) = &self.controller {
            controller.set_line(self.number, level);
        }
    }

    /// Drives the wire high and low again: an edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level that was last set.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("connected", &self.controller.is_some())
            .field("number", &self.number)
            .field("level", &self.level())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u8, bool)>>);

    impl Interrupts for Recorder {
        fn set_line(&self, number: u8, level: bool) {
            self.0.lock().unwrap().push((number, level));
        }
    }

    #[test]
    fn a_controller_hears_changes_only_and_clones_are_the_same_wire() {
        let recorder = Arc::new(Recorder::default());
        let line = Line::new(recorder.clone(), 4);
        line.set(false);
        line.set(true);
        line.clone().set(true);
        line.clone().set(false);
        line.pulse();
        assert_eq!(
            *recorder.0.lock().unwrap(),
            [(4, true), (4, false), (4, true), (4, false)]
        );
        assert!(!line.level());
    }

    #[test]
    fn a_disconnected_line_keeps_its_level() {
        let line = Line::disconnected();
        line.set(true);
        assert!(line.level());
    }
}
