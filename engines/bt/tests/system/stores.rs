//! Every kind of store into the instruction that follows it, under its own address and under another.
//!
//! A slot is a store and, right behind it, what it writes: `mov eax, imm32`. It is called again and
//! again with another constant each time, so a translation that is kept for one call too many shows
//! the constant before.

use engine_core::testing::assemble;
use iced_x86::code_asm::*;

use crate::kernel::{ALL, Asm, Built, Kernel, Steps, page, window};
use crate::run::report_of_all;

/// Stores RAX at RDI; RBX, RCX, RDX, RSI, R8, R9, XMM0 to XMM2 and ST0 are free. Bytes 8 to 31 at RDI
/// are to stay.
type Store = fn(&mut Asm) -> Built;

const STORES: &[(&str, Store)] = &[
    ("mov", |asm| asm.mov(qword_ptr(rdi), rax)),
    ("mov of halves", |asm| {
        asm.mov(rcx, rax)?;
        asm.shr(rcx, 32)?;
        asm.mov(dword_ptr(rdi + 4), ecx)?;
        asm.mov(dword_ptr(rdi), eax)
    }),
    ("mov of bytes", |asm| {
        for byte in 0..8 {
            asm.mov(byte_ptr(rdi + byte), al)?;
            asm.ror(rax, 8)?;
        }
        Ok(())
    }),
    ("mov across dwords", |asm| {
        asm.mov(rcx, rax)?;
        asm.shr(rcx, 8)?;
        asm.mov(dword_ptr(rdi + 1), ecx)
    }),
    ("movnti", |asm| asm.movnti(qword_ptr(rdi), rax)),
    ("movbe", |asm| {
        asm.bswap(rax)?;
        asm.movbe(qword_ptr(rdi), rax)
    }),
    ("xchg", |asm| asm.xchg(qword_ptr(rdi), rax)),
    ("not", |asm| {
        asm.not(rax)?;
        asm.mov(qword_ptr(rdi), rax)?;
        asm.not(qword_ptr(rdi))
    }),
    ("bts and btr", |asm| {
        asm.mov(qword_ptr(rdi), rax)?;
        asm.btc(qword_ptr(rdi), 12)?;
        asm.lock().btc(qword_ptr(rdi), 12)
    }),
    ("lock xor", |asm| {
        asm.xor(rax, qword_ptr(rdi))?;
        asm.lock().xor(qword_ptr(rdi), rax)
    }),
    ("lock xadd", |asm| {
        asm.sub(rax, qword_ptr(rdi))?;
        asm.lock().xadd(qword_ptr(rdi), rax)
    }),
    ("lock cmpxchg", |asm| {
        asm.mov(rcx, rax)?;
        asm.mov(rax, qword_ptr(rdi))?;
        asm.lock().cmpxchg(qword_ptr(rdi), rcx)
    }),
    ("lock cmpxchg8b", |asm| {
        asm.mov(rbx, rax)?;
        asm.mov(rcx, rax)?;
        asm.shr(rcx, 32)?;
        asm.mov(eax, dword_ptr(rdi))?;
        asm.mov(edx, dword_ptr(rdi + 4))?;
        asm.lock().cmpxchg8b(qword_ptr(rdi))
    }),
    ("lock cmpxchg16b", |asm| {
        asm.mov(rbx, rax)?;
        asm.mov(rax, qword_ptr(rdi))?;
        asm.mov(rdx, qword_ptr(rdi + 8))?;
        asm.mov(rcx, rdx)?;
        asm.lock().cmpxchg16b(xmmword_ptr(rdi))
    }),
    ("movq", |asm| {
        asm.movq(xmm0, rax)?;
        asm.movq(qword_ptr(rdi), xmm0)
    }),
    ("movlps", |asm| {
        asm.movq(xmm0, rax)?;
        asm.movlps(qword_ptr(rdi), xmm0)
    }),
    ("pextrq", |asm| {
        asm.movq(xmm0, rax)?;
        asm.pextrq(qword_ptr(rdi), xmm0, 0)
    }),
    ("movups", |asm| {
        asm.movups(xmm0, xmmword_ptr(rdi))?;
        asm.pinsrq(xmm0, rax, 0)?;
        asm.movups(xmmword_ptr(rdi), xmm0)
    }),
    ("movntdq", |asm| {
        asm.movdqa(xmm0, xmmword_ptr(rdi))?;
        asm.pinsrq(xmm0, rax, 0)?;
        asm.movntdq(xmmword_ptr(rdi), xmm0)
    }),
    ("maskmovdqu", |asm| {
        asm.movq(xmm0, rax)?;
        asm.mov(rcx, -1i64)?;
        asm.movq(xmm1, rcx)?;
        asm.maskmovdqu(xmm0, xmm1)
    }),
    ("vmovups", |asm| {
        asm.vmovups(ymm0, ymmword_ptr(rdi))?;
        asm.vmovq(xmm1, rax)?;
        asm.vpblendd(ymm0, ymm0, ymm1, 3)?;
        asm.vmovups(ymmword_ptr(rdi), ymm0)
    }),
    ("vpmaskmovq", |asm| {
        asm.vmovq(xmm0, rax)?;
        asm.mov(rcx, -1i64)?;
        asm.vmovq(xmm1, rcx)?;
        asm.vpmaskmovq(ymmword_ptr(rdi), ymm1, ymm0)
    }),
    ("fistp", |asm| {
        asm.push(rax)?;
        asm.fild(qword_ptr(rsp))?;
        asm.pop(rax)?;
        asm.fistp(qword_ptr(rdi))
    }),
    ("stosq", |asm| asm.stosq()),
    ("rep stosd", |asm| {
        asm.mov(rcx, rax)?;
        asm.shr(rcx, 32)?;
        asm.mov(dword_ptr(rdi + 4), ecx)?;
        asm.mov(ecx, 1)?;
        asm.rep().stosd()
    }),
    ("rep movsb", |asm| {
        asm.push(rax)?;
        asm.mov(rsi, rsp)?;
        asm.mov(ecx, 8)?;
        asm.rep().movsb()?;
        asm.pop(rax)
    }),
    ("rep movsb downwards", |asm| {
        asm.push(rax)?;
        asm.lea(rsi, ptr(rsp + 7))?;
        asm.add(rdi, 7)?;
        asm.mov(ecx, 8)?;
        asm.std()?;
        asm.rep().movsb()?;
        asm.cld()?;
        asm.pop(rax)
    }),
    ("movsq", |asm| {
        asm.push(rax)?;
        asm.mov(rsi, rsp)?;
        asm.movsq()?;
        asm.pop(rax)
    }),
    ("push", |asm| {
        asm.mov(r8, rsp)?;
        asm.lea(rsp, ptr(rdi + 8))?;
        asm.push(rax)?;
        asm.mov(rsp, r8)
    }),
    ("pop to memory", |asm| {
        asm.push(rax)?;
        asm.pop(qword_ptr(rdi))
    }),
    ("enter", |asm| {
        asm.mov(r8, rsp)?;
        asm.mov(r9, rbp)?;
        asm.mov(rbp, rax)?;
        asm.lea(rsp, ptr(rdi + 8))?;
        asm.enter(0, 0)?;
        asm.mov(rsp, r8)?;
        asm.mov(rbp, r9)
    }),
];

const STRIDE: usize = 256;
/// Where in its slot a store's target is.
const TARGET: usize = 128;
/// Pages of the slots, and where they are mapped once more.
const SLOTS: u64 = 8;
const ALIAS: u64 = 24;
const DRIVER: u64 = 40;
/// `mov eax, 0x11111111; nop; nop; nop`, as a number.
const CONSTANT: u64 = 0x9090_9011_1111_11b8;
const ROUNDS: u64 = 5;

/// Long nops, so that store and target are in one block; the store; its target; ret.
fn slots() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, store) in STORES {
        let code = assemble(64, 0, store);
        let pad = TARGET - code.len();
        let mut slot = [0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0].repeat(pad / 9);
        slot.resize(pad, 0x90);
        slot.extend(code);
        assert_eq!(slot.len(), TARGET, "{name}");
        slot.extend(CONSTANT.to_le_bytes());
        slot.extend([0x90; 24]);
        slot.push(0xc3);
        slot.resize(STRIDE, 0xcc);
        bytes.extend(slot);
    }
    bytes
}

/// Calls each slot, by turns with its target's own address and another one. R12 and R13 get the
/// numbers of the slots where either went wrong, R14 how often it went right.
fn driver(asm: &mut Asm) -> Built {
    let mut slot = asm.create_label();
    let mut round = asm.create_label();
    asm.xor(r12d, r12d)?;
    asm.xor(r13d, r13d)?;
    asm.xor(r14d, r14d)?;
    asm.xor(r15d, r15d)?;
    asm.set_label(&mut slot)?;
    asm.xor(ebp, ebp)?;
    asm.set_label(&mut round)?;
    for (aside, wrong) in [(0, r12), (1, r13)] {
        let mut right = asm.create_label();
        let mut done = asm.create_label();
        asm.mov(rbx, r15)?;
        asm.shl(rbx, STRIDE.trailing_zeros())?;
        asm.mov(rcx, window(SLOTS))?;
        asm.add(rbx, rcx)?;
        asm.lea(rdi, ptr(rbx + TARGET as u64))?;
        asm.add(rdi, aside * (window(ALIAS) - window(SLOTS)) as i32)?;
        asm.mov(rcx, rbp)?;
        asm.shl(rcx, 12)?;
        asm.mov(rax, CONSTANT + 0x100 * aside as u64)?;
        asm.add(rax, rcx)?;
        asm.mov(r10, rax)?;
        asm.shr(r10, 8)?;
        asm.call(rbx)?;
        asm.cmp(eax, r10d)?;
        asm.je(right)?;
        asm.bts(wrong, r15)?;
        asm.jmp(done)?;
        asm.set_label(&mut right)?;
        asm.inc(r14)?;
        asm.set_label(&mut done)?;
    }
    asm.inc(ebp)?;
    asm.cmp(ebp, ROUNDS as i32)?;
    asm.jb(round)?;
    asm.inc(r15d)?;
    asm.cmp(r15d, STORES.len() as i32)?;
    asm.jb(slot)
}

fn kernel() -> Kernel {
    assert!(STORES.len() <= 64);
    (0..4)
        .fold(Kernel::new(), |kernel, number| {
            let entry = page(SLOTS + number) | ALL;
            kernel.map(SLOTS + number, entry).map(ALIAS + number, entry)
        })
        .put(page(SLOTS), slots())
}

fn check(kernel: Kernel, body: impl FnOnce(&mut Asm) -> Built) {
    let report = report_of_all(kernel, |asm| {
        // AVX state, and SSE for older kinds.
        asm.mov(rax, cr4)?;
        asm.or(rax, 0x4_0600)?;
        asm.mov(cr4, rax)?;
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        asm.mov(eax, 7)?;
        asm.xsetbv()?;
        body(asm)?;
        asm.result(0, r12)?;
        asm.result(1, r13)?;
        asm.result(2, r14)
    });
    let names = |wrong: u64| -> Vec<&str> {
        let stores = STORES.iter().enumerate();
        stores
            .filter(|(number, _)| wrong >> number & 1 == 1)
            .map(|(_, (name, _))| *name)
            .collect()
    };
    assert_eq!(names(report.results[0]), [""; 0], "by its own address");
    assert_eq!(names(report.results[1]), [""; 0], "by another address");
    assert_eq!(report.results[2], 2 * ROUNDS * STORES.len() as u64);
}

#[test]
fn ring_0_stores_into_the_next_instruction_in_every_way() {
    check(kernel(), driver);
}

#[test]
fn ring_3_stores_into_the_next_instruction_in_every_way() {
    let kernel =
        kernel()
            .map(DRIVER, page(DRIVER) | ALL)
            .code(page(DRIVER), window(DRIVER), |asm| {
                driver(asm)?;
                asm.hlt()
            });
    check(kernel, |asm| asm.in_ring_3(window(DRIVER), 0x202));
}
