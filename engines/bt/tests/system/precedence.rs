//! Which exception comes when several are due, and what is left where none is: null selectors, stacks
//! of IA-32e mode, instructions that aren't known here.

use engine_core::CpuState;
use iced_x86::code_asm::{eax, ss};

use crate::rig::{
    CODE, CS_32, DATA, End, FREE, GDT, IDT, Rig, SPARE, STACK, USER_CS_32, USER_CS_64, USER_DATA,
    gate, segment, system_descriptor,
};

const AT: u64 = GDT + SPARE as u64;
const HLT: u8 = 0xf4;

/// 64-bit mode in ring 0, with pages that ring 3 may use.
fn shared_pages() -> Rig {
    let inner = Rig::long().state.segments;
    let mut rig = Rig::long().in_ring_3();
    rig.state.segments = inner;
    rig
}

/// Puts a frame at the stack's top, of words of `size` bytes.
fn frame(rig: &mut Rig, size: usize, words: &[u64]) {
    for (number, word) in words.iter().enumerate() {
        let at = rig.state.gpr[4] + (number * size) as u64;
        rig.put(at, &word.to_le_bytes()[..size]);
    }
}

#[test]
fn a_return_to_less_privilege_leaves_null_selectors_without_an_rpl() {
    let stack = STACK - 0x100;
    let iret = |cs: u16| [FREE, cs.into(), 2, stack, USER_DATA.into()];
    let far = |cs: u16| [FREE, cs.into(), stack, USER_DATA.into()];
    for (mut rig, size, words, code) in [
        (Rig::protected(), 4, &iret(USER_CS_32)[..], &[0xcfu8][..]),
        (Rig::protected(), 4, &far(USER_CS_32), &[0xcb]),
        (shared_pages(), 8, &iret(USER_CS_64), &[0x48, 0xcf]),
        (shared_pages(), 8, &far(USER_CS_64), &[0x48, 0xcb]),
    ] {
        rig.state.gpr[4] = STACK - 0x200;
        frame(&mut rig, size, words);
        rig.put(FREE, &[HLT]);
        for (index, selector) in [(CpuState::DS, 1), (CpuState::FS, 2), (CpuState::GS, 3)] {
            rig.state.segments[index] = segment(selector, 0, 0, 0);
        }
        rig.bytes(code);
        // Once more by what the first time has left behind.
        for _ in 0..2 {
            assert_eq!(rig.run(), End::Vector(13), "{code:x?}");
            let state = rig.after();
            for index in [CpuState::DS, CpuState::FS, CpuState::GS] {
                assert_eq!(state.segments[index].selector, 0, "{code:x?}");
            }
        }
    }
}

/// SDM 2A, JMP, CALL, INT n, IRET; 2B, RET: privilege first, presence behind it.
#[test]
fn code_that_may_not_be_entered_may_as_well_be_absent() {
    // Absent, of ring 3.
    let absent = 0x00cf_7b00_0000_ffff;
    let mut far_jump = vec![0xea, 0, 0, 4, 0];
    far_jump.extend(SPARE.to_le_bytes());
    let mut through_gate = vec![0x9a, 0, 0, 0, 0];
    through_gate.extend((SPARE + 8).to_le_bytes());
    let words = [FREE, SPARE.into(), 2];
    for code in [
        &far_jump[..],
        &through_gate,
        &[0xcf],
        &[0xcb],
        &[0xcd, 0x21],
    ] {
        let mut rig = Rig::protected();
        rig.word(AT, absent);
        rig.word(AT + 8, gate(0x8c, SPARE, FREE));
        rig.word(IDT + 8 * 0x21, gate(0x8e, SPARE, FREE));
        rig.state.gpr[4] = STACK - 0x100;
        frame(&mut rig, 4, &words);
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(13), "{code:x?}");
        assert_eq!(rig.error(), u32::from(SPARE), "{code:x?}");
        // Of ring 0 it is missed.
        rig.word(AT, 0x00cf_1b00_0000_ffff);
        assert_eq!(rig.run(), End::Vector(11), "{code:x?}");
        assert_eq!(rig.error(), u32::from(SPARE), "{code:x?}");
    }
}

/// SDM 2A, IRET; 2B, RET: "if the return instruction pointer is not within the return code segment
/// limit" is asked last.
#[test]
fn a_return_judges_its_stack_before_its_target() {
    // 4 KiB of code of ring 3, not accessed.
    let code = 0x0040_fa00_0000_0fff;
    let selector = u64::from(SPARE | 3);
    for (instruction, words) in [
        (0xcf, &[FREE, selector, 2, 0, u64::from(DATA | 3)][..]),
        (0xcb, &[FREE, selector, 0, u64::from(DATA | 3)]),
    ] {
        let mut rig = Rig::protected();
        rig.word(AT, code);
        rig.state.gpr[4] = STACK - 0x100;
        frame(&mut rig, 4, words);
        rig.bytes(&[instruction]);
        assert_eq!(rig.run(), End::Vector(13));
        assert_eq!(rig.error(), u32::from(DATA));
        // A good stack, of a target that is none.
        let last = 4 * (words.len() as u64 - 1);
        let top = rig.state.gpr[4];
        rig.put(top + last, &USER_DATA.to_le_bytes());
        assert_eq!(rig.run(), End::Vector(13));
        assert_eq!(rig.error(), 0);
        // Nothing has been loaded, so nothing has been accessed.
        assert_eq!(rig.byte(AT + 5), 0xfa);
    }
}

/// SDM 2B, SYSRET: #UD outside of 64-bit mode, whatever the ring; SDM 2C, XSETBV: #UD without
/// CR4.OSXSAVE.
#[test]
fn what_is_not_known_is_undefined_in_every_ring() {
    for code in [&[0x0fu8, 0x07][..], &[0x0f, 0x01, 0xd1]] {
        for mut rig in [Rig::protected(), Rig::protected().in_ring_3()] {
            rig.bytes(code);
            assert_eq!(rig.run(), End::Vector(6), "{code:x?}");
        }
    }
    // Known, and of ring 0.
    let mut rig = Rig::long().in_ring_3();
    rig.bytes(&[0x48, 0x0f, 0x07]);
    assert_eq!(rig.run(), End::Vector(13));
    rig.state.cr4 |= 1 << 18;
    rig.bytes(&[0x0f, 0x01, 0xd1]);
    assert_eq!(rig.run(), End::Vector(13));
    // Without system calls it isn't.
    let mut rig = Rig::long().in_ring_3();
    rig.state.efer &= !1;
    rig.bytes(&[0x48, 0x0f, 0x07]);
    assert_eq!(rig.run(), End::Vector(6));
}

/// SDM 2A, LLDT, LTR.
#[test]
fn lldt_and_ltr_judge_the_whole_descriptor() {
    let (lldt, ltr): (&[u8], &[u8]) = (&[0x0f, 0x00, 0xd0], &[0x0f, 0x00, 0xd8]);
    let absent = |kind| system_descriptor(kind, FREE, 0xff);
    for (code, low, vector) in [
        (lldt, absent(0x02), 11),
        (ltr, absent(0x09), 11),
        // Not what is wanted, present or not.
        (lldt, absent(0x09), 13),
        (ltr, absent(0x02), 13),
        (ltr, absent(0x0b), 13),
    ] {
        for mut rig in [Rig::protected(), Rig::long()] {
            rig.word(AT, low);
            rig.state.gpr[0] = SPARE.into();
            rig.bytes(code);
            assert_eq!(rig.run(), End::Vector(vector), "{code:x?} {low:x}");
            assert_eq!(rig.error(), u32::from(SPARE));
        }
    }
    for (code, kind) in [(lldt, 0x82), (ltr, 0x89)] {
        let mut rig = Rig::long();
        rig.word(AT, system_descriptor(kind, FREE, 0xff));
        rig.state.gpr[0] = SPARE.into();
        let mut bytes = code.to_vec();
        bytes.push(HLT);
        rig.bytes(&bytes);
        let good = rig.state.gdtr.limit;
        for (upper, limit, expected) in [
            // A type in the upper half, a base that isn't canonical, no upper half.
            (1 << 40, good, End::Vector(13)),
            (0x8000, good, End::Vector(13)),
            (0, SPARE + 7, End::Vector(13)),
            (0, good, End::Halt),
        ] {
            rig.word(AT + 8, upper);
            rig.state.gdtr.limit = limit;
            assert_eq!(rig.run(), expected, "{code:x?} {upper:x} {limit:x}");
        }
    }
}

/// 64-bit code needs no SS, other code does (SDM 3A 5.4.1.1: a null selector there faults when used).
#[test]
fn a_null_stack_is_good_for_64_bit_code_alone() {
    let compatible = [FREE, CS_32.into()];
    let push = |rig: &mut Rig| rig.put(FREE, &[0x50, HLT]);
    // Loaded by an instruction.
    let mut rig = Rig::long();
    push(&mut rig);
    rig.state.gpr[4] = STACK - 0x100;
    frame(&mut rig, 8, &compatible);
    rig.bytes(&[0x31, 0xc0, 0x8e, 0xd0, 0x48, 0xcb]);
    assert_eq!(rig.run(), End::Vector(12));
    assert_eq!(rig.error(), 0);
    // By a return to 64-bit code, which pushes and goes on to other code.
    let mut rig = Rig::long();
    push(&mut rig);
    let top = STACK - 0x100;
    rig.state.gpr[4] = top - 0x100;
    let target = CODE + 0x100;
    let cs = rig.state.segments[CpuState::CS].selector;
    frame(&mut rig, 8, &[target, cs.into(), 2, top, 0]);
    rig.put(target, &[0x50, 0x58, 0x48, 0xcb]);
    rig.bytes(&[0x48, 0xcf]);
    for _ in 0..2 {
        // The handler's frame comes to lie there.
        for (number, word) in compatible.into_iter().enumerate() {
            rig.word(top + 8 * number as u64, word);
        }
        assert_eq!(rig.run(), End::Vector(12));
    }
    // Other code can't load it.
    let mut rig = Rig::long();
    rig.state.segments[CpuState::CS] = segment(CS_32, 0, u32::MAX, 0xc09b);
    rig.expect(13, 0, |asm| {
        asm.xor(eax, eax)?;
        asm.mov(ss, eax)
    });
}

#[test]
fn enter_wraps_the_frame_pointer_as_the_stack_does() {
    let mut rig = Rig::protected();
    rig.state.segments[CpuState::SS] = segment(DATA, FREE, 0xffff, 0x93);
    for pointer in [0u64, 0x7_0000] {
        rig.state.gpr[4] = pointer;
        rig.state.gpr[5] = 0x1234_5678;
        rig.bytes(&[0xc8, 0, 0, 0, HLT]);
        assert_eq!(rig.run(), End::Halt);
        let state = rig.after();
        assert_eq!(
            (state.gpr[4], state.gpr[5]),
            (pointer | 0xfffc, pointer | 0xfffc)
        );
        assert_eq!(rig.read_32(FREE + 0xfffc), 0x1234_5678);
    }
}
