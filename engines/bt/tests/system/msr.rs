//! Model-specific registers by name, and the instructions that reach them.

use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};

pub(crate) const STAR: u32 = 0xc000_0081;
pub(crate) const LSTAR: u32 = 0xc000_0082;
pub(crate) const FMASK: u32 = 0xc000_0084;
pub(crate) const FS_BASE: u32 = 0xc000_0100;
pub(crate) const GS_BASE: u32 = 0xc000_0101;
pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Clobbers rax, rcx, rdx.
pub(crate) fn wrmsr(asm: &mut Asm, msr: u32, value: u64) -> Built {
    asm.mov(ecx, msr)?;
    asm.mov(eax, value as u32)?;
    asm.mov(edx, (value >> 32) as u32)?;
    asm.wrmsr()
}

/// Clobbers rcx, rdx; the value comes in RAX.
pub(crate) fn rdmsr(asm: &mut Asm, msr: u32) -> Built {
    asm.mov(ecx, msr)?;
    asm.rdmsr()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)
}
