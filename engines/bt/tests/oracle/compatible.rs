//! 32-bit code: any bytes, in compatibility mode natively and translated, a few instructions at a time.
//! What 64-bit mode doesn't have is compared here alone: decimal arithmetic, bound, pusha, 32-bit stacks,
//! addresses that wrap at 4 GiB, operands of 16-bit addresses, offsets that are checked against limits.
//!
//! `TRAPLINE_ORACLE_COMPATIBLE` says how many cases to compare (default 1,000), `TRAPLINE_ORACLE_SEED` where
//! to start.

use bt::insn::Case;
use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic};

use crate::case::{CODE, Comparison, Liberty, liberty};
use crate::layout::{DATA, PAGE};
use crate::random::Random;
use crate::raw::{LONGEST, PREFIXES, comparable};
use crate::table::announced;

const CASES: u64 = 1_000;
const DATA_BYTES: u64 = 5 * PAGE;
/// Where 64-bit code jumps through: offset and selector of the 32-bit code.
const POINTER: u64 = DATA;
/// Where 32-bit code begins, behind what loads the registers.
const START: u64 = CODE + 0x100;
/// Selectors of flat 32-bit code and data, as Linux gives them to processes.
const CODE32: u32 = 0x23;
const DATA32: u32 = 0x2b;

fn decode(bytes: &[u8]) -> Instruction {
    let options = DecoderOptions::FORCE_RESERVED_NOP | DecoderOptions::NO_WBNOINVD;
    Decoder::with_ip(32, bytes, START, options).decode()
}

/// True if the instruction is what the guest's CPUID announces, and means the same on both sides.
fn known(instr: &Instruction) -> bool {
    let code = instr.code();
    let info = code.op_code();
    info.is_instruction()
        && info.mode32()
        && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && announced(code)
        && !matches!(code, Code::Ud0)
        && !matches!(
            instr.mnemonic(),
            Mnemonic::Int1 | Mnemonic::Rdpmc | Mnemonic::Xsetbv | Mnemonic::Rsm
        )
        && !matches!(
            code,
            Code::Call_ptr1616 | Code::Call_ptr1632 | Code::Jmp_ptr1616 | Code::Jmp_ptr1632
        )
        && comparable(instr)
}

/// Prefixes, an opcode, and bytes up to the longest instruction.
fn bytes(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.pick(&[0, 0, 0, 1, 1, 2, 4]) {
        bytes.push(random.pick(&PREFIXES));
    }
    match random.below(10) {
        0 => bytes.extend([0xc5, 0xc0 | random.next() as u8]),
        1 => bytes.extend([
            0xc4,
            0xc0 | random.next() as u8 & 0x20 | random.pick(&[1, 2, 3]),
            random.next() as u8,
        ]),
        2..6 => {}
        6 | 7 => bytes.push(0x0f),
        8 => bytes.extend([0x0f, 0x38]),
        _ => bytes.extend([0x0f, 0x3a]),
    }
    while bytes.len() < LONGEST {
        let byte = if random.chance(30) { 0 } else { random.next() };
        bytes.push(byte as u8);
    }
    bytes
}

/// A few instructions; what follows from them is certain up to the last.
fn sequence(random: &mut Random) -> Option<(Vec<u8>, Liberty)> {
    let mut code = Vec::new();
    let mut free = Liberty {
        wraps: true,
        ..Liberty::default()
    };
    for _ in 0..random.pick(&[1, 1, 2, 3, 5]) {
        let mut bytes = bytes(random);
        let instr = decode(&bytes);
        if instr.is_invalid() {
            // The host may know more of EVEX and VEX, and what is too long may be undefined besides.
            bytes.truncate(1 + random.below(8) as usize);
            // What is cut off may be an instruction with the hlts behind it.
            let mut followed = bytes.clone();
            followed.extend([0xf4; LONGEST]);
            let instr = decode(&followed);
            if !instr.is_invalid() && !known(&instr) {
                return None;
            }
            code.extend(bytes);
            let more = code.iter().any(|byte| matches!(byte, 0x62 | 0xc4 | 0xc5));
            return (!more).then_some((code, free));
        }
        if !known(&instr) {
            return None;
        }
        free = Liberty {
            wraps: true,
            ..liberty(&instr)
        };
        code.extend(&bytes[..instr.len()]);
        let uncertain = free.flags != 0 || free.extended || free.operand || free.byte;
        if uncertain || instr.flow_control() != FlowControl::Next {
            break;
        }
    }
    Some((code, free))
}

/// Loads flags and registers, and goes to the code in compatibility mode.
fn case(random: &mut Random, code32: &[u8], contents: &[u8]) -> Case {
    let mut code = Vec::new();
    let mut load = |register: u8, value: u32| {
        code.push(0xb8 | register);
        code.extend(value.to_le_bytes());
    };
    load(4, (DATA + 0x800) as u32);
    // push flags; popfq
    let flags = random.next() as u32 & 0x8d5 | 0x202 | u32::from(random.chance(10)) << 10;
    load(0, flags);
    code.extend([0x50, 0x9d]);
    let mut load = |register: u8, value: u32| {
        code.push(0xb8 | register);
        code.extend(value.to_le_bytes());
    };
    load(0, DATA32);
    // mov ds, eax; mov es, eax
    code.extend([0x8e, 0xd8, 0x8e, 0xc0]);
    for register in 0..8u8 {
        let value = match register {
            _ if random.chance(15) => random.value(),
            // A count, for strings and shifts.
            1 => random.below(40),
            4 => DATA + 0x1800,
            _ => DATA + 0x1000 + random.below(2 * PAGE),
        };
        code.push(0xb8 | register);
        code.extend((value as u32).to_le_bytes());
    }
    // jmp far dword [POINTER]
    code.extend([0xff, 0x2c, 0x25]);
    code.extend((POINTER as u32).to_le_bytes());
    assert!(code.len() as u64 <= START - CODE);
    code.resize((START - CODE) as usize, 0xf4);
    code.extend(code32);
    code.extend([0xf4; 40]);
    let mut contents = contents.to_vec();
    contents[..4].copy_from_slice(&(START as u32).to_le_bytes());
    contents[4..8].copy_from_slice(&CODE32.to_le_bytes());
    Case {
        code,
        load: CODE,
        map: vec![(DATA, DATA_BYTES)],
        mem: vec![(DATA, contents)],
    }
}

#[test]
fn bytes_as_32_bit_code_end_as_on_the_host() {
    let wanted = crate::environment("TRAPLINE_ORACLE_COMPATIBLE", CASES);
    let mut random = Random::new(crate::environment("TRAPLINE_ORACLE_SEED", 1));
    let mut comparison = Comparison::new();
    let mut contents = vec![0; DATA_BYTES as usize];
    random.fill(&mut contents);
    let probe = case(&mut random, &[0xf4], &contents);
    if let Ok(text) = comparison.differences(&probe, Liberty::default())
        && text.contains("native Exception")
    {
        eprintln!("skipped: the host's kernel has no compatibility mode:\n{text}");
        return;
    }
    while comparison.goes_on(wanted) {
        let Some((code, liberty)) = sequence(&mut random) else {
            continue;
        };
        let case = case(&mut random, &code, &contents);
        comparison.compare(&case, liberty, || {
            let mut decoder = Decoder::with_ip(32, &code, START, DecoderOptions::NONE);
            let instrs: Vec<String> = decoder.iter().map(|instr| instr.to_string()).collect();
            format!("{code:02x?} {}", instrs.join("; "))
        });
    }
    comparison.end(0);
}
