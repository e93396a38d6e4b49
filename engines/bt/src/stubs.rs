//! Hand-written entry to and exit from translated code.
//!
//! `enter` is an ordinary C function to Rust: it parks the host's callee-saved registers on the
//! host stack, loads the guest's registers from the [`Context`] and jumps to `Context::resume`.
//! Translated code comes back by storing a site number and jumping to `exit`, which undoes it.
//! The guest's RSP is in the host's RSP meanwhile, so nothing between the two may use the stack,
//! and every signal handler of this thread must run on its alternate stack.
//!
//! Integer registers, flags, XMM and MXCSR are exchanged. x87 and MMX state stays in the host's
//! registers: Rust code doesn't touch it (the vCPU swaps it when threads share it, see vcpu.rs).

use std::mem::offset_of;

use dynasmrt::{DynasmApi, SimpleAssembler, dynasm};

use crate::context::Context;

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stubs {
    /// `extern "C" fn()`: with the guest's flags in the host's.
    pub enter: u64,
    /// As `enter`, for entries that fetch the flags themselves, and with DF clear: popfq is the
    /// most expensive instruction of an entry.
    pub enter_lazy: u64,
    /// Target of every site's jump.
    pub exit: u64,
    /// As `exit`, for a signal handler that has stored the integer state itself.
    pub exit_after_signal: u64,
}

const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

/// Emits the stubs for a context at `ctx`, to be placed at `base`.
pub(crate) fn emit(ctx: i32, base: u64) -> (Stubs, Vec<u8>) {
    let mut ops = SimpleAssembler::new();
    let gpr = ctx + offset_of!(Context, gpr) as i32;
    let xmm = ctx + offset_of!(Context, xmm) as i32;
    let flags = ctx + offset_of!(Context, flags) as i32;
    let mxcsr = ctx + offset_of!(Context, mxcsr) as i32;
    let host_mxcsr = ctx + offset_of!(Context, host_mxcsr) as i32;
    let host_rsp = ctx + offset_of!(Context, host_rsp) as i32;
    let resume = ctx + offset_of!(Context, resume) as i32;

    let mut entry = |with_flags: bool| {
        ops.align(16, 0xcc);
        let entry = base + ops.offset().0 as u64;
        for register in SAVED {
            dynasm!(ops ; .arch x64 ; push Rq(register));
        }
        dynasm!(ops
            ; .arch x64
            ; mov [host_rsp], rsp
            ; stmxcsr [host_mxcsr]
            ; ldmxcsr [mxcsr]
        );
        for register in 0..16u8 {
            dynasm!(ops ; .arch x64 ; movaps Rx(register), [xmm + 16 * i32::from(register)]);
        }
        if with_flags {
            dynasm!(ops ; .arch x64 ; push QWORD [flags] ; popfq);
        }
        for register in 0..16u8 {
            dynasm!(ops ; .arch x64 ; mov Rq(register), [gpr + 8 * i32::from(register)]);
        }
        dynasm!(ops ; .arch x64 ; jmp QWORD [resume]);
        entry
    };
    let enter = entry(true);
    let enter_lazy = entry(false);

    ops.align(16, 0xcc);
    let exit = base + ops.offset().0 as u64;
    for register in 0..16u8 {
        dynasm!(ops ; .arch x64 ; mov [gpr + 8 * i32::from(register)], Rq(register));
    }
    dynasm!(ops
        ; .arch x64
        ; mov rsp, [host_rsp]
        ; pushfq
        ; pop QWORD [flags]
    );
    let exit_after_signal = base + ops.offset().0 as u64;
    dynasm!(ops ; .arch x64 ; cld);
    for register in 0..16u8 {
        dynasm!(ops ; .arch x64 ; movaps [xmm + 16 * i32::from(register)], Rx(register));
    }
    dynasm!(ops
        ; .arch x64
        ; stmxcsr [mxcsr]
        ; ldmxcsr [host_mxcsr]
    );
    for register in SAVED.into_iter().rev() {
        dynasm!(ops ; .arch x64 ; pop Rq(register));
    }
    dynasm!(ops ; .arch x64 ; ret);
    (
        Stubs {
            enter,
            enter_lazy,
            exit,
            exit_after_signal,
        },
        ops.finalize(),
    )
}
