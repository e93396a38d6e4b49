//! What handlers do: keep all that they find, leave the case's world, print.

use iced_x86::code_asm::*;

use crate::executive::{Built, EFER, GPR_64, far_jump, own_segments, print};
use crate::layout::*;

/// `jmp` to an address that is not of this part.
fn jump(asm: &mut CodeAssembler, target: u32) -> Built {
    asm.jmp(u64::from(target))
}

/// The common part of 32-bit handlers.
pub(crate) fn save(asm: &mut CodeAssembler, report: u32) -> Built {
    let to = |at: u32| dword_ptr(SAVED + at);
    asm.mov(ax, ds)?;
    asm.mov(dr3, eax)?;
    asm.mov(ax, u32::from(OWN_DATA) as i32)?;
    asm.mov(ds, eax)?;
    for (number, register) in [
        (1, ecx),
        (2, edx),
        (3, ebx),
        (4, esp),
        (5, ebp),
        (6, esi),
        (7, edi),
    ] {
        asm.mov(to(saved::GPR + 8 * number), register)?;
    }
    asm.mov(eax, dr3)?;
    asm.mov(to(saved::VECTOR), eax)?;
    asm.mov(eax, dr2)?;
    asm.mov(to(saved::GPR), eax)?;
    for (at, segment) in [
        (saved::ES, es),
        (saved::CS, cs),
        (saved::SS, ss),
        (saved::FS, fs),
        (saved::GS, gs),
    ] {
        asm.mov(eax, segment)?;
        asm.mov(to(at), eax)?;
    }
    asm.mov(eax, cr0)?;
    asm.mov(to(saved::CR0), eax)?;
    asm.mov(eax, cr2)?;
    asm.mov(to(saved::CR2), eax)?;
    asm.mov(eax, cr3)?;
    asm.mov(to(saved::CR3), eax)?;
    asm.mov(eax, cr4)?;
    asm.mov(to(saved::CR4), eax)?;
    asm.mov(eax, dr6)?;
    asm.mov(to(saved::DR6), eax)?;
    asm.mov(eax, dr7)?;
    asm.mov(to(saved::DR7), eax)?;
    asm.str(eax)?;
    asm.mov(to(saved::TR), eax)?;
    asm.sldt(eax)?;
    asm.mov(to(saved::LDTR), eax)?;
    asm.sgdt(fword_ptr(SAVED + saved::GDTR))?;
    asm.sidt(fword_ptr(SAVED + saved::IDTR))?;
    // What an exception has pushed for the executive's task.
    asm.mov(eax, dword_ptr(STACK - 0x1004))?;
    asm.mov(to(saved::ERROR), eax)?;
    asm.mov(eax, u32::from(OWN_DATA))?;
    asm.mov(ss, eax)?;
    asm.mov(esp, STACK)?;
    asm.pushfd()?;
    asm.pop(to(saved::FLAGS))?;
    jump(asm, report)
}

/// The common part of 64-bit handlers.
pub(crate) fn save_long(asm: &mut CodeAssembler, report: u32) -> Built {
    let to = |at: u32| dword_ptr(SAVED + at);
    let wide = |at: u32| qword_ptr(SAVED + at);
    for (number, register) in GPR_64.into_iter().enumerate() {
        if number > 0 {
            asm.mov(wide(saved::GPR + 8 * number as u32), register)?;
        }
    }
    asm.mov(rbx, dr2)?;
    asm.mov(wide(saved::GPR), rbx)?;
    asm.mov(ax, ds)?;
    asm.mov(to(saved::VECTOR), eax)?;
    for (at, segment) in [
        (saved::ES, es),
        (saved::CS, cs),
        (saved::SS, ss),
        (saved::FS, fs),
        (saved::GS, gs),
    ] {
        asm.mov(eax, segment)?;
        asm.mov(to(at), eax)?;
    }
    asm.mov(rax, cr0)?;
    asm.mov(to(saved::CR0), eax)?;
    asm.mov(rax, cr2)?;
    asm.mov(wide(saved::CR2), rax)?;
    asm.mov(rax, cr3)?;
    asm.mov(to(saved::CR3), eax)?;
    asm.mov(rax, cr4)?;
    asm.mov(to(saved::CR4), eax)?;
    asm.mov(rax, dr6)?;
    asm.mov(to(saved::DR6), eax)?;
    asm.mov(rax, dr7)?;
    asm.mov(to(saved::DR7), eax)?;
    asm.str(eax)?;
    asm.mov(to(saved::TR), eax)?;
    asm.sldt(eax)?;
    asm.mov(to(saved::LDTR), eax)?;
    asm.sgdt(fword_ptr(SAVED + saved::GDTR))?;
    asm.sidt(fword_ptr(SAVED + saved::IDTR))?;
    for (at, msr) in [
        (saved::FS_BASE, 0xc000_0100u32),
        (saved::GS_BASE, 0xc000_0101),
        (saved::KERNEL_GS_BASE, 0xc000_0102),
        (saved::EFER, EFER),
    ] {
        asm.mov(ecx, msr)?;
        asm.rdmsr()?;
        asm.mov(to(at), eax)?;
        asm.mov(to(at + 4), edx)?;
    }
    asm.mov(eax, u32::from(OWN_DATA))?;
    asm.mov(ds, eax)?;
    asm.mov(ss, eax)?;
    asm.mov(rsp, u64::from(STACK))?;
    asm.pushfq()?;
    asm.pop(rax)?;
    asm.mov(to(saved::FLAGS), eax)?;
    // To compatibility mode, the only way out of IA-32e mode.
    asm.mov(eax, u32::from(OWN_CODE))?;
    asm.push(rax)?;
    asm.mov(eax, report)?;
    asm.push(rax)?;
    asm.db(&[0x48, 0xcb])
}

/// Leaves the case's world and prints: state as hexadecimal words, then words of the sandbox that
/// have changed.
pub(crate) fn report(asm: &mut CodeAssembler) -> Built {
    let mut word = asm.create_label();
    let mut body = asm.create_label();
    asm.jmp(body)?;
    // Prints EAX and a space; changes EAX, EDX.
    asm.set_label(&mut word)?;
    for _ in 0..8 {
        asm.rol(eax, 4)?;
        asm.mov(edx, eax)?;
        asm.and(eax, 15)?;
        asm.mov(al, byte_ptr(eax + DIGITS))?;
        asm.out(0xe9, al)?;
        asm.mov(eax, edx)?;
    }
    asm.mov(al, i32::from(b' '))?;
    asm.out(0xe9, al)?;
    asm.ret()?;
    asm.set_label(&mut body)?;
    // NT, AC and all else go.
    asm.push(2)?;
    asm.popfd()?;
    asm.xor(eax, eax)?;
    asm.mov(dr7, eax)?;
    asm.mov(eax, 0x11)?;
    asm.mov(cr0, eax)?;
    asm.xor(eax, eax)?;
    asm.mov(cr4, eax)?;
    asm.mov(ecx, EFER)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.lgdt(fword_ptr(OWN_GDT))?;
    asm.lidt(fword_ptr(OWN_IDT))?;
    own_segments(asm)?;
    asm.cld()?;
    print(asm, b"@S ")?;
    asm.mov(esi, SAVED)?;
    asm.mov(ebp, SAVED_WORDS)?;
    let mut next = asm.create_label();
    asm.set_label(&mut next)?;
    asm.lodsd()?;
    asm.call(word)?;
    asm.dec(ebp)?;
    asm.jnz(next)?;
    asm.mov(esi, SANDBOX)?;
    asm.mov(edi, BEFORE)?;
    asm.mov(ecx, SANDBOX_SIZE / 4)?;
    let mut compare = asm.create_label();
    let mut equal = asm.create_label();
    asm.set_label(&mut compare)?;
    asm.mov(eax, dword_ptr(esi))?;
    asm.cmp(eax, dword_ptr(edi))?;
    asm.je(equal)?;
    asm.lea(eax, dword_ptr(esi - SANDBOX as i32))?;
    asm.call(word)?;
    asm.mov(eax, dword_ptr(esi))?;
    asm.call(word)?;
    asm.set_label(&mut equal)?;
    asm.add(esi, 4)?;
    asm.add(edi, 4)?;
    asm.dec(ecx)?;
    asm.jnz(compare)?;
    print(asm, b"\n")?;
    asm.inc(dword_ptr(INDEX))?;
    asm.mov(dword_ptr(UNDER_WAY), DONE)?;
    far_jump(asm, OWN_CODE, IMAGE)
}
