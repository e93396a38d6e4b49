//! Near branches at the edges of a code segment, and instructions that are none.

use engine_core::CpuState;

use crate::rig::{CODE, CS_32, End, Rig, STACK, TABLES, segment};

const LIMIT: u32 = CODE as u32 + 0xfff;
const BEYOND: u32 = LIMIT + 1;

/// 32-bit code in a segment that ends with the page.
fn limited() -> Rig {
    let mut rig = Rig::protected();
    rig.state.segments[CpuState::CS] = segment(CS_32, 0, LIMIT, 0x409b);
    rig
}

fn near(opcode: &[u8], ip: u32, target: u32) -> Vec<u8> {
    let end = ip + opcode.len() as u32 + 4;
    [opcode, &target.wrapping_sub(end).to_le_bytes()].concat()
}

#[test]
fn a_branch_beyond_the_segment_faults_before_it_is_taken() {
    let at = CODE as u32 + 1;
    let far = BEYOND.to_le_bytes();
    let pushed = [&[0x68][..], &far, &[0xc3]].concat();
    let held = |modrm: u8| [&[0xb8][..], &far, &[0xff, modrm]].concat();
    // inc ebx first; then the branch, how far into the code it lies, and what it leaves on the stack.
    for (code, offset, stack) in [
        (near(&[0xe9], at, BEYOND), 0, 0),
        (near(&[0xe8], at, BEYOND), 0, 0),
        (near(&[0x0f, 0x85], at, BEYOND), 0, 0),
        (pushed, 5, 4),
        (held(0xe0), 5, 0),
        (held(0xd0), 5, 0),
    ] {
        let mut rig = limited();
        rig.bytes(&[&[0x43][..], &code].concat());
        // Once to translate it, once to run what is there already.
        for _ in 0..2 {
            assert_eq!(rig.run(), End::Vector(13), "{code:x?}");
            let state = rig.after();
            assert_eq!(rig.error(), 0);
            assert_eq!(rig.read_32(state.gpr[4] + 4), at + offset, "{code:x?}");
            assert_eq!(state.gpr[4], STACK - 16 - stack, "{code:x?}");
            assert_eq!(state.gpr[3], 1);
        }
    }
}

#[test]
fn a_branch_beyond_the_segment_that_is_not_taken_is_nothing() {
    // xor eax, eax; jnz beyond; hlt, and its opposite.
    for (opcode, end) in [(0x85, End::Halt), (0x84, End::Vector(13))] {
        let mut rig = limited();
        let mut code = vec![0x31, 0xc0];
        code.extend(near(&[0x0f, opcode], CODE as u32 + 2, BEYOND));
        code.push(0xf4);
        rig.bytes(&code);
        assert_eq!(rig.run(), end);
    }
    // loop, with a count that ends it and one that doesn't; a fault leaves the count.
    for (count, end, left) in [(1u64, End::Halt, 0), (2, End::Vector(13), 2)] {
        let mut rig = limited();
        rig.state.rip = u64::from(LIMIT) - 3;
        rig.state.gpr[1] = count;
        // loop +0x10; hlt
        rig.bytes(&[0xe2, 0x10, 0xf4]);
        assert_eq!(rig.run(), end);
        assert_eq!(rig.after().gpr[1], left);
    }
}

#[test]
fn branches_of_16_bits_wrap_and_obey_the_limit() {
    // jmp short over the end of the segment: IP has 16 bits.
    let mut rig = Rig::real();
    rig.put(CODE + 0xfff0, &[0xeb, 0x20]);
    rig.put(CODE + 0x12, &[0x43, 0xf4]);
    rig.bytes(&[0xe9, 0xed, 0xff]);
    assert_eq!(rig.run(), End::Halt);
    assert_eq!(rig.after().gpr[3], 1);
    // In a shorter segment the jump itself faults; so do call, ret and jcxz.
    for (code, offset) in [
        (&[0xe9, 0x00, 0x20][..], 0),
        (&[0xe8, 0x00, 0x20], 0),
        (&[0xe3, 0x70], 0),
        (&[0x68, 0x00, 0x20, 0xc3], 3),
        (&[0xb8, 0x00, 0x20, 0xff, 0xe0], 3),
    ] {
        let mut rig = Rig::real();
        rig.state.segments[CpuState::CS].limit = 0xfff;
        rig.state.rip = 0xfa0;
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(13), "{code:x?}");
        let state = rig.after();
        let frame = state.gpr[4] + state.segments[CpuState::SS].base;
        assert_eq!(rig.read(frame) as u16, 0xfa0 + offset, "{code:x?}");
    }
}

/// Maps the last page of 32-bit addresses, and the first as before.
fn at_the_top() -> (Rig, u64) {
    const PAGES: u64 = 0xc_0000;
    const FRAME: u64 = 0xd_0000;
    let mut rig = Rig::protected();
    // Page directory: 4 MiB pages one to one, and a table for the last.
    for page in 0..4u64 {
        let entry = (page << 22 | 0x83) as u32;
        rig.put(TABLES + 4 * page, &entry.to_le_bytes());
    }
    rig.put(TABLES + 4 * 1023, &(PAGES as u32 | 3).to_le_bytes());
    rig.put(PAGES + 4 * 1023, &(FRAME as u32 | 3).to_le_bytes());
    rig.state.cr0 |= 1 << 31;
    rig.state.cr3 = TABLES;
    rig.state.cr4 = 0x10;
    (rig, FRAME)
}

#[test]
fn eip_wraps_behind_a_segment_of_4_gib() {
    let (mut rig, frame) = at_the_top();
    // inc ebx; inc ebx, and on at 0: inc ebx; hlt.
    rig.put(frame + 0xffe, &[0x43, 0x43]);
    rig.put(0, &[0x43, 0xf4]);
    rig.state.rip = 0xffff_fffe;
    assert_eq!(rig.run(), End::Halt);
    assert_eq!((rig.after().gpr[3], rig.after().rip), (3, 2));
    // mov eax, 0x12345678 across the end.
    rig.put(frame + 0xffe, &[0xb8, 0x78]);
    rig.put(0, &[0x56, 0x34, 0x12, 0xf4]);
    assert_eq!(rig.run(), End::Halt);
    assert_eq!((rig.after().gpr[0], rig.after().rip), (0x1234_5678, 4));
    // A call at the end pushes the address that it wraps to, and a jump goes over it.
    rig.put(frame + 0xffb, &[0xe8, 0x10, 0, 0, 0]);
    rig.put(0x10, &[0x58, 0xeb, 0xdb]);
    rig.put(frame + 0xfee, &[0x43, 0xf4]);
    rig.state.rip = 0xffff_fffb;
    assert_eq!(rig.run(), End::Halt);
    assert_eq!((rig.after().gpr[0], rig.after().gpr[3]), (0, 1));
}

/// 64-bit code at the end of a page behind which there is none.
fn at_the_edge() -> (Rig, u64) {
    let mut rig = Rig::long();
    let edge = 0x20_0000;
    rig.word(TABLES + 0x2000 + 8, 0);
    rig.state.rip = edge;
    (rig, edge)
}

#[test]
fn an_undefined_instruction_is_told_from_one_that_is_too_long() {
    let many = |count: usize, rest: &[u8]| [&vec![0x66; count][..], rest].concat();
    for (code, expected) in [
        // push es, which 64-bit mode lacks: alone, and with prefixes up to the most.
        (many(0, &[0x06]), 6),
        (many(13, &[0x06]), 6),
        (many(14, &[0x06]), 6),
        (many(15, &[0x06]), 13),
        // ud2, nop, and an addition of 5 bytes.
        (many(13, &[0x0f, 0x0b]), 6),
        (many(14, &[0x0f, 0x0b]), 13),
        (many(15, &[0x90]), 13),
        (many(13, &[0x81, 0xc0, 1, 0]), 13),
        // lock nop: undefined, however long it may be.
        ([&[0xf0][..], &many(13, &[0x90])].concat(), 6),
        ([&[0xf0][..], &many(14, &[0x90])].concat(), 13),
    ] {
        // In the middle of a page, and in the last bytes before one that isn't there.
        for crosses in [false, true] {
            let (mut rig, edge) = at_the_edge();
            let held = code.len().min(15);
            rig.state.rip = edge - if crosses { held as u64 } else { 0x800 };
            rig.bytes(&code[..held]);
            if !crosses {
                rig.put(rig.state.rip, &code);
            }
            assert_eq!(rig.run(), End::Vector(expected), "{code:x?} {crosses}");
        }
    }
}

#[test]
fn a_page_that_is_not_there_faults_if_its_bytes_are_needed() {
    for (code, expected) in [
        (&[0x06][..], 6),
        (&[0x0f, 0x0b], 6),
        (&[0x0f, 0x04], 6),
        (&[0x0f], 14),
        (&[0x66, 0x66, 0xf0], 14),
        (&[0x48, 0xb8, 1, 2, 3], 14),
        // xadd with the register form that a lock excludes: complete, so undefined.
        (&[0xf0, 0x0f, 0xc1, 0xc0], 6),
        (&[0xf0, 0x0f, 0xc1], 14),
    ] {
        let (mut rig, edge) = at_the_edge();
        rig.state.rip = edge - code.len() as u64;
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(expected), "{code:x?}");
        if expected == 14 {
            assert_eq!(rig.after().cr2, edge, "{code:x?}");
            // Not present, a fetch of ring 0.
            assert_eq!(rig.error() & !0x10, 0);
        }
    }
}
