//! What is written over: sites of a few instructions, with the alternatives that may stand there.

use super::emit::{EAX, EBP, EBX, EDX, Label};
use super::{ALTERNATIVES, Mode, POINTERS, VALUES};
use crate::random::Random;

/// Bytes between alternatives.
pub(super) const STRIDE: usize = 32;

/// Registers that code at sites computes with.
const COMPUTED: [u8; 3] = [EAX, EDX, EBX];

#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) label: Label,
    pub(super) bytes: usize,
    /// It ends with a return, and is called.
    pub(super) function: bool,
    /// Offset of four bytes that are an operand in every alternative.
    pub(super) immediate: Option<usize>,
    /// Each as long as the site.
    pub(super) alternatives: Vec<Vec<u8>>,
    /// Where they lie.
    pub(super) table: u32,
}

/// What sites of a program have in common.
pub(super) struct Surroundings {
    pub(super) mode: Mode,
    /// Numbers of functions: they call those with higher ones alone.
    pub(super) functions: std::ops::Range<usize>,
    /// One of a thousand operations is undefined.
    pub(super) undefined: bool,
}

pub(super) fn site(
    random: &mut Random,
    around: &Surroundings,
    label: Label,
    number: usize,
    table: u32,
) -> Site {
    let function = around.functions.contains(&number);
    let immediate = random.chance(30);
    // A function of few instructions that touch registers alone.
    let leaf = function && random.chance(50);
    let bytes = if leaf {
        random.pick(&[5usize, 8, 8, 10, 12])
    } else {
        random.pick(&[5, 8, 8, 10, 12, 16, 16, 24, 32])
    };
    // From 5 bytes on, the first instruction is mov r32, imm32.
    let begin = immediate.then(|| 0xb8 | random.pick(&COMPUTED));
    let alternatives = (0..ALTERNATIVES).map(|_| {
        let mut code = Vec::new();
        if let Some(opcode) = begin {
            code.push(opcode);
            code.extend((random.value() as u32).to_le_bytes());
        }
        while code.len() < bytes && !random.chance(10) {
            let next = if leaf {
                on_registers(random)
            } else {
                operation(random, around, function.then_some(number))
            };
            if code.len() + next.len() <= bytes {
                code.extend(next);
            } else if random.chance(30) {
                break;
            }
        }
        fill(random, &mut code, bytes);
        code
    });
    Site {
        label,
        bytes,
        function,
        immediate: immediate.then_some(1),
        alternatives: alternatives.collect(),
        table,
    }
}

/// Nops up to `bytes`.
fn fill(random: &mut Random, code: &mut Vec<u8>, bytes: usize) {
    const NOPS: [&[u8]; 6] = [
        &[0x90],
        &[0x66, 0x90],
        &[0x0f, 0x1f, 0x00],
        &[0x0f, 0x1f, 0x40, 0x00],
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    ];
    while code.len() < bytes {
        let room = (bytes - code.len()).min(NOPS.len());
        let longest = random.below(room as u64) as usize;
        code.extend(NOPS[longest]);
    }
}

/// One operation on the computed registers, which leaves no flag undefined but AF.
fn on_registers(random: &mut Random) -> Vec<u8> {
    let (a, b) = (random.pick(&COMPUTED), random.pick(&COMPUTED));
    let pair = 0xc0 | a << 3 | b;
    let alone = |extension: u8| 0xc0 | extension << 3 | b;
    let value = (random.value() as u32).to_le_bytes();
    match random.below(12) {
        0..3 => {
            let opcode = random.pick(&[0x01, 0x29, 0x31, 0x11, 0x19, 0x39, 0x85, 0x21, 0x09]);
            vec![opcode, pair]
        }
        3 => [&[0x81, alone(random.below(8) as u8)], &value[..]].concat(),
        4 => vec![0x83, alone(random.below(8) as u8), value[0]],
        5 => [&[0xb8 | a], &value[..]].concat(),
        // lea a, [a + b * 4 + value]
        6 => vec![0x8d, 0x44 | a << 3, 0x80 | b << 3 | a, value[0]],
        7 => vec![0x0f, 0x90 | random.below(16) as u8, 0xc0 | a],
        8 => vec![0x0f, 0x40 | random.below(16) as u8, pair],
        9 => vec![0xd1, alone(random.pick(&[0, 1, 2, 3, 4, 5, 7]))],
        10 => vec![0xf7, alone(random.pick(&[2, 3]))],
        _ => vec![0xff, alone(random.pick(&[0, 1]))],
    }
}

/// One operation on the computed registers, memory and the stack, which leaves no flag undefined but AF.
pub(super) fn operation(
    random: &mut Random,
    around: &Surroundings,
    function: Option<usize>,
) -> Vec<u8> {
    let (a, b) = (random.pick(&COMPUTED), random.pick(&COMPUTED));
    let pair = 0xc0 | a << 3 | b;
    // A word of the values.
    let offset = VALUES + 4 * random.below(8) as u8;
    let at = 0x40 | a << 3 | EBP;
    let four = |opcode: &[u8], tail: [u8; 4]| [opcode, &tail].concat();
    match random.below(30) {
        0..10 => on_registers(random),
        10 => vec![random.pick(&[0x8b, 0x03, 0x33, 0x3b, 0x13]), at, offset],
        11 => vec![random.pick(&[0x89, 0x01, 0x31, 0x29, 0x87]), at, offset],
        12..15 => on_registers(random),
        15 => vec![0x0f, 0xc8 | a],
        16..19 => vec![0x0f, random.pick(&[0xb6, 0xbe, 0xb7, 0xbf]), pair],
        19 => vec![0x50 | a, 0x58 | b],
        // To a vector register and back.
        20 => vec![0x66, 0x0f, 0x6e, 0xc0 | (random.below(4) as u8) << 3 | a],
        21 => {
            let (left, right) = (random.below(4) as u8, random.below(4) as u8);
            let opcode = random.pick(&[0xfe, 0xfa, 0xef]);
            vec![0x66, 0x0f, opcode, 0xc0 | left << 3 | right]
        }
        22 => vec![0x66, 0x0f, 0x7e, 0xc0 | (random.below(4) as u8) << 3 | a],
        23 => on_registers(random),
        24 => {
            // Over something, or not.
            let over = operation(random, around, None);
            let opcode = if random.chance(30) {
                0xeb
            } else {
                0x70 | random.below(16) as u8
            };
            [&[opcode, over.len() as u8], &over[..]].concat()
        }
        // call of the next instruction; pop
        25 => four(&[0xe8], [0; 4])
            .into_iter()
            .chain([0x58 | a])
            .collect(),
        26 => match function {
            Some(_) => vec![0xc3],
            None => vec![0x0f, 0xc1, pair],
        },
        27 => {
            let first = function.map_or(around.functions.start, |number| number + 1);
            let Some(count) = around.functions.end.checked_sub(first).filter(|&n| n > 0) else {
                return vec![0x87, pair];
            };
            let to = first - around.functions.start + random.below(count as u64) as usize;
            let pointer = (POINTERS + 8 * to as u64) as u32;
            let tail = function.is_some() && random.chance(30);
            let how = if tail { 0x24 } else { 0x14 };
            four(&[0xff, how, 0x25], pointer.to_le_bytes())
        }
        28 if around.undefined && random.chance(3) => vec![0x0f, 0x0b],
        _ => match around.mode {
            Mode::Long => match random.below(3) {
                // Between these and R8 to R11.
                0 => vec![0x4c, 0x01, 0xc0 | (random.below(4) as u8) << 3 | b],
                1 => vec![0x4d, 0x31, 0xc0 | (random.below(4) as u8 * 9)],
                _ => vec![0x49, 0x89, 0xc0 | a << 3 | random.below(4) as u8],
            },
            Mode::Compatible => match random.below(3) {
                0 => vec![0x40 | (random.below(2) as u8) << 3 | a],
                1 => vec![0x60, 0x61],
                // Through the stack segment.
                _ => vec![0x36, 0x8b, at, offset],
            },
        },
    }
}
