//! Snippets about extended state: vectors, x87, their saves, strings and prefixes.

use iced_x86::code_asm::*;

use crate::snippets::{PLACE, PLACES, Snippet};

/// As [`crate::snippets::SNIPPETS`].
pub(crate) const STATE_SNIPPETS: &[(&str, Snippet)] = &[
    ("maskmovdqu of nothing, nowhere", |asm| {
        asm.mov(edi, 0x40_0000)?;
        asm.pxor(xmm1, xmm1)?;
        asm.vmaskmovps(xmm0, xmm1, xmmword_ptr(rdi))?;
        asm.vpmaskmovq(ymmword_ptr(rdi), ymm1, ymm0)
    }),
    ("masked load across the end of memory", |asm| {
        asm.mov(rax, -1i64)?;
        asm.vmovq(xmm1, rax)?;
        asm.mov(ecx, (PLACES - 8) as u32)?;
        asm.vpmaskmovd(xmm0, xmm1, xmmword_ptr(rcx))?;
        asm.vpmaskmovd(xmmword_ptr(rcx), xmm1, xmm1)
    }),
    ("an SSE access that isn't aligned", |asm| {
        asm.movaps(xmm0, xmmword_ptr(PLACE + 8))
    }),
    ("an AVX access that isn't aligned", |asm| {
        asm.vmovups(ymm0, ymmword_ptr(PLACE + 8))?;
        asm.vaddps(ymm1, ymm0, ymmword_ptr(PLACE + 8))?;
        asm.vmovaps(ymm0, ymmword_ptr(PLACE + 16))
    }),
    ("cmpxchg16b that isn't aligned", |asm| {
        asm.cmpxchg16b(xmmword_ptr(PLACE + 8))
    }),
    ("upper halves", |asm| {
        asm.vpcmpeqd(ymm1, ymm1, ymm1)?;
        asm.vpcmpeqd(ymm2, ymm2, ymm2)?;
        asm.paddd(xmm1, xmm2)?;
        asm.vpaddd(xmm2, xmm2, xmm2)?;
        // Into the runtime and back with live upper halves.
        asm.mov(ecx, 0)?;
        asm.vpcmpeqd(ymm3, ymm3, ymm3)?;
        asm.xgetbv()?;
        asm.and(eax, 7)?;
        asm.vpaddd(ymm4, ymm3, ymm3)
    }),
    ("vzeroupper", |asm| {
        asm.vpcmpeqd(ymm1, ymm1, ymm1)?;
        asm.vpcmpeqd(ymm15, ymm15, ymm15)?;
        asm.vzeroupper()
    }),
    ("vzeroall", |asm| {
        asm.vpcmpeqd(ymm1, ymm1, ymm1)?;
        asm.vzeroall()
    }),
    ("vex behind a prefix", |asm| {
        asm.db(&[0x66, 0xc5, 0xf8, 0x57, 0xc0])
    }),
    ("vex behind rex", |asm| {
        asm.db(&[0x48, 0xc5, 0xf8, 0x57, 0xc0])
    }),
    ("vex behind lock", |asm| {
        asm.db(&[0xf0, 0xc5, 0xf8, 0x57, 0xc0])
    }),
    ("vex with a register too many", |asm| {
        // vmovaps with vvvv in use.
        asm.db(&[0xc5, 0xe8, 0x28, 0xc1])
    }),
    ("xgetbv of what isn't there", |asm| {
        asm.mov(ecx, 2)?;
        asm.xgetbv()
    }),
    ("xsave that isn't aligned", |asm| {
        asm.mov(eax, 7)?;
        asm.xsave(ptr(PLACE + 16))
    }),
    ("xrstor of a bad header", |asm| {
        asm.mov(eax, 7)?;
        asm.mov(dword_ptr(PLACE + 520), 1)?;
        asm.xrstor(ptr(PLACE))
    }),
    ("xrstor of bad control bits", |asm| {
        asm.mov(eax, 7)?;
        asm.mov(dword_ptr(PLACE + 24), -1)?;
        asm.xrstor(ptr(PLACE))
    }),
    ("xrstor of initial state", |asm| {
        asm.vpcmpeqd(ymm1, ymm1, ymm1)?;
        asm.fld1()?;
        asm.mov(eax, 7)?;
        asm.mov(dword_ptr(PLACE + 24), 0x1fa0)?;
        asm.xrstor(ptr(PLACE))
    }),
    ("xsavec and xrstor of it", |asm| {
        asm.vpcmpeqd(ymm1, ymm1, ymm1)?;
        asm.fld1()?;
        asm.mov(eax, 5)?;
        asm.xsavec(ptr(PLACE))?;
        asm.vzeroall()?;
        asm.fninit()?;
        asm.xrstor(ptr(PLACE))
    }),
    ("fnstenv shows the last instruction", |asm| {
        asm.fld1()?;
        asm.fldpi()?;
        asm.nop()?;
        asm.fnstenv(ptr(PLACE))?;
        asm.fnstcw(word_ptr(PLACE + 64))
    }),
    ("fnsave and frstor", |asm| {
        asm.fld1()?;
        asm.fldz()?;
        asm.fldl2e()?;
        asm.fnsave(ptr(PLACE))?;
        asm.frstor(ptr(PLACE))?;
        asm.fld1()
    }),
    ("fnstenv in 16 bits", |asm| {
        asm.fldpi()?;
        asm.db(&[0x66, 0xd9, 0x34, 0x25, 0, 0, 2, 0])
    }),
    ("fxsave and fxrstor", |asm| {
        asm.fldpi()?;
        asm.movd(xmm3, esp)?;
        asm.fxsave64(ptr(PLACE))?;
        asm.fninit()?;
        asm.fxrstor64(ptr(PLACE))
    }),
    ("fxrstor of no address of the stack", |asm| {
        asm.mov(rbp, 0x8000_0000_0000_0001u64)?;
        asm.fxrstor(ptr(rbp))
    }),
    ("fxsave to no address of the stack", |asm| {
        asm.mov(rbp, 0x8000_0000_0000_0008u64)?;
        asm.fxsave(ptr(rbp))
    }),
    ("xsave to no address of the stack", |asm| {
        asm.mov(rbp, 0x8000_0000_0000_0008u64)?;
        asm.mov(eax, 3)?;
        asm.xsave(ptr(rbp))
    }),
    ("xrstor of no address of the stack", |asm| {
        asm.mov(rbp, 0x8000_0000_0000_0008u64)?;
        asm.mov(eax, 3)?;
        asm.xrstor(ptr(rbp))
    }),
    ("fxrstor of an address that is not aligned", |asm| {
        asm.mov(ebp, (PLACE + 8) as u32)?;
        asm.fxrstor(ptr(rbp))
    }),
    ("an aligned load of no address of the stack", |asm| {
        asm.mov(rbp, 0x8000_0000_0000_0001u64)?;
        asm.movaps(xmm0, xmmword_ptr(rbp))
    }),
    ("x87 pointers that were loaded", |asm| {
        // An environment: control, status, tags, instruction, opcode, data.
        let image = [
            0x37f,
            0x3000,
            0xffff,
            0x1234_5678,
            0x123_0033,
            0x7654_3210,
            0,
        ];
        for (at, word) in (0u64..).zip(image) {
            asm.mov(dword_ptr(PLACE + 4 * at), word)?;
        }
        asm.fldenv(ptr(PLACE))?;
        asm.fld1()?;
        asm.fnstenv(ptr(PLACE + 0x40))?;
        asm.fldenv(ptr(PLACE))?;
        asm.fldz()?;
        asm.fchs()?;
        asm.db(&[0x66])?;
        asm.fnstenv(ptr(PLACE + 0x80))?;
        asm.fldenv(ptr(PLACE))?;
        asm.fldpi()?;
        asm.fxsave64(ptr(PLACE + 0x100))
    }),
    ("x87 pointers of an exception that was cleared", |asm| {
        asm.mov(word_ptr(PLACE), 0x37b)?;
        asm.mov(edx, (PLACE + 0x20) as u32)?;
        asm.fldcw(word_ptr(PLACE))?;
        asm.fld1()?;
        asm.fdiv(qword_ptr(rdx + 8))?;
        asm.fnclex()?;
        asm.fnstenv(ptr(PLACE + 0x40))?;
        asm.fnsave(ptr(PLACE + 0x80))
    }),
    ("an unmasked x87 exception", |asm| {
        asm.fninit()?;
        asm.mov(word_ptr(PLACE), 0x33b)?;
        asm.fldcw(word_ptr(PLACE))?;
        asm.fld1()?;
        asm.fldz()?;
        asm.fdivp(st1, st0)?;
        asm.nop()?;
        asm.wait()
    }),
    ("an unmasked SSE exception", |asm| {
        asm.mov(dword_ptr(PLACE), 0x1d80)?;
        asm.ldmxcsr(dword_ptr(PLACE))?;
        asm.mov(eax, 1)?;
        asm.cvtsi2ss(xmm0, eax)?;
        asm.divss(xmm0, xmm1)
    }),
    ("a bad mxcsr", |asm| {
        asm.mov(dword_ptr(PLACE), 0x1_0000)?;
        asm.ldmxcsr(dword_ptr(PLACE))
    }),
    ("division by zero and overflow", |asm| {
        asm.mov(edx, 5)?;
        asm.mov(ecx, 5)?;
        asm.div(ecx)
    }),
    ("a string that runs into nothing", |asm| {
        asm.mov(ecx, 100)?;
        asm.mov(esi, 0x2_0000)?;
        asm.mov(edi, (PLACES - 20) as u32)?;
        asm.mov(eax, 0x0102_0304)?;
        asm.rep().stosd()
    }),
    ("a string downwards into nothing", |asm| {
        asm.std()?;
        asm.mov(ecx, 100)?;
        asm.mov(esi, 0x2_1000)?;
        asm.mov(edi, (PLACE + 20) as u32)?;
        asm.rep().movsb()
    }),
    ("loops with short counts", |asm| {
        asm.mov(rcx, 0x1_0000_0000u64)?;
        // jecxz over inc eax
        asm.db(&[0x67, 0xe3, 2, 0xff, 0xc0])?;
        asm.mov(rcx, 0x1_0000_0003u64)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.inc(ebx)?;
        // loop with an address-size prefix
        asm.db(&[0x67, 0xe2, 0xfb])
    }),
    ("xlat with an address-size prefix", |asm| {
        asm.mov(rbx, 0x1_0002_0000u64)?;
        asm.mov(byte_ptr(PLACE + 3), 9)?;
        asm.mov(al, 3)?;
        asm.db(&[0x67, 0xd7])
    }),
    ("near branches ignore the operand-size prefix", |asm| {
        asm.mov(esp, 0x2_1000)?;
        // call +1 over an int3 and back
        asm.db(&[0x66, 0xe8, 1, 0, 0, 0, 0xcc])?;
        asm.pop(rax)
    }),
    ("nops of all kinds", |asm| {
        asm.db(&[0xf3, 0x0f, 0x1e, 0xfa])?;
        asm.db(&[0x0f, 0x1f, 0x00])?;
        asm.db(&[0x0f, 0x18, 0x0c, 0x25, 0, 0, 0x40, 0])?;
        asm.db(&[0x0f, 0x0d, 0x0c, 0x25, 0, 0, 0x40, 0])?;
        asm.db(&[0x0f, 0x19, 0xc0])?;
        asm.pause()
    }),
];
