//! The local APIC in xAPIC mode, with its timer (SDM 3A chapter 11).
//!
//! For engines that leave interrupt control to the VMM. Present: ID, version, TPR/PPR, EOI,
//! spurious vector, ISR/TMR/IRR, the six LVT entries of which the timer's works, and self IPIs
//! through the ICR. Absent: other processors, external and NMI/SMI/INIT delivery, x2APIC and
//! TSC-deadline mode; CPUID announces none of them.
//!
//! The timer counts at 1 GHz before the divider, as KVM's does (arch/x86/kvm/lapic.h,
//! APIC_BUS_CYCLE_NS). It is the guest's clock, not a measurement.
//!
//! Task priority lives in two places, here and in the vCPU's CR8; [`Lapic::sync_task_priority`]
//! and [`Lapic::take_priority_write`] tie them together (SDM 3A 11.8.6.1).

use std::time::{Duration, Instant};

use super::{Action, Device};
use crate::GuestPhys;

/// Where the registers lie at reset; the guest can't move them.
pub const BASE: GuestPhys = GuestPhys(0xfee0_0000);
/// Size of the register page.
pub const SIZE: u64 = 0x1000;

const ID: u64 = 0x20;
const VERSION: u64 = 0x30;
const TPR: u64 = 0x80;
const APR: u64 = 0x90;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_ERROR: u64 = 0x370;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

/// Version 0x14 with six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const LVT_PERIODIC: u32 = 1 << 17;

/// A period shorter than this would leave the guest no time between two interrupts.
const SHORTEST_PERIOD: Duration = Duration::from_micros(20);

/// A set of 256 vectors in the APIC's layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Vectors([u32; 8]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] |= 1 << (vector % 32);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector / 32)] &= !(1 << (vector % 32));
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some(word as u8 * 32 + 31 - self.0[word].leading_zeros() as u8)
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }
}

/// Local APIC of processor 0.
#[derive(Debug)]
pub struct Lapic {
    id: u32,
    priority: u8,
    priority_written: bool,
    spurious: u32,
    logical_id: u32,
    destination_format: u32,
    in_service: Vectors,
    trigger_mode: Vectors,
    requested: Vectors,
    command_high: u32,
    command_low: u32,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial_count: u32,
    divide: u32,
    /// When the running count reaches zero.
    expiry: Option<Instant>,
    timer_changed: bool,
}

impl Default for Lapic {
    fn default() -> Self {
        // SDM 3A 11.4.7.1: state after reset.
        Lapic {
            id: 0,
            priority: 0,
            priority_written: false,
            spurious: 0xff,
            logical_id: 0,
            destination_format: u32::MAX,
            in_service: Vectors::default(),
            trigger_mode: Vectors::default(),
            requested: Vectors::default(),
            command_high: 0,
            command_low: 0,
            lvt: [LVT_MASKED; 6],
            initial_count: 0,
            divide: 0,
            expiry: None,
            timer_changed: false,
        }
    }
}

impl Lapic {
    /// True when some vector waits, deliverable or not: a cheap look for the run loop.
    #[inline]
    pub fn has_request(&self) -> bool {
        !self.requested.is_empty()
    }

    /// The vector that goes to the processor next, if its priority allows (SDM 3A 11.8.3.1).
    pub fn deliverable(&self) -> Option<u8> {
        if self.spurious & SVR_ENABLED == 0 {
            return None;
        }
        let vector = self.requested.highest()?;
        (vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// True when nothing but the task priority holds the highest request back.
    pub fn held_by_task_priority(&self) -> bool {
        let serving = self.in_service.highest().map_or(0, |vector| vector >> 4);
        self.spurious & SVR_ENABLED != 0
            && self
                .requested
                .highest()
                .is_some_and(|vector| vector >> 4 > serving && vector >> 4 <= self.priority >> 4)
    }

    /// Moves `vector` from requested to in service.
    pub fn acknowledge(&mut self, vector: u8) {
        self.requested.clear(vector);
        self.in_service.set(vector);
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

    /// When the host timer has to be set anew: `Some(None)` means disarm.
    pub fn take_timer_change(&mut self) -> Option<Option<Duration>> {
        if !std::mem::take(&mut self.timer_changed) {
            return None;
        }
        Some(self.timer_delay())
    }

    /// Time until the timer fires, if it is going to.
    pub fn timer_delay(&self) -> Option<Duration> {
        let wanted = self.expiry.filter(|_| self.timer_can_fire());
        wanted.map(|expiry| expiry.saturating_duration_since(Instant::now()))
    }

    /// True when the timer runs and its interrupt is not masked.
    pub fn timer_armed(&self) -> bool {
        self.expiry.is_some() && self.timer_can_fire()
    }

    /// The host timer went off: requests the timer's vector if its time has really come.
    pub fn timer_event(&mut self) {
        let now = Instant::now();
        let Some(expiry) = self.expiry.filter(|&expiry| expiry <= now) else {
            // An old expiry of a timer that the guest has set anew since.
            self.timer_changed |= self.timer_armed();
            return;
        };
        let lvt = self.lvt[0];
        if self.timer_can_fire() {
            self.requested.set(lvt as u8);
        }
        self.expiry = (lvt & LVT_PERIODIC != 0).then(|| {
            let period = self.period();
            // Periods that the host slept through are lost, as on a machine with interrupts off.
            (expiry + period).max(now)
        });
        self.timer_changed = true;
    }

    /// Accounts for expiries that passed while the timer was masked: they request nothing.
    fn skip_masked_expiries(&mut self) {
        let now = Instant::now();
        if !self.timer_can_fire() && self.expiry.is_some_and(|expiry| expiry <= now) {
            self.expiry = (self.lvt[0] & LVT_PERIODIC != 0).then(|| now + self.period());
        }
    }

    fn timer_can_fire(&self) -> bool {
        self.spurious & SVR_ENABLED != 0 && self.lvt[0] & LVT_MASKED == 0
    }

    fn processor_priority(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0);
        if self.priority >> 4 >= serving >> 4 {
            self.priority
        } else {
            serving & 0xf0
        }
    }

    /// Nanoseconds of one count.
    fn tick_ns(&self) -> u64 {
        // Bits 3, 1 and 0 of the divide configuration; 0b111 divides by 1 (SDM 3A figure 11-10).
        let code = (self.divide >> 1 & 0b100) | (self.divide & 0b11);
        if code == 0b111 { 1 } else { 2 << code }
    }

    fn period(&self) -> Duration {
        let exact = Duration::from_nanos(u64::from(self.initial_count) * self.tick_ns());
        if self.lvt[0] & LVT_PERIODIC != 0 {
            exact.max(SHORTEST_PERIOD)
        } else {
            exact
        }
    }

    fn current_count(&self) -> u32 {
        self.expiry.map_or(0, |expiry| {
            let left = expiry.saturating_duration_since(Instant::now());
            u32::try_from(left.as_nanos() as u64 / self.tick_ns()).unwrap_or(u32::MAX)
        })
    }

    fn start_timer(&mut self, count: u32) {
        self.initial_count = count;
        self.expiry = (count != 0).then(|| Instant::now() + self.period());
        self.timer_changed = true;
    }

    fn send_command(&mut self) {
        let vector = self.command_low as u8;
        let fixed = self.command_low >> 8 & 7 == 0;
        let to_self = match self.command_low >> 18 & 3 {
            0b01 | 0b10 => true,
            // A physical or logical destination: this processor or nobody.
            0b00 => {
                let destination = self.command_high >> 24;
                let logical = self.command_low >> 11 & 1 == 1;
                destination == 0xff
                    || if logical {
                        destination & self.logical_id >> 24 != 0
                    } else {
                        destination == self.id >> 24
                    }
            }
            // All but this one: nobody.
            _ => false,
        };
        // Vectors 0 to 15 are illegal (SDM 3A 11.5.2).
        if fixed && to_self && vector >= 16 {
            self.requested.set(vector);
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let bank = |base: u64, vectors: &Vectors| vectors.0[((offset - base) >> 4) as usize];
        match offset {
            ID => self.id,
            VERSION => VERSION_VALUE,
            TPR => self.priority.into(),
            PPR => self.processor_priority().into(),
            LDR => self.logical_id,
            DFR => self.destination_format,
            SVR => self.spurious,
            ISR..TMR => bank(ISR, &self.in_service),
            TMR..IRR => bank(TMR, &self.trigger_mode),
            IRR..ESR => bank(IRR, &self.requested),
            ICR_LOW => self.command_low,
            ICR_HIGH => self.command_high,
            LVT_TIMER..=LVT_ERROR => self.lvt[((offset - LVT_TIMER) >> 4) as usize],
            INITIAL_COUNT => self.initial_count,
            CURRENT_COUNT => self.current_count(),
            DIVIDE => self.divide,
            // No error is ever recorded; write-only and reserved registers read as zero.
            APR | EOI | ESR => 0,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            ID => self.id = value & 0xff00_0000,
            TPR => {
                self.priority = value as u8;
                self.priority_written = true;
            }
            EOI => {
                if let Some(vector) = self.in_service.highest() {
                    self.in_service.clear(vector);
                }
            }
            LDR => self.logical_id = value & 0xff00_0000,
            DFR => self.destination_format = value | 0x0fff_ffff,
            SVR => {
                self.skip_masked_expiries();
                self.spurious = value & 0x1ff;
                if value & SVR_ENABLED == 0 {
                    // SDM 3A 11.4.7.2: software disable masks all LVT entries.
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
                self.timer_changed = true;
            }
            ICR_HIGH => self.command_high = value,
            ICR_LOW => {
                // Delivery is immediate, so the status bit (12) always reads as idle.
                self.command_low = value & !(1 << 12);
                self.send_command();
            }
            LVT_TIMER..=LVT_ERROR => {
                let index = ((offset - LVT_TIMER) >> 4) as usize;
                let disabled = self.spurious & SVR_ENABLED == 0;
                self.skip_masked_expiries();
                self.lvt[index] = value & 0x0007_ffff | if disabled { LVT_MASKED } else { 0 };
                self.timer_changed |= index == 0;
            }
            INITIAL_COUNT => self.start_timer(value),
            DIVIDE => {
                let left = self.current_count();
                self.divide = value & 0b1011;
                if self.expiry.is_some() {
                    let rest = Duration::from_nanos(u64::from(left) * self.tick_ns());
                    self.expiry = Some(Instant::now() + rest);
                    self.timer_changed = true;
                }
            }
            // Read-only and reserved registers, and ESR, which records nothing.
            _ => {}
        }
    }
}

impl Device for Lapic {
    fn name(&self) -> &'static str {
        "lapic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
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
        if offset & 0xf == 0
            && let Some(word) = data.first_chunk::<4>()
        {
            self.set_register(offset, u32::from_le_bytes(*word));
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(lapic: &mut Lapic, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        lapic.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(lapic: &mut Lapic, offset: u64, value: u32) {
        lapic.write(offset, &value.to_le_bytes());
    }

    fn enabled() -> Lapic {
        let mut lapic = Lapic::default();
        set(&mut lapic, SVR, SVR_ENABLED | 0xff);
        lapic
    }

    fn self_ipi(lapic: &mut Lapic, vector: u8) {
        set(lapic, ICR_LOW, 0b01 << 18 | u32::from(vector));
    }

    #[test]
    fn reset_state_is_disabled_and_masked() {
        let mut lapic = Lapic::default();
        assert_eq!(get(&mut lapic, VERSION), 0x0005_0014);
        assert_eq!(get(&mut lapic, SVR), 0xff);
        assert_eq!(get(&mut lapic, LVT_TIMER), LVT_MASKED);
        self_ipi(&mut lapic, 0x40);
        assert_eq!(lapic.deliverable(), None);
    }

    #[test]
    fn higher_vectors_preempt_and_lower_ones_wait_for_eoi() {
        let mut lapic = enabled();
        self_ipi(&mut lapic, 0x40);
        self_ipi(&mut lapic, 0x51);
        assert_eq!(lapic.deliverable(), Some(0x51));
        lapic.acknowledge(0x51);
        assert_eq!(get(&mut lapic, ISR + 0x20), 1 << 0x11);
        assert_eq!(get(&mut lapic, PPR), 0x50);
        assert_eq!(lapic.deliverable(), None);
        self_ipi(&mut lapic, 0x60);
        assert_eq!(lapic.deliverable(), Some(0x60));
        lapic.acknowledge(0x60);
        set(&mut lapic, EOI, 0);
        set(&mut lapic, EOI, 0);
        assert_eq!(lapic.deliverable(), Some(0x40));
    }

    #[test]
    fn task_priority_blocks_and_follows_cr8() {
        let mut lapic = enabled();
        self_ipi(&mut lapic, 0x40);
        lapic.sync_task_priority(4);
        assert_eq!(get(&mut lapic, TPR), 0x40);
        assert_eq!(lapic.deliverable(), None);
        assert!(lapic.held_by_task_priority());
        set(&mut lapic, TPR, 0x3f);
        assert!(!lapic.held_by_task_priority());
        assert_eq!(lapic.take_priority_write(), Some(3));
        assert_eq!(lapic.deliverable(), Some(0x40));
        lapic.sync_task_priority(3);
        assert_eq!(get(&mut lapic, TPR), 0x3f);
    }

    #[test]
    fn a_one_shot_timer_fires_once() {
        let mut lapic = enabled();
        set(&mut lapic, DIVIDE, 0b1011);
        set(&mut lapic, LVT_TIMER, 0x30);
        set(&mut lapic, INITIAL_COUNT, 1);
        assert!(matches!(lapic.take_timer_change(), Some(Some(_))));
        std::thread::sleep(Duration::from_micros(2));
        lapic.timer_event();
        assert_eq!(lapic.deliverable(), Some(0x30));
        assert!(!lapic.timer_armed());
        assert_eq!(lapic.take_timer_change(), Some(None));
    }

    #[test]
    fn an_early_host_timer_requests_nothing() {
        let mut lapic = enabled();
        set(&mut lapic, LVT_TIMER, 0x30 | LVT_PERIODIC);
        set(&mut lapic, INITIAL_COUNT, u32::MAX);
        lapic.timer_event();
        assert_eq!(lapic.deliverable(), None);
        assert!(lapic.timer_armed());
        assert!(get(&mut lapic, CURRENT_COUNT) > u32::MAX / 2);
    }

    #[test]
    fn divide_codes_follow_the_manual() {
        let mut lapic = enabled();
        for (code, divisor) in [
            (0b0000, 2),
            (0b0001, 4),
            (0b0010, 8),
            (0b0011, 16),
            (0b1000, 32),
            (0b1001, 64),
            (0b1010, 128),
            (0b1011, 1),
        ] {
            set(&mut lapic, DIVIDE, code);
            assert_eq!(lapic.tick_ns(), divisor);
        }
    }

    #[test]
    fn narrow_and_misaligned_accesses_do_no_harm() {
        let mut lapic = enabled();
        lapic.write(TPR, &[0xff]);
        lapic.write(TPR + 1, &[0xff; 4]);
        assert_eq!(get(&mut lapic, TPR), 0);
        let mut wide = [0xff; 8];
        lapic.read(VERSION, &mut wide);
        assert_eq!(wide, [0x14, 0, 5, 0, 0, 0, 0, 0]);
    }
}
