//! The I/O APIC (Intel 82093AA data sheet): 24 pins, each with a redirection entry.
//!
//! Lines are logical: a pin's polarity is kept and read back but inverts nothing, as in QEMU and
//! KVM. Edges at a masked pin are lost, as the data sheet says. SMI and ExtINT reach nobody.
//!
//! Invariant: a level-triggered pin sends once, and again only after its vector has ended.

use super::lapic::{Delivery, Destination, Message};
use super::{Action, Device};
use crate::GuestPhys;

/// Where the registers lie.
pub const BASE: GuestPhys = GuestPhys(0xfec0_0000);
/// Size of the register page.
pub const SIZE: u64 = 0x1000;
/// Number of pins.
pub const PINS: u8 = 24;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;
const LAST_ENTRY: u8 = FIRST_ENTRY + 2 * PINS - 1;
/// Version 0x11, 24 entries.
const VERSION_VALUE: u32 = 0x0017_0011;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What a guest can't write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !READ_ONLY;

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    select: u8,
    id: u8,
    entries: [u64; PINS as usize],
    /// Levels of the pins.
    lines: u32,
    /// Pins with something to send.
    requested: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic {
            select: 0,
            id: 0,
            entries: [MASKED; PINS as usize],
            lines: 0,
            requested: 0,
        }
    }
}

impl IoApic {
    /// Drives `pin`; others than the 24 are ignored.
    pub fn set_line(&mut self, pin: u8, level: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rises = level && self.lines & bit == 0;
        self.lines = if level {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        let entry = self.entries[usize::from(pin)];
        if entry & LEVEL != 0 {
            self.requested = self.requested & !bit | self.lines & bit;
        } else if rises && entry & MASKED == 0 {
            self.requested |= bit;
        }
    }

    /// Sends what waits through `send`, which says whether it was taken. What was not waits on.
    pub fn deliver(&mut self, mut send: impl FnMut(Destination, Message) -> bool) {
        let mut waiting = self.requested;
        while waiting != 0 {
            let pin = waiting.trailing_zeros();
            let bit = 1 << pin;
            waiting &= !bit;
            let entry = &mut self.entries[pin as usize];
            let level = *entry & LEVEL != 0;
            if *entry & MASKED != 0 || level && *entry & REMOTE_IRR != 0 {
                continue;
            }
            let delivery = Delivery::of(*entry as u32);
            // What has no vector has no end either: always an edge (data sheet 3.2.4).
            let vectored = matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
            let taken = send(
                Destination::narrow((*entry >> 56) as u8, *entry & LOGICAL != 0),
                Message {
                    delivery,
                    vector: *entry as u8,
                    level: level && vectored,
                },
            );
            if level && taken && vectored {
                *entry |= REMOTE_IRR;
            }
            if !level || taken && !vectored {
                // An edge that nobody takes is gone.
                self.requested &= !bit;
            }
        }
    }

    /// True if an NMI or INIT may come from some pin.
    pub fn has_unmaskable(&self) -> bool {
        self.entries.iter().any(|&entry| {
            entry & MASKED == 0
                && matches!(Delivery::of(entry as u32), Delivery::Nmi | Delivery::Init)
        })
    }

    /// The level-triggered `vector` has ended in a local APIC.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in &mut self.entries {
            if *entry & LEVEL != 0 && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
            }
        }
    }

    fn register(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => u32::from(self.id) << 24,
            VERSION => VERSION_VALUE,
            FIRST_ENTRY..=LAST_ENTRY => {
                let (pin, high) = entry_of(self.select);
                (self.entries[pin] >> (32 * u32::from(high))) as u32
            }
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) {
        match self.select {
            ID => self.id = (value >> 24) as u8 & 0xf,
            FIRST_ENTRY..=LAST_ENTRY => {
                let (pin, high) = entry_of(self.select);
                let old = self.entries[pin];
                let written = if high {
                    old & 0xffff_ffff | u64::from(value) << 32
                } else {
                    old & !0xffff_ffff | u64::from(value)
                };
                let mut entry = written & WRITABLE | old & READ_ONLY;
                let bit = 1 << pin;
                if entry & LEVEL == 0 {
                    // Software ends a level-triggered interrupt by a moment of edge mode.
                    entry &= !REMOTE_IRR;
                    if old & LEVEL != 0 {
                        self.requested &= !bit;
                    }
                } else {
                    self.requested = self.requested & !bit | self.lines & bit;
                }
                self.entries[pin] = entry;
            }
            // Read-only and reserved.
            _ => {}
        }
    }
}

/// Pin of a redirection register, and whether it is the upper half.
fn entry_of(select: u8) -> (usize, bool) {
    let index = usize::from(select - FIRST_ENTRY);
    (index / 2, index % 2 == 1)
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let value = match offset & !0xf {
            SELECT => self.select.into(),
            WINDOW => self.register(),
            _ => 0,
        };
        let from = (offset & 0xf) as usize;
        for (index, slot) in data.iter_mut().enumerate() {
            *slot = value.to_le_bytes().get(from + index).copied().unwrap_or(0);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            (SELECT, [select, ..]) => self.select = *select,
            (WINDOW, _) => {
                // Registers are 32 bits wide; narrower writes are undefined and ignored.
                if let Some(word) = data.first_chunk::<4>() {
                    self.set_register(u32::from_le_bytes(*word));
                }
            }
            _ => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ioapic: &mut IoApic, register: u8, value: u32) {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn get(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        let mut data = [0xff; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn entry(ioapic: &mut IoApic, pin: u8, value: u64) {
        set(ioapic, FIRST_ENTRY + 2 * pin + 1, (value >> 32) as u32);
        set(ioapic, FIRST_ENTRY + 2 * pin, value as u32);
    }

    fn sent(ioapic: &mut IoApic) -> Vec<u8> {
        let mut vectors = Vec::new();
        ioapic.deliver(|_, message| {
            vectors.push(message.vector);
            true
        });
        vectors
    }

    #[test]
    fn registers_read_back_what_can_be_written() {
        let mut ioapic = IoApic::default();
        assert_eq!(get(&mut ioapic, VERSION), VERSION_VALUE);
        assert_eq!(get(&mut ioapic, FIRST_ENTRY), MASKED as u32);
        set(&mut ioapic, ID, 0xff << 24);
        assert_eq!(get(&mut ioapic, ID), 0x0f << 24);
        entry(&mut ioapic, 23, u64::MAX);
        assert_eq!(get(&mut ioapic, 0x3e), 0x0001_afff);
        assert_eq!(get(&mut ioapic, 0x3f), 0xff00_0000);
        assert_eq!(get(&mut ioapic, 0x40), 0);
        let mut narrow = [0xff; 1];
        ioapic.read(WINDOW + 3, &mut narrow);
        assert_eq!(narrow, [0]);
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_while_masked() {
        let mut ioapic = IoApic::default();
        ioapic.set_line(4, true);
        entry(&mut ioapic, 4, 0x44);
        assert_eq!(sent(&mut ioapic), []);
        ioapic.set_line(4, false);
        ioapic.set_line(4, true);
        assert_eq!(sent(&mut ioapic), [0x44]);
        assert_eq!(sent(&mut ioapic), []);
    }

    #[test]
    fn a_level_is_sent_again_after_its_end_while_it_lasts() {
        let mut ioapic = IoApic::default();
        entry(&mut ioapic, 10, 0x55 | LEVEL);
        ioapic.set_line(10, true);
        assert_eq!(sent(&mut ioapic), [0x55]);
        assert_eq!(get(&mut ioapic, FIRST_ENTRY + 20) & 1 << 14, 1 << 14);
        assert_eq!(sent(&mut ioapic), []);
        ioapic.end_of_interrupt(0x56);
        assert_eq!(sent(&mut ioapic), []);
        ioapic.end_of_interrupt(0x55);
        assert_eq!(sent(&mut ioapic), [0x55]);
        ioapic.set_line(10, false);
        ioapic.end_of_interrupt(0x55);
        assert_eq!(sent(&mut ioapic), []);
        assert_eq!(get(&mut ioapic, FIRST_ENTRY + 20) & 1 << 14, 0);
    }

    #[test]
    fn a_level_that_nobody_takes_waits_and_an_edge_does_not() {
        let mut ioapic = IoApic::default();
        entry(&mut ioapic, 10, 0x55 | LEVEL);
        entry(&mut ioapic, 11, 0x66);
        ioapic.set_line(10, true);
        ioapic.set_line(11, true);
        ioapic.deliver(|_, _| false);
        assert_eq!(sent(&mut ioapic), [0x55]);
    }

    #[test]
    fn a_masked_level_is_sent_when_it_is_unmasked() {
        let mut ioapic = IoApic::default();
        entry(&mut ioapic, 10, 0x55 | LEVEL | MASKED);
        ioapic.set_line(10, true);
        assert_eq!(sent(&mut ioapic), []);
        entry(&mut ioapic, 10, 0x55 | LEVEL);
        assert_eq!(sent(&mut ioapic), [0x55]);
        // A moment of edge mode ends it.
        entry(&mut ioapic, 10, 0x55);
        entry(&mut ioapic, 10, 0x55 | LEVEL);
        assert_eq!(sent(&mut ioapic), [0x55]);
    }

    #[test]
    fn messages_carry_their_destination_and_delivery() {
        let mut ioapic = IoApic::default();
        entry(&mut ioapic, 1, 0x31 | LOGICAL | 3 << 56);
        entry(&mut ioapic, 2, 4 << 8 | LEVEL);
        assert!(ioapic.has_unmaskable());
        ioapic.set_line(1, true);
        ioapic.set_line(2, true);
        ioapic.set_line(24, true);
        let mut seen = Vec::new();
        for _ in 0..2 {
            ioapic.deliver(|destination, message| {
                seen.push((destination, message.delivery, message.vector, message.level));
                true
            });
        }
        assert_eq!(
            seen,
            [
                (Destination::narrow(3, true), Delivery::Fixed, 0x31, false),
                (Destination::narrow(0, false), Delivery::Nmi, 0, false),
            ]
        );
    }
}
