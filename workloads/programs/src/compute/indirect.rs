//! `indirect`: calls through a table of functions, in an order that depends on the data: a tiny
//! bytecode machine, as interpreters and virtual methods do it.

use super::Random;
use crate::{Group, Ring, Workload, mix, workload::Program};

/// Words of bytecode, one operation each; a power of two.
const CODE: usize = 4096;

pub(crate) const WORKLOAD: Workload = Workload {
    name: "indirect",
    group: Group::Compute,
    ring: Ring::User,
    size: 20_000,
    iterations: 100,
    operation: "SIZE operations of a bytecode machine, one indirect call each",
    program: Program::Compute {
        words: |_| Some(CODE as u64),
        limit: 1 << 40,
        prepare,
        run,
    },
};

#[inline(never)]
fn prepare(arena: &mut [u64], _size: u64, _iterations: u64) -> u64 {
    let mut random = Random::new(0x696e_6469_7265_6374);
    for word in arena.iter_mut().take(CODE) {
        *word = random.next();
    }
    0
}

/// The bytecode machine's registers.
struct Machine {
    accumulator: u64,
    index: u64,
}

type Operation = fn(&mut Machine, u64);

/// Indexed by the low three bits of a bytecode word; the rest is the operand.
static OPERATIONS: [Operation; 8] = [add, xor, rotate, multiply, skip, exchange, subtract, shift];

fn add(machine: &mut Machine, operand: u64) {
    machine.accumulator = machine.accumulator.wrapping_add(operand);
}

fn xor(machine: &mut Machine, operand: u64) {
    machine.accumulator ^= operand;
}

fn rotate(machine: &mut Machine, operand: u64) {
    machine.accumulator = machine.accumulator.rotate_left(operand as u32 & 63);
}

fn multiply(machine: &mut Machine, operand: u64) {
    machine.accumulator = machine.accumulator.wrapping_mul(operand | 1);
}

/// The one branch: where the machine goes on depends on what it has computed.
fn skip(machine: &mut Machine, _operand: u64) {
    machine.index = machine.index.wrapping_add(machine.accumulator >> 60);
}

fn exchange(machine: &mut Machine, operand: u64) {
    machine.accumulator = machine.accumulator.swap_bytes() ^ operand >> 32;
}

fn subtract(machine: &mut Machine, operand: u64) {
    machine.accumulator = operand.wrapping_sub(machine.accumulator);
}

fn shift(machine: &mut Machine, operand: u64) {
    machine.accumulator ^= machine.accumulator >> 29 ^ operand << 3;
}

#[inline(never)]
fn run(arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let Some(code) = arena.first_chunk::<CODE>() else {
        return 0;
    };
    let mut machine = Machine {
        accumulator: 0x0123_4567_89ab_cdef,
        index: 0,
    };
    let mut sum = 0;
    for _ in 0..iterations {
        for _ in 0..size {
            let word = code[machine.index as usize % CODE];
            machine.index = machine.index.wrapping_add(1);
            OPERATIONS[word as usize % OPERATIONS.len()](&mut machine, word >> 3);
        }
        sum = mix(sum, machine.accumulator);
    }
    sum
}
