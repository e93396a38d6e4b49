//! The timer against its data sheet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::counter::HZ;
use super::*;
use crate::clock::{SECOND, scale};
use crate::interrupt::Interrupts;

#[derive(Default)]
struct Rises(AtomicU32);

impl Interrupts for Rises {
    fn set_line(&self, number: u8, level: bool) {
        assert_eq!(number, IRQ);
        self.0.fetch_add(level.into(), Ordering::Relaxed);
    }
}

struct Bench {
    pit: Pit,
    clock: Clock,
    rises: Arc<Rises>,
}

impl Bench {
    fn new() -> Self {
        let clock = Clock::manual();
        let rises = Arc::new(Rises::default());
        let line = Line::new(rises.clone(), IRQ);
        Bench {
            pit: Pit::new(clock.clone(), line),
            clock,
            rises,
        }
    }

    fn out(&mut self, offset: u64, value: u8) {
        self.pit.write(offset, &[value]);
    }

    fn inb(&mut self, offset: u64) -> u8 {
        let mut data = [0xff];
        self.pit.read(offset, &mut data);
        data[0]
    }

    /// Sets up a counter, both bytes.
    fn program(&mut self, counter: u8, mode: u8, count: u16) {
        self.out(CONTROL, counter << 6 | 0x30 | mode << 1);
        let [low, high] = count.to_le_bytes();
        self.out(counter.into(), low);
        self.out(counter.into(), high);
    }

    /// Goes to the first moment at which `clocks` input clocks have passed since 0.
    fn at(&mut self, clocks: u64) {
        self.clock.set(scale(clocks, HZ, SECOND));
    }

    fn count(&mut self, counter: u8) -> u16 {
        self.out(CONTROL, counter << 6);
        u16::from_le_bytes([self.inb(counter.into()), self.inb(counter.into())])
    }

    fn status(&mut self, counter: u8) -> u8 {
        self.out(CONTROL, 0xe0 | 2 << counter);
        self.inb(counter.into())
    }

    fn output(&mut self, counter: u8) -> bool {
        self.status(counter) & 0x80 != 0
    }

    /// Lets time pass until the next deadline.
    fn wait(&mut self) -> u64 {
        let due = self.pit.deadline().unwrap();
        self.clock.set(due);
        self.pit.advance(due);
        due
    }

    fn taken(&self) -> u32 {
        self.rises.0.swap(0, Ordering::Relaxed)
    }
}

#[test]
fn mode_0_interrupts_once_at_the_terminal_count() {
    let mut bench = Bench::new();
    bench.program(0, 0, 1000);
    assert_eq!((bench.count(0), bench.output(0)), (1000, false));
    bench.at(999);
    assert_eq!((bench.count(0), bench.output(0)), (1, false));
    assert_eq!(bench.pit.deadline(), Some(scale(1000, HZ, SECOND)));
    bench.wait();
    assert_eq!(bench.taken(), 1);
    assert_eq!((bench.count(0), bench.output(0)), (0, true));
    assert_eq!(bench.pit.deadline(), None);
    bench.at(1001);
    assert_eq!(bench.count(0), 0xffff, "it counts on");
    // A new count starts over and lowers the output.
    bench.out(0, 2);
    bench.out(0, 0);
    assert!(!bench.output(0));
    bench.wait();
    assert_eq!(bench.taken(), 1);
}

#[test]
fn modes_2_and_3_interrupt_each_period_in_phase() {
    for mode in [2, 3, 6, 7] {
        let mut bench = Bench::new();
        bench.program(0, mode, 11932);
        assert_eq!(bench.taken(), 1, "the output rises with the control word");
        for period in 1..=3 {
            assert_eq!(bench.wait(), scale(11932 * period, HZ, SECOND));
        }
        assert_eq!(bench.taken(), 3, "mode {mode}");
        // A host that slept for ten periods.
        bench.at(11932 * 13 + 5);
        let now = bench.clock.now();
        bench.pit.advance(now);
        assert_eq!(bench.taken(), 1);
        assert_eq!(bench.pit.deadline(), Some(scale(11932 * 14, HZ, SECOND)));
    }
}

#[test]
fn outputs_and_counts_follow_the_data_sheets_figures() {
    // (mode, count, after so many clocks: count, output)
    type Seen = (u64, u16, bool);
    let figures: [(u8, u16, &[Seen]); 4] = [
        (
            2,
            4,
            &[(0, 4, true), (2, 2, true), (3, 1, false), (4, 4, true)],
        ),
        (
            3,
            4,
            &[
                (0, 4, true),
                (1, 2, true),
                (2, 4, false),
                (3, 2, false),
                (4, 4, true),
            ],
        ),
        (
            3,
            5,
            &[(0, 4, true), (2, 0, true), (3, 4, false), (5, 4, true)],
        ),
        (
            4,
            3,
            &[(0, 3, true), (2, 1, true), (3, 0, false), (4, 0xffff, true)],
        ),
    ];
    for (mode, reload, expected) in figures {
        let mut bench = Bench::new();
        bench.program(1, mode, reload);
        for &(clocks, count, output) in expected {
            bench.at(clocks);
            let seen = bench.output(1);
            assert_eq!(seen, output, "mode {mode} output after {clocks}");
            // In mode 3 an odd count's element depends on the half; the even bits are what counts.
            if (mode, reload) != (3, 5) {
                assert_eq!(bench.count(1), count, "mode {mode} after {clocks}");
            }
        }
    }
}

#[test]
fn a_count_of_zero_is_the_longest() {
    let mut bench = Bench::new();
    bench.program(0, 2, 0);
    assert_eq!(bench.pit.deadline(), Some(scale(0x1_0000, HZ, SECOND)));
    assert_eq!(bench.count(0), 0);
    bench.out(CONTROL, 0x35);
    bench.out(0, 0);
    bench.out(0, 0);
    assert_eq!(bench.pit.deadline(), Some(scale(10_000, HZ, SECOND)));
}

#[test]
fn decimal_counts_count_in_decimal() {
    let mut bench = Bench::new();
    bench.out(CONTROL, 0x71);
    bench.out(1, 0x00);
    bench.out(1, 0x10);
    bench.at(1);
    assert_eq!(bench.count(1), 0x0999);
}

#[test]
fn latches_hold_until_read_and_status_comes_first() {
    let mut bench = Bench::new();
    bench.program(1, 0, 0x1234);
    // Count and status of counter 1.
    bench.out(CONTROL, 0xc0 | 2 << 1);
    bench.at(0x100);
    assert_eq!(bench.inb(1), 0x30);
    bench.out(CONTROL, 0x40);
    assert_eq!([bench.inb(1), bench.inb(1)], [0x34, 0x12]);
    assert_eq!(bench.count(1), 0x1134);
    // Without a count the status says so.
    bench.out(CONTROL, 0x50);
    assert_eq!(bench.status(1), 0x50);
    assert_eq!(bench.inb(CONTROL), 0xff);
    // One byte only.
    bench.out(1, 0x20);
    // A clock more than 16: both moments are rounded up.
    bench.at(0x111);
    assert_eq!([bench.inb(1), bench.inb(1)], [0x10, 0x10]);
}

#[test]
fn port_0x61_gates_counter_2_and_shows_its_output() {
    let mut bench = Bench::new();
    bench.out(SYSTEM_CONTROL, 0);
    bench.program(2, 0, 1000);
    bench.at(5000);
    assert_eq!(bench.inb(SYSTEM_CONTROL) & 0x23, 0);
    assert_eq!(bench.count(2), 1000, "the gate is low");
    bench.out(SYSTEM_CONTROL, 1);
    bench.at(5500);
    assert!((499..=500).contains(&bench.count(2)));
    // A pause.
    bench.out(SYSTEM_CONTROL, 0);
    bench.at(9000);
    assert_eq!(bench.inb(SYSTEM_CONTROL) & 0x20, 0);
    bench.out(SYSTEM_CONTROL, 3);
    bench.at(9502);
    assert_eq!(bench.inb(SYSTEM_CONTROL) & 0x23, 0x23);
    // The refresh bit toggles, by which code of old delayed.
    let bits: Vec<u8> = (0..4)
        .map(|step| {
            bench.clock.set(REFRESH * (1000 + step));
            bench.inb(SYSTEM_CONTROL) & 0x10
        })
        .collect();
    assert_eq!(bits, [0, 0x10, 0, 0x10]);
}

#[test]
fn a_gate_triggers_modes_1_and_5() {
    for (mode, before, after) in [(1, false, true), (5, true, true)] {
        let mut bench = Bench::new();
        bench.program(2, mode, 100);
        assert!(bench.output(2));
        bench.out(SYSTEM_CONTROL, 1);
        bench.at(50);
        assert_eq!(bench.output(2), before);
        // The gate's fall changes nothing; its rise starts over.
        bench.out(SYSTEM_CONTROL, 0);
        bench.out(SYSTEM_CONTROL, 1);
        bench.at(140);
        assert_eq!(bench.output(2), before, "mode {mode}");
        bench.at(152);
        assert_eq!(bench.output(2), after);
    }
}

#[test]
fn a_storm_leaves_the_guest_some_time() {
    let mut bench = Bench::new();
    bench.program(0, 2, 2);
    let first = bench.wait();
    assert!(bench.wait() >= first + SHORTEST_PERIOD);
}
