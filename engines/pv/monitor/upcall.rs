//! Entering the guest kernel: at its start, and when user mode has stopped.

use core::arch::asm;
use core::sync::atomic::Ordering::Relaxed;

use crate::hypercall::errno::{EFAULT, EINVAL, EPERM};
use crate::hypercall::layout::{KERNEL_CS, KERNEL_SS};
use crate::hypercall::{Registers, TrapEntry, UpcallFrame, cause};
use crate::memory::Errno;
use crate::wire::{crash, event, k};
use crate::{State, events, ledger, sys, vmm};

/// Where the guest kernel wants to be entered.
pub(crate) struct Kernel {
    pub(crate) traps: [u64; 32],
    pub(crate) event: u64,
    pub(crate) failsafe: u64,
    pub(crate) syscall: u64,
    pub(crate) stack: u64,
}

impl Kernel {
    pub(crate) const NONE: Kernel = Kernel {
        traps: [0; 32],
        event: 0,
        failsafe: 0,
        syscall: 0,
        stack: 0,
    };
}

/// Enters the kernel for the first time.
pub(crate) fn start(entry: u64, stack: u64) -> ! {
    jump(entry, stack, k::START_INFO)
}

/// Calls `entry(argument)` on `stack`, for good.
pub(crate) fn jump(entry: u64, stack: u64, argument: u64) -> ! {
    // SAFETY: leaves the monitor, whose stack is empty from here on; entry and stack are the
    // kernel's, and what it does with them is bounded by its jail.
    unsafe {
        asm!(
            "mov rsp, {stack}",
            "push 0",
            "xor ebp, ebp",
            "jmp {entry}",
            stack = in(reg) stack,
            entry = in(reg) entry,
            in("rdi") argument,
            options(noreturn),
        )
    }
}

/// The frame that upcalls from user mode use.
pub(crate) fn frame() -> &'static mut UpcallFrame {
    // SAFETY: the page is mapped, and the kernel, which may write to it, is not running.
    unsafe { &mut *(k::UPCALL_FRAME as *mut UpcallFrame) }
}

impl State {
    pub(crate) fn set_trap_table(&mut self, entries: u64) -> Result<i64, Errno> {
        let mut traps = [0; 32];
        if entries == 0 {
            self.kernel.traps = traps;
            return Ok(0);
        }
        for index in 0..=32 {
            let at = entries
                .checked_add(index * size_of::<TrapEntry>() as u64)
                .ok_or(-EFAULT)?;
            let entry: TrapEntry = self.read(at)?;
            if entry.address == 0 {
                self.kernel.traps = traps;
                return Ok(0);
            }
            if entry.cs != KERNEL_CS {
                return Err(-EPERM);
            }
            if !self.executable(entry.address) {
                return Err(-EFAULT);
            }
            *traps.get_mut(usize::from(entry.vector)).ok_or(-EINVAL)? = entry.address;
        }
        Err(-EINVAL)
    }

    pub(crate) fn set_callbacks(
        &mut self,
        event: u64,
        failsafe: u64,
        syscall: u64,
    ) -> Result<i64, Errno> {
        if ![event, failsafe, syscall]
            .iter()
            .all(|&entry| entry == 0 || self.executable(entry))
        {
            return Err(-EFAULT);
        }
        self.kernel.event = event;
        self.kernel.failsafe = failsafe;
        self.kernel.syscall = syscall;
        Ok(0)
    }

    pub(crate) fn stack_switch(&mut self, ss: u64, rsp: u64) -> Result<i64, Errno> {
        if ss != u64::from(KERNEL_SS) {
            return Err(-EPERM);
        }
        if !rsp.is_multiple_of(16) || rsp < 16 {
            return Err(-EINVAL);
        }
        if !self.kernel_has(rsp - 16, 16, sys::PROT_WRITE) {
            return Err(-EFAULT);
        }
        self.kernel.stack = rsp;
        Ok(0)
    }

    /// Calls `entry` with the frame, which says why.
    fn enter(&self, entry: u64, why: u64, vector: u64) -> ! {
        if entry == 0 || self.kernel.stack == 0 {
            vmm::crashed(crash::NO_ENTRY, [why as i64, vector as i64, 0, 0]);
        }
        events::shared().upcall_mask.store(1, Relaxed);
        jump(entry, self.kernel.stack, k::UPCALL_FRAME)
    }

    fn root(&self) -> u64 {
        self.current.map_or(0, |slot| self.spaces[slot].root)
    }

    /// Hands a system call to the kernel.
    pub(crate) fn upcall_syscall(&self, number: u64, arguments: [u64; 6], rip: u64) -> ! {
        vmm::count(&ledger().events[event::SYSCALL]);
        let frame = frame();
        frame.cause = cause::SYSCALL;
        frame.ring = 3;
        frame.space = self.root();
        frame.number = number;
        frame.arguments = arguments;
        frame.registers.rip = rip;
        self.enter(self.kernel.syscall, cause::SYSCALL, 0)
    }

    /// Hands an exception of user mode to the kernel.
    pub(crate) fn upcall_exception(
        &self,
        vector: u64,
        error: u64,
        address: u64,
        registers: Registers,
    ) -> ! {
        vmm::count(&ledger().exceptions[vector as usize & 31]);
        *frame() = UpcallFrame {
            cause: cause::EXCEPTION,
            ring: 3,
            space: self.root(),
            vector,
            error,
            address,
            registers,
            ..UpcallFrame::default()
        };
        self.enter(
            self.kernel.traps[vector as usize & 31],
            cause::EXCEPTION,
            vector,
        )
    }

    /// Hands pending events to the kernel, user mode being stopped.
    pub(crate) fn upcall_event(&self, registers: Registers) -> ! {
        vmm::count(&ledger().events[event::EVENT]);
        *frame() = UpcallFrame {
            cause: cause::EVENT,
            ring: 3,
            space: self.root(),
            registers,
            ..UpcallFrame::default()
        };
        self.enter(self.kernel.event, cause::EVENT, 0)
    }

    /// Tells the kernel that a user process has lost its registers.
    pub(crate) fn upcall_failsafe(&self) -> ! {
        vmm::count(&ledger().events[event::FAILSAFE]);
        if self.kernel.failsafe == 0 {
            vmm::crashed(crash::SIGNAL_STATE, [0; 4]);
        }
        *frame() = UpcallFrame {
            cause: cause::EXCEPTION,
            ring: 3,
            space: self.root(),
            vector: 8,
            ..UpcallFrame::default()
        };
        self.enter(self.kernel.failsafe, cause::EXCEPTION, 8)
    }
}
