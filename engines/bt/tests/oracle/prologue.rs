//! The code that brings a [`Start`] into the registers. Host and guest run the same bytes.
//!
//! ```text
//! enter:  push callee-saved registers; park rsp       host only, called from Rust
//! load:   xrstor, flags, registers, jump             the guest starts here
//! back:   pop callee-saved registers; ret             host only, where the handler returns to
//! ```

use std::mem::offset_of;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

use crate::layout::{CONTROL, PROLOGUE, Start, avx};

/// Host stack pointer while a sequence runs, after the [`Start`] at CONTROL.
pub(crate) const HOST_RSP: u64 = CONTROL + 0xc00;
/// Top of a stack of a few words, for popfq.
const SCRATCH_STACK: u64 = CONTROL + 0xd00;

/// The prologue and its entry points.
pub(crate) struct Prologue {
    pub(crate) code: Vec<u8>,
    pub(crate) enter: u64,
    pub(crate) load: u64,
    pub(crate) back: u64,
}

const REGISTERS: [AsmRegister64; 16] = [
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
];
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

pub(crate) fn prologue() -> Prologue {
    let build = || -> Result<Prologue, iced_x86::IcedError> {
        let mut asm = CodeAssembler::new(64)?;
        let mut load = asm.create_label();
        let mut back = asm.create_label();
        for register in SAVED {
            asm.push(register)?;
        }
        asm.mov(qword_ptr(HOST_RSP), rsp)?;
        asm.set_label(&mut load)?;
        let area = ptr(CONTROL + offset_of!(Start, fx) as u64);
        if avx() {
            asm.mov(eax, 7)?;
            asm.mov(edx, 0)?;
            asm.xrstor64(area)?;
        } else {
            asm.fxrstor64(area)?;
        }
        asm.mov(rsp, SCRATCH_STACK)?;
        asm.push(qword_ptr(CONTROL + offset_of!(Start, rflags) as u64))?;
        asm.popfq()?;
        for (index, register) in REGISTERS.into_iter().enumerate() {
            let at = CONTROL + offset_of!(Start, gpr) as u64 + 8 * index as u64;
            asm.mov(register, qword_ptr(at))?;
        }
        asm.jmp(qword_ptr(CONTROL + offset_of!(Start, rip) as u64))?;
        asm.set_label(&mut back)?;
        for register in SAVED.into_iter().rev() {
            asm.pop(register)?;
        }
        asm.ret()?;
        let result = asm.assemble_options(
            PROLOGUE,
            BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
        )?;
        Ok(Prologue {
            enter: PROLOGUE,
            load: result.label_ip(&load)?,
            back: result.label_ip(&back)?,
            code: result.inner.code_buffer,
        })
    };
    build().expect("the prologue can be assembled")
}
