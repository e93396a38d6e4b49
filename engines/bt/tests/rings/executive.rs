//! The code around the cases: prepares a sandbox, enters the case in it, and prints what any handler
//! finds. A shutdown resets the processor, and so starts it afresh with the case still under way.

use engine_core::testing::assemble;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::capture::{report, save, save_long};
use crate::layout::*;

pub(crate) type Built = Result<(), IcedError>;

pub(crate) const EFER: u32 = 0xc000_0080;

/// Code at [`IMAGE`], entered in 32-bit protected mode with flat segments; where the common parts of
/// handlers of 32-bit and 64-bit code are, for [`handlers`].
pub(crate) struct Executive {
    pub(crate) code: Vec<u8>,
    pub(crate) save: u32,
    pub(crate) save_long: u32,
}

/// The executive with its code of both sizes. Parts refer to each other by address, so each lies at
/// a place of its own.
pub(crate) fn executive() -> Executive {
    const LONG_ENTER: u32 = IMAGE + 0x1000;
    const SAVE: u32 = IMAGE + 0x2000;
    const SAVE_LONG: u32 = IMAGE + 0x3000;
    const REPORT: u32 = IMAGE + 0x4000;
    let parts = [
        (
            IMAGE,
            assemble(32, IMAGE.into(), |asm| start(asm, LONG_ENTER)),
        ),
        (LONG_ENTER, assemble(64, LONG_ENTER.into(), enter_long)),
        (SAVE, assemble(32, SAVE.into(), |asm| save(asm, REPORT))),
        (
            SAVE_LONG,
            assemble(64, SAVE_LONG.into(), |asm| save_long(asm, REPORT)),
        ),
        (REPORT, assemble(32, REPORT.into(), report)),
    ];
    let mut code = Vec::new();
    for (at, part) in parts {
        let at = (at - IMAGE) as usize;
        assert!(code.len() <= at, "parts overlap");
        code.resize(at, 0xcc);
        code.extend(part);
    }
    Executive {
        code,
        save: SAVE,
        save_long: SAVE_LONG,
    }
}

/// One handler for each vector: keeps EAX in DR2 and goes on to the common part with the vector in
/// EAX's upper half. The same bytes do in 32-bit and in 64-bit code.
pub(crate) fn handlers(at: u32, common: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for vector in 0..256u32 {
        let start = code.len();
        code.extend([0x0f, 0x23, 0xd0, 0xb8]);
        code.extend((vector << 16).to_le_bytes());
        code.push(0xe9);
        let next = at + code.len() as u32 + 4;
        code.extend(common.wrapping_sub(next).to_le_bytes());
        code.resize(start + HANDLER_STEP as usize, 0xcc);
    }
    code
}

pub(crate) fn far_jump(asm: &mut CodeAssembler, selector: u16, target: u32) -> Built {
    let mut bytes = vec![0xea];
    bytes.extend_from_slice(&target.to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    asm.db(&bytes)
}

/// Prints a few characters; changes AL.
pub(crate) fn print(asm: &mut CodeAssembler, text: &[u8]) -> Built {
    for &byte in text {
        asm.mov(al, i32::from(byte))?;
        asm.out(0xe9, al)?;
    }
    Ok(())
}

fn field(at: u32) -> AsmMemoryOperand {
    dword_ptr(HEADER + at)
}

fn word_field(at: u32) -> AsmMemoryOperand {
    word_ptr(HEADER + at)
}

pub(crate) fn own_segments(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, u32::from(OWN_DATA))?;
    for segment in [ds, es, fs, gs, ss] {
        asm.mov(segment, eax)?;
    }
    asm.mov(esp, STACK)
}

/// From reset: the first case, or the one after a shutdown.
fn start(asm: &mut CodeAssembler, long_enter: u32) -> Built {
    let mut case = asm.create_label();
    let mut patch = asm.create_label();
    let mut shutdown = asm.create_label();
    asm.lgdt(fword_ptr(OWN_GDT))?;
    own_segments(asm)?;
    asm.cmp(dword_ptr(UNDER_WAY), MAGIC as i32)?;
    asm.je(shutdown)?;
    asm.cmp(dword_ptr(UNDER_WAY), DONE as i32)?;
    asm.je(case)?;
    asm.mov(eax, dword_ptr(FIRST_RECORD))?;
    asm.mov(dword_ptr(NEXT), eax)?;
    asm.mov(eax, dword_ptr(FIRST))?;
    asm.mov(dword_ptr(INDEX), eax)?;
    asm.mov(esi, IMAGE_HANDLERS)?;
    asm.mov(edi, HANDLERS)?;
    asm.mov(ecx, 0x2000 / 4)?;
    asm.rep().movsd()?;
    // Whoever strays meets int3.
    asm.mov(eax, 0xcccc_ccccu32)?;
    for (from, to) in [
        (0, HANDLERS),
        (LONG_HANDLERS + 0x1000, SANDBOX),
        (SANDBOX + SANDBOX_SIZE, BEFORE),
    ] {
        asm.mov(edi, from)?;
        asm.mov(ecx, (to - from) / 4)?;
        asm.rep().stosd()?;
    }
    asm.set_label(&mut case)?;
    asm.mov(dword_ptr(UNDER_WAY), DONE)?;
    // What wild pointers of the case before have left, where they are likely.
    asm.mov(eax, 0xcccc_ccccu32)?;
    for from in [0, SANDBOX + SANDBOX_SIZE] {
        asm.mov(edi, from)?;
        asm.mov(ecx, 0x400)?;
        asm.rep().stosd()?;
    }
    asm.mov(eax, dword_ptr(INDEX))?;
    asm.cmp(eax, dword_ptr(COUNT))?;
    let mut go = asm.create_label();
    asm.jb(go)?;
    // All done.
    print(asm, b"@E\n")?;
    asm.out(0xf4, al)?;
    let mut end = asm.create_label();
    asm.set_label(&mut end)?;
    asm.cli()?;
    asm.hlt()?;
    asm.jmp(end)?;
    asm.set_label(&mut shutdown)?;
    print(asm, b"@X\n")?;
    asm.inc(dword_ptr(INDEX))?;
    asm.jmp(case)?;
    asm.set_label(&mut go)?;
    // The sandbox, by template.
    asm.mov(ebp, dword_ptr(NEXT))?;
    asm.mov(esi, dword_ptr(ebp + header::LONG as i32))?;
    asm.shl(esi, 16)?;
    asm.add(esi, TEMPLATES as i32)?;
    asm.mov(edi, SANDBOX)?;
    asm.mov(ecx, SANDBOX_SIZE / 4)?;
    asm.rep().movsd()?;
    asm.mov(esi, ebp)?;
    asm.mov(edi, HEADER)?;
    asm.mov(ecx, header::SIZE / 4)?;
    asm.rep().movsd()?;
    asm.mov(ebx, field(header::PATCHES))?;
    asm.set_label(&mut patch)?;
    let mut patched = asm.create_label();
    asm.test(ebx, ebx)?;
    asm.jz(patched)?;
    asm.lodsd()?;
    asm.lea(edi, dword_ptr(eax + SANDBOX))?;
    asm.lodsd()?;
    asm.mov(ecx, eax)?;
    asm.rep().movsb()?;
    asm.dec(ebx)?;
    asm.jmp(patch)?;
    asm.set_label(&mut patched)?;
    asm.mov(dword_ptr(NEXT), esi)?;
    asm.mov(esi, SANDBOX)?;
    asm.mov(edi, BEFORE)?;
    asm.mov(ecx, SANDBOX_SIZE / 4)?;
    asm.rep().movsd()?;
    asm.xor(eax, eax)?;
    asm.mov(edi, SAVED)?;
    asm.mov(ecx, SAVED_WORDS)?;
    asm.rep().stosd()?;
    // The task that double faults switch to.
    asm.mov(esi, OWN_TASK_STATE)?;
    asm.mov(edi, OWN_TSS)?;
    asm.mov(ecx, 0x68 / 4)?;
    asm.rep().movsd()?;
    asm.mov(eax, field(header::CR3))?;
    asm.mov(dword_ptr(OWN_TSS + 0x1c), eax)?;
    asm.mov(dword_ptr(STACK - 0x1004), 0)?;
    asm.fninit()?;
    asm.mov(dword_ptr(UNDER_WAY), MAGIC)?;
    // System registers.
    asm.mov(eax, 0xffff_0ff0u32)?;
    asm.mov(dr6, eax)?;
    asm.xor(eax, eax)?;
    asm.mov(cr2, eax)?;
    asm.mov(eax, field(header::DR0))?;
    asm.mov(dr0, eax)?;
    asm.mov(eax, field(header::DR1))?;
    asm.mov(dr1, eax)?;
    asm.mov(eax, field(header::CR3))?;
    asm.mov(cr3, eax)?;
    asm.mov(eax, field(header::CR4))?;
    asm.mov(cr4, eax)?;
    for (number, msr) in (0..).zip(MSRS) {
        asm.mov(ecx, msr)?;
        asm.mov(eax, field(header::MSR + 8 * number))?;
        asm.mov(edx, field(header::MSR + 8 * number + 4))?;
        asm.wrmsr()?;
    }
    asm.mov(ecx, EFER)?;
    asm.mov(eax, field(header::EFER))?;
    asm.xor(edx, edx)?;
    asm.wrmsr()?;
    asm.lgdt(fword_ptr(HEADER + header::GDTR))?;
    asm.lidt(fword_ptr(HEADER + header::IDTR))?;
    asm.mov(eax, field(header::CR0))?;
    asm.mov(cr0, eax)?;
    asm.lldt(word_field(header::LDTR))?;
    asm.ltr(word_field(header::TR))?;
    asm.cmp(field(header::LONG), 0)?;
    let mut narrow = asm.create_label();
    asm.je(narrow)?;
    far_jump(asm, OWN_CODE_64, long_enter)?;
    asm.set_label(&mut narrow)?;
    let mut by_jump = asm.create_label();
    asm.cmp(field(header::BY_IRET), 0)?;
    asm.je(by_jump)?;
    for at in [
        header::GS,
        header::FS,
        header::DS,
        header::ES,
        header::SS,
        header::SP,
        header::FLAGS,
        header::CS,
        header::IP,
    ] {
        asm.push(field(at))?;
    }
    asm.test(field(header::FLAGS), 0x2_0000)?;
    let mut segments = asm.create_label();
    asm.jz(segments)?;
    general_registers(asm)?;
    asm.iretd()?;
    asm.set_label(&mut segments)?;
    data_segments(asm)?;
    general_registers(asm)?;
    asm.iretd()?;
    asm.set_label(&mut by_jump)?;
    asm.push(field(header::FLAGS))?;
    asm.popfd()?;
    data_segments(asm)?;
    general_registers(asm)?;
    asm.lss(esp, fword_ptr(HEADER + header::SP).cs())?;
    // jmp far cs:[IP]
    let mut far = vec![0x2e, 0xff, 0x2d];
    far.extend_from_slice(&(HEADER + header::IP).to_le_bytes());
    asm.db(&far)
}

fn data_segments(asm: &mut CodeAssembler) -> Built {
    asm.mov(es, word_field(header::ES))?;
    asm.mov(fs, word_field(header::FS))?;
    asm.mov(gs, word_field(header::GS))?;
    asm.mov(ds, word_field(header::DS))
}

fn general_registers(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, field(header::DR7).cs())?;
    asm.mov(dr7, eax)?;
    for (number, register) in [eax, ecx, edx, ebx].into_iter().enumerate() {
        asm.mov(register, field(header::GPR + 8 * number as u32).cs())?;
    }
    for (number, register) in [(5, ebp), (6, esi), (7, edi)] {
        asm.mov(register, field(header::GPR + 8 * number).cs())?;
    }
    Ok(())
}

pub(crate) const GPR_64: [AsmRegister64; 16] = [
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
];

fn enter_long(asm: &mut CodeAssembler) -> Built {
    asm.mov(rsp, u64::from(STACK))?;
    for at in [
        header::SS,
        header::SP,
        header::FLAGS,
        header::CS,
        header::IP,
    ] {
        asm.mov(eax, field(at))?;
        // Addresses are signed, for those that are not canonical as little as for those that are.
        if at == header::SP || at == header::IP {
            asm.movsxd(rax, eax)?;
        }
        asm.push(rax)?;
    }
    asm.mov(eax, field(header::DR7))?;
    asm.mov(dr7, rax)?;
    asm.mov(es, word_field(header::ES))?;
    asm.mov(fs, word_field(header::FS))?;
    asm.mov(gs, word_field(header::GS))?;
    asm.mov(ds, word_field(header::DS))?;
    for (number, register) in GPR_64.into_iter().enumerate() {
        if register != rsp {
            asm.mov(
                register,
                qword_ptr(HEADER + header::GPR + 8 * number as u32),
            )?;
        }
    }
    asm.iretq()
}
