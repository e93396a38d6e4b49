//! Every form of instruction, once in a while: executed or undefined, and as on the host.

use std::time::Duration;

use bt::insn::{Bench, Case};
use iced_x86::{Code, IcedError, Instruction, Mnemonic};

use crate::case::{CODE, Comparison, Liberty, liberty};
use crate::layout::{DATA, PAGE};

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
    let mut comparison = Comparison::new();
    let table = crate::table::Table::new();
    let rounds = crate::environment("TRAPLINE_ORACLE_ROUNDS", ROUNDS);
    let mut random = crate::random::Random::new(crate::environment("TRAPLINE_ORACLE_SEED", 1));
    let mut contents = vec![0; 5 * PAGE as usize];
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
            random.fill(&mut contents);
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
            comparison.compare(&case, liberty, || format!("{round} {code:?} `{instr}`"));
        }
    }
    comparison.end(0);
}

/// A case that loads registers, flags and vectors, and runs `instr`.
fn loaded(
    instr: &Instruction,
    gpr: &[u64; 16],
    flags: u64,
    contents: &[u8],
) -> Option<(Case, Liberty)> {
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
    let liberty = liberty(instr);
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
