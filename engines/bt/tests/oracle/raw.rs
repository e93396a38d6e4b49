//! Any bytes: prefixes in any number and order, any opcode, any operands, natively and translated. What
//! is undefined, what a prefix means where it has no business, and how long an instruction is come out
//! as on the host.
//!
//! `TRAPLINE_ORACLE_RAW` says how many cases to compare (default 1,000), `TRAPLINE_ORACLE_SEED` where to
//! start.
//!
//! Left out: instructions that the host has and the guest's CPUID doesn't announce, those whose result
//! depends on the machine around them, and those that the host's kernel answers.

use bt::insn::Case;
use iced_x86::{Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::case::{CODE, Comparison, Liberty, liberty};
use crate::layout::{DATA, PAGE};
use crate::random::Random;

const CASES: u64 = 1_000;
const DATA_BYTES: u64 = 5 * PAGE;
/// The longest instruction.
pub(crate) const LONGEST: usize = 15;

pub(crate) const PREFIXES: [u8; 11] = [
    0x66, 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x64, 0x65,
];

/// Prefixes, an opcode, and random bytes up to the longest instruction.
fn instruction(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.pick(&[0, 0, 1, 1, 2, 3, 6]) {
        bytes.push(if random.chance(30) {
            0x40 | random.below(16) as u8
        } else {
            random.pick(&PREFIXES)
        });
    }
    if random.chance(30) {
        bytes.push(0x48 | random.below(8) as u8);
    }
    let vex = random.chance(20);
    match random.below(if vex { 2 } else { 8 }) {
        0 if vex => bytes.extend([0xc5, random.next() as u8]),
        _ if vex => bytes.extend([
            0xc4,
            random.next() as u8 & 0xe0 | random.pick(&[1, 2, 3, 3, 2, 1, 0, 4]),
            random.next() as u8,
        ]),
        0..3 => {}
        3..6 => bytes.push(0x0f),
        6 => bytes.extend([0x0f, 0x38]),
        _ => bytes.extend([0x0f, 0x3a]),
    }
    bytes.push(random.next() as u8);
    while bytes.len() < LONGEST {
        // Small displacements keep operands in memory that is there.
        let byte = if random.chance(40) { 0 } else { random.next() };
        bytes.push(byte as u8);
    }
    bytes
}

fn decode(bytes: &[u8]) -> Instruction {
    let options = DecoderOptions::FORCE_RESERVED_NOP | DecoderOptions::NO_WBNOINVD;
    Decoder::with_ip(64, bytes, 0, options).decode()
}

/// False for what can't be compared.
pub(crate) fn comparable(instr: &Instruction) -> bool {
    use Mnemonic::*;
    let machine = matches!(
        instr.mnemonic(),
        Cpuid
            | Rdtsc
            | Rdtscp
            | Rdpid
            | Rdrand
            | Rdseed
            | Syscall
            | Sysenter
            | Sysret
            | Sysretq
            | Sysexit
            | Sysexitq
            | Int
            | Iret
            | Iretd
            | Iretq
            | Retf
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lar
            | Lsl
            | Verr
            | Verw
            | Lss
            | Lfs
            | Lgs
            | Xgetbv
            | Fxsave
            | Fxsave64
            | Fnsave
            | Fnstenv
            | Xsave
            | Xsave64
            | Xsavec
            | Xsavec64
            | Xsaveopt
            | Xsaveopt64
            | Rdfsbase
            | Rdgsbase
            | Wrfsbase
            | Wrgsbase
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Popf
            | Popfd
            | Popfq
            | Lds
            | Les
    );
    let segment = (0..instr.op_count()).any(|operand| {
        instr.op_kind(operand) == OpKind::Register
            && instr.op_register(operand).is_segment_register()
    });
    let far = matches!(
        instr.code(),
        iced_x86::Code::Jmp_m1616
            | iced_x86::Code::Jmp_m1632
            | iced_x86::Code::Jmp_m1664
            | iced_x86::Code::Call_m1616
            | iced_x86::Code::Call_m1632
            | iced_x86::Code::Call_m1664
    );
    // A branch lands in bytes that nobody has chosen.
    let branch = matches!(
        instr.flow_control(),
        iced_x86::FlowControl::IndirectBranch | iced_x86::FlowControl::IndirectCall
    );
    !machine && !segment && !far && !branch && instr.code().encoding() != EncodingKind::EVEX
}

/// Registers that lead into the data, then the bytes, at the end of a page if they are all there is.
fn case(random: &mut Random, bytes: &[u8], contents: &[u8]) -> Case {
    let mut code = Vec::new();
    for register in 0..16u8 {
        let value = match register {
            // A count, for strings and shifts.
            1 => random.below(40),
            4 => DATA + 0x1800,
            _ => DATA + 0x1000 + random.below(2 * PAGE),
        };
        code.extend([0x48 | register >> 3, 0xb8 | register & 7]);
        code.extend(value.to_le_bytes());
    }
    // add eax, 0: the same flags on both sides, whatever the start gives.
    code.extend([0x83, 0xc0, 0]);
    code.extend(bytes);
    let load = if bytes.len() > LONGEST {
        CODE
    } else {
        CODE + PAGE - code.len() as u64
    };
    Case {
        code,
        load,
        map: vec![(DATA, DATA_BYTES)],
        mem: vec![(DATA, contents.to_vec())],
    }
}

#[test]
fn any_bytes_end_as_on_the_host() {
    let wanted = crate::environment("TRAPLINE_ORACLE_RAW", CASES);
    let mut random = Random::new(crate::environment("TRAPLINE_ORACLE_SEED", 1));
    let mut comparison = Comparison::new();
    let mut contents = vec![0; DATA_BYTES as usize];
    random.fill(&mut contents);
    let table = crate::table::Table::new();
    let announced: std::collections::HashSet<_> = [
        &table.integer,
        &table.stack,
        &table.string,
        &table.sse,
        &table.mmx,
        &table.x87,
        &table.avx,
        &table.late,
        &table.forbidden,
    ]
    .into_iter()
    .flatten()
    .copied()
    .collect();
    let mut invalid = 0;
    while comparison.goes_on(wanted) {
        let mut bytes = instruction(&mut random);
        let length = match decode(&bytes) {
            // Whatever comes behind: a part of it may still be an instruction with the hlts.
            instr if instr.is_invalid() => 1 + random.below(LONGEST as u64) as usize,
            instr => instr.len(),
        };
        bytes.truncate(length);
        bytes.extend([0xf4; 40]);
        let instr = decode(&bytes);
        let liberty = if instr.is_invalid() {
            // EVEX has its own rules, and the host may know it, and the maps of VEX that are none.
            let vex = bytes
                .windows(2)
                .any(|pair| pair[0] == 0xc4 && !matches!(pair[1] & 0x1f, 1..=3));
            // Some end with their page, and what is fetched beyond faults; behind 15 bytes processors see
            // that or the length first.
            let at_end = random.chance(20) && length < LONGEST;
            if bytes.contains(&0x62) || vex && (length > 8 || at_end) {
                continue;
            }
            if at_end {
                bytes.truncate(length);
            }
            Liberty::default()
        } else {
            let known = announced.contains(&instr.code())
                || instr.flow_control() != iced_x86::FlowControl::Next;
            if !known || !comparable(&instr) {
                continue;
            }
            // Offsets that the kernel's FS and GS would shift out of the data fault alike.
            if matches!(instr.segment_prefix(), Register::FS | Register::GS) {
                continue;
            }
            liberty(&instr)
        };
        invalid += u64::from(instr.is_invalid());
        let case = case(&mut random, &bytes, &contents);
        let name = || format!("{:02x?} `{instr}`", &bytes[..length]);
        comparison.compare(&case, liberty, name);
    }
    eprintln!("{invalid} invalid");
    comparison.end(0);
}
