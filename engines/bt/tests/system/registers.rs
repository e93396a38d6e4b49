//! System registers and the instructions about them: time-stamp counter, protection keys, sysenter and
//! sysexit, debug registers.

use engine_core::CpuState;
use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::msr::{STAR, rdmsr, wrmsr};
use crate::rig::{CODE, End, FREE, HANDLERS, Rig};

const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const SYSENTER_CS: u32 = 0x174;
const CR4_TSD: u64 = 1 << 2;
const CR4_PKE: u64 = 1 << 22;

/// Into RAX; clobbers RDX.
fn rdtsc(asm: &mut Asm) -> Built {
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)
}

#[test]
fn the_time_stamp_counter_can_be_set_and_adjusted() {
    let mut rig = Rig::long();
    let before = engine_core::clock::tsc();
    let end = rig.try_code(|asm| {
        wrmsr(asm, TSC, 1 << 50)?;
        rdtsc(asm)?;
        asm.mov(r8, rax)?;
        rdmsr(asm, TSC)?;
        asm.mov(r9, rax)?;
        asm.rdtscp()?;
        asm.shl(rdx, 32)?;
        asm.or(rax, rdx)?;
        asm.mov(r10, rax)?;
        rdmsr(asm, TSC_ADJUST)?;
        asm.mov(r11, rax)?;
        // A thousand back, and away again.
        asm.mov(rbx, 1u64 << 40)?;
        asm.sub(rax, rbx)?;
        asm.mov(rdx, rax)?;
        asm.shr(rdx, 32)?;
        asm.mov(ecx, TSC_ADJUST)?;
        asm.wrmsr()?;
        rdtsc(asm)?;
        asm.mov(r12, rax)?;
        wrmsr(asm, TSC_ADJUST, 0)?;
        rdtsc(asm)?;
        asm.mov(r13, rax)
    });
    let after = engine_core::clock::tsc();
    assert_eq!(end, End::Halt);
    let gpr = rig.after().gpr;
    let near = |value: u64, start: u64| (start..start + (after - before)).contains(&value);
    for register in [8, 9, 10] {
        assert!(near(gpr[register], 1 << 50), "{:x}", gpr[register]);
    }
    assert!(gpr[8] < gpr[9] && gpr[9] < gpr[10]);
    let adjust = gpr[11];
    assert!((before..after).contains(&(1u64 << 50).wrapping_sub(adjust)));
    assert!(near(gpr[12], (1 << 50) - (1 << 40)), "{:x}", gpr[12]);
    assert!((before..after).contains(&gpr[13]));
}

#[test]
fn rdtsc_is_ring_0s_alone_where_it_says_so() {
    for (code, tsd, end) in [
        (&[0x0fu8, 0x31, 0xf4][..], 0, 2),
        (&[0x0f, 0x31, 0xf4], CR4_TSD, 0),
        (&[0x0f, 0x01, 0xf9, 0xf4], 0, 3),
        (&[0x0f, 0x01, 0xf9, 0xf4], CR4_TSD, 0),
    ] {
        let mut rig = Rig::long().in_ring_3();
        rig.state.cr4 |= tsd;
        rig.bytes(code);
        // Either the instruction or the hlt behind it.
        assert_eq!(rig.run(), End::Vector(13));
        assert_eq!(rig.read(rig.after().gpr[4] + 8), CODE + end);
    }
}

#[test]
fn rights_of_protection_keys_are_read_and_written_by_rules() {
    let rdpkru = [0x0f, 0x01, 0xee];
    let wrpkru = [0x0f, 0x01, 0xef];
    let mut rig = Rig::long();
    for code in [rdpkru, wrpkru] {
        assert_eq!(rig.try_code(|asm| asm.db(&code)), End::Vector(6));
    }
    rig.state.cr4 |= CR4_PKE;
    for (code, index, high, good) in [
        (rdpkru, 0, 5, true),
        (rdpkru, 1, 0, false),
        (rdpkru, 1 << 32, 0, true),
        (wrpkru, 0, 0, true),
        (wrpkru, 0, 1, false),
        (wrpkru, 1, 0, false),
    ] {
        (rig.state.gpr[1], rig.state.gpr[2]) = (index, high);
        let expected = if good { End::Halt } else { End::Vector(13) };
        assert_eq!(rig.try_code(|asm| asm.db(&code)), expected);
    }
    let end = rig.try_code(|asm| {
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        asm.mov(eax, 0x8765_4321u32)?;
        asm.db(&wrpkru)?;
        asm.mov(rax, -1i64)?;
        asm.mov(rdx, -1i64)?;
        asm.db(&rdpkru)?;
        asm.mov(rdi, rax)?;
        asm.mov(rsi, rdx)?;
        // OSPKE follows CR4.
        asm.mov(eax, 7)?;
        asm.cpuid()
    });
    assert_eq!(end, End::Halt);
    let gpr = rig.after().gpr;
    assert_eq!((gpr[7], gpr[6]), (0x8765_4321, 0));
    assert_eq!(gpr[1] >> 3 & 3, 3);
    rig.state.cr4 &= !CR4_PKE;
    assert_eq!(
        rig.try_code(|asm| {
            asm.mov(eax, 7)?;
            asm.xor(ecx, ecx)?;
            asm.cpuid()
        }),
        End::Halt
    );
    assert_eq!(rig.after().gpr[1] >> 3 & 3, 1);
}

#[test]
fn a_key_that_is_locked_again_binds_translated_loops() {
    let mut rig = Rig::long().in_ring_3();
    rig.state.cr4 |= CR4_PKE;
    // The second large page has key 1.
    rig.word(crate::rig::TABLES + 0x2008, 0x20_0087 | 1 << 59);
    let end = rig.try_code(|asm| {
        asm.mov(ebx, 0x20_0000)?;
        asm.mov(esi, 1000)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.inc(dword_ptr(rbx))?;
        asm.dec(esi)?;
        asm.jnz(again)?;
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        // Writes to key 1 no longer.
        asm.mov(eax, 8)?;
        asm.db(&[0x0f, 0x01, 0xef])?;
        asm.mov(edi, dword_ptr(rbx))?;
        asm.inc(dword_ptr(rbx))
    });
    assert_eq!(
        (end, rig.error(), rig.after().gpr[7]),
        (End::Vector(14), 0x27, 1000)
    );
}

#[test]
fn sysenter_and_sysexit_go_there_and_back_in_32_bit_code() {
    let mut rig = Rig::protected();
    // Descriptors don't matter, their selectors do: 0x18 for code, then stack, then ring 3's.
    rig.put(FREE, &{
        // mov ebx, esp; mov esi, cs; mov edi, ss; mov ecx, 0x35000; mov edx, FREE + 0x100; sysexit
        let mut code = vec![0x89, 0xe3, 0x8c, 0xce, 0x8c, 0xd7, 0xb9];
        code.extend(0x3_5000u32.to_le_bytes());
        code.push(0xba);
        code.extend((FREE as u32 + 0x100).to_le_bytes());
        code.extend([0x0f, 0x35]);
        code
    });
    // In ring 3: mov eax, cs; mov ecx, ss; mov edx, esp; cli
    rig.put(FREE + 0x100, &[0x8c, 0xc8, 0x8c, 0xd1, 0x89, 0xe2, 0xfa]);
    rig.state.rflags |= 0x200;
    let end = rig.try_code(|asm| {
        for (number, value) in [(0, 0x19u32), (1, 0x3_4000), (2, FREE as u32)] {
            asm.mov(ecx, SYSENTER_CS + number)?;
            asm.mov(eax, value)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()?;
        }
        asm.db(&[0x0f, 0x34])
    });
    assert_eq!(end, End::Vector(13));
    let state = rig.after();
    assert_eq!(
        (state.gpr[3], state.gpr[6], state.gpr[7]),
        (0x3_4000, 0x18, 0x20)
    );
    assert_eq!(
        (state.gpr[0], state.gpr[1], state.gpr[2]),
        (0x2b, 0x33, 0x3_5000)
    );
    // sysenter has cleared IF, and sysexit doesn't set it.
    assert_eq!(rig.read_32(state.gpr[4] + 12) & 0x200, 0);
}

#[test]
fn sysenter_and_sysexit_of_64_bit_code_and_their_faults() {
    let mut rig = Rig::long();
    rig.put(FREE, &[0xf4]);
    let end = rig.try_code(|asm| {
        wrmsr(asm, SYSENTER_CS, 0x18)?;
        wrmsr(asm, SYSENTER_CS + 1, 0x3_4000)?;
        wrmsr(asm, SYSENTER_CS + 2, FREE)?;
        asm.db(&[0x0f, 0x34])
    });
    assert_eq!(end, End::Halt);
    let state = rig.after();
    assert_eq!((state.gpr[4], state.rip), (0x3_4000, FREE + 1));
    let segments = [CpuState::CS, CpuState::SS].map(|index| state.segments[index].selector);
    assert_eq!(segments, [0x18, 0x20]);
    // Without a selector neither is allowed, nor is sysexit from ring 3 or to nowhere.
    let mut rig = Rig::long();
    for code in [&[0x0fu8, 0x34][..], &[0x0f, 0x35], &[0x48, 0x0f, 0x35]] {
        rig.expect(13, 0, |asm| asm.db(code));
    }
    rig.expect(13, 0, |asm| {
        wrmsr(asm, SYSENTER_CS, 0x18)?;
        asm.mov(rdx, 1u64 << 47)?;
        asm.xor(ecx, ecx)?;
        asm.db(&[0x48, 0x0f, 0x35])
    });
    let mut rig = Rig::real();
    assert_eq!(rig.try_code(|asm| asm.db(&[0x0f, 0x34])), End::Vector(13));
}

#[test]
fn instructions_of_every_processor_are_known_and_refused_where_they_must_be() {
    // wbnoinvd was wbinvd before; no performance counter is there.
    let mut rig = Rig::long();
    assert_eq!(rig.try_code(|asm| asm.db(&[0xf3, 0x0f, 0x09])), End::Halt);
    rig.expect(13, 0, |asm| asm.rdpmc());
    for code in [
        &[0x0fu8, 0x01, 0xc8][..], // monitor
        &[0x0f, 0x01, 0xc9],       // mwait
        &[0x0f, 0x01, 0xc1],       // vmcall
        &[0x0f, 0x01, 0xd9],       // vmmcall
        &[0x0f, 0xaa],             // rsm
        &[0x0f, 0x37],             // getsec
        &[0x0f, 0x01, 0xfd],       // rdpru
        &[0x0f, 0x0e],             // femms
        &[0xc7, 0xf8, 0, 0, 0, 0], // xbegin
    ] {
        assert_eq!(
            rig.try_code(|asm| asm.db(code)),
            End::Vector(6),
            "{code:x?}"
        );
    }
}

#[test]
fn sysret_traps_at_once_where_it_sets_tf() {
    let mut rig = Rig::long().in_ring_3();
    let ring_0 = Rig::long();
    rig.state.segments = ring_0.state.segments;
    let end = rig.try_code(|asm| {
        wrmsr(asm, STAR, 0x20 << 48 | 0x18 << 32)?;
        asm.mov(ecx, FREE as i32)?;
        asm.mov(r11d, 0x302)?;
        asm.sysretq()
    });
    assert_eq!(end, End::Vector(1));
    let state = rig.after();
    assert_eq!(rig.read(state.gpr[4]), FREE);
    assert_eq!(rig.read(state.gpr[4] + 8), 0x33);
}

#[test]
fn debug_registers_keep_what_they_have() {
    let mut rig = Rig::long();
    let end = rig.try_code(|asm| {
        asm.mov(rax, 0xffff_ffffu64)?;
        asm.mov(dr6, rax)?;
        asm.mov(rbx, dr6)?;
        asm.xor(ecx, ecx)?;
        asm.mov(dr6, rcx)?;
        asm.mov(rcx, dr6)?;
        asm.mov(rdx, -1i64)?;
        asm.mov(dr3, rdx)?;
        asm.mov(rsi, dr3)
    });
    assert_eq!(end, End::Halt);
    let gpr = rig.after().gpr;
    assert_eq!(
        (gpr[3], gpr[1], gpr[6]),
        (0xffff_efff, 0xffff_0ff0, u64::MAX)
    );
    for number in [6, 7] {
        rig.expect(13, 0, |asm| {
            asm.mov(rax, 1u64 << 32)?;
            asm.mov(if number == 6 { dr6 } else { dr7 }, rax)
        });
    }
}

#[test]
fn interrupts_of_real_mode_push_16_bits_and_come_back() {
    let mut rig = Rig::real();
    // add bx, 5; iret
    rig.put(HANDLERS + 0x400, &[0x83, 0xc3, 0x05, 0xcf]);
    rig.put(
        4 * 0x40,
        &[0, 4, (HANDLERS >> 4) as u8, (HANDLERS >> 12) as u8],
    );
    rig.state.rflags = 0x202;
    let end = rig.try_code(|asm| {
        asm.stc()?;
        asm.int(0x40)?;
        asm.pushf()?;
        asm.pop(cx)?;
        asm.int(0x40)
    });
    assert_eq!(end, End::Halt);
    let state = rig.after();
    assert_eq!(
        (state.gpr[3], state.gpr[1] & 0x201, state.gpr[4]),
        (10, 0x201, 0xf000)
    );
    assert_eq!(state.segments[CpuState::CS].base, CODE);
}

#[test]
fn an_unmasked_x87_exception_shows_the_guests_opcode_and_address() {
    use crate::rig::{CODE, End, FREE, Rig};
    let mut rig = Rig::long();
    // Zero divide unmasked.
    rig.put(FREE, &0x37bu16.to_le_bytes());
    let mut ahead = Vec::new();
    // fninit; fldcw [FREE]; fld1
    ahead.extend([0xdb, 0xe3, 0xd9, 0x2c, 0x25, 0, 0, 4, 0, 0xd9, 0xe8]);
    // fdiv dword [FREE + 0x10], with a prefix; fnstenv [FREE + 0x20]
    let mut code = ahead.clone();
    code.extend([0x3e, 0xd8, 0x34, 0x25, 0x10, 0, 4, 0]);
    code.extend([0xd9, 0x34, 0x25, 0x20, 0, 4, 0, 0xf4]);
    rig.bytes(&code);
    assert_eq!(rig.run(), End::Halt);
    assert_eq!(rig.read(FREE + 0x24) & 0xbfff, 0xb884);
    assert_eq!(
        u64::from(rig.read_32(FREE + 0x2c)),
        CODE + ahead.len() as u64
    );
    // Some processors keep no opcode.
    let opcode = rig.read_32(FREE + 0x30) >> 16;
    assert!(matches!(opcode, 0 | 0x34), "{opcode:x}");
}

#[test]
fn key_rights_are_a_component_of_xsave() {
    use crate::rig::{FREE, Rig};
    const PKRU: u64 = 1 << 9;
    if engine_core::cpuid::pinned(0xd, 0)[0] == 0 {
        eprintln!("skipped: no XSAVE");
        return;
    }
    let wrpkru = |asm: &mut CodeAssembler, rights: i32| {
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        asm.mov(eax, rights)?;
        asm.wrpkru()
    };
    let rdpkru = |asm: &mut CodeAssembler, to: AsmRegister64| {
        asm.xor(ecx, ecx)?;
        asm.rdpkru()?;
        asm.mov(to, rax)
    };
    let all = |asm: &mut CodeAssembler| {
        asm.mov(eax, -1)?;
        asm.mov(edx, -1)
    };
    let mut rig = Rig::long();
    // OSXSAVE and PKE.
    rig.state.cr4 |= 1 << 18 | 1 << 22;
    let end = rig.try_code(|asm| {
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        asm.mov(eax, 0x207)?;
        asm.xsetbv()?;
        asm.mov(edi, FREE as u32)?;
        wrpkru(asm, 0x55)?;
        all(asm)?;
        asm.xsave(ptr(rdi))?;
        asm.xsavec(ptr(rdi + 0x1000))?;
        // Without AVX it lies where that would.
        asm.mov(eax, 0x203)?;
        asm.xsavec(ptr(rdi + 0x2000))?;
        asm.mov(ecx, 1)?;
        asm.xgetbv()?;
        asm.mov(r8, rax)?;
        for (area, register) in [(0, r9), (0x1000, r10), (0x2000, r11)] {
            wrpkru(asm, 0)?;
            all(asm)?;
            asm.xrstor(ptr(rdi + area))?;
            rdpkru(asm, register)?;
        }
        // In its initial state, and not asked for.
        asm.and(qword_ptr(rdi + 512), !PKRU as i32)?;
        all(asm)?;
        asm.xrstor(ptr(rdi))?;
        rdpkru(asm, r12)?;
        wrpkru(asm, 0x44)?;
        asm.mov(eax, 7)?;
        asm.xrstor(ptr(rdi))?;
        rdpkru(asm, r13)
    });
    assert_eq!(end, End::Halt);
    let state = rig.after();
    assert_eq!(state.gpr[8] & PKRU, PKRU);
    assert_eq!(state.gpr[9..14], [0x55, 0x55, 0x55, 0, 0x44]);
    let at = u64::from(engine_core::cpuid::pkru_at());
    assert_eq!(rig.read(FREE + at), 0x55);
    assert_eq!(rig.read(FREE + 0x1000 + 832), 0x55);
    assert_eq!(rig.read(FREE + 0x2000 + 576), 0x55);
    assert_eq!(rig.read(FREE + 0x1000 + 520), 1 << 63 | 0x207);
    // What XCR0 doesn't have is not there to be restored.
    let mut rig = Rig::long();
    rig.state.cr4 |= 1 << 18;
    let end = rig.try_code(|asm| {
        asm.mov(edi, FREE as u32)?;
        asm.mov(qword_ptr(rdi + 512), PKRU as i32)?;
        all(asm)?;
        asm.xrstor(ptr(rdi))
    });
    assert_eq!(end, End::Vector(13));
}
