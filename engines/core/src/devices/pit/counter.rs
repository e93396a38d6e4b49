//! One counter of the 8254: six modes as functions of the time since counting began.
//!
//! Nothing ticks. What a counter shows and what its output does is worked out from the number of
//! input clocks that have passed, so a counter that nobody looks at costs nothing.
//!
//! A count that is written while another runs starts over at once; the data sheet lets modes 2 and
//! 3 end their period first. QEMU and KVM start over too.
//!
//! Invariant: `elapsed` holds the clocks of earlier stretches; `since` is set while clocks count.

use crate::clock::{SECOND, scale};

/// Input clock of a PC's counters, in Hz.
pub(super) const HZ: u64 = 1_193_182;

/// Which byte comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

/// Bytes of the count that are written and read: RW of the control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

#[derive(Debug)]
pub(super) struct Counter {
    mode: u8,
    decimal: bool,
    bytes: Bytes,
    /// The low byte, while the high one is expected.
    written: Option<u8>,
    next_read: Half,
    latched: Option<u16>,
    status: Option<u8>,
    /// Clocks of a period, 1 to 65536; none was written since the control word.
    reload: Option<u32>,
    gate: bool,
    since: Option<u64>,
    elapsed: u64,
    /// A mode that waits for the gate has been triggered.
    triggered: bool,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Counter {
            mode: 0,
            decimal: false,
            bytes: Bytes::Both,
            written: None,
            next_read: Half::Low,
            latched: None,
            status: None,
            reload: None,
            gate,
            since: None,
            elapsed: 0,
            triggered: false,
        }
    }

    /// A control word for this counter, not a latch command.
    pub(super) fn control(&mut self, word: u8) {
        *self = Counter {
            // Modes 6 and 7 are 2 and 3.
            mode: match word >> 1 & 7 {
                6 => 2,
                7 => 3,
                mode => mode,
            },
            decimal: word & 1 != 0,
            bytes: match word >> 4 & 3 {
                1 => Bytes::Low,
                2 => Bytes::High,
                _ => Bytes::Both,
            },
            ..Counter::new(self.gate)
        };
        if self.bytes == Bytes::High {
            self.next_read = Half::High;
        }
    }

    pub(super) fn write(&mut self, byte: u8, now: u64) {
        let value = match (self.bytes, self.written.take()) {
            (Bytes::Low, _) => u16::from(byte),
            (Bytes::High, _) => u16::from(byte) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Bytes::Both, None) => {
                self.written = Some(byte);
                if self.mode == 0 {
                    // The first byte stops counting.
                    self.since = None;
                    self.reload = None;
                }
                return;
            }
        };
        let count = if self.decimal {
            (0..4).rev().fold(0, |sum, digit| {
                sum * 10 + u32::from(value >> (4 * digit) & 0xf)
            })
        } else {
            value.into()
        };
        self.reload = Some(if count == 0 { self.modulus() } else { count });
        if !self.waits_for_trigger() {
            self.start(now);
        }
    }

    /// Modes 1 and 5 count from the rising edge of the gate.
    fn waits_for_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// In modes 0 and 4 a low gate holds the count; in the others the gate's edges matter.
    fn held_by_gate(&self) -> bool {
        matches!(self.mode, 0 | 4)
    }

    fn start(&mut self, now: u64) {
        self.elapsed = 0;
        self.since = (self.gate || self.waits_for_trigger()).then_some(now);
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        if self.held_by_gate() {
            if gate {
                self.since = self.reload.map(|_| now);
            } else {
                self.elapsed = self.clocks(now);
                self.since = None;
            }
        } else if gate && self.reload.is_some() {
            self.elapsed = 0;
            self.since = Some(now);
            self.triggered = true;
        } else if !gate && !self.waits_for_trigger() {
            self.since = None;
            self.elapsed = 0;
        }
        self.gate = gate;
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// Input clocks since counting began.
    fn clocks(&self, now: u64) -> u64 {
        let running = self.since.map_or(0, |since| {
            (u128::from(now.saturating_sub(since)) * u128::from(HZ) / u128::from(SECOND)) as u64
        });
        self.elapsed + running
    }

    fn modulus(&self) -> u32 {
        if self.decimal { 10_000 } else { 0x1_0000 }
    }

    /// The counting element.
    fn count(&self, now: u64) -> u16 {
        let Some(reload) = self.reload else { return 0 };
        let (length, clocks) = (u64::from(reload), self.clocks(now));
        let modulus = u64::from(self.modulus());
        let value = match self.mode {
            2 => length - clocks % length,
            // By twos, through each half of the period.
            3 => (length - 2 * clocks % length) & !1,
            _ if self.waits_for_trigger() && !self.triggered => length,
            _ => (length + modulus - clocks % modulus) % modulus,
        };
        let value = (value % modulus) as u16;
        if self.decimal {
            (0..4)
                .rev()
                .fold(0, |sum, digit| (sum << 4) | (value / 10u16.pow(digit) % 10))
        } else {
            value
        }
    }

    /// The output pin.
    pub(super) fn output(&self, now: u64) -> bool {
        let Some(reload) = self.reload else {
            return self.mode != 0;
        };
        let (length, clocks) = (u64::from(reload), self.clocks(now));
        match self.mode {
            0 => clocks >= length,
            1 => !self.triggered || clocks >= length,
            2 => !self.gate || clocks % length != length - 1,
            3 => !self.gate || clocks % length < length.div_ceil(2),
            // Low for the one clock in which the count is zero.
            _ => self.waits_for_trigger() && !self.triggered || clocks != length,
        }
    }

    /// When the output next rises after `now`.
    pub(super) fn next_rise(&self, now: u64) -> Option<u64> {
        let (length, since) = (u64::from(self.reload?), self.since?);
        let clocks = self.clocks(now);
        let rise = match self.mode {
            2 | 3 => (clocks / length + 1) * length,
            0 => length,
            1 if self.triggered => length,
            4 => length + 1,
            5 if self.triggered => length + 1,
            _ => return None,
        };
        (rise > clocks).then(|| since + scale(rise - self.elapsed, HZ, SECOND))
    }

    /// The latch command; a latch that waits to be read stays.
    pub(super) fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
        }
    }

    /// The status part of the read-back command.
    pub(super) fn latch_status(&mut self, now: u64) {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        let fresh = u8::from(self.output(now)) << 7
            | u8::from(self.reload.is_none()) << 6
            | bytes << 4
            | self.mode << 1
            | u8::from(self.decimal);
        self.status.get_or_insert(fresh);
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self
            .latched
            .unwrap_or_else(|| self.count(now))
            .to_le_bytes();
        let half = self.next_read;
        if self.bytes == Bytes::Both {
            self.next_read = match half {
                Half::Low => Half::High,
                Half::High => Half::Low,
            };
        }
        if self.bytes != Bytes::Both || half == Half::High {
            self.latched = None;
        }
        match half {
            Half::Low => low,
            Half::High => high,
        }
    }
}
