//! Debug exceptions: single steps, breakpoints, general detect (SDM 3B chapter 18).
//!
//! While TF is set or a breakpoint is armed the guest runs instruction by instruction, and with data
//! breakpoints every access takes the slow path. What an instruction has hit is kept until the
//! boundary after it and forgotten should it fault.

use std::cell::Cell;

use super::Trap;
use crate::{
    core::Core,
    cpu::{CR0_AM, Cpu, FLAG_AC, FLAG_RF, FLAG_TF},
    fault::{self, Fault},
};

/// DR6.BD: a debug register was touched under DR7.GD.
const BD: u64 = 1 << 13;
/// DR6.BS: single step.
const BS: u64 = 1 << 14;
/// DR6.BT: the TSS of the task that starts asks for it.
const BT: u64 = 1 << 15;
/// DR7: the breakpoints of one task, L0 to L3 and LE.
const LOCAL: u64 = 0x155;
/// DR7.GD.
const GD: u64 = 1 << 13;
/// L0 to G3 of DR7.
const ENABLED: u64 = 0xff;
const CR4_DE: u64 = 1 << 3;
/// R/W fields of DR7.
const ON_EXECUTION: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_PORT: u64 = 2;

/// What the instruction under way has coming.
#[derive(Debug, Default)]
pub(crate) struct Debugging {
    /// TF was set when it started.
    stepping: bool,
    /// Breakpoints that it has hit, as DR6 names them.
    hits: Cell<u64>,
    /// It loads SS: whatever is due waits for the next one (SDM 3A 6.8.3).
    pub blocked: bool,
}

impl Core {
    /// True if the next instruction, or the one before, may concern a debugger.
    pub(crate) fn debugging(&self) -> bool {
        self.cpu.flags & (FLAG_TF | FLAG_RF) != 0
            || self.cpu.dr[7] & ENABLED != 0
            || self.trap_due()
    }

    /// Breakpoints of any kind are armed.
    pub(crate) fn armed(&self) -> bool {
        self.cpu.dr[7] & ENABLED != 0
    }

    /// The instruction before has a trap coming, which goes before any interrupt.
    pub(crate) fn trap_due(&self) -> bool {
        self.debug.stepping || self.debug.hits.get() != 0
    }

    /// The trap that the instruction before has left behind.
    pub(crate) fn take_trap(&mut self) -> Option<Fault> {
        let stepped = std::mem::take(&mut self.debug.stepping);
        if self.debug.blocked {
            return None;
        }
        let hits = self.debug.hits.take() | if stepped { BS } else { 0 };
        (hits != 0).then(|| self.debug_exception(hits))
    }

    /// Just before an instruction: its breakpoint, or else whether it has to run by itself.
    pub(crate) fn debug_instruction(&mut self) -> Result<bool, Fault> {
        let blocked = std::mem::take(&mut self.debug.blocked);
        if !blocked && self.cpu.flags & FLAG_RF == 0 {
            let address = self.linear_ip();
            let hits = self.breakpoints(ON_EXECUTION, address, 1);
            if hits != 0 {
                return Err(self.debug_exception(hits));
            }
        }
        self.cpu.flags &= !FLAG_RF;
        self.debug.stepping = self.cpu.flags & FLAG_TF != 0;
        Ok(self.debug.stepping || self.cpu.dr[7] & ENABLED != 0)
    }

    /// Notes `hits` in DR6.
    fn debug_exception(&mut self, hits: u64) -> Fault {
        self.cpu.dr[6] = self.cpu.dr[6] & !0xf | hits;
        Fault::plain(fault::DB)
    }

    /// An exception or an interrupt by instruction comes instead of the step's trap.
    pub(crate) fn forget_step(&mut self) {
        self.debug.stepping = false;
    }

    /// The instruction under way has set TF and traps at its own end.
    pub(super) fn step_from_here(&mut self) {
        self.debug.stepping = self.cpu.flags & FLAG_TF != 0;
    }

    /// A task switch: local breakpoints go (SDM 3A 8.2.1).
    pub(super) fn task_entered(&mut self) {
        self.cpu.dr[7] &= !LOCAL;
        self.forget_modes();
    }

    /// The new task asks for a trap before its first instruction (SDM 3B 18.3.1.5).
    pub(super) fn task_traps(&mut self) {
        self.debug.hits.set(self.debug.hits.get() | BT);
    }

    /// The instruction has not happened, or is itself what its breakpoints would raise.
    pub(crate) fn forget_traps(&mut self) {
        self.debug.stepping = false;
        self.debug.hits.set(0);
        self.debug.blocked = false;
    }

    /// A debug exception is being delivered.
    pub(crate) fn debug_delivered(&mut self) {
        self.cpu.dr[7] &= !GD;
        self.forget_modes();
    }

    /// A step goes on in spite of a halt.
    pub(crate) fn stepping(&self) -> bool {
        self.debug.stepping
    }

    /// Data breakpoints are armed.
    pub(crate) fn watching(&self) -> bool {
        let dr7 = self.cpu.dr[7];
        dr7 & ENABLED != 0
            && (0..4).any(|number| dr7 >> (2 * number) & 3 != 0 && self.kind(number) & 1 == 1)
    }

    /// Ring 3 runs with alignment checks.
    pub(crate) fn checks_alignment(&self) -> bool {
        Core::aligns(&self.cpu)
    }

    /// As [`Core::checks_alignment`], of any CPU.
    pub(crate) fn aligns(cpu: &Cpu) -> bool {
        cpu.flags & FLAG_AC != 0 && cpu.cr0 & CR0_AM != 0 && cpu.cpl() == 3
    }

    fn kind(&self, number: u32) -> u64 {
        self.cpu.dr[7] >> (16 + 4 * number) & 3
    }

    /// Breakpoints of a kind that an access touches.
    fn breakpoints(&self, kind: u64, address: u64, size: u64) -> u64 {
        let dr7 = self.cpu.dr[7];
        if dr7 & ENABLED == 0 {
            return 0;
        }
        (0..4)
            .filter(|&number| dr7 >> (2 * number) & 3 != 0 && self.kind(number) == kind)
            .filter(|&number| {
                let bytes = match dr7 >> (18 + 4 * number) & 3 {
                    0 => 1,
                    1 => 2,
                    2 => 8,
                    _ => 4,
                };
                let start = self.cpu.dr[number as usize] & !(bytes - 1);
                start.wrapping_sub(address) < size || address.wrapping_sub(start) < bytes
            })
            .fold(0, |hits, number| hits | 1 << number)
    }

    /// A data access: notes the breakpoints that it hits.
    pub(crate) fn watch(&self, address: u64, size: u64, write: bool) {
        if self.cpu.dr[7] & ENABLED == 0 {
            return;
        }
        let mut hits = self.breakpoints(ON_WRITE | 2, address, size);
        if write {
            hits |= self.breakpoints(ON_WRITE, address, size);
        }
        self.debug.hits.set(self.debug.hits.get() | hits);
    }

    /// As `watch`, for a port.
    pub(super) fn watch_port(&self, port: u16, size: u8) {
        if self.cpu.cr4 & CR4_DE != 0 {
            let hits = self.breakpoints(ON_PORT, port.into(), size.into());
            self.debug.hits.set(self.debug.hits.get() | hits);
        }
    }

    /// #AC for a misaligned access of ring 3, where that is asked for.
    pub(crate) fn check_alignment(&self, address: u64, size: u32) -> Result<(), Fault> {
        if matches!(size, 2 | 4 | 8)
            && address & u64::from(size - 1) != 0
            && self.checks_alignment()
        {
            return Err(Fault {
                vector: fault::AC,
                error: Some(0),
                address: None,
            });
        }
        Ok(())
    }

    /// Number of the debug register that `number` names.
    ///
    /// # Errors
    /// #UD for DR4 and DR5 under CR4.DE, #DB under DR7.GD.
    pub(super) fn debug_register(&mut self, number: usize) -> Result<usize, Trap> {
        let number = match number & 7 {
            4 | 5 if self.cpu.cr4 & CR4_DE != 0 => return Err(Fault::ud().into()),
            // Aliases otherwise (SDM 3B 18.2.2).
            4 => 6,
            5 => 7,
            number => number,
        };
        if self.cpu.dr[7] & GD != 0 {
            return Err(self.debug_exception(BD).into());
        }
        Ok(number)
    }
}
