//! Signal frames: the registers of a user process that is stopped in the gate.
//!
//! The frame lies on a page that U and K share, and is U's to write whenever user code runs. While K
//! looks at it U waits for K's answer, so nothing changes meanwhile. Registers are taken as the
//! user's own. All else that returning into a frame would set (signal mask, signal stack, flags) is
//! replaced by K ([`clean`]), and a process can return into none without K, since rt_sigreturn takes
//! the key: so no user process ever blocks a signal or moves its signal stack.

use crate::hypercall::Registers;
use crate::hypercall::layout::{USER_CS, USER_SS};
use crate::trap::user_flags;
use crate::wire::{SLOT_SIZE, k, u};

const SIGILL: u64 = 4;

/// `struct sigcontext_64`, and the way to it.
#[repr(C)]
pub(crate) struct Context {
    r8_to_r15: [u64; 8],
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    pub(crate) rip: u64,
    rflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    vector: u64,
    mask: u64,
    address: u64,
    fpstate: u64,
    reserved: [u64; 8],
}

/// Offset of ucontext in the signal frame, of the sigcontext in ucontext, of the signal mask there.
const UCONTEXT: u64 = 8;
const SIGCONTEXT: u64 = 40;
const SIGMASK: u64 = 296;
/// Bytes of a signal frame without FPU state: return address, ucontext, siginfo.
const FRAME_SIZE: u64 = 8 + 304 + 128;
/// Where K puts together the frame of a fresh register file: the host's frames lie at the other end.
pub(crate) const FRESH: u64 = u::SIGNAL_STACK;
/// UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
const UC_FLAGS: u64 = 6;
/// UC_FP_XSTATE: the frame has extended FPU state, which is the user's own.
const UC_FP_XSTATE: u64 = 1;
const SS_AUTODISARM: u64 = 1 << 31;

impl Context {
    /// The sigcontext in a ucontext.
    pub(crate) fn in_ucontext(ucontext: *mut u8) -> *mut Context {
        ucontext.wrapping_add(SIGCONTEXT as usize).cast()
    }

    /// Vector, error code and address of the exception that raised the signal.
    pub(crate) fn exception(&self, signal: u64) -> (u64, u64, u64) {
        if signal == SIGILL {
            // Some come without an exception, and leave the vector of an earlier one.
            return (6, 0, 0);
        }
        let address = if self.vector == 14 { self.address } else { 0 };
        (self.vector & 31, self.error, address)
    }

    pub(crate) fn registers(&self) -> Registers {
        let mut gpr = [0; 16];
        let first = [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
        ];
        gpr[..8].copy_from_slice(&first);
        gpr[8..].copy_from_slice(&self.r8_to_r15);
        Registers {
            gpr,
            rip: self.rip,
            rflags: self.rflags,
            cs: USER_CS.into(),
            ss: USER_SS.into(),
        }
    }

    pub(crate) fn set_registers(&mut self, registers: &Registers) {
        let Registers {
            gpr,
            rip,
            rflags,
            cs: _,
            ss: _,
        } = *registers;
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
        ] = [
            gpr[0], gpr[1], gpr[2], gpr[3], gpr[4], gpr[5], gpr[6], gpr[7],
        ];
        self.r8_to_r15.copy_from_slice(&gpr[8..]);
        self.rip = rip;
        self.rflags = user_flags(rflags);
        self.cs = USER_CS;
        self.ss = USER_SS;
    }

    /// Continues elsewhere.
    pub(crate) fn redirect(&mut self, rip: u64, rsp: u64, rdi: u64) {
        self.rip = rip;
        self.rsp = rsp;
        self.rdi = rdi;
        self.rflags &= !(1 << 8 | 1 << 10);
    }
}

/// K's view of an address on U's signal stack.
fn signal_stack(slot: usize, address: u64) -> *mut u8 {
    (k::SLOTS + slot as u64 * SLOT_SIZE + (address - u::COMMANDS)) as *mut u8
}

/// Whether a signal frame can lie at `address`.
pub(crate) fn fits(address: u64) -> bool {
    address.is_multiple_of(8)
        && (u::SIGNAL_STACK..=u::SIGNAL_STACK + u::SIGNAL_STACK_SIZE - FRAME_SIZE)
            .contains(&address)
}

/// The registers in the frame of a stopped process. The reference must not outlive the stop.
pub(crate) fn context(slot: usize, frame: u64) -> &'static mut Context {
    let ucontext = signal_stack(slot, frame + UCONTEXT);
    // SAFETY: `fits` held for the frame; U, the only other one that writes there, is stopped.
    unsafe { &mut *Context::in_ucontext(ucontext) }
}

/// Sets everything in the frame of a stopped process that is not the user's to say.
pub(crate) fn clean(slot: usize, frame: u64) {
    let words = signal_stack(slot, frame).cast::<u64>();
    // SAFETY: `fits` held for the frame; U, the only other one that writes there, is stopped.
    unsafe {
        words
            .add(1)
            .write(words.add(1).read() & UC_FP_XSTATE | UC_FLAGS);
        words.add(3).write(u::SIGNAL_STACK);
        words.add(4).write(SS_AUTODISARM);
        words.add(5).write(u::SIGNAL_STACK_SIZE);
        words.add(((UCONTEXT + SIGMASK) / 8) as usize).write(0);
    }
}

/// Puts together a frame whose return starts user mode anew.
pub(crate) fn fresh(slot: usize, registers: &Registers) {
    let words = signal_stack(slot, FRESH).cast::<u64>();
    // SAFETY: the frame lies at the start of the signal stack; U is stopped.
    unsafe {
        for index in 0..(FRAME_SIZE / 8) as usize {
            words.add(index).write(0);
        }
    }
    clean(slot, FRESH);
    // Without FPU state in the frame the host gives a fresh one.
    context(slot, FRESH).set_registers(registers);
}
