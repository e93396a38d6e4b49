//! Instructions of 16-bit code, one after the other, in real-address mode: what each leaves in
//! registers, flags and memory is compared with QEMU.
//!
//! Each snippet starts with the same registers. Its results are folded into one word.

use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::legacy::{real, result};
use crate::rig::{CODE, End, Rig};

type Snippet = fn(&mut Asm) -> Built;

/// OF SF ZF AF PF CF and IF.
const ALL: i32 = 0xad5;
const NO_AF: i32 = 0xac5;
const CARRY_AND_OVERFLOW: i32 = 0xa01;
const CARRY: i32 = 0x201;
const NONE: i32 = 0x200;

/// A snippet's name, flags that it defines, and itself.
const STACK: &[(&str, i32, Snippet)] = &[
    ("push and pop", ALL, |asm| {
        asm.push(ax)?;
        asm.push(edx)?;
        asm.push(-3)?;
        asm.db(&[0x66, 0x6a, 0xfd])?; // push dword -3
        asm.db(&[0x68, 0x34, 0x92])?; // push 0x9234
        asm.db(&[0x66, 0x68, 1, 2, 3, 4])?; // push dword 0x04030201
        asm.push(word_ptr(bx))?;
        asm.push(dword_ptr(bx + 4))?;
        asm.push(cs)?;
        asm.db(&[0x66, 0x1e])?; // push ds as 32 bits
        asm.pop(eax)?;
        asm.movzx(eax, ax)?;
        asm.pop(cx)?;
        asm.pop(dword_ptr(bx + 8))?;
        asm.pop(word_ptr(bx + 12))?;
        asm.pop(edi)?;
        asm.pop(si)?;
        asm.pop(ebp)?;
        asm.pop(dx)
    }),
    ("pop through sp", ALL, |asm| {
        asm.push(0x1234)?;
        asm.push(0x5678)?;
        asm.mov(bp, sp)?;
        asm.pop(word_ptr(bp + 4))?;
        asm.pop(ax)?;
        asm.push(sp)?;
        asm.pop(cx)
    }),
    ("a stack that wraps", ALL, |asm| {
        asm.mov(edx, esp)?;
        asm.mov(esp, 0x7_0002)?;
        asm.push(ax)?;
        asm.push(cx)?;
        asm.mov(di, word_ptr(0xfffeu32))?;
        asm.mov(si, sp)?;
        asm.pop(cx)?;
        asm.pop(ax)?;
        asm.mov(ebx, esp)?;
        asm.mov(esp, edx)
    }),
    ("pusha and popa", ALL, |asm| {
        asm.pusha()?;
        asm.pushad()?;
        asm.xor(eax, eax)?;
        asm.mov(ebp, eax)?;
        asm.mov(edi, eax)?;
        asm.popad()?;
        asm.inc(edi)?;
        asm.popa()
    }),
    ("pushf and popf", ALL, |asm| {
        asm.stc()?;
        asm.pushfd()?;
        asm.pop(eax)?;
        asm.and(eax, 0x3_ffff)?;
        asm.push(0x7ad5)?;
        asm.popf()?;
        asm.pushf()?;
        asm.pop(cx)?;
        asm.push(0x02)?;
        asm.popf()
    }),
    ("enter and leave", ALL, |asm| {
        asm.mov(word_ptr(0x43f8), 0x1111)?;
        asm.mov(word_ptr(0x43fc), 0x2222)?;
        asm.mov(word_ptr(0x43fe), 0x3333)?;
        asm.enter(6, 0)?;
        asm.mov(ax, bp)?;
        asm.leave()?;
        asm.enter(4, 3)?;
        asm.mov(cx, sp)?;
        asm.mov(dx, word_ptr(bp - 2))?;
        asm.leave()?;
        asm.db(&[0x66, 0xc8, 8, 0, 2])?; // enter 8, 2 with 32 bits
        asm.mov(esi, dword_ptr(bp - 4))?;
        asm.db(&[0x66, 0xc9])
    }),
    ("calls and returns", ALL, |asm| {
        let mut over = asm.create_label();
        let mut drops = asm.create_label();
        // Pushes the function's address.
        asm.call(over)?;
        asm.inc(ecx)?;
        asm.ret()?;
        asm.set_label(&mut drops)?;
        asm.add(ecx, 16)?;
        asm.ret_1(4)?;
        asm.set_label(&mut over)?;
        asm.pop(ax)?;
        asm.call(ax)?;
        asm.mov(word_ptr(bx), ax)?;
        asm.call(word_ptr(bx))?;
        asm.push(ax)?;
        asm.push(dx)?;
        asm.call(drops)?;
        asm.xor(ax, ax)?;
        asm.mov(word_ptr(bx), ax)
    }),
    ("far calls and returns", ALL, |asm| {
        let mut first = asm.create_label();
        let mut second = asm.create_label();
        asm.call(first)?;
        asm.inc(ecx)?;
        asm.mov(bp, sp)?;
        asm.mov(si, word_ptr(bp + 2))?;
        asm.retf_1(2)?;
        asm.set_label(&mut first)?;
        asm.pop(word_ptr(bx))?;
        asm.mov(word_ptr(bx + 2), cs)?;
        asm.push(dx)?;
        asm.db(&[0xff, 0x1f])?; // call far [bx]
        asm.call(second)?;
        asm.add(ecx, 16)?;
        asm.db(&[0x66, 0xcb])?;
        asm.set_label(&mut second)?;
        asm.pop(ax)?;
        asm.movzx(eax, ax)?;
        asm.mov(dword_ptr(bx), eax)?;
        asm.mov(word_ptr(bx + 4), cs)?;
        asm.db(&[0x66, 0xff, 0x1f])?; // call far dword [bx]
        asm.xor(eax, eax)?;
        asm.mov(dword_ptr(bx), eax)
    }),
    ("iret and iretd", ALL, |asm| {
        asm.push(0xad7)?;
        asm.push(cs)?;
        // call +0; pop ax; add ax, 9; push ax; iret; mov cx, 0xdead
        asm.db(&[0xe8, 0, 0])?;
        asm.db(&[0x58, 0x83, 0xc0, 9, 0x50, 0xcf, 0xb9, 0xad, 0xde])?;
        asm.pushf()?;
        asm.pop(dx)?;
        // push dword 0xd7; push cs as 32 bits
        asm.db(&[0x66, 0x68, 0xd7, 0, 0, 0, 0x66, 0x0e])?;
        // call +0; pop ax; add ax, 15; movzx eax, ax; push eax; iretd; mov si, 0xdead
        asm.db(&[0xe8, 0, 0])?;
        asm.db(&[0x58, 0x83, 0xc0, 15, 0x66, 0x0f, 0xb7, 0xc0])?;
        asm.db(&[0x66, 0x50, 0x66, 0xcf, 0xbe, 0xad, 0xde])?;
        asm.mov(eax, 0)
    }),
    ("segments from memory", ALL, |asm| {
        asm.mov(dword_ptr(bx), 0x3210_4204)?;
        asm.mov(dword_ptr(bx + 4), 0x1000_0010)?;
        asm.lds(si, dword_ptr(bx))?;
        asm.mov(dx, ds)?;
        asm.db(&[0x2e, 0x66, 0xc4, 0x3f])?; // les edi, cs:[bx]
        asm.mov(cx, es)?;
        asm.mov(ax, cs)?;
        asm.mov(ds, ax)?;
        asm.mov(es, ax)?;
        asm.db(&[0x0f, 0xb5, 0x2f])?; // lgs bp, [bx]
        asm.mov(bx, gs)
    }),
    ("esp and ebp mean the stack segment", ALL, |asm| {
        asm.mov(dword_ptr(0x4500), 0x1111_1111)?;
        asm.mov(dword_ptr(0x4600), 0x2222_2222)?;
        asm.mov(cx, ss)?;
        asm.mov(dx, cx)?;
        asm.add(cx, 0x10)?;
        asm.mov(edi, esp)?;
        asm.mov(ss, cx)?;
        asm.mov(ebp, 0x4500)?;
        asm.mov(eax, dword_ptr(ebp))?;
        asm.mov(esp, 0x4500)?;
        asm.mov(esi, dword_ptr(esp))?;
        asm.mov(ebx, dword_ptr(ebp + esi * 1 - 0x2222_2222).ds())?;
        asm.mov(ss, dx)?;
        asm.mov(esp, edi)
    }),
];

const ARITHMETIC: &[(&str, i32, Snippet)] = &[
    ("shld and shrd", NO_AF & !0x800, |asm| {
        asm.shld(eax, edx, 3)?;
        asm.shrd(bx, dx, 5)?;
        asm.shld(ecx, edx, cl)
    }),
    ("shifts and rotates", NONE, |asm| {
        asm.stc()?;
        asm.rcl(ax, 1)?;
        asm.rcr(dx, 5)?;
        asm.rol(ebx, 9)?;
        asm.mov(cl, 35)?;
        asm.sar(esi, cl)?;
        asm.shl(di, cl)?;
        asm.ror(byte_ptr(bx), cl)
    }),
    ("multiplications", CARRY_AND_OVERFLOW, |asm| {
        asm.mul(dl)?;
        asm.mul(bx)?;
        asm.imul(dx)?;
        asm.mul(esi)?;
        asm.imul_2(ecx, edi)?;
        asm.imul_3(si, bp, -7)?;
        asm.imul_3(edi, ebx, 100_000)
    }),
    ("divisions", NONE, |asm| {
        asm.mov(ax, 0x1234)?;
        asm.div(dl)?;
        asm.mov(si, ax)?;
        asm.mov(dx, 3)?;
        asm.div(bx)?;
        asm.mov(edi, eax)?;
        asm.mov(eax, -100_000)?;
        asm.cdq()?;
        asm.idiv(ebx)?;
        asm.cwd()?;
        asm.cbw()?;
        asm.cwde()
    }),
    ("decimal", 0xc5, |asm| {
        asm.mov(ax, 0x2f9d)?;
        asm.aam(10)?;
        asm.mov(cx, ax)?;
        asm.aam(7)?;
        asm.aad(10)?;
        asm.db(&[0xd5, 16])?;
        asm.add(al, 0x99)?;
        asm.daa()?;
        asm.sub(al, 0x45)?;
        asm.das()
    }),
    ("ascii", 0x11, |asm| {
        asm.mov(ax, 0x2f9d)?;
        asm.add(al, 5)?;
        asm.aaa()?;
        asm.mov(dx, ax)?;
        asm.sub(al, 9)?;
        asm.aas()
    }),
    ("salc, sahf and lahf", ALL, |asm| {
        asm.stc()?;
        asm.db(&[0xd6])?;
        asm.mov(dl, al)?;
        asm.mov(ah, 0xd7)?;
        asm.sahf()?;
        asm.mov(ah, 0)?;
        asm.lahf()?;
        asm.db(&[0xd6])
    }),
    ("extensions and swaps", ALL, |asm| {
        asm.movzx(ax, dl)?;
        asm.movsx(cx, dh)?;
        asm.movzx(esi, dx)?;
        asm.movsx(edi, bx)?;
        asm.bswap(edx)?;
        asm.xchg(al, ch)?;
        asm.xchg(word_ptr(bx), bp)?;
        asm.xchg(eax, ebp)
    }),
    ("compare and exchange", ALL, |asm| {
        asm.mov(dword_ptr(bx), eax)?;
        asm.mov(dword_ptr(bx + 4), edx)?;
        asm.cmpxchg(word_ptr(bx), si)?;
        asm.cmpxchg(dword_ptr(bx), edi)?;
        asm.lock().cmpxchg8b(qword_ptr(bx))?;
        asm.xadd(word_ptr(bx), cx)?;
        asm.xadd(ecx, edx)
    }),
    ("bits", CARRY, |asm| {
        asm.mov(cx, 0x123)?;
        asm.bts(word_ptr(bx), cx)?;
        asm.mov(ecx, -17i32 as u32)?;
        asm.btc(dword_ptr(bx + 64), ecx)?;
        asm.bsf(ax, dx)?;
        asm.bsr(edx, edx)?;
        asm.bt(eax, 3)?;
        asm.setc(byte_ptr(bx + 2))?;
        asm.btr(word_ptr(bx), 14)
    }),
    ("loops", NO_AF & !0x8d4, |asm| {
        let mut first = asm.create_label();
        asm.xor(eax, eax)?;
        asm.mov(ecx, 0x7_0003)?;
        asm.set_label(&mut first)?;
        asm.inc(eax)?;
        asm.loop_(first)?;
        asm.mov(esi, ecx)?;
        // loopne with ECX, by its prefix: dec ax; 67 e0 -5
        asm.mov(ecx, 3)?;
        asm.mov(ax, 2)?;
        asm.db(&[0x48, 0x67, 0xe0, 0xfc])?;
        // loope to itself
        asm.cmp(ax, ax)?;
        asm.mov(dx, cx)?;
        asm.mov(cx, 9)?;
        asm.db(&[0xe1, 0xfe])?;
        // jcxz over inc bp, jecxz over inc di
        asm.mov(ecx, 0x1_0000)?;
        asm.db(&[0xe3, 1, 0x45])?;
        asm.db(&[0x67, 0xe3, 1, 0x47])
    }),
    ("every condition", NONE, |asm| {
        for flags in [0x0002, 0x0ad7, 0x0843, 0x0096] {
            asm.push(flags)?;
            asm.popf()?;
            for condition in 0..16u8 {
                // jcc +4, over add eax, ebx with a shift
                asm.db(&[0x66, 0xd1, 0xc0])?;
                asm.push(flags)?;
                asm.popf()?;
                asm.db(&[0x70 | condition, 2, 0x66, 0x40])?;
                asm.db(&[0x0f, 0x80 | condition, 1, 0, 0x42])?;
            }
        }
        asm.nop()
    }),
    ("x87", ALL, |asm| {
        asm.fninit()?;
        asm.fnstsw(ax)?;
        asm.fnstcw(word_ptr(bx))?;
        asm.fild(dword_ptr(bx + 32))?;
        asm.fldpi()?;
        asm.fmulp(st1, st0)?;
        asm.fistp(dword_ptr(bx + 4))?;
        asm.fld1()?;
        asm.fnstsw(word_ptr(bx + 8))?;
        asm.fninit()?;
        asm.mov(edx, dword_ptr(bx))
    }),
];

const STRINGS: &[(&str, i32, Snippet)] = &[
    ("movs up and down", ALL, |asm| {
        asm.mov(cx, 7)?;
        asm.rep().movsb()?;
        asm.movsw()?;
        asm.std()?;
        asm.mov(cx, 3)?;
        asm.db(&[0xf3, 0x66, 0xa5])?; // rep movsd
        asm.cld()
    }),
    ("stos and lods", ALL, |asm| {
        asm.mov(cx, 5)?;
        asm.rep().stosb()?;
        asm.stosd()?;
        asm.mov(cx, 3)?;
        asm.db(&[0xf3, 0xad])?; // rep lodsw
        asm.db(&[0x26, 0xac])?; // lodsb es:
        asm.mov(edx, dword_ptr(0x4300))
    }),
    ("scas and cmps", ALL, |asm| {
        asm.mov(dword_ptr(0x4200), 0x3020_1000)?;
        asm.mov(dword_ptr(0x4300), 0x3021_1000)?;
        asm.mov(cx, 4)?;
        asm.repe().cmpsb()?;
        asm.mov(dx, cx)?;
        asm.mov(al, 0x30)?;
        asm.mov(cx, 20)?;
        asm.mov(di, 0x4300)?;
        asm.repne().scasb()?;
        asm.scasw()
    }),
    ("with 32-bit addresses", ALL, |asm| {
        asm.mov(ecx, 4)?;
        asm.db(&[0xf3, 0x67, 0xa4])?; // rep movsb [edi], [esi]
        asm.db(&[0x67, 0x66, 0xab])?; // stosd [edi]
        asm.db(&[0x67, 0xad]) // lodsw [esi]
    }),
    ("a count of zero", ALL, |asm| {
        asm.stc()?;
        asm.mov(ecx, 0x7_0000)?;
        asm.rep().movsb()?;
        asm.repe().cmpsb()
    }),
    ("around the end of the segment", ALL, |asm| {
        asm.mov(byte_ptr(0xffffu32), 0x5a)?;
        asm.mov(si, 0xffff)?;
        asm.mov(di, 0x4300)?;
        asm.mov(cx, 3)?;
        asm.rep().movsb()?;
        asm.mov(dl, byte_ptr(0x4300))
    }),
    ("xlat", ALL, |asm| {
        asm.mov(byte_ptr(0x4121), 0x77)?;
        asm.xlatb()?;
        asm.mov(cl, al)?;
        asm.mov(al, 0x21)?;
        asm.db(&[0x36, 0xd7])?; // ss:
        asm.mov(ch, al)?;
        asm.mov(bx, 0xffe0)?;
        asm.mov(al, 0x40)?;
        asm.mov(byte_ptr(0x20), 0x66)?;
        asm.xlatb()
    }),
    ("addresses of 32 bits", ALL, |asm| {
        asm.mov(edx, dword_ptr(ebx + ecx * 1 - 0x1_0000))?;
        asm.mov(word_ptr(esi + 4), dx)?;
        asm.lea(edi, dword_ptr(ebx + esi * 4 + 0x1234_5678))?;
        asm.lea(bp, word_ptr(ebx + esi * 2))
    }),
    ("prefixes twice and without use", ALL, |asm| {
        asm.db(&[0x66, 0x66, 0x89, 0xc1])?; // mov ecx, eax
        asm.db(&[0x67, 0x90])?;
        asm.db(&[0x2e, 0x3e, 0x8b, 0x17])?; // mov dx, ds:[bx]
        asm.db(&[0x66, 0x0f, 0x1f, 0x44, 0x00])?;
        asm.db(&[0x66, 0x98])
    }),
    ("machine status", NONE, |asm| {
        asm.db(&[0x0f, 0x01, 0xe0])?; // smsw ax
        asm.mov(cx, ax)?;
        asm.or(ax, 8)?;
        asm.db(&[0x0f, 0x01, 0xf0])?; // lmsw ax
        asm.db(&[0x0f, 0x01, 0x27])?; // smsw [bx]
        asm.mov(dx, word_ptr(bx))?;
        asm.clts()?;
        asm.db(&[0x0f, 0x01, 0xe5]) // smsw bp
    }),
    ("debug registers whatever mod says", NONE, |asm| {
        asm.mov(eax, 0x1_2345)?;
        asm.db(&[0x0f, 0x23, 0x00])?; // mov dr0, eax with mod 0
        asm.xor(eax, eax)?;
        asm.db(&[0x0f, 0x21, 0x43])?; // mov ebx, dr0 with mod 1
        asm.mov(ecx, ebx)?;
        asm.db(&[0x0f, 0x23, 0xc0])
    }),
];

/// Sets the registers, runs the snippet, folds what it left and 64 words of memory.
fn framed(asm: &mut Asm, number: i32, flags: i32, snippet: Snippet) -> Built {
    for (register, value) in [
        (eax, 0x8765_4321u32),
        (ecx, 0x1_0005),
        (edx, 0x55aa_1234),
        (ebx, 0x4100),
        (ebp, 0x4400),
        (esi, 0x4200),
        (edi, 0x4300),
    ] {
        asm.mov(register, value)?;
    }
    asm.push(2)?;
    asm.popf()?;
    snippet(asm)?;
    asm.pushf()?;
    asm.pushad()?;
    asm.cld()?;
    asm.mov(ax, cs)?;
    asm.mov(ds, ax)?;
    asm.mov(es, ax)?;
    asm.mov(bp, sp)?;
    asm.and(word_ptr(bp + 32), flags)?;
    // The stack pointer is the place of the frame: it has to be the same each time.
    let mut next = asm.create_label();
    asm.xor(ebx, ebx)?;
    asm.mov(si, bp)?;
    asm.mov(cx, 17)?;
    asm.set_label(&mut next)?;
    asm.lodsw()?;
    asm.rol(ebx, 5)?;
    asm.xor(bx, ax)?;
    asm.loop_(next)?;
    asm.mov(si, 0x4100)?;
    asm.mov(cx, 0x180)?;
    let mut more = asm.create_label();
    asm.set_label(&mut more)?;
    asm.lodsw()?;
    asm.rol(ebx, 3)?;
    asm.add(bx, ax)?;
    asm.loop_(more)?;
    result(asm, number, ebx)?;
    asm.popad()?;
    asm.add(sp, 2)
}

fn compare(snippets: &[(&str, i32, Snippet)]) {
    let found = real(&[], |asm| {
        for (number, (_, flags, snippet)) in snippets.iter().enumerate() {
            framed(asm, number as i32, *flags, *snippet)?;
        }
        Ok(())
    });
    assert!(snippets.len() <= found.len());
    for ((name, _, _), word) in snippets.iter().zip(found) {
        assert_ne!(word, 0, "{name}");
    }
}

#[test]
fn stacks_calls_and_segments_of_real_mode() {
    compare(STACK);
}

#[test]
fn arithmetic_and_branches_of_real_mode() {
    compare(ARITHMETIC);
}

#[test]
fn strings_addresses_and_prefixes_of_real_mode() {
    compare(STRINGS);
}

#[test]
fn limits_that_protected_mode_left_hold_in_real_mode() {
    use engine_core::CpuState;
    // Beyond 64 KiB, with the limit that is usual there and with all of memory.
    let far = &[0x67u8, 0x66, 0x8b, 0x03][..]; // mov eax, [ebx]
    let near = &[0x66, 0x8b, 0x47, 0xff]; // mov eax, [bx - 1]
    for (limit, code, offset, end) in [
        (0xffff, far, 0x1_0000, End::Vector(13)),
        (u32::MAX, far, 0x1_0000, End::Halt),
        (0xffff, far, 0xfffd, End::Vector(13)),
        (0xffff, near, 0xfffd, End::Halt),
        (0xffff, near, 0xfffe, End::Vector(13)),
        (u32::MAX, near, 0xfffe, End::Halt),
        (0xfff, near, 0xffe, End::Vector(13)),
    ] {
        let mut rig = Rig::real();
        rig.state.segments[CpuState::DS].limit = limit;
        rig.state.gpr[3] = offset;
        rig.put(CODE + 0xfffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(
            rig.try_code(|asm| asm.db(code)),
            end,
            "{limit:x} {offset:x}"
        );
    }
    // The stack's faults are the stack's.
    let mut rig = Rig::real();
    rig.state.segments[CpuState::SS].limit = 0xfff;
    rig.state.gpr[4] = 0x800;
    rig.state.gpr[5] = 0x1000;
    assert_eq!(
        rig.try_code(|asm| asm.mov(ax, word_ptr(bp))),
        End::Vector(12)
    );
}
