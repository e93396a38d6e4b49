//! Snippets: what sequences can't hold, from every corner of ring 3.

use bt::insn::Case;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{CODE, Comparison, Liberty};
use crate::snippets_of_state::STATE_SNIPPETS;

/// One snippet.
pub(crate) type Snippet = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A word of two pages that are mapped; nothing lies behind them.
pub(crate) const PLACE: u64 = 0x2_0000;
pub(crate) const PLACES: u64 = 0x2_2000;

/// By what they are about. Each is followed by hlt.
const SNIPPETS: &[(&str, Snippet)] = &[
    ("flags of ring 3", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x26_7fd7i32)?;
        asm.and(dword_ptr(rsp), !0x4_0100i32)?;
        asm.popfq()?;
        asm.pushfq()?;
        asm.pop(rax)?;
        // RF and IF aside.
        asm.and(eax, !0x1_0200i32)
    }),
    ("single step", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x302)?;
        asm.popfq()?;
        asm.inc(eax)?;
        asm.inc(eax)
    }),
    ("single step of a string", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.mov(ecx, 5)?;
        asm.mov(edi, 0x2_0000)?;
        asm.push(0x302)?;
        asm.popfq()?;
        asm.rep().stosb()
    }),
    ("single step into a fault", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x302)?;
        asm.popfq()?;
        asm.mov(eax, dword_ptr(PLACES))
    }),
    ("a copy of nothing to no address", |asm| {
        asm.mov(esi, PLACES as u32)?;
        asm.mov(rdi, 1u64 << 63)?;
        asm.movsb()
    }),
    ("a repeated copy of nothing to no address", |asm| {
        asm.mov(esi, PLACES as u32)?;
        asm.mov(rdi, 1u64 << 63)?;
        asm.mov(ecx, 3)?;
        asm.rep().movsb()
    }),
    ("a comparison of nothing with no address", |asm| {
        asm.mov(esi, PLACES as u32)?;
        asm.mov(rdi, 1u64 << 63)?;
        asm.cmpsb()
    }),
    ("a comparison of no address with nothing", |asm| {
        asm.mov(rsi, 1u64 << 63)?;
        asm.mov(edi, PLACES as u32)?;
        asm.cmpsb()
    }),
    ("alignment check of a load", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x4_0202)?;
        asm.popfq()?;
        asm.mov(eax, dword_ptr(PLACE))?;
        asm.mov(ebx, dword_ptr(PLACE + 2))
    }),
    ("alignment check of a push", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x4_0202)?;
        asm.popfq()?;
        asm.mov(esp, 0x2_0ffc)?;
        asm.push(rax)
    }),
    ("alignment checks spare bytes and aligned words", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.push(0x4_0202)?;
        asm.popfq()?;
        asm.mov(al, byte_ptr(PLACE + 1))?;
        asm.mov(ax, word_ptr(PLACE + 2))?;
        asm.mov(rax, qword_ptr(PLACE + 8))?;
        asm.mov(esi, 0x2_0001)?;
        asm.lodsb()
    }),
    ("int3", |asm| asm.int3()),
    ("int 3", |asm| asm.db(&[0xcd, 3])),
    ("int 4", |asm| asm.db(&[0xcd, 4])),
    ("int 1", |asm| asm.db(&[0xcd, 1])),
    ("int 32", |asm| asm.db(&[0xcd, 32])),
    ("int1", |asm| asm.db(&[0xf1])),
    ("ud0, ud1, ud2", |asm| asm.ud2()),
    ("ud1", |asm| asm.db(&[0x0f, 0xb9, 0xc0])),
    ("into in 64-bit code", |asm| asm.db(&[0xce])),
    ("bound in 64-bit code", |asm| asm.db(&[0x62, 0x00])),
    ("pusha in 64-bit code", |asm| asm.db(&[0x60])),
    ("aam in 64-bit code", |asm| asm.db(&[0xd4, 0x0a])),
    ("push es in 64-bit code", |asm| asm.db(&[0x06])),
    ("far call in 64-bit code", |asm| {
        asm.db(&[0x9a, 0, 0, 0, 0, 0, 0])
    }),
    ("arpl is movsxd", |asm| {
        asm.mov(ecx, -5)?;
        asm.movsxd(rax, ecx)?;
        // movsxd eax, ecx and movsxd ax, ecx.
        asm.db(&[0x63, 0xd9])?;
        asm.db(&[0x66, 0x63, 0xf1])
    }),
    ("lock where it may not be", |asm| {
        asm.db(&[0xf0, 0x01, 0xc8])
    }),
    ("lock on a load", |asm| {
        asm.db(&[0xf0, 0x8b, 0x04, 0x25, 0, 0, 2, 0])
    }),
    ("fifteen bytes", |asm| {
        asm.db(&[
            0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
            0x90,
        ])
    }),
    ("sixteen bytes", |asm| {
        asm.db(&[
            0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
            0x66,
        ])?;
        asm.db(&[0x90])
    }),
    ("privileged: cli", |asm| asm.cli()),
    ("privileged: sti", |asm| asm.sti()),
    ("privileged: in", |asm| asm.in_(al, dx)),
    ("privileged: out", |asm| asm.out(0x80, al)),
    ("privileged: ins", |asm| asm.rep().insb()),
    ("privileged: rdmsr", |asm| asm.rdmsr()),
    ("privileged: wrmsr", |asm| asm.wrmsr()),
    ("privileged: mov cr0", |asm| asm.mov(rax, cr0)),
    ("privileged: mov dr7", |asm| asm.mov(dr7, rax)),
    ("privileged: lgdt", |asm| asm.lgdt(ptr(PLACE))),
    ("privileged: invlpg", |asm| asm.invlpg(ptr(PLACE))),
    ("privileged: swapgs", |asm| asm.swapgs()),
    ("privileged: xsetbv", |asm| asm.xsetbv()),
    ("privileged: wbinvd", |asm| asm.wbinvd()),
    ("privileged: clts", |asm| asm.clts()),
    ("privileged: ltr", |asm| asm.ltr(ax)),
    ("iretq to the same ring", |asm| {
        asm.mov(esp, 0x2_1000)?;
        let mut there = asm.create_label();
        asm.push(0x2b)?;
        asm.push(0x2_0800)?;
        asm.push(0xad7)?;
        asm.push(0x33)?;
        asm.lea(rax, ptr(there))?;
        asm.push(rax)?;
        asm.iretq()?;
        asm.ud2()?;
        asm.set_label(&mut there)?;
        asm.nop()
    }),
    ("iretq to a null selector", |asm| {
        asm.mov(esp, 0x2_0800)?;
        asm.iretq()
    }),
    ("iretq to ring 0", |asm| {
        asm.mov(esp, 0x2_0800)?;
        asm.mov(qword_ptr(0x2_0808), 0x10)?;
        asm.iretq()
    }),
    ("far return", |asm| {
        asm.mov(esp, 0x2_1000)?;
        let mut there = asm.create_label();
        asm.push(0x33)?;
        asm.lea(rax, ptr(there))?;
        asm.push(rax)?;
        asm.db(&[0x48, 0xcb])?;
        asm.ud2()?;
        asm.set_label(&mut there)?;
        asm.nop()
    }),
    ("compatibility mode and back", |asm| {
        asm.mov(esp, 0x2_1000)?;
        let mut narrow = asm.create_label();
        let mut wide = asm.create_label();
        asm.lea(rax, ptr(narrow))?;
        asm.mov(dword_ptr(PLACE), eax)?;
        asm.mov(dword_ptr(PLACE + 4), 0x23)?;
        asm.lea(rbx, ptr(wide))?;
        asm.mov(dword_ptr(PLACE + 8), ebx)?;
        asm.mov(dword_ptr(PLACE + 12), 0x33)?;
        // jmp far dword [PLACE]
        asm.db(&[0xff, 0x2c, 0x25, 0, 0, 2, 0])?;
        asm.set_label(&mut narrow)?;
        // inc ecx; dec edx; jmp far dword [PLACE + 8]
        asm.db(&[0x41, 0x4a, 0xff, 0x2d, 8, 0, 2, 0])?;
        asm.set_label(&mut wide)?;
        asm.nop()
    }),
    ("segment registers", |asm| {
        asm.mov(eax, 0x2b)?;
        asm.mov(ds, eax)?;
        asm.mov(es, eax)?;
        asm.mov(ecx, ds)?;
        asm.mov(rdx, es)?;
        asm.mov(ebx, cs)?;
        asm.mov(esi, ss)?;
        asm.mov(ax, ds)?;
        asm.mov(word_ptr(PLACE), ds)
    }),
    ("a segment that isn't there", |asm| {
        asm.mov(eax, 0xffff)?;
        asm.mov(ds, eax)
    }),
    ("a segment of ring 0", |asm| {
        asm.mov(eax, 0x10)?;
        asm.mov(es, eax)
    }),
    ("a null ss", |asm| {
        asm.xor(eax, eax)?;
        asm.mov(ss, eax)
    }),
    ("push and pop of fs and gs", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.db(&[0x0f, 0xa0, 0x0f, 0xa8])?;
        asm.db(&[0x0f, 0xa9, 0x0f, 0xa1])
    }),
    ("bases of fs and gs", |asm| {
        asm.mov(rax, 0x1234_5678_9abcu64)?;
        asm.wrfsbase(rax)?;
        asm.mov(ebx, 0x2_0000)?;
        asm.wrgsbase(ebx)?;
        asm.rdfsbase(rcx)?;
        asm.rdfsbase(edx)?;
        asm.rdgsbase(rsi)?;
        asm.mov(dword_ptr(8).gs(), 77)?;
        asm.mov(edi, dword_ptr(PLACE + 8))
    }),
    ("a base that isn't canonical", |asm| {
        asm.mov(rax, 0x8000_0000_0000u64)?;
        asm.wrgsbase(rax)
    }),
    ("lar, lsl, verr and verw", |asm| {
        asm.mov(eax, 0x33)?;
        asm.verr(ax)?;
        asm.setz(bl)?;
        asm.verw(ax)?;
        asm.setz(bh)?;
        asm.mov(ecx, 0)?;
        asm.lar(edx, ecx)?;
        asm.setz(cl)?;
        asm.mov(esi, 0xfff8)?;
        asm.lsl(edi, esi)
    }),
    ("enter of every depth", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.mov(ebp, 0x2_0800)?;
        asm.enter(16, 0)?;
        asm.enter(8, 1)?;
        asm.enter(32, 5)?;
        asm.leave()
    }),
    ("enter below the stack", |asm| {
        asm.mov(esp, 0x2_0004)?;
        asm.enter(0, 0)
    }),
    ("a push that faults leaves RSP", |asm| asm.push(rax)),
    ("a stack that isn't canonical", |asm| {
        asm.mov(rsp, 0x8000_0000_0000u64)?;
        asm.push(rax)
    }),
    ("a return to nowhere", |asm| {
        asm.mov(esp, 0x2_0800)?;
        asm.mov(rax, 0x8000_0000_0000u64)?;
        asm.mov(qword_ptr(0x2_0800), rax)?;
        asm.ret()
    }),
    ("a call to nowhere", |asm| {
        asm.mov(esp, 0x2_0800)?;
        asm.mov(rax, 0x1234_0000_0000_0000u64)?;
        asm.call(rax)
    }),
    ("a far call through a stack that isn't there", |asm| {
        asm.mov(rbp, 0x1234_0000_0000_0000u64)?;
        // call far [rbp]
        asm.db(b"\x48\xff\x5d\x00")
    }),
    ("a far jump through such a stack", |asm| {
        asm.mov(rsp, 0x1234_0000_0000_0000u64)?;
        // jmp far [rsp]
        asm.db(b"\x48\xff\x2c\x24")
    }),
    ("a far pointer there", |asm| {
        asm.mov(rbp, 0x1234_0000_0000_0000u64)?;
        // lfs eax, [rbp]
        asm.db(b"\x0f\xb4\x45\x00")
    }),
    ("a stack pointer there", |asm| {
        asm.mov(rbp, 0x1234_0000_0000_0000u64)?;
        // lss rax, [rbp]
        asm.db(b"\x48\x0f\xb2\x45\x00")
    }),
    ("a masked load across the end of all addresses", |asm| {
        asm.mov(rbp, 0x7fff_ffff_fff8u64)?;
        asm.vpcmpeqb(xmm0, xmm0, xmm0)?;
        asm.vmaskmovps(xmm1, xmm0, xmmword_ptr(rbp))
    }),
    ("a masked store there", |asm| {
        asm.mov(rax, 0x7fff_ffff_fff8u64)?;
        asm.vpcmpeqb(xmm0, xmm0, xmm0)?;
        asm.vmaskmovps(xmmword_ptr(rax), xmm0, xmm1)
    }),
    ("a jump to an unmapped page", |asm| {
        asm.mov(eax, 0x40_0000)?;
        asm.jmp(rax)
    }),
    ("a jump to the end of a page", |asm| {
        // mov eax, imm32 whose immediate lies beyond.
        asm.mov(byte_ptr(PLACES - 1), 0xb8)?;
        asm.mov(eax, (PLACES - 1) as u32)?;
        asm.jmp(rax)
    }),
    ("code that changes its next instruction", |asm| {
        let mut next = asm.create_label();
        asm.lea(rax, ptr(next))?;
        asm.mov(byte_ptr(rax + 1), 42)?;
        asm.set_label(&mut next)?;
        asm.mov(cl, 1)
    }),
    ("code written, run, changed and run again", |asm| {
        asm.mov(esp, 0x2_1000)?;
        asm.mov(eax, 0x2_1800)?;
        // mov bl, 1; ret
        asm.mov(dword_ptr(rax), 0x00c3_01b3)?;
        asm.call(rax)?;
        asm.mov(edx, ebx)?;
        asm.mov(byte_ptr(rax + 1), 9)?;
        asm.call(rax)
    }),
];

#[test]
fn snippets_end_as_on_the_host() {
    let mut comparison = Comparison::new();
    for (name, snippet) in SNIPPETS.iter().chain(STATE_SNIPPETS) {
        let mut asm = CodeAssembler::new(64).expect("64-bit code");
        snippet(&mut asm).expect("can be encoded");
        asm.hlt().expect("can be encoded");
        let case = Case {
            code: asm.assemble(CODE).expect("can be assembled"),
            load: CODE,
            map: vec![(PLACE, PLACES - PLACE)],
            mem: Vec::new(),
        };
        // Undefined by the manual, whatever this host does.
        let mut liberty = Liberty::default();
        if name.starts_with("division") {
            liberty.flags = 0x8d5;
        }
        comparison.compare(&case, liberty, || (*name).to_owned());
    }
    comparison.end(1);
}
