//! Pushes, pops, calls and returns that run off their stack: after each number of them.
//!
//! What moves RSP may do so together, later; a fault shows it moved by what was done.

use bt::insn::Case;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::case::{CODE, Comparison, Liberty};

/// One page, and nothing beside it.
const STACK: u64 = 0x5_0000;
const STACK_BYTES: u64 = 0x1000;
/// Instructions of a run.
const LENGTH: usize = 24;

type Step = fn(&mut CodeAssembler, usize) -> Result<(), IcedError>;

/// What stands between those that move RSP.
const BETWEEN: &[(&str, Step)] = &[
    ("nothing", |_, _| Ok(())),
    ("a move", |asm, at| asm.mov(r12d, at as u32)),
    ("flags", |asm, at| asm.add(r13d, at as i32 + 1)),
    ("an address", |asm, _| asm.lea(r14, ptr(r14 + r13 * 2 + 5))),
    ("RSP read", |asm, _| asm.add(r15, rsp)),
    ("RSP moved", |asm, _| asm.lea(rsp, ptr(rsp))),
    ("a load", |asm, _| asm.add(r15, qword_ptr(STACK + 0x800))),
    ("a load by RSP", |asm, _| asm.xor(r15, qword_ptr(rsp))),
    ("a comparison and a branch", |asm, at| {
        let mut next = asm.create_label();
        asm.cmp(r13d, at as i32)?;
        asm.je(next)?;
        asm.set_label(&mut next)?;
        asm.nop()
    }),
    ("a division", |asm, _| {
        asm.mov(eax, 77)?;
        asm.xor(edx, edx)?;
        asm.mov(ecx, 5)?;
        asm.div(ecx)
    }),
];

/// What moves RSP, in turn.
const DOWN: &[Step] = &[
    |asm, _| asm.push(rbx),
    |asm, at| asm.push(at as i32),
    |asm, _| asm.push(rsp),
    |asm, _| asm.push(r13),
    |asm, _| asm.push(bp),
    |asm, _| {
        let mut next = asm.create_label();
        asm.call(next)?;
        asm.set_label(&mut next)?;
        asm.nop()
    },
];
const UP: &[Step] = &[
    |asm, _| asm.pop(rbx),
    |asm, _| asm.pop(rsi),
    |asm, _| asm.pop(r13),
    |asm, _| asm.pop(bp),
    |asm, _| asm.pop(rdi),
];

fn code(
    moves: &[Step],
    only: Option<usize>,
    between: Step,
    start: u64,
    by: i32,
) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    asm.mov(ebx, 0x1234_5678)?;
    asm.mov(rbp, 0x1122_3344_5566_7788u64)?;
    asm.mov(rsp, start)?;
    for at in 0..LENGTH {
        moves[only.unwrap_or(at) % moves.len()](&mut asm, at)?;
        between(&mut asm, at)?;
    }
    if by != 0 {
        asm.ret_1(by as u32)?;
    }
    asm.hlt()?;
    asm.assemble(CODE)
}

#[test]
fn what_runs_off_its_stack_shows_how_far_it_came() {
    let mut comparison = Comparison::new();
    for (down, moves) in [(true, DOWN), (false, UP)] {
        for (name, between) in BETWEEN {
            for only in [None, Some(0), Some(moves.len() - 1)] {
                for room in 0..=LENGTH as u64 + 1 {
                    let start = if down {
                        STACK + 8 * room
                    } else {
                        STACK + STACK_BYTES - 8 * room
                    };
                    let by = if down { 0 } else { 16 };
                    let case = Case {
                        code: code(moves, only, *between, start, by).expect("it assembles"),
                        load: CODE,
                        map: vec![(STACK, STACK_BYTES)],
                        mem: vec![(STACK + 0x800, (0..0x80).collect())],
                    };
                    comparison.compare(&case, Liberty::default(), || {
                        format!("{name}, down: {down}, only {only:?}, room for {room}")
                    });
                }
            }
        }
    }
    comparison.end(1500);
}
