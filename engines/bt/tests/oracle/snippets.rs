//! Snippets through [`bt::insn`] and through the host's CPU: what sequences can't hold, and every
//! form of instruction once in a while.
//!
//! Not compared: undefined flags, RF and IF, the present bit of page faults beyond user addresses
//! (the kernel sets it), and what the kernel emulates (sgdt and its kin under UMIP).

use std::time::Duration;

use bt::insn::{Bench, Case, End, Outcome};
use bt::{Extended, UserStop};
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, Mnemonic, RflagsBits};

use crate::layout::{DATA, FX_AVX, PAGE};
use crate::process::{Ended, MEMORY, Pages, Process};

const CODE: u64 = 0x1_0000;
const USER_END: u64 = (1 << 47) - PAGE;

/// What of a difference doesn't matter.
#[derive(Clone, Copy, Default)]
struct Liberty {
    flags: u64,
    /// The address of a page fault, and memory: long operands.
    operand: bool,
    extended: bool,
}

fn stop(ended: &Ended, code: &[u8], load: u64) -> UserStop {
    let at = ended.rip.wrapping_sub(load) as usize;
    if ended.vector == 13 && code.get(at) == Some(&0xf4) {
        return UserStop::Halt;
    }
    let vector = ended.vector as u8;
    UserStop::Exception {
        vector,
        error: matches!(vector, 8 | 10..=14 | 17 | 21).then_some(ended.error as u32),
        address: (vector == 14).then_some(ended.cr2),
    }
}

/// Both sides of one case; what differs.
fn differences(
    bench: &mut Bench,
    process: &mut Process,
    case: &Case,
    liberty: Liberty,
) -> Result<String, String> {
    let whole = |(at, bytes): (u64, u64)| {
        let first = at & !(PAGE - 1);
        (first, (at + bytes).next_multiple_of(PAGE) - first)
    };
    let code_range = whole((case.load, case.code.len() as u64));
    let ranges: Vec<(u64, usize)> = [code_range]
        .into_iter()
        .chain(case.map.iter().copied().map(whole))
        .map(|(at, bytes)| (at, bytes as usize))
        .collect();
    let contents = case.mem.iter().cloned();
    let pages = Pages {
        ranges,
        contents: contents.chain([(case.load, case.code.clone())]).collect(),
    };
    let native = process.run(&pages, case.load);
    let outcome = bench.run(case).map_err(|error| error.to_string())?;
    let Some(native) = native else {
        return match outcome.end {
            End::Limit => Ok(String::new()),
            End::Stop(stop) => Err(format!("natively no end, translated {stop:?}")),
        };
    };
    Ok(compare(bench, case, &pages, &native, &outcome, liberty))
}

fn compare(
    bench: &Bench,
    case: &Case,
    pages: &Pages,
    native: &Ended,
    outcome: &Outcome,
    liberty: Liberty,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, native: u64, translated: u64| {
        if native != translated {
            text += &format!("  {name:8} native {native:#x}  translated {translated:#x}\n");
        }
    };
    let expected = stop(native, &case.code, case.load);
    let same = match (End::Stop(expected), outcome.end) {
        (
            End::Stop(UserStop::Exception {
                vector: 14,
                error: Some(mut error),
                address,
            }),
            End::Stop(UserStop::Exception {
                vector: 14,
                error: Some(found),
                address: at,
            }),
        ) => {
            if address >= Some(USER_END) {
                error = error & !1 | found & 1;
            }
            error == found && (address == at || liberty.operand)
        }
        (expected, found) => expected == found,
    };
    if !same {
        return format!("  native {expected:?}  translated {:?}\n", outcome.end);
    }
    line("rip", native.rip, outcome.rip);
    for number in 0..16 {
        let name = crate::layout::GPR[number];
        line(name, native.gpr[number], outcome.gpr[number]);
    }
    // All but RF, IF and the fixed ones.
    let mask = 0x24_4dd5 & !liberty.flags;
    line("rflags", native.rflags & mask, outcome.rflags & mask);
    if !liberty.extended {
        extended(native, &outcome.extended, &mut line);
    }
    if liberty.operand {
        return text;
    }
    let mut from = 0;
    for &(at, bytes) in &pages.ranges {
        let bytes = bytes.min(MEMORY - from);
        let mut found = vec![0; bytes];
        bench.read(at, &mut found).expect("mapped");
        let native = &native.memory[from..from + bytes];
        let pairs = native.chunks_exact(8).zip(found.chunks_exact(8));
        for (index, (left, right)) in pairs.enumerate().filter(|(_, (a, b))| a != b) {
            let word = |bytes: &[u8]| u64::from_le_bytes(std::array::from_fn(|byte| bytes[byte]));
            let name = format!("{:x}", at + 8 * index as u64);
            line(&name, word(left), word(right));
        }
        from += bytes;
    }
    text
}

fn extended(native: &Ended, found: &Extended, line: &mut impl FnMut(&str, u64, u64)) {
    let word = |at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&native.fx[at..at + bytes]);
        u64::from_le_bytes(word)
    };
    line("fcw", word(0, 2), found.fcw.into());
    line("fsw", word(2, 2), found.fsw.into());
    // The frame has the abridged tags.
    let tags = (0..8).filter(|tag| found.ftw >> (2 * tag) & 3 != 3);
    line("ftw", word(4, 1), tags.map(|tag| 1 << tag).sum());
    line("mxcsr", word(24, 4), found.mxcsr.into());
    for register in 0..8 {
        let at = 32 + 16 * register;
        let st = &found.st[register];
        let low = u64::from_le_bytes(std::array::from_fn(|byte| st[byte]));
        let high = u16::from_le_bytes([st[8], st[9]]);
        line(&format!("st{register}"), word(at, 8), low);
        line(&format!("st{register}.e"), word(at + 8, 2), high.into());
    }
    for (register, ymm) in found.ymm.iter().enumerate() {
        let places = [160, 168, FX_AVX, FX_AVX + 8];
        for (part, (place, value)) in places.into_iter().zip(ymm).enumerate() {
            let name = format!("ymm{register}.{part}");
            line(&name, word(place + 16 * register, 8), *value);
        }
    }
}

type Snippet = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A word of two pages that are mapped; nothing lies behind them.
const PLACE: u64 = 0x2_0000;
const PLACES: u64 = 0x2_2000;

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
    ("privileged: sysret", |asm| asm.sysretq()),
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

#[test]
fn snippets_end_as_on_the_host() {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    let mut process = Process::new();
    let mut failures = String::new();
    for (name, snippet) in SNIPPETS {
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
        match differences(&mut bench, &mut process, &case, liberty) {
            Ok(text) if text.is_empty() => {}
            Ok(text) | Err(text) => failures += &format!("{name}:\n{text}\n"),
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
}

#[test]
fn every_form_is_executed_or_undefined() {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    let mut random = crate::random::Random::new(crate::environment("TRAPLINE_ORACLE_SEED", 1));
    let mut failures = Vec::new();
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || !info.mode64() {
            continue;
        }
        let gpr = [DATA; 16];
        let mut builder = crate::operands::Builder::new(&mut random, gpr);
        let Some(instr) = builder.form(code) else {
            continue;
        };
        let Some(case) = form_case(&instr) else {
            continue;
        };
        if let Err(error) = bench.run(&case) {
            failures.push(format!("{code:?} `{instr}`: {error}"));
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// Registers that lead into the data, vectors of it, then `instr`.
fn form_case(instr: &Instruction) -> Option<Case> {
    let mut encoder = iced_x86::Encoder::new(64);
    let mut at = CODE;
    for register in 0..16u32 {
        let gpr = iced_x86::Register::RAX + register;
        let load = Instruction::with2(Code::Mov_r64_imm64, gpr, DATA).ok()?;
        at += encoder.encode(&load, at).ok()? as u64;
    }
    encoder.encode(instr, at).ok()?;
    let mut code = encoder.take_buffer();
    code.push(0xf4);
    Some(Case {
        code,
        load: CODE,
        map: vec![(DATA, 8 * PAGE)],
        mem: Vec::new(),
    })
}

#[test]
fn forms_end_as_on_the_host() {
    const ROUNDS: u64 = 1;
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    let mut process = Process::new();
    let table = crate::table::Table::new();
    let rounds = crate::environment("TRAPLINE_ORACLE_ROUNDS", ROUNDS);
    let mut random = crate::random::Random::new(crate::environment("TRAPLINE_ORACLE_SEED", 1));
    let mut contents = vec![0; 5 * PAGE as usize];
    let (mut cases, mut failures) = (0, Vec::new());
    let groups = [
        &table.integer,
        &table.stack,
        &table.string,
        &table.sse,
        &table.mmx,
        &table.x87,
        &table.avx,
        &table.late,
        &table.forbidden,
    ];
    for round in 0..rounds {
        for &code in groups.into_iter().flatten() {
            // The kernel answers some of these itself.
            if matches!(
                code.mnemonic(),
                Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Rdpmc
            ) {
                continue;
            }
            for word in contents.chunks_exact_mut(8) {
                word.copy_from_slice(&random.value().to_le_bytes());
            }
            let mut gpr: [u64; 16] = std::array::from_fn(|_| {
                if random.chance(60) {
                    DATA + random.below(4 * PAGE)
                } else {
                    random.value()
                }
            });
            gpr[4] = DATA + 0x1800;
            let flags = random.next() & 0x8d5 | 0x202;
            let mut builder = crate::operands::Builder::new(&mut random, gpr);
            let Some(instr) = builder.form(code) else {
                continue;
            };
            let Some((case, liberty)) = loaded(&instr, &gpr, flags, &contents) else {
                continue;
            };
            cases += 1;
            match differences(&mut bench, &mut process, &case, liberty) {
                Ok(text) if text.is_empty() => {}
                Ok(text) | Err(text) => {
                    failures.push(format!("{round} {code:?} `{instr}`:\n{text}"));
                }
            }
        }
    }
    eprintln!("{cases} cases, {} differ", failures.len());
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// A case that loads registers, flags and vectors, and runs `instr`.
fn loaded(
    instr: &Instruction,
    gpr: &[u64; 16],
    flags: u64,
    contents: &[u8],
) -> Option<(Case, Liberty)> {
    use Mnemonic::*;
    let mut encoder = iced_x86::Encoder::new(64);
    let mut at = CODE;
    let mut put = |instr: Result<Instruction, IcedError>| {
        at += encoder.encode(&instr.ok()?, at).ok()? as u64;
        Some(at)
    };
    let displ = |at: u64| iced_x86::MemoryOperand::with_displ(at, 8);
    for register in 0..16u32 {
        let ymm = iced_x86::Register::YMM0 + register;
        let from = displ(DATA + 32 * u64::from(register));
        put(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, ymm, from))?;
    }
    for _ in 0..2 {
        put(Instruction::with1(Code::Fild_m32int, displ(DATA + 0x204)))?;
    }
    let stack = DATA + 0x1800;
    put(Instruction::with2(
        Code::Mov_r64_imm64,
        iced_x86::Register::RSP,
        stack,
    ))?;
    put(Instruction::with1(Code::Pushq_imm32, flags as i32))?;
    put(Ok(Instruction::with(Code::Popfq)))?;
    for register in 0..16u32 {
        let target = iced_x86::Register::RAX + register;
        let value = gpr[register as usize];
        put(Instruction::with2(Code::Mov_r64_imm64, target, value))?;
    }
    put(Ok(*instr))?;
    let mut code = encoder.take_buffer();
    code.push(0xf4);
    let undefined = instr.rflags_undefined();
    let bits = [
        (RflagsBits::OF, 11),
        (RflagsBits::SF, 7),
        (RflagsBits::ZF, 6),
        (RflagsBits::AF, 4),
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
    ];
    let mut liberty = Liberty {
        flags: bits
            .into_iter()
            .filter(|(bit, _)| undefined & bit != 0)
            .map(|(_, at)| 1 << at)
            .sum(),
        // Which byte of a long operand a fault names differs between processors.
        operand: instr.memory_size().size() > 16
            || matches!(
                instr.mnemonic(),
                Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Fldenv | Fbld | Fbstp
            )
            || matches!(instr.code(), Code::Fld_m80fp | Code::Fstp_m80fp),
        extended: false,
    };
    match instr.mnemonic() {
        // Counts beyond one leave OF undefined, and those beyond the operand all.
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => liberty.flags = 0x8d5,
        // Faulting conversions and MMX accesses may have raised flags or entered MMX mode before.
        Vcvtps2ph => liberty.extended = true,
        _ => {}
    }
    let mmx = (0..instr.op_count()).any(|operand| instr.op_register(operand).is_mm());
    let features = instr.cpuid_features();
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    let x87 = features
        .iter()
        .any(|feature| matches!(feature, FPU | FPU287 | FPU387));
    liberty.extended |= mmx || x87 && liberty.operand;
    Some((
        Case {
            code,
            load: CODE,
            map: vec![(DATA, 5 * PAGE)],
            mem: vec![(DATA, contents.to_vec())],
        },
        liberty,
    ))
}
