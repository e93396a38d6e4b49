//! Who gets what: interprocessor interrupts, the I/O APIC's messages and the 8259s' output, among
//! four processors.

use super::*;
use crate::devices::Irqchip;

const SVR: u64 = 0xf0;
const TPR: u64 = 0x80;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const ESR: u64 = 0x280;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LINT0: u64 = 0x350;
const INITIAL_COUNT: u64 = 0x380;

const ASSERT: u32 = 1 << 14;
const LOGICAL: u32 = 1 << 11;
const LOWEST: u32 = 1 << 8;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const EVERYBODY: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

struct Board(Irqchip);

impl Board {
    /// Four processors that run, with local APICs that are enabled.
    fn new() -> Self {
        let mut board = Board(Irqchip::new(&Clock::manual(), 4));
        board.send(0, 0, OTHERS | ASSERT | INIT);
        board.send(0, 0, OTHERS | ASSERT | STARTUP | 8);
        for cpu in 0..4 {
            board.write(cpu, SVR, 0x1ff);
            board.0.lapics.take_signal(cpu);
        }
        board.0.lapics.take_news();
        board
    }

    fn write(&mut self, cpu: usize, offset: u64, value: u32) {
        self.0.lapics.set_current(cpu);
        self.0.lapics.write(offset, &value.to_le_bytes());
        self.0.settle();
    }

    fn read(&mut self, cpu: usize, offset: u64) -> u32 {
        self.0.lapics.set_current(cpu);
        let mut data = [0; 4];
        self.0.lapics.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn send(&mut self, cpu: usize, address: u8, low: u32) {
        self.write(cpu, ICR_HIGH, u32::from(address) << 24);
        self.write(cpu, ICR_LOW, low);
    }

    fn write_msr(&mut self, cpu: usize, index: u32, value: u64) {
        self.0.lapics.set_current(cpu);
        assert!(self.0.lapics.own().write_msr(index, value, 0));
        self.0.settle();
    }

    fn switch_to_x2apic(&mut self) {
        for cpu in 0..4 {
            let base = self.0.lapics.of(cpu).read_msr(APIC_BASE).unwrap();
            self.write_msr(cpu, APIC_BASE, base | 0xc00);
        }
    }

    /// Who has `vector`, as bits; they take it, and its end.
    fn takers(&mut self, vector: u8) -> u32 {
        let mut takers = 0;
        for cpu in 0..4 {
            let Some(request) = self.0.deliverable(cpu) else {
                continue;
            };
            self.0.lapics.set_current(cpu);
            assert_eq!(self.0.acknowledge(cpu, request), vector);
            if self.0.lapics.of(cpu).read_msr(APIC_BASE).unwrap() & 1 << 10 == 0 {
                self.write(cpu, EOI, 0);
            } else {
                self.write_msr(cpu, 0x80b, 0);
            }
            takers |= 1 << cpu;
        }
        takers
    }

    fn redirect(&mut self, pin: u8, entry: u64) {
        for (register, value) in [(1, entry >> 32), (0, entry)] {
            self.0
                .ioapic
                .write(0, &[0x10 + 2 * pin + register, 0, 0, 0]);
            self.0.ioapic.write(0x10, &(value as u32).to_le_bytes());
        }
        self.0.settle();
    }

    fn pulse(&mut self, pin: u8) {
        self.0.ioapic.set_line(pin, true);
        self.0.ioapic.set_line(pin, false);
        self.0.settle();
    }
}

#[test]
fn physical_destinations_and_shorthands() {
    let mut board = Board::new();
    for (address, low, takers) in [
        (2, 0x51, 0b0100),
        (0, 0x51, 0b0001),
        (7, 0x51, 0),
        (0xff, 0x51, 0b1111),
        (9, 1 << 18 | 0x51, 0b0010),
        (9, EVERYBODY | 0x51, 0b1111),
        (9, OTHERS | 0x51, 0b1101),
    ] {
        board.send(1, address, ASSERT | low);
        let news = board.0.lapics.take_news();
        assert_eq!(board.takers(0x51), takers, "{address} {low:#x}");
        assert_eq!(news, takers, "whoever got something is told");
        board.0.lapics.take_news();
    }
    // Vectors below 16 are the sender's error.
    board.send(1, 2, ASSERT | 0xf);
    board.write(1, ESR, 0);
    assert_eq!(board.read(1, ESR), 1 << 5);
}

#[test]
fn logical_destinations_flat_and_in_clusters() {
    let mut board = Board::new();
    for cpu in 0..4 {
        board.write(cpu, LDR, 1 << (24 + cpu));
    }
    for (address, takers) in [(0b0101, 0b0101), (0xf0, 0), (0xff, 0b1111)] {
        board.send(0, address, ASSERT | LOGICAL | 0x61);
        assert_eq!(board.takers(0x61), takers, "{address:#x}");
    }
    // Two clusters of two.
    for cpu in 0..4 {
        board.write(cpu, DFR, 0);
        board.write(
            cpu,
            LDR,
            (cpu as u32 / 2) << 28 | 1 << (24 + cpu as u32 % 2),
        );
    }
    for (address, takers) in [(0x03, 0b0011), (0x12, 0b1000), (0x21, 0), (0xff, 0b1111)] {
        board.send(0, address, ASSERT | LOGICAL | 0x61);
        assert_eq!(board.takers(0x61), takers, "{address:#x}");
    }
}

#[test]
fn x2apic_destinations_have_32_bits() {
    let mut board = Board::new();
    board.switch_to_x2apic();
    for (high, low, takers) in [
        (3u32, 0x51, 0b1000),
        (0xff, 0x51, 0),
        (u32::MAX, 0x51, 0b1111),
        (0b0110, LOGICAL | 0x51, 0b0110),
        (1 << 16 | 0b0110, LOGICAL | 0x51, 0),
        (0, OTHERS | 0x51, 0b1110),
    ] {
        board.write_msr(0, 0x830, u64::from(high) << 32 | u64::from(ASSERT | low));
        assert_eq!(board.takers(0x51), takers, "{high:#x} {low:#x}");
    }
}

#[test]
fn lowest_priority_goes_to_one_and_takes_turns_among_equals() {
    let mut board = Board::new();
    for cpu in 0..4 {
        board.write(cpu, LDR, 1 << (24 + cpu));
    }
    let mut seen = 0;
    for _ in 0..4 {
        board.send(0, 0xf, ASSERT | LOGICAL | LOWEST | 0x61);
        let takers = board.takers(0x61);
        assert_eq!(takers.count_ones(), 1);
        seen |= takers;
    }
    assert_eq!(seen, 0b1111);
    for cpu in [0, 1, 3] {
        board.write(cpu, TPR, 0x40);
    }
    for _ in 0..3 {
        board.send(0, 0xf, ASSERT | LOGICAL | LOWEST | 0x61);
        assert_eq!(board.takers(0x61), 0b0100);
    }
    // One that takes nothing is not asked.
    board.write(2, SVR, 0xff);
    board.send(0, 0xf, ASSERT | LOGICAL | LOWEST | 0x61);
    assert_eq!(board.takers(0x61).count_ones(), 1);
}

#[test]
fn processors_wait_for_their_start_and_go_back_to_it() {
    let mut board = Board(Irqchip::new(&Clock::manual(), 4));
    assert_eq!(
        [0, 1, 3].map(|cpu| board.0.lapics.stopped(cpu)),
        [false, true, true]
    );
    // Not by the I/O APIC, nor by the shorthands that name the sender.
    board.redirect(5, 6 << 8 | 0xff << 56);
    board.pulse(5);
    board.send(0, 0, EVERYBODY | ASSERT | STARTUP | 8);
    assert!(board.0.lapics.stopped(1));
    board.send(0, 0, OTHERS | ASSERT | INIT);
    board.send(0, 0, OTHERS | ASSERT | STARTUP | 8);
    board.send(0, 0, OTHERS | ASSERT | STARTUP | 9);
    assert_eq!(board.0.lapics.take_news(), 0b1110);
    for cpu in 1..4 {
        let signal = board.0.lapics.take_signal(cpu);
        let expected = Signal {
            init: true,
            startup: Some(8),
            nmis: 0,
        };
        assert_eq!(signal, expected);
        assert!(!board.0.lapics.stopped(cpu));
    }
    assert_eq!(board.0.lapics.signal(0), Signal::NONE);
    // To one that runs, a start-up IPI is nothing, and the end of an INIT is nothing.
    board.send(0, 2, ASSERT | STARTUP | 8);
    board.send(0, 2, 1 << 15 | INIT);
    assert_eq!(board.0.lapics.signal(2), Signal::NONE);
    // INIT forgets what waited, and what comes before the start.
    board.write(2, SVR, 0x1ff);
    board.send(0, 2, ASSERT | 0x51);
    board.send(0, 2, ASSERT | NMI);
    board.send(0, 2, ASSERT | INIT);
    board.send(0, 2, ASSERT | NMI);
    board.send(0, 2, ASSERT | 0x51);
    assert!(!board.0.waiting(2));
    let signal = board.0.lapics.take_signal(2);
    assert!(signal.init && signal.nmis == 0 && signal.startup.is_none());
}

#[test]
fn nmis_come_from_the_icr_the_ioapic_and_lint0() {
    let mut board = Board::new();
    let nmis = |board: &mut Board| {
        (0..4).fold(0, |seen, cpu| {
            seen | u32::from(board.0.lapics.take_signal(cpu).nmis) << cpu
        })
    };
    board.send(1, 0, OTHERS | ASSERT | NMI);
    assert_eq!(nmis(&mut board), 0b1101);
    // One that takes no vectors takes NMIs, one that is off doesn't.
    board.write(2, SVR, 0xff);
    let base = board.0.lapics.of(3).read_msr(APIC_BASE).unwrap();
    board.write_msr(3, APIC_BASE, base & !(1 << 11));
    board.send(1, 0, OTHERS | ASSERT | NMI);
    assert_eq!(nmis(&mut board), 0b0101);
    assert!(!board.0.has_unmaskable());
    board.redirect(7, 4 << 8 | 1 << 56);
    assert!(board.0.has_unmaskable());
    board.pulse(7);
    assert_eq!(nmis(&mut board), 0b0010);
    // The 8259s' output, at the LINT0 of two.
    board.redirect(7, 1 << 16);
    for (cpu, lint0) in [(0, 4 << 8), (1, 1 << 16), (2, 0x700)] {
        board.write(cpu, LINT0, lint0);
    }
    for (offset, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1)] {
        board.0.pics.write(offset, &[value]);
    }
    board.0.lapics.take_news();
    board.0.pics.set_line(4, true);
    board.0.settle();
    assert_eq!(nmis(&mut board), 0b0001);
    // Software disable masks LINT0; off, it goes past.
    assert_eq!(board.0.lapics.take_news(), 0b1001);
    assert_eq!(board.takers(0x24), 0b1000);
}

#[test]
fn a_level_ends_wherever_it_was_taken() {
    let mut board = Board::new();
    board.redirect(10, 0x70 | 1 << 15 | 3 << 56);
    board.0.ioapic.set_line(10, true);
    board.0.settle();
    assert_eq!(board.takers(0x70), 0b1000);
    // Its end came with it being taken; the line is still up.
    assert_eq!(board.takers(0x70), 0b1000);
    board.0.ioapic.set_line(10, false);
    assert_eq!(board.takers(0x70), 0b1000);
    assert_eq!(board.takers(0x70), 0);
    // In x2APIC mode 8 bits address cluster 0.
    board.switch_to_x2apic();
    board.redirect(10, 0x70 | u64::from(LOGICAL) | 0b0110 << 56);
    board.pulse(10);
    assert_eq!(board.takers(0x70), 0b0110);
}

#[test]
fn everybody_has_a_timer() {
    let mut board = Board::new();
    for (cpu, count) in [(1, 3000), (3, 1000)] {
        board.write(cpu, LVT_TIMER, 0x30 + cpu as u32);
        board.write(cpu, INITIAL_COUNT, count);
    }
    assert_eq!(board.0.lapics.deadline(), Some(2000));
    board.0.lapics.advance(2000);
    assert_eq!(board.0.lapics.take_news(), 0b1000);
    assert_eq!(board.takers(0x33), 0b1000);
    assert_eq!(board.0.lapics.deadline(), Some(6000));
    board.0.lapics.advance(6000);
    assert_eq!(board.takers(0x31), 0b0010);
    assert_eq!(board.0.lapics.deadline(), None);
}
