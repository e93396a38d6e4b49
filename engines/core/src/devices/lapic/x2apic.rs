//! The local APIC's MSRs: its base, x2APIC mode and the TSC deadline (SDM 3A 11.12, 11.5.4.1).
//!
//! In x2APIC mode a register at offset `16 n` of the page is MSR `0x800 + n`. What the page
//! silently ignores raises #GP here: absent registers, reserved bits, reads of what is only written.

use super::{Lapic, reg};
use crate::cpuid::PHYSICAL_MEMORY_LIMIT;

/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of x2APIC mode.
pub(super) const FIRST: u32 = 0x800;
/// Last MSR that is set aside for it.
pub(super) const LAST: u32 = 0x8ff;

/// MSRs that every machine's local APIC answers: engines that see `rdmsr` and `wrmsr` themselves
/// hand these on.
pub fn owns_msr(index: u32) -> bool {
    matches!(index, APIC_BASE | TSC_DEADLINE | FIRST..=LAST)
}

pub(super) const BASE_BSP: u64 = 1 << 8;
pub(super) const BASE_X2APIC: u64 = 1 << 10;
pub(super) const BASE_ENABLED: u64 = 1 << 11;
const MODES: u64 = BASE_X2APIC | BASE_ENABLED;
/// The page's address.
const PAGE: u64 = PHYSICAL_MEMORY_LIMIT - 0x1000;

const ICR: u32 = FIRST + 0x30;
const SELF_IPI: u32 = FIRST + 0x3f;

impl Lapic {
    /// Answers `rdmsr`; `None` is #GP.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        match index {
            APIC_BASE => return Some(self.base),
            TSC_DEADLINE => return Some(self.timer.deadline()),
            _ => {}
        }
        if !self.x2apic() || !(FIRST..=LAST).contains(&index) {
            return None;
        }
        let offset = u64::from(index - FIRST) << 4;
        match offset {
            reg::ICR_LOW => Some(u64::from(self.command_low) | u64::from(self.command_high) << 32),
            reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR
            | reg::SVR
            | reg::ISR..reg::ESR
            | reg::ESR
            | reg::LVT_TIMER..=reg::LVT_ERROR
            | reg::INITIAL_COUNT
            | reg::CURRENT_COUNT
            | reg::DIVIDE => Some(self.register(offset).into()),
            _ => None,
        }
    }

    /// Takes a `wrmsr` while the guest's time-stamp counter stands at `guest_tsc`. False is #GP.
    pub fn write_msr(&mut self, index: u32, value: u64, guest_tsc: u64) -> bool {
        match index {
            APIC_BASE => return self.set_base(value),
            TSC_DEADLINE => {
                self.timer.set_deadline(value, guest_tsc);
                return true;
            }
            _ => {}
        }
        if !self.x2apic() || !(FIRST..=LAST).contains(&index) {
            return false;
        }
        if index == ICR {
            // Reserved: 31:20, 17:16, 13:12.
            if value & 0xfff3_3000 != 0 {
                return false;
            }
            self.command_high = (value >> 32) as u32;
            self.command_low = value as u32;
            self.send_command();
            return true;
        }
        if index == SELF_IPI {
            if value >> 8 != 0 {
                return false;
            }
            self.send_to_self(value as u8);
            return true;
        }
        let offset = u64::from(index - FIRST) << 4;
        // The bits that may be set; none for what must be written as zero.
        let writable: u64 = match offset {
            reg::TPR => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => 0x1ff,
            reg::LVT_TIMER => 0x7_10ff,
            reg::LVT_THERMAL | reg::LVT_PERFORMANCE => 0x1_17ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_f7ff,
            reg::LVT_ERROR => 0x1_10ff,
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => 0b1011,
            _ => return false,
        };
        if value & !writable != 0 {
            return false;
        }
        self.set_register(offset, value as u32);
        true
    }

    /// True in x2APIC mode.
    pub(super) fn x2apic(&self) -> bool {
        self.base & MODES == MODES
    }

    /// Where the register page lies.
    pub fn page(&self) -> u64 {
        self.base & PAGE
    }

    /// SDM 3A 11.12.5 and figure 11-27: which ways lead from mode to mode.
    fn set_base(&mut self, value: u64) -> bool {
        let (from, to) = (self.base & MODES, value & MODES);
        let allowed = match to {
            // Switched off.
            0 => true,
            // xAPIC: not straight back from x2APIC.
            BASE_ENABLED => from != MODES,
            // x2APIC: not from off.
            MODES => from != 0,
            // x2APIC without the enable bit is no mode.
            _ => false,
        };
        if value & !(PAGE | MODES | BASE_BSP) != 0 || !allowed {
            return false;
        }
        if to == 0 && from != 0 {
            self.reset();
        }
        self.base = self.base & BASE_BSP | value & PAGE | to;
        true
    }
}
