//! The clock against its data sheet.

use super::*;

/// 2024-02-29 23:59:58 UTC, a Thursday.
const EVE: i128 = 1_709_251_198;
const S: u64 = SECOND;

struct Bench {
    rtc: Rtc,
    clock: Clock,
    line: Line,
}

impl Bench {
    fn new() -> Self {
        let clock = Clock::manual();
        let line = Line::disconnected();
        let memory = [(GuestPhys(0), 3 << 30), (GuestPhys(4 << 30), 1 << 30)];
        let wall = EVE * i128::from(SECOND);
        Bench {
            rtc: Rtc::at(clock.clone(), line.clone(), &memory, wall),
            clock,
            line,
        }
    }

    fn get(&mut self, index: usize) -> u8 {
        self.rtc.write(0, &[index as u8 | 0x80]);
        let mut data = [0xff];
        self.rtc.read(1, &mut data);
        data[0]
    }

    fn set(&mut self, index: usize, value: u8) {
        self.rtc.write(0, &[index as u8]);
        self.rtc.write(1, &[value]);
    }

    /// Century, year, month, day, weekday, hours, minutes, seconds.
    fn shown(&mut self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|at| self.get(at))
    }

    fn wait(&mut self) -> u64 {
        let due = self.rtc.deadline().unwrap();
        self.clock.set(due);
        self.rtc.advance(due);
        due
    }
}

#[test]
fn time_goes_on_through_a_leap_day_in_every_format() {
    let mut bench = Bench::new();
    assert_eq!(bench.shown(), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    bench.clock.set(2 * S);
    assert_eq!(bench.shown(), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
    bench.set(B, BINARY);
    assert_eq!(bench.shown(), [20, 24, 3, 1, 6, 12, 0, 0]);
    bench.clock.set(2 * S + 13 * 3600 * S);
    assert_eq!(bench.get(HOURS), 1 | AFTERNOON);
    bench.set(B, 0);
    assert_eq!(bench.get(HOURS), 0x01 | AFTERNOON);
}

#[test]
fn the_time_can_be_set_whole_or_by_a_register() {
    let mut bench = Bench::new();
    bench.set(B, SET | HOURS_24 | UPDATE);
    for (register, value) in [
        (YEAR, 0x99),
        (CENTURY, 0x19),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x59),
    ] {
        bench.set(register, value);
    }
    bench.clock.set(10 * S);
    assert_eq!(bench.get(SECONDS), 0x59, "stopped");
    assert_eq!(bench.rtc.deadline(), None, "SET has cleared UIE");
    bench.set(B, HOURS_24);
    bench.clock.set(10 * S + S / 2);
    assert_eq!(bench.shown(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    bench.set(MINUTES, 0x30);
    bench.clock.set(11 * S + S / 2);
    assert_eq!(bench.shown(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0x30, 1]);
}

#[test]
fn the_periodic_interrupt_has_the_rate_of_register_a() {
    // (rate, nanoseconds, rounded up to the clock's)
    for (rate, period) in [(6, 976_563), (3, 122_071), (15, S / 2), (1, 3_906_250)] {
        let mut bench = Bench::new();
        bench.set(A, DIVIDER | rate);
        bench.set(B, HOURS_24 | PERIODIC);
        assert_eq!(bench.wait(), period, "rate {rate}");
        assert!(bench.line.level());
        assert_eq!(bench.rtc.deadline(), None, "not before it is acknowledged");
        assert_eq!(bench.get(C), INTERRUPT | PERIODIC);
        assert!(!bench.line.level());
        assert_eq!(bench.get(C), 0);
        let second = bench.wait();
        assert!(second.abs_diff(2 * period) <= 2, "{second}");
    }
    let mut bench = Bench::new();
    bench.set(A, DIVIDER);
    bench.set(B, PERIODIC);
    assert_eq!(bench.rtc.deadline(), None);
}

#[test]
fn flags_are_set_without_interrupts_too() {
    let mut bench = Bench::new();
    assert_eq!(bench.rtc.deadline(), None);
    assert_eq!(bench.get(C), 0);
    bench.clock.set(S);
    assert_eq!(bench.get(C) & (PERIODIC | UPDATE), PERIODIC | UPDATE);
    assert!(!bench.line.level());
    // Enabling an interrupt whose flag is set requests it.
    bench.clock.set(2 * S);
    bench.set(B, HOURS_24 | UPDATE);
    assert!(bench.line.level());
}

#[test]
fn updates_end_each_second_and_announce_themselves() {
    let mut bench = Bench::new();
    bench.set(B, HOURS_24 | UPDATE);
    bench.clock.set(S - 100_000);
    assert_eq!(bench.get(A) & UPDATE_IN_PROGRESS, UPDATE_IN_PROGRESS);
    assert_eq!(bench.wait(), S);
    assert_eq!(bench.get(A) & UPDATE_IN_PROGRESS, 0);
    assert_eq!(bench.get(C), INTERRUPT | UPDATE | PERIODIC);
    assert_eq!(bench.wait(), 2 * S);
}

#[test]
fn alarms_match_a_time_or_any() {
    let mut bench = Bench::new();
    for (register, value) in [
        (SECONDS_ALARM, 0x01),
        (MINUTES_ALARM, 0x00),
        (HOURS_ALARM, 0xff),
    ] {
        bench.set(register, value);
    }
    bench.set(B, HOURS_24 | ALARM);
    let mut seconds = 0;
    while !bench.line.level() {
        seconds = bench.wait() / S;
    }
    assert_eq!(seconds, 3, "00:00:01");
    assert_eq!(bench.get(C) & ALARM, ALARM);
    // Slept through, it is still seen.
    bench.clock.set(3 * S + 3600 * S + 5 * S);
    assert_eq!(bench.get(C) & (ALARM | INTERRUPT), ALARM | INTERRUPT);
}

#[test]
fn memory_is_told_in_every_unit_and_the_rest_is_memory() {
    let mut bench = Bench::new();
    let mut word = |low, high| u16::from_le_bytes([bench.get(low), bench.get(high)]);
    assert_eq!(word(0x15, 0x16), 640);
    assert_eq!(word(0x30, 0x31), 0xffff);
    assert_eq!(word(0x34, 0x35), (((3u64 << 30) - (16 << 20)) >> 16) as u16);
    assert_eq!(word(0x5b, 0x5c), 1 << 14);
    assert_eq!(word(D, 0x5d), u16::from(VALID));
    bench.set(0x7f, 0xa5);
    bench.set(D, 0);
    assert_eq!(bench.get(0x7f), 0xa5);
    assert_eq!(bench.get(D), VALID);
}

/// As Linux's mc146818_set_time does it: the divider is held while the registers are written, under SET.
#[test]
fn a_divider_in_reset_stops_the_time_and_starts_it_half_a_second_late() {
    let mut bench = Bench::new();
    bench.clock.set(S / 4);
    bench.set(B, HOURS_24 | PERIODIC);
    bench.set(A, 0x76);
    // What was due before is acknowledged.
    bench.get(C);
    assert_eq!(
        bench.rtc.deadline(),
        None,
        "the periodic interrupt stands still too"
    );
    bench.clock.set(10 * S);
    assert_eq!(bench.get(A), 0x76, "no update is in progress");
    assert_eq!(bench.get(SECONDS), 0x58);
    bench.set(SECONDS, 0x10);
    bench.set(A, 0x26);
    assert!(bench.rtc.deadline().is_some());
    bench.clock.set(10 * S + S / 2 - 1);
    assert_eq!(bench.get(SECONDS), 0x10);
    bench.clock.set(10 * S + S / 2);
    assert_eq!(bench.get(SECONDS), 0x11);
}
