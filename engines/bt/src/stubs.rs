//! Hand-written entry to and exit from translated code.
//!
//! `enter` is an ordinary C function to Rust: it parks the host's callee-saved registers on the
//! host stack, loads the guest's registers from the [`Context`] and jumps to `Context::resume`.
//! Translated code comes back by storing a site number and jumping to `exit`, which undoes it.
//! The guest's RSP is in the host's RSP meanwhile, so nothing between the two may use the stack,
//! and every signal handler of this thread must run on its alternate stack.
//!
//! Integer registers and flags are exchanged; XMM and MXCSR if the code uses them
//! ([`Mode::vectors`](crate::decode::Mode)), which the exit knows by `Context::live`; the upper halves
//! of YMM only where the guest has enabled AVX and they hold something. Saving them costs little, but loading them, zeros
//! included, would make every SSE instruction that follows merge with them (Intel's optimization
//! manual, 15.3). Rust code gets clean upper halves. x87 and MMX state stays in the host's
//! registers: Rust code doesn't touch it (the vCPU swaps it when threads share it, see vcpu.rs).

use std::mem::offset_of;

use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm, x64::X64Relocation};

use crate::context::Context;

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stubs {
    /// `extern "C" fn()`: with the guest's flags in the host's, DF from its slot; without and with its
    /// vector registers.
    pub enter: [u64; 2],
    /// As `enter`, for entries that fetch the arithmetic flags themselves.
    pub enter_lazy: [u64; 2],
    /// Target of every site's jump.
    pub exit: u64,
    /// As `exit`, for who has stored the general registers and has the host's RSP.
    pub exit_stored: u64,
    /// As `exit`, for a signal handler that has stored the integer state itself.
    pub exit_after_signal: u64,
    /// Brings the vector registers in from code that did without, and goes on at R12. The flags are
    /// scratch.
    pub load_vectors: u64,
}

/// General registers that the C calling convention has a callee preserve, but RSP.
pub(crate) const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

/// Emits the stubs for a context at `ctx`, to be placed at `base`.
pub(crate) fn emit(ctx: i32, base: u64) -> (Stubs, Vec<u8>) {
    let avx_host = std::arch::is_x86_feature_detected!("avx");
    // XGETBV with ECX = 1 tells whether upper halves are in use (SDM 1 13.2).
    let in_use_host = avx_host && std::arch::x86_64::__cpuid_count(0xd, 1).eax >> 2 & 1 == 1;
    let mut ops = VecAssembler::<X64Relocation>::new(base as usize);
    let gpr = ctx + offset_of!(Context, gpr) as i32;
    let xmm = ctx + offset_of!(Context, xmm) as i32;
    let ymm_high = ctx + offset_of!(Context, ymm_high) as i32;
    let upper = ctx + offset_of!(Context, upper) as i32;
    let avx = ctx + offset_of!(Context, avx) as i32;
    let flags = ctx + offset_of!(Context, flags) as i32;
    let direction = ctx + offset_of!(Context, direction) as i32;
    let mxcsr = ctx + offset_of!(Context, mxcsr) as i32;
    let host_mxcsr = ctx + offset_of!(Context, host_mxcsr) as i32;
    let host_rsp = ctx + offset_of!(Context, host_rsp) as i32;
    let resume = ctx + offset_of!(Context, resume) as i32;

    let live = ctx + offset_of!(Context, live) as i32;
    let load = |ops: &mut VecAssembler<X64Relocation>| {
        dynasm!(ops
            ; .arch x64
            ; stmxcsr [host_mxcsr]
            ; ldmxcsr [mxcsr]
            ; mov DWORD [live], 1
        );
        if avx_host {
            dynasm!(ops ; .arch x64 ; cmp DWORD [upper], 0 ; je >clean);
            for register in 0..16u8 {
                dynasm!(ops
                    ; .arch x64
                    ; vmovaps Rx(register), [xmm + 16 * i32::from(register)]
                    ; vinsertf128 Ry(register), Ry(register), [ymm_high + 16 * i32::from(register)], 1
                );
            }
            dynasm!(ops
                ; .arch x64
                ; jmp >loaded
                ;clean:
                ; cmp DWORD [avx], 0
                ; je >invisible
                ; vzeroupper
                ;invisible:
            );
        }
        for register in 0..16u8 {
            dynasm!(ops ; .arch x64 ; movaps Rx(register), [xmm + 16 * i32::from(register)]);
        }
        dynasm!(ops ; .arch x64 ; loaded:);
    };
    let mut entry = |with_flags: bool, vectors: bool| {
        ops.align(16, 0xcc);
        let entry = base + ops.offset().0 as u64;
        for register in SAVED {
            dynasm!(ops ; .arch x64 ; push Rq(register));
        }
        dynasm!(ops ; .arch x64 ; mov [host_rsp], rsp);
        if vectors {
            load(&mut ops);
        }
        dynasm!(ops
            ; .arch x64
            ; cmp DWORD [direction], 0
            ; je >up
            ; std
            ;up:
        );
        if with_flags {
            // popfq would take longer than all the rest: sahf loads all but OF, and 1 + 127 overflows a
            // signed byte and 0 + 127 doesn't.
            dynasm!(ops
                ; .arch x64
                ; mov eax, [flags]
                ; mov ecx, eax
                ; shl eax, 8
                ; shr ecx, 11
                ; and ecx, 1
                ; or eax, ecx
                ; add al, 127
                ; sahf
            );
        }
        for register in 0..16u8 {
            dynasm!(ops ; .arch x64 ; mov Rq(register), [gpr + 8 * i32::from(register)]);
        }
        dynasm!(ops ; .arch x64 ; jmp QWORD [resume]);
        entry
    };
    let enter = [false, true].map(|vectors| entry(true, vectors));
    let enter_lazy = [false, true].map(|vectors| entry(false, vectors));
    ops.align(16, 0xcc);
    let load_vectors = base + ops.offset().0 as u64;
    load(&mut ops);
    dynasm!(ops ; .arch x64 ; jmp r12);

    ops.align(16, 0xcc);
    let exit = base + ops.offset().0 as u64;
    for register in 0..16u8 {
        dynasm!(ops ; .arch x64 ; mov [gpr + 8 * i32::from(register)], Rq(register));
    }
    dynasm!(ops ; .arch x64 ; mov rsp, [host_rsp]);
    let exit_stored = base + ops.offset().0 as u64;
    dynasm!(ops ; .arch x64 ; pushfq ; pop QWORD [flags]);
    let exit_after_signal = base + ops.offset().0 as u64;
    dynasm!(ops
        ; .arch x64
        ; cld
        ; cmp DWORD [live], 0
        ; je >kept
        ; mov DWORD [live], 0
    );
    if avx_host {
        dynasm!(ops ; .arch x64 ; cmp DWORD [avx], 0 ; je >invisible);
        if in_use_host {
            dynasm!(ops
                ; .arch x64
                ; mov DWORD [upper], 0
                ; mov ecx, 1
                ; xgetbv
                ; test al, 4
                ; jz >invisible
            );
        }
        for register in 0..16u8 {
            dynasm!(ops
                ; .arch x64
                ; vmovaps [xmm + 16 * i32::from(register)], Rx(register)
                ; vextractf128 [ymm_high + 16 * i32::from(register)], Ry(register), 1
            );
        }
        dynasm!(ops
            ; .arch x64
            ; mov DWORD [upper], 1
            ; vzeroupper
            ; jmp >saved
            ;invisible:
        );
    }
    for register in 0..16u8 {
        dynasm!(ops ; .arch x64 ; movaps [xmm + 16 * i32::from(register)], Rx(register));
    }
    dynasm!(ops
        ; .arch x64
        ;saved:
        ; stmxcsr [mxcsr]
        ; ldmxcsr [host_mxcsr]
        ;kept:
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
            exit_stored,
            exit_after_signal,
            load_vectors,
        },
        ops.finalize().expect("every label is bound"),
    )
}
