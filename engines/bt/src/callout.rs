//! Calls from translated code to Rust that come back to it.
//!
//! Leaving for the run loop and entering again costs more than most devices need to answer. So code
//! that accesses a port stores its site, with everything else as at an exit, and jumps to this stub. It
//! puts away the registers that the C calling convention lets a callee change, and calls
//! `Context::callee` with `Context::owner`, the context and the site: to find these two by way of the owner
//! would take two loads more before anything else can begin. The answer 0 leads to `Context::resume` with the
//! registers as their slots say then; anything else leaves through the exit.
//!
//! What a call would have to look after beyond that leaves as it is, and whoever reads the site does
//! what there is to do: DF is set, vector registers are in use, or nobody can be called.
//!
//! The flags are scratch on the way back.
//!
//! Invariant: the guest's registers are in their slots wherever this leaves, and in the host's where it
//! goes on.

use std::mem::offset_of;

use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm, x64::X64Relocation};

use crate::{
    context::Context,
    stubs::{SAVED, Stubs},
};

/// General registers that a callee may change.
const CHANGED: [u8; 9] = [0, 1, 2, 6, 7, 8, 9, 10, 11];
const RSP: u8 = 4;

/// Emits the stub for a context at `context`, to be placed at `base`.
pub(crate) fn emit(context: i32, stubs: &Stubs, base: u64) -> Vec<u8> {
    let mut ops = VecAssembler::<X64Relocation>::new(base as usize);
    let slot = |offset: usize| context + offset as i32;
    let gpr = |register: u8| slot(offset_of!(Context, gpr)) + 8 * i32::from(register);
    let host_rsp = slot(offset_of!(Context, host_rsp));
    let direction = slot(offset_of!(Context, direction));
    let live = slot(offset_of!(Context, live));
    let owner = slot(offset_of!(Context, owner));
    let callee = slot(offset_of!(Context, callee));
    let resume = slot(offset_of!(Context, resume));
    let site = slot(offset_of!(Context, site));
    let exit = stubs.exit_stored as usize;
    for register in CHANGED.into_iter().chain([RSP]) {
        dynasm!(ops ; .arch x64 ; mov [gpr(register)], Rq(register));
    }
    dynasm!(ops
        ; .arch x64
        ; mov rsp, [host_rsp]
        ; mov rdi, [owner]
        ; mov esi, context
        ; mov rdx, [site]
        ; cmp DWORD [direction], 0
        ; jne >leave
        ; cmp DWORD [live], 0
        ; jne >leave
        ; test rdi, rdi
        ; jz >leave
        // The entry has left the stack eight bytes off what a call demands.
        ; sub rsp, 8
        ; call QWORD [callee]
        ; add rsp, 8
        ; test eax, eax
        ; jnz >leave
    );
    for register in CHANGED.into_iter().chain([RSP]) {
        dynasm!(ops ; .arch x64 ; mov Rq(register), [gpr(register)]);
    }
    dynasm!(ops ; .arch x64 ; jmp QWORD [resume] ;leave:);
    for register in SAVED {
        dynasm!(ops ; .arch x64 ; mov [gpr(register)], Rq(register));
    }
    dynasm!(ops ; .arch x64 ; jmp extern exit);
    ops.finalize().expect("every label is bound")
}
