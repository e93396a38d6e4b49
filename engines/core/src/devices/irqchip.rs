//! The interrupt controllers of a machine, wired together: 8259s, I/O APIC and local APICs.
//!
//! Every line reaches the 8259s and the I/O APIC, as on a PC; which of them is heard is the guest's
//! choice. The timer's IRQ 0 is pin 2 of the I/O APIC (Intel MultiProcessor Specification 5.2).
//! The 8259s' output goes to every processor, through its local APIC's LINT0.
//!
//! [`Wires`] is the end that devices hold. It may be driven from any thread and only notes what has
//! changed; a vCPU's thread takes it over between two exits, so the controllers need no lock of
//! their own.
//!
//! Invariant: between two exits everything that can move on has been moved on: no message waits that
//! a local APIC would take.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{IoApic, Lapics, Pics};
use crate::clock::Clock;
use crate::host::events::{Events, flag};
use crate::interrupt::Interrupts;

/// The timer's line at the I/O APIC.
const TIMER_PIN: u8 = 2;

/// The lines of a machine, as its devices drive them.
#[derive(Debug)]
pub struct Wires {
    events: Arc<Events>,
    levels: AtomicU32,
    /// Lines that rose since the last look.
    rises: AtomicU32,
    /// Lines that changed since the last look.
    changes: AtomicU32,
}

impl Wires {
    /// All low.
    pub fn new(events: Arc<Events>) -> Self {
        Wires {
            events,
            levels: AtomicU32::new(0),
            rises: AtomicU32::new(0),
            changes: AtomicU32::new(0),
        }
    }
}

impl Interrupts for Wires {
    fn set_line(&self, number: u8, level: bool) {
        let Some(bit) = 1u32.checked_shl(number.into()) else {
            return;
        };
        if level {
            self.levels.fetch_or(bit, Ordering::Relaxed);
            self.rises.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.levels.fetch_and(!bit, Ordering::Relaxed);
        }
        // After the levels: whoever sees the change sees them too.
        self.changes.fetch_or(bit, Ordering::Release);
        if runs_vcpu() {
            // It looks by itself before it enters its guest.
            self.events.note(flag::LINES);
        } else {
            self.events.raise(flag::LINES);
        }
    }
}

thread_local! {
    /// This thread runs a vCPU.
    static RUNS_VCPU: Cell<bool> = const { Cell::new(false) };
}

fn runs_vcpu() -> bool {
    RUNS_VCPU.get()
}

/// While it lives, the calling thread runs a vCPU: what it does to a line it takes over by itself.
#[derive(Debug)]
pub(crate) struct VcpuThread(());

impl VcpuThread {
    pub(crate) fn enter() -> Self {
        RUNS_VCPU.set(true);
        VcpuThread(())
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        RUNS_VCPU.set(false);
    }
}

/// What a processor is to take next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The 8259s' interrupt: its vector is told by [`Irqchip::acknowledge`].
    External,
    /// A vector of the local APIC.
    Vector(u8),
}

/// The controllers.
#[derive(Debug)]
pub struct Irqchip {
    /// The 8259s.
    pub pics: Pics,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// The local APICs.
    pub lapics: Lapics,
    /// The 8259s' output, as the local APICs have last been told.
    output: bool,
}

impl Irqchip {
    /// Controllers of `cpus` processors after reset.
    pub fn new(clock: &Clock, cpus: u8) -> Self {
        Irqchip {
            pics: Pics::default(),
            ioapic: IoApic::default(),
            lapics: Lapics::new(clock, cpus),
            output: false,
        }
    }

    /// Takes over what has changed on the wires.
    pub fn take(&mut self, wires: &Wires) {
        let mut changes = wires.changes.swap(0, Ordering::Acquire);
        let rises = wires.rises.swap(0, Ordering::Relaxed);
        let levels = wires.levels.load(Ordering::Relaxed);
        while changes != 0 {
            let number = changes.trailing_zeros() as u8;
            changes &= changes - 1;
            let level = levels >> number & 1 == 1;
            if rises >> number & 1 == 1 {
                // It may have fallen in between: the edge counts.
                self.set_line(number, false);
                self.set_line(number, true);
            }
            self.set_line(number, level);
        }
        self.settle();
    }

    fn set_line(&mut self, number: u8, level: bool) {
        self.pics.set_line(number, level);
        let pin = if number == 0 { TIMER_PIN } else { number };
        // The 8259s' cascade has no pin of its own.
        if number != TIMER_PIN {
            self.ioapic.set_line(pin, level);
        }
    }

    /// Moves on what can move on. To be called after each access to one of the controllers.
    pub fn settle(&mut self) {
        while let Some(vector) = self.lapics.own().take_ended() {
            self.ioapic.end_of_interrupt(vector);
        }
        self.lapics.deliver_sent();
        let lapics = &mut self.lapics;
        self.ioapic
            .deliver(|destination, message| lapics.accept(destination, message));
        let output = self.pics.output();
        if output && !self.output {
            self.lapics.external_rose();
        }
        self.output = output;
    }

    fn external(&self, cpu: usize) -> bool {
        self.pics.output() && self.lapics.of(cpu).takes_external()
    }

    /// True when something waits for `cpu`, deliverable or not.
    pub fn waiting(&self, cpu: usize) -> bool {
        self.lapics.of(cpu).has_request() || self.external(cpu)
    }

    /// What `cpu` is to take next, if priorities allow. The 8259s know none of the local APICs' and
    /// come first, as they do with KVM.
    pub fn deliverable(&self, cpu: usize) -> Option<Request> {
        if self.external(cpu) {
            return Some(Request::External);
        }
        self.lapics.of(cpu).deliverable().map(Request::Vector)
    }

    /// `cpu` takes `request`; answers its vector.
    pub fn acknowledge(&mut self, cpu: usize, request: Request) -> u8 {
        let vector = match request {
            Request::External => {
                // It falls, and rises again if there is more: news for whoever listens.
                self.output = false;
                self.pics.acknowledge()
            }
            Request::Vector(vector) => {
                self.lapics.of_mut(cpu).acknowledge(vector);
                vector
            }
        };
        self.settle();
        vector
    }

    /// True if an NMI or INIT may come without a processor's doing.
    pub fn has_unmaskable(&self) -> bool {
        let lint0 = |cpu| self.lapics.of(cpu).lint0_is_nmi();
        self.ioapic.has_unmaskable() || (0..self.lapics.count()).any(lint0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;

    const SVR: u64 = 0xf0;
    const EOI: u64 = 0xb0;
    const LINT0: u64 = 0x350;

    struct Board {
        chip: Irqchip,
        wires: Arc<Wires>,
    }

    impl Board {
        fn new() -> Self {
            let events = Arc::new(Events::new().unwrap());
            let mut board = Board {
                chip: Irqchip::new(&Clock::manual(), 4),
                wires: Arc::new(Wires::new(events)),
            };
            for (offset, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1)] {
                board.chip.pics.write(offset, &[value]);
            }
            board
        }

        fn lapic(&mut self, offset: u64, value: u32) {
            self.chip.lapics.write(offset, &value.to_le_bytes());
            self.chip.settle();
        }

        fn redirect(&mut self, pin: u8, entry: u32) {
            self.chip.ioapic.write(0, &[0x10 + 2 * pin, 0, 0, 0]);
            self.chip.ioapic.write(0x10, &entry.to_le_bytes());
            self.chip.settle();
        }

        fn set(&mut self, number: u8, level: bool) {
            self.wires.set_line(number, level);
            self.chip.take(&self.wires);
        }

        fn next(&mut self) -> Option<u8> {
            let request = self.chip.deliverable(0)?;
            Some(self.chip.acknowledge(0, request))
        }
    }

    #[test]
    fn the_8259s_reach_the_processor_through_lint0_alone() {
        let mut board = Board::new();
        board.set(4, true);
        assert!(board.chip.waiting(0));
        board.lapic(LINT0, 1 << 16);
        assert!(!board.chip.waiting(0));
        board.lapic(SVR, 0x1ff);
        board.lapic(LINT0, 0x700);
        assert_eq!(board.next(), Some(0x24));
        assert_eq!(board.next(), None);
        assert!(!board.chip.waiting(0));
    }

    #[test]
    fn the_timer_is_pin_two_and_masked_8259s_are_silent() {
        let mut board = Board::new();
        board.chip.pics.write(1, &[0xff]);
        board.lapic(SVR, 0x1ff);
        board.redirect(2, 0x60);
        board.redirect(0, 0x61);
        board.set(0, true);
        assert_eq!(board.next(), Some(0x60));
        board.set(2, true);
        assert_eq!(board.next(), None);
    }

    #[test]
    fn a_level_comes_again_after_its_eoi() {
        let mut board = Board::new();
        board.chip.pics.write(1, &[0xff]);
        board.lapic(SVR, 0x1ff);
        board.redirect(10, 0x70 | 1 << 15);
        board.set(10, true);
        assert_eq!(board.next(), Some(0x70));
        assert_eq!(board.next(), None);
        board.lapic(EOI, 0);
        assert_eq!(board.next(), Some(0x70));
        board.set(10, false);
        board.lapic(EOI, 0);
        assert_eq!(board.next(), None);
    }

    #[test]
    fn a_level_waits_for_an_apic_that_is_switched_on() {
        let mut board = Board::new();
        board.chip.pics.write(1, &[0xff]);
        board.redirect(10, 0x70 | 1 << 15);
        board.set(10, true);
        assert_eq!(board.next(), None);
        board.lapic(SVR, 0x1ff);
        assert_eq!(board.next(), Some(0x70));
    }

    #[test]
    fn pulses_and_changes_from_other_threads_are_not_lost() {
        let mut board = Board::new();
        board.lapic(SVR, 0x1ff);
        board.redirect(5, 0x50);
        board.chip.pics.write(1, &[0xff]);
        let wires = Arc::clone(&board.wires);
        std::thread::spawn(move || {
            wires.set_line(5, true);
            wires.set_line(5, false);
        })
        .join()
        .unwrap();
        assert_eq!(board.wires.events.pending(), flag::LINES);
        board.chip.take(&board.wires);
        assert_eq!(board.next(), Some(0x50));
        board.lapic(EOI, 0);
        // A fall and a rise between two looks are an edge.
        board.set(5, true);
        assert_eq!(board.next(), Some(0x50));
        board.lapic(EOI, 0);
        board.wires.set_line(5, false);
        board.wires.set_line(5, true);
        board.chip.take(&board.wires);
        assert_eq!(board.next(), Some(0x50));
        board.wires.set_line(200, true);
        board.chip.take(&board.wires);
        assert_eq!(board.next(), None);
    }
}
