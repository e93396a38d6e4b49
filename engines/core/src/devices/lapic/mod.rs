//! A processor's local APIC (SDM 3A chapter 11): registers, priorities and delivery.
//!
//! | module | what |
//! |---|---|
//! | `timer` | one-shot, periodic and TSC-deadline |
//! | `x2apic` | the MSRs: base, x2APIC mode, deadline |
//! | `message` | what is sent and who is addressed |
//! | `vectors` | IRR, ISR and TMR |
//!
//! For engines that leave interrupt control to the VMM. What it sends is carried by
//! [`Lapics`](super::Lapics). Absent: SMI. Nothing is wired to LINT1.
//!
//! As firmware leaves it, LINT0 of the boot processor takes the 8259s' interrupts from the start
//! (virtual wire mode, MultiProcessor Specification 3.6.2.2): images are entered without firmware
//! here.
//!
//! Task priority lives in two places, here and in the vCPU's CR8; [`Lapic::sync_task_priority`]
//! and [`Lapic::take_priority_write`] tie them together (SDM 3A 11.8.6.1).
//!
//! Invariant: what is accepted has a vector of at least 16; others are recorded as errors.

mod message;
mod timer;
mod vectors;
mod x2apic;

#[cfg(test)]
mod tests;

pub use message::{Delivery, Destination, Message, Target};
use timer::{Mode, Timer};
use vectors::Vectors;
pub use x2apic::{APIC_BASE, TSC_DEADLINE, owns_msr};

use super::{Action, Device};
use crate::GuestPhys;
use crate::clock::Clock;

/// Where the registers lie after reset.
pub const BASE: GuestPhys = GuestPhys(0xfee0_0000);
/// Size of the register page.
pub const SIZE: u64 = 0x1000;

/// Offsets of the registers in the page.
mod reg {
    pub(super) const ID: u64 = 0x20;
    pub(super) const VERSION: u64 = 0x30;
    pub(super) const TPR: u64 = 0x80;
    pub(super) const PPR: u64 = 0xa0;
    pub(super) const EOI: u64 = 0xb0;
    pub(super) const LDR: u64 = 0xd0;
    pub(super) const DFR: u64 = 0xe0;
    pub(super) const SVR: u64 = 0xf0;
    pub(super) const ISR: u64 = 0x100;
    pub(super) const TMR: u64 = 0x180;
    pub(super) const IRR: u64 = 0x200;
    pub(super) const ESR: u64 = 0x280;
    pub(super) const ICR_LOW: u64 = 0x300;
    pub(super) const ICR_HIGH: u64 = 0x310;
    pub(super) const LVT_TIMER: u64 = 0x320;
    pub(super) const LVT_THERMAL: u64 = 0x330;
    pub(super) const LVT_PERFORMANCE: u64 = 0x340;
    pub(super) const LVT_LINT0: u64 = 0x350;
    pub(super) const LVT_LINT1: u64 = 0x360;
    pub(super) const LVT_ERROR: u64 = 0x370;
    pub(super) const INITIAL_COUNT: u64 = 0x380;
    pub(super) const CURRENT_COUNT: u64 = 0x390;
    pub(super) const DIVIDE: u64 = 0x3e0;
}

/// Version 0x14 with six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Indices of LVT entries.
const TIMER: usize = 0;
const LINT0: usize = 3;
const ERROR: usize = 5;

/// Bits of the error status register (SDM 3A figure 11-9).
const SEND_ILLEGAL: u32 = 1 << 5;
const RECEIVE_ILLEGAL: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

/// The local APIC of one processor.
#[derive(Debug)]
pub struct Lapic {
    /// IA32_APIC_BASE.
    base: u64,
    /// The processor's number, which is the id after reset and in x2APIC mode.
    number: u8,
    id: u8,
    priority: u8,
    priority_written: bool,
    spurious: u32,
    logical_id: u32,
    destination_format: u32,
    in_service: Vectors,
    level: Vectors,
    requested: Vectors,
    /// Errors as the register shows them, and those since it was last written.
    errors: [u32; 2],
    command_high: u32,
    command_low: u32,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    timer: Timer,
    /// Level-triggered vectors that have ended, for the I/O APIC.
    ended: Vectors,
    /// What the ICR has sent.
    sent: Option<(Target, Message)>,
}

impl Lapic {
    /// That of processor `number` as firmware leaves it. Number 0 is the boot processor.
    pub fn new(clock: Clock, number: u8) -> Self {
        // SDM 3A 11.4.7.1: state after reset.
        let mut lvt = [LVT_MASKED; 6];
        let mut base = BASE.0 | x2apic::BASE_ENABLED;
        if number == 0 {
            lvt[LINT0] = DELIVERY_EXTINT;
            base |= x2apic::BASE_BSP;
        }
        Lapic {
            base,
            number,
            id: number,
            priority: 0,
            priority_written: false,
            spurious: 0xff,
            logical_id: 0,
            destination_format: u32::MAX,
            in_service: Vectors::default(),
            level: Vectors::default(),
            requested: Vectors::default(),
            errors: [0; 2],
            command_high: 0,
            command_low: 0,
            lvt,
            timer: Timer::new(clock),
            ended: Vectors::default(),
            sent: None,
        }
    }

    /// As after power-up, but for what firmware does.
    fn reset(&mut self) {
        let clock = self.timer.clock().clone();
        *self = Lapic {
            base: self.base,
            priority_written: true,
            lvt: [LVT_MASKED; 6],
            ..Lapic::new(clock, self.number)
        };
    }

    /// The processor takes INIT: as after power-up, but for its mode and its id (SDM 3A 11.4.7.3).
    pub fn init(&mut self) {
        let id = self.id;
        self.reset();
        self.id = id;
        // The processor's CR8 is reset with it.
        self.priority_written = false;
    }

    /// What firmware does: the boot processor takes the 8259s' interrupts.
    pub fn wire(&mut self) {
        self.lvt[LINT0] = DELIVERY_EXTINT;
    }

    /// True when some vector waits, deliverable or not.
    #[inline]
    pub fn has_request(&self) -> bool {
        !self.requested.is_empty()
    }

    /// The vector that goes to the processor next, if its priority allows (SDM 3A 11.8.3.1).
    pub fn deliverable(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        let vector = self.requested.highest()?;
        (vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// True when nothing but the task priority holds the highest request back.
    pub fn held_by_task_priority(&self) -> bool {
        let serving = self.in_service.highest().map_or(0, |vector| vector >> 4);
        self.enabled()
            && self
                .requested
                .highest()
                .is_some_and(|vector| vector >> 4 > serving && vector >> 4 <= self.priority >> 4)
    }

    /// Moves `vector` from requested to in service.
    pub fn acknowledge(&mut self, vector: u8) {
        self.requested.put(vector, false);
        self.in_service.put(vector, true);
    }

    /// True when the 8259s' output reaches the processor: through LINT0, or past an APIC that is
    /// switched off.
    pub fn takes_external(&self) -> bool {
        let lint0 = self.lvt[LINT0];
        !self.is_on() || lint0 & LVT_MASKED == 0 && Delivery::of(lint0) == Delivery::External
    }

    /// True when a rise of the 8259s' output is an NMI.
    pub fn lint0_is_nmi(&self) -> bool {
        let lint0 = self.lvt[LINT0];
        self.is_on() && lint0 & LVT_MASKED == 0 && Delivery::of(lint0) == Delivery::Nmi
    }

    /// A level-triggered vector that the guest has ended since the last call, for the I/O APIC.
    pub fn take_ended(&mut self) -> Option<u8> {
        let vector = self.ended.highest()?;
        self.ended.put(vector, false);
        Some(vector)
    }

    /// Takes over what the guest did to CR8.
    pub fn sync_task_priority(&mut self, cr8: u8) {
        if self.priority >> 4 != cr8 && !self.priority_written {
            self.priority = cr8 << 4;
        }
    }

    /// The new value for CR8 after a write to TPR.
    pub fn take_priority_write(&mut self) -> Option<u8> {
        std::mem::take(&mut self.priority_written).then_some(self.priority >> 4)
    }

    /// True when TPR was written and CR8 does not know yet.
    #[inline]
    pub fn priority_written(&self) -> bool {
        self.priority_written
    }

    /// True unless IA32_APIC_BASE switches it off: it takes what has no vector.
    pub fn is_on(&self) -> bool {
        self.base & x2apic::BASE_ENABLED != 0
    }

    /// True when it takes vectors.
    pub fn enabled(&self) -> bool {
        self.spurious & SVR_ENABLED != 0 && self.is_on()
    }

    fn timer_can_fire(&self) -> bool {
        self.enabled() && self.lvt[TIMER] & LVT_MASKED == 0
    }

    /// PPR: an interrupt of a higher class is taken.
    pub fn processor_priority(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0);
        if self.priority >> 4 >= serving >> 4 {
            self.priority
        } else {
            serving & 0xf0
        }
    }

    /// Requests `vector`. False if this APIC takes nothing at present.
    pub fn request(&mut self, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if vector < 16 {
            self.record(RECEIVE_ILLEGAL);
            return true;
        }
        self.requested.put(vector, true);
        self.level.put(vector, level);
        true
    }

    /// Records an error, which interrupts if its LVT entry says so (SDM 3A 11.5.3).
    fn record(&mut self, error: u32) {
        self.errors[1] |= error;
        let (vector, masked) = (self.lvt[ERROR] as u8, self.lvt[ERROR] & LVT_MASKED != 0);
        // An illegal vector for errors themselves would never end.
        if !masked && vector >= 16 {
            self.request(vector, false);
        }
    }

    fn end_of_interrupt(&mut self) {
        if let Some(vector) = self.in_service.highest() {
            self.in_service.put(vector, false);
            if self.level.contains(vector) {
                self.ended.put(vector, true);
            }
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let word = |base: u64, vectors: &Vectors| vectors.word(((offset - base) >> 4) as usize);
        match offset {
            reg::ID if self.x2apic() => self.number.into(),
            reg::ID => u32::from(self.id) << 24,
            reg::VERSION => VERSION_VALUE,
            reg::TPR => self.priority.into(),
            reg::PPR => self.processor_priority().into(),
            reg::LDR => self.logical_destination(),
            reg::DFR => self.destination_format,
            reg::SVR => self.spurious,
            reg::ISR..reg::TMR => word(reg::ISR, &self.in_service),
            reg::TMR..reg::IRR => word(reg::TMR, &self.level),
            reg::IRR..reg::ESR => word(reg::IRR, &self.requested),
            reg::ESR => self.errors[0],
            reg::ICR_LOW => self.command_low,
            reg::ICR_HIGH => self.command_high,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[((offset - reg::LVT_TIMER) >> 4) as usize],
            reg::INITIAL_COUNT => self.timer.initial(),
            reg::CURRENT_COUNT => self.timer.current(),
            reg::DIVIDE => self.timer.divide(),
            // Write-only and reserved registers read as zero.
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::ID => self.id = (value >> 24) as u8,
            reg::TPR => {
                self.priority = value as u8;
                self.priority_written = true;
            }
            reg::EOI => self.end_of_interrupt(),
            reg::LDR => self.logical_id = value & 0xff00_0000,
            reg::DFR => self.destination_format = value | 0x0fff_ffff,
            reg::SVR => {
                self.skip_masked_expiries();
                self.spurious = value & 0x1ff;
                if value & SVR_ENABLED == 0 {
                    // SDM 3A 11.4.7.2: software disable masks all LVT entries.
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            // A write arms the register with what was recorded since the last one.
            reg::ESR => self.errors = [self.errors[1], 0],
            reg::ICR_HIGH => self.command_high = value,
            reg::ICR_LOW => {
                // Delivery is immediate, so the status bit (12) always reads as idle.
                self.command_low = value & !(1 << 12);
                self.send_command();
            }
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let index = ((offset - reg::LVT_TIMER) >> 4) as usize;
                self.skip_masked_expiries();
                let masked = if self.spurious & SVR_ENABLED == 0 {
                    LVT_MASKED
                } else {
                    0
                };
                self.lvt[index] = value & 0x0007_ffff | masked;
                if index == TIMER {
                    self.timer.set_mode(Mode::of(value));
                }
            }
            reg::INITIAL_COUNT => self.timer.start(value),
            reg::DIVIDE => self.timer.set_divide(value),
            // Read-only registers take no notice.
            reg::VERSION | reg::PPR | reg::CURRENT_COUNT | reg::ISR..reg::ESR => {}
            _ => self.record(ILLEGAL_REGISTER),
        }
    }

    /// Expiries that passed while the timer was masked request nothing.
    fn skip_masked_expiries(&mut self) {
        if !self.timer_can_fire() {
            self.timer.skip_expiries();
        }
    }

    /// True when the page shows the registers.
    fn mapped(&self) -> bool {
        self.base & x2apic::BASE_ENABLED != 0 && !self.x2apic()
    }
}

impl Device for Lapic {
    fn name(&self) -> &'static str {
        "lapic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if !self.mapped() {
            return Action::None;
        }
        // Registers are 32 bits wide at multiples of 16; the rest of each slot is reserved.
        let bytes = self.register(offset & !0xf).to_le_bytes();
        let from = (offset & 0xf) as usize;
        for (index, slot) in data.iter_mut().enumerate() {
            *slot = bytes.get(from + index).copied().unwrap_or(0);
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        // SDM 3A 11.4.1: registers are to be accessed as aligned 32-bit words; others are ignored.
        if self.mapped()
            && offset & 0xf == 0
            && let Some(word) = data.first_chunk::<4>()
        {
            self.set_register(offset, u32::from_le_bytes(*word));
        }
        Action::None
    }

    fn deadline(&self) -> Option<u64> {
        self.timer.expiry().filter(|_| self.timer_can_fire())
    }

    fn advance(&mut self, now: u64) {
        let can_fire = self.timer_can_fire();
        if can_fire && self.timer.expired(now) {
            self.request(self.lvt[TIMER] as u8, false);
        }
    }
}
