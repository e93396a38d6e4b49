//! Exceptions of the guest kernel itself: signals in K.
//!
//! An exception goes to the kernel's own trap table, with a frame on the interrupted stack; without
//! an entry, or from within the monitor, it crashes the guest and leaves its registers in the ledger.

use core::arch::{asm, global_asm};
use core::sync::atomic::Ordering::Relaxed;

use crate::frame::Context;
use crate::hypercall::errno::EINVAL;
use crate::hypercall::layout::{KERNEL_CS, KERNEL_SS};
use crate::hypercall::{Registers, UpcallFrame, cause};
use crate::memory::Errno;
use crate::wire::{crash, k};
use crate::{State, events, ledger, state, sys, vmm};

global_asm!(
    ".pushsection .text",
    "trap_restorer:",
    "mov eax, 15",
    "syscall",
    ".popsection",
);

unsafe extern "C" {
    fn trap_restorer();
}

/// SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV
const SIGNALS: [u64; 5] = [4, 5, 7, 8, 11];

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Handles the signals of exceptions, on this stack.
pub(crate) fn install(stack: u64, size: u64) -> bool {
    let handler = on_signal as *const () as u64;
    let restorer = trap_restorer as *const () as u64;
    sys::signal_stack(stack, size, 0)
        && SIGNALS
            .iter()
            .all(|&signal| sys::handle(signal, handler, restorer))
}

extern "C" fn on_signal(signal: i32, _information: *const u8, ucontext: *mut u8) {
    // SAFETY: the host's kernel hands out a valid ucontext.
    let context = unsafe { &mut *Context::in_ucontext(ucontext) };
    let (vector, error, address) = context.exception(signal as u64);
    let registers = context.registers();
    let inside = (k::MONITOR..k::MONITOR_END).contains(&registers.rip);
    if !inside {
        // SAFETY: the monitor was not running, so no reference is in use.
        let state = unsafe { state() };
        if let Some((entry, at)) = state.exception_entry(vector, registers.gpr[4]) {
            vmm::count(&ledger().exceptions[vector as usize & 31]);
            // IF stands for the kernel's own mask, as in Xen's frames.
            let masked = events::shared().upcall_mask.swap(1, Relaxed) != 0;
            let flags = registers.rflags & !INTERRUPT_FLAG;
            let rflags = if masked {
                flags
            } else {
                flags | INTERRUPT_FLAG
            };
            let frame = UpcallFrame {
                cause: cause::EXCEPTION,
                ring: 0,
                vector,
                error,
                address,
                registers: Registers {
                    cs: KERNEL_CS.into(),
                    ss: KERNEL_SS.into(),
                    rflags,
                    ..registers
                },
                ..UpcallFrame::default()
            };
            // SAFETY: the place was found to be the kernel's to write.
            unsafe { (at as *mut UpcallFrame).write(frame) };
            context.redirect(entry, at - 8, at);
            return;
        }
    }
    let known = registers
        .gpr
        .iter()
        .chain([&registers.rip, &registers.rflags]);
    for (place, &value) in ledger().registers.iter().zip(known) {
        place.store(value, Relaxed);
    }
    let detail = [vector as i64, error as i64, address as i64, 0];
    vmm::crashed(
        if inside {
            crash::MONITOR
        } else {
            crash::EXCEPTION
        },
        detail,
    )
}

impl State {
    /// The kernel's entry for `vector` and a place for the frame below `rsp` and its red zone.
    fn exception_entry(&self, vector: u64, rsp: u64) -> Option<(u64, u64)> {
        let entry = self.kernel.traps[vector as usize & 31];
        let size = size_of::<UpcallFrame>() as u64;
        let at = rsp.checked_sub(128 + size)? & !15;
        let fits = self.kernel_has(at.checked_sub(8)?, size + 8, sys::PROT_WRITE);
        (entry != 0 && fits).then_some((entry, at))
    }

    /// Continues the kernel after its own exception.
    pub(crate) fn iret_kernel(&mut self, frame: u64) -> Result<i64, Errno> {
        let UpcallFrame {
            ring, registers, ..
        } = self.read(frame)?;
        if ring != 0 || registers.cs != KERNEL_CS.into() || registers.ss != KERNEL_SS.into() {
            return Err(-EINVAL);
        }
        if !self.executable(registers.rip) {
            return Err(-EINVAL);
        }
        let masked = registers.rflags & INTERRUPT_FLAG == 0;
        events::shared().upcall_mask.store(masked.into(), Relaxed);
        resume(&registers)
    }
}

/// Loads a register file and goes on at its rip.
fn resume(registers: &Registers) -> ! {
    // The five words that iretq takes, with K's real selectors.
    let words = [
        registers.rip,
        0x33,
        user_flags(registers.rflags),
        registers.gpr[4],
        0x2b,
    ];
    // SAFETY: leaves the monitor for good, with a state that is the kernel's own.
    unsafe {
        asm!(
            "mov rsp, {words}",
            "mov rcx, [rax + 8]",
            "mov rdx, [rax + 16]",
            "mov rbx, [rax + 24]",
            "mov rbp, [rax + 40]",
            "mov rsi, [rax + 48]",
            "mov rdi, [rax + 56]",
            "mov r8, [rax + 64]",
            "mov r9, [rax + 72]",
            "mov r10, [rax + 80]",
            "mov r11, [rax + 88]",
            "mov r12, [rax + 96]",
            "mov r13, [rax + 104]",
            "mov r14, [rax + 112]",
            "mov r15, [rax + 120]",
            "mov rax, [rax]",
            "iretq",
            words = in(reg) words.as_ptr(),
            in("rax") registers.gpr.as_ptr(),
            options(noreturn),
        )
    }
}

/// The bits of RFLAGS that code without privilege can change, and IF (SDM 3A 2.3).
pub(crate) fn user_flags(flags: u64) -> u64 {
    const CHANGEABLE: u64 = 0x24_0dd5;
    flags & CHANGEABLE | 0x202
}
