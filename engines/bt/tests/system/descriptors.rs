//! Descriptors and what loading them checks and changes; code at the end of its segment.

use engine_core::CpuState;
use iced_x86::code_asm::*;

use crate::rig::{
    CODE, CS_32, DATA, End, FREE, GDT, HANDLERS, IDT, LDT, Rig, SPARE, TSS_2, gate, segment,
    system_descriptor,
};

const AT: u64 = GDT + SPARE as u64;

#[test]
fn a_fault_met_during_a_delivery_says_whether_the_program_asked_for_it() {
    for (code, error) in [
        // An invalid opcode without a present gate, an int 6.
        (&[0x0fu8, 0x0b][..], 0x33),
        (&[0xcd, 0x06], 0x32),
        // int1 counts as hardware's.
        (&[0xf1], 0xb),
        (&[0xcc], 0x1a),
    ] {
        let mut rig = Rig::long();
        for vector in [1, 3, 6] {
            let absent = rig.read(IDT + 16 * vector) & !(1 << 47);
            rig.word(IDT + 16 * vector, absent);
        }
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(11), "{code:x?}");
        assert_eq!(rig.error(), error, "{code:x?}");
        // The handler's code segment isn't there.
        let mut rig = Rig::long();
        for vector in [1, 3, 6] {
            let target = HANDLERS + 16 * vector;
            rig.word(IDT + 16 * vector, gate(0x8e, SPARE, target));
        }
        rig.word(AT, 0x00af_1b00_0000_ffff);
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(11), "{code:x?}");
        assert_eq!(rig.error(), u32::from(SPARE) | error & 1, "{code:x?}");
    }
}

#[test]
fn loading_a_descriptor_marks_it_accessed() {
    let data = 0x00cf_9200_0000_ffff;
    let code = 0x00cf_9a00_0000_ffff;
    let mut rig = Rig::protected();
    rig.word(AT, data);
    rig.word(AT + 8, code);
    let end = rig.try_code(|asm| {
        asm.mov(eax, i32::from(SPARE))?;
        // lar looks without touching.
        asm.lar(ebx, eax)?;
        asm.mov(ecx, dword_ptr(AT + 4))?;
        asm.mov(fs, eax)?;
        asm.lar(edx, eax)?;
        // Data by ss, code by a far jump, each from its own descriptor.
        asm.mov(ss, eax)
    });
    assert_eq!(end, End::Halt);
    let state = rig.after();
    assert_eq!(state.gpr[3] as u32, 0x00cf_9200);
    assert_eq!(state.gpr[1] as u32, 0x00cf_9200);
    assert_eq!(state.gpr[2] as u32, 0x00cf_9300);
    assert_eq!(state.segments[CpuState::FS].attributes, 0xc093);
    assert_eq!(rig.byte(AT + 5), 0x93);

    let far_jump = |target: u32| {
        let mut bytes = vec![0xea];
        bytes.extend(target.to_le_bytes());
        bytes.extend((SPARE + 8).to_le_bytes());
        bytes
    };
    assert_eq!(
        rig.try_code(|asm| asm.db(&far_jump(CODE as u32 + 7))),
        End::Halt
    );
    assert_eq!(rig.byte(AT + 13), 0x9b);
    // In the LDT, by a return, and by an exception.
    rig.word(LDT, code);
    rig.state.ldtr = segment(SPARE + 16, LDT, 0xff, 0x82);
    let end = rig.try_code(|asm| {
        asm.push(4)?;
        asm.push(CODE as i32 + 8)?;
        asm.retf()
    });
    assert_eq!((end, rig.byte(LDT + 5)), (End::Halt, 0x9b));
    rig.word(AT + 8, code);
    rig.word(IDT + 8 * 6, gate(0x8e, SPARE + 8, HANDLERS + 16 * 6));
    assert_eq!(rig.try_code(|asm| asm.ud2()), End::Vector(6));
    assert_eq!(rig.byte(AT + 13), 0x9b);
}

#[test]
fn a_descriptor_that_can_not_be_marked_is_not_loaded() {
    let mut rig = Rig::long();
    // The GDT's pages are read-only, and ring 0 heeds it.
    rig.word(crate::rig::TABLES + 0x2000, 0x81);
    rig.state.cr3 = crate::rig::TABLES;
    rig.state.gpr[4] = 0x20_8000;
    rig.word(AT, 0x00cf_9200_0000_ffff);
    rig.expect(14, 3, |asm| {
        asm.mov(eax, i32::from(SPARE))?;
        asm.mov(fs, eax)
    });
    let state = rig.after();
    assert_eq!(
        (state.cr2, state.segments[CpuState::FS].selector),
        (AT + 5, DATA)
    );
    rig.word(AT, 0x00cf_9300_0000_ffff);
    let end = rig.try_code(|asm| {
        asm.mov(eax, i32::from(SPARE))?;
        asm.mov(fs, eax)
    });
    assert_eq!(end, End::Halt);
}

#[test]
fn a_64_bit_code_segment_of_32_bits_is_none() {
    let mut rig = Rig::long();
    rig.word(AT, 0x00ef_9b00_0000_ffff);
    rig.expect(13, SPARE.into(), |asm| {
        asm.push(i32::from(SPARE))?;
        asm.push(CODE as i32)?;
        asm.db(&[0x48, 0xcb])
    });
    // Outside IA-32e mode L says nothing.
    let mut rig = Rig::protected();
    rig.word(AT, 0x00ef_9b00_0000_ffff);
    let end = rig.try_code(|asm| {
        asm.push(i32::from(SPARE))?;
        asm.push(CODE as i32 + 8)?;
        asm.retf()
    });
    assert_eq!(end, End::Halt);
}

#[test]
fn real_mode_knows_no_descriptors() {
    for code in [
        &[0x0fu8, 0x00, 0xc0][..], // sldt
        &[0x0f, 0x00, 0xc8],       // str
        &[0x0f, 0x00, 0xd0],       // lldt
        &[0x0f, 0x00, 0xd8],       // ltr
        &[0x0f, 0x00, 0xe0],       // verr
        &[0x0f, 0x00, 0xe8],       // verw
        &[0x0f, 0x02, 0xc0],       // lar
        &[0x0f, 0x03, 0xc0],       // lsl
        &[0x63, 0xc0],             // arpl
    ] {
        let mut rig = Rig::real();
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(6), "{code:x?}");
    }
}

#[test]
fn lar_and_lsl_know_which_system_descriptors_they_may_show() {
    for long in [false, true] {
        let mut rig = if long { Rig::long() } else { Rig::protected() };
        for kind in 0..16u64 {
            rig.word(AT, system_descriptor(0x80 | kind, 0, 0x1234));
            rig.word(AT + 8, 0);
            let end = rig.try_code(|asm| {
                asm.mov(eax, i32::from(SPARE))?;
                asm.lar(ebx, eax)?;
                asm.setz(cl)?;
                asm.lsl(edx, eax)?;
                asm.setz(ch)
            });
            assert_eq!(end, End::Halt);
            let wide = [2, 9, 0xb].contains(&kind);
            let gates = [5, 4, 0xc].contains(&kind);
            let narrow = [1, 3].contains(&kind);
            let (lar, lsl) = if long {
                (wide || kind == 0xc, wide)
            } else {
                (wide || gates || narrow, wide || narrow)
            };
            let state = rig.after();
            let found = (state.gpr[1] & 1 == 1, state.gpr[1] >> 8 & 1 == 1);
            assert_eq!(found, (lar, lsl), "type {kind:x}, long {long}");
            if lar {
                assert_eq!(state.gpr[3], 0x8000 | kind << 8);
            }
            if lsl {
                assert_eq!(state.gpr[2], 0x1234);
            }
        }
    }
}

#[test]
fn a_16_bit_tss_can_be_loaded_outside_ia_32e_mode() {
    for (long, kind, good) in [
        (false, 0x81, true),
        (false, 0x89, true),
        (false, 0x83, false),
        (true, 0x81, false),
        (true, 0x89, true),
        (true, 0x8b, false),
    ] {
        let mut rig = if long { Rig::long() } else { Rig::protected() };
        rig.word(AT, system_descriptor(kind, TSS_2, 0x67));
        rig.word(AT + 8, 0);
        let end = rig.try_code(|asm| {
            asm.mov(eax, i32::from(SPARE))?;
            asm.ltr(ax)
        });
        let expected = if good { End::Halt } else { End::Vector(13) };
        assert_eq!(end, expected, "{kind:x} {long}");
        if good {
            assert_eq!(u64::from(rig.byte(AT + 5)), kind | 2);
        }
    }
}

#[test]
fn code_ends_with_its_segment() {
    // inc ax up to the limit: the instruction that would begin behind it faults, and so does one
    // that would reach beyond.
    let mut rig = Rig::real();
    rig.put(CODE + 0xff00, &[0x40; 0x100]);
    rig.bytes(&[0xe9, 0xfd, 0xfe]);
    assert_eq!(rig.run(), End::Vector(13));
    let state = rig.after();
    assert_eq!(state.gpr[0], 0x100);
    let frame = state.gpr[4] + state.segments[CpuState::SS].base;
    // IP has 16 bits in the frame.
    assert_eq!(rig.read(frame) as u16, 0);
    rig.put(CODE + 0xfffe, &[0xb8, 1, 2]);
    assert_eq!(rig.run(), End::Vector(13));
    assert_eq!(rig.after().gpr[0], 0xfe);
    assert_eq!(rig.read(frame) as u16, 0xfffe);
    // In the middle of a page, with other limits one after the other.
    let mut rig = Rig::protected();
    for limit in [CODE as u32 + 9, CODE as u32 + 5, CODE as u32 + 12] {
        rig.state.segments[CpuState::CS] = segment(CS_32, 0, limit, 0x409b);
        rig.bytes(&[0x40; 64]);
        assert_eq!(rig.run(), End::Vector(13));
        let state = rig.after();
        assert_eq!(state.gpr[0], u64::from(limit) - CODE + 1);
        assert_eq!(rig.error(), 0);
        assert_eq!(rig.read_32(state.gpr[4] + 4), limit + 1);
    }
}

#[test]
fn a_gate_to_nowhere_faults_at_its_cause() {
    let mut rig = Rig::long();
    rig.word(IDT + 16 * 6 + 8, 0x8000);
    rig.bytes(&[0x0f, 0x0b]);
    assert_eq!(rig.run(), End::Vector(13));
    assert_eq!(rig.error(), 1);
    assert_eq!(rig.read(rig.after().gpr[4] + 8), CODE);
}

#[test]
fn a_task_may_ask_for_a_trap_at_its_start() {
    let mut rig = Rig::protected();
    rig.word(AT, system_descriptor(0x89, TSS_2, 0x67));
    let mut put = |at: u64, value: u32| rig.put(TSS_2 + at, &value.to_le_bytes());
    put(0x20, FREE as u32);
    put(0x24, 2);
    put(0x38, 0x3_4000);
    put(0x4c, CS_32.into());
    for at in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        put(at, DATA.into());
    }
    put(0x64, 0x68 << 16 | 1);
    rig.put(FREE, &[0xf4]);
    let end = rig.try_code(|asm| {
        asm.mov(eax, 0x3ff)?;
        asm.mov(dr7, eax)?;
        let mut bytes = vec![0x9a, 0, 0, 0, 0];
        bytes.extend(SPARE.to_le_bytes());
        asm.db(&bytes)
    });
    assert_eq!(end, End::Vector(1));
    let state = rig.after();
    // Nothing of the task has run; it has no trap bit of its own in DR6 but BT.
    assert_eq!(rig.read_32(state.gpr[4]), FREE as u32);
    rig.put(HANDLERS + 17, &[0x0f, 0x21, 0xf0, 0x0f, 0x21, 0xfb, 0xf4]);
    rig.go_on();
    let state = rig.after();
    assert_eq!(state.gpr[0] as u32, 0xffff_8ff0);
    assert_eq!(state.gpr[3] as u32, 0x6aa);
}
