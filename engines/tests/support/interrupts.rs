//! What small guests that take interrupts are made of. Handlers count in r12.

use engine_core::devices::lapic;
use engine_core::testing::end;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::everywhere::ABSENT;

pub(crate) type Built = Result<(), IcedError>;
pub(crate) type Asm = CodeAssembler;

/// Ticks after which a guest has seen enough.
pub(crate) const ENOUGH: i32 = 5;

const IDT: u64 = 0x28_0000;
const LAPIC: u64 = lapic::BASE.0;

pub(crate) fn out(asm: &mut Asm, port: u32, value: u8) -> Built {
    asm.mov(dx, port)?;
    asm.mov(al, u32::from(value))?;
    asm.out(dx, al)
}

/// Lets the CPU take interrupts: an empty IDT, the 8259s masked, nothing counted.
pub(crate) fn prepare(asm: &mut Asm) -> Built {
    asm.xor(r12d, r12d)?;
    asm.mov(rax, IDT)?;
    asm.push(rax)?;
    asm.mov(rax, 0x0fff_0000_0000_0000u64)?;
    asm.push(rax)?;
    asm.lidt(ptr(rsp + 6))?;
    asm.add(rsp, 16)?;
    // The 8259s: vectors 0x20 and 0x28, everything masked.
    for (port, words) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
        out(asm, port, words[0])?;
        for word in &words[1..] {
            out(asm, port + 1, *word)?;
        }
        out(asm, port + 1, 0xff)?;
    }
    Ok(())
}

/// Installs a handler of `vector` that counts, does `body`, which may use rax and rdx, and returns.
pub(crate) fn handler(asm: &mut Asm, vector: u64, body: impl FnOnce(&mut Asm) -> Built) -> Built {
    let mut handler = asm.create_label();
    let mut after = asm.create_label();
    asm.jmp(after)?;
    asm.set_label(&mut handler)?;
    asm.push(rax)?;
    asm.push(rdx)?;
    asm.inc(r12)?;
    body(asm)?;
    asm.pop(rdx)?;
    asm.pop(rax)?;
    asm.iretq()?;
    asm.set_label(&mut after)?;
    asm.lea(rax, ptr(handler))?;
    asm.mov(rbx, IDT + vector * 16)?;
    asm.mov(word_ptr(rbx), ax)?;
    asm.mov(word_ptr(rbx + 2), 8)?;
    asm.mov(word_ptr(rbx + 4), 0x8e00)?;
    asm.shr(rax, 16)?;
    asm.mov(word_ptr(rbx + 6), ax)
}

/// Ends service at the 8259 that has `irq`, and at the master.
pub(crate) fn end_at_pic(asm: &mut Asm, irq: u8) -> Built {
    if irq >= 8 {
        out(asm, 0xa0, 0x20)?;
    }
    out(asm, 0x20, 0x20)
}

/// Lets `irq` through the 8259s.
pub(crate) fn unmask(asm: &mut Asm, irq: u8) -> Built {
    let mask = !(1u16 << irq) & if irq >= 8 { !4 } else { !0 };
    out(asm, 0x21, mask as u8)?;
    out(asm, 0xa1, (mask >> 8) as u8)
}

/// Ends service at the local APIC.
pub(crate) fn end_at_lapic(asm: &mut Asm) -> Built {
    asm.mov(rax, LAPIC)?;
    asm.mov(dword_ptr(rax + 0xb0), 0)
}

/// Switches the local APIC on, and leaves its address in rbx.
pub(crate) fn enable_lapic(asm: &mut Asm) -> Built {
    asm.mov(rbx, LAPIC)?;
    asm.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Halts until `count` interrupts have come.
pub(crate) fn halt_until(asm: &mut Asm, count: i32) -> Built {
    let mut again = asm.create_label();
    let mut done = asm.create_label();
    asm.set_label(&mut again)?;
    asm.cli()?;
    asm.cmp(r12, count)?;
    asm.jae(done)?;
    asm.sti()?;
    asm.hlt()?;
    asm.jmp(again)?;
    asm.set_label(&mut done)?;
    asm.nop()
}

/// Time for an interrupt to arrive: `wrmsr` to an x2APIC register does not serialise (SDM 3A
/// 11.12.3).
pub(crate) fn settle(asm: &mut Asm) -> Built {
    let mut wait = asm.create_label();
    asm.mov(ecx, 1000)?;
    asm.set_label(&mut wait)?;
    asm.dec(ecx)?;
    asm.jne(wait)
}

/// Ends with `code` unless eax holds `expected`.
pub(crate) fn expect(asm: &mut Asm, expected: i32, code: u32) -> Built {
    let mut right = asm.create_label();
    asm.cmp(eax, expected)?;
    asm.je(right)?;
    end(asm, code)?;
    asm.set_label(&mut right)?;
    asm.nop()
}

/// Ends with [`ABSENT`] unless bit `bit` of CPUID.1:ECX is set.
pub(crate) fn need(asm: &mut Asm, bit: u32) -> Built {
    let mut present = asm.create_label();
    asm.mov(eax, 1)?;
    asm.cpuid()?;
    asm.bt(ecx, bit)?;
    asm.jc(present)?;
    end(asm, ABSENT)?;
    asm.set_label(&mut present)?;
    asm.nop()
}

/// Ends with `code` unless `count` interrupts have come.
pub(crate) fn expect_count(asm: &mut Asm, count: i32, code: u32) -> Built {
    asm.mov(eax, r12d)?;
    expect(asm, count, code)
}
