//! Programs from seeds.

use iced_x86::{Code, Instruction, Register};

use super::plan::{Function, Label, Op, Plan};
use super::writer::{RSP, STACK, Scope, Writer};
use crate::generate::fx_image;
use crate::layout::{DATA, PAGE, Start, operand};
use crate::random::Random;
use crate::table::Table;

/// Most bytes between functions, all together.
const GAPS: usize = 6000;

/// The program of this seed.
pub(super) fn plan(table: &Table, seed: u64) -> Plan {
    let mut random = Random::new(seed ^ 0x70_726f_6772_616d);
    let mut gpr: [u64; 16] = std::array::from_fn(|_| {
        if random.chance(30) {
            DATA + random.below(4 * PAGE)
        } else {
            random.value()
        }
    });
    gpr[usize::from(RSP)] = STACK - 8 * random.below(8);
    let rflags = random.next() & 0xcd5 | 0x202;
    let fx = fx_image(&mut random);
    let offset = random.below(PAGE) as usize;
    let budget = random.pick(&[400, 1500, 4000, 12_000]);
    let functions = random.below(7);
    let mut writer = Writer::new(&mut random, table);

    let mut segments = vec![0];
    for _ in 0..functions {
        let share = writer.pick(&[20, 60, 200, 800]);
        writer.function(share.min(budget / 3));
        segments.push(writer.ops.len());
    }
    let (setup, main, end) = (writer.label(), writer.label(), writer.label());
    writer.bind(main);
    let parts = writer.pick(&[1, 1, 2, 3, 5]);
    let scope = Scope {
        pinned: 1 << RSP,
        known: Vec::new(),
        budget: budget / parts,
        depth: 4,
        leave: None,
        callable: writer.functions.len(),
        returns: None,
        faults: false,
    };
    let count = 6 + writer.below(20);
    let begins: Vec<Label> = (0..parts).map(|_| writer.label()).collect();
    for (part, &begin) in begins.iter().enumerate() {
        writer.bind(begin);
        let next = begins.get(part + 1).copied();
        if parts > 1 {
            writer.land(next, gpr[usize::from(RSP)]);
        }
        let scope = Scope {
            faults: next.is_some(),
            ..scope.clone()
        };
        writer.statements(&scope, count / parts + 1);
    }
    writer.jump(end);
    segments.push(writer.ops.len());

    let mut plan = arranged(&mut writer, &segments, setup);
    // What only a branch leads to, before what follows.
    plan.ops.push(Op::Bind(setup));
    for (slot, label) in std::mem::take(&mut writer.pointers) {
        plan.ops.push(Op::Address {
            register: Register::RAX,
            of: label,
        });
        let store = Instruction::with2(Code::Mov_rm64_r64, operand(slot), Register::RAX);
        plan.ops.push(Op::Plain(store.expect("a form")));
    }
    let code = Code::Jmp_rel32_64;
    plan.ops.push(Op::Branch { code, to: main });
    plan.ops.push(Op::Bind(end));
    plan.functions = with_tails(std::mem::take(&mut writer.functions));
    plan.start = Start {
        fx,
        gpr,
        rflags,
        rip: 0,
    };
    plan.offset = offset;
    plan.cost = writer.cost;
    plan
}

/// The functions in any order, with gaps, behind a jump to `setup`.
fn arranged(writer: &mut Writer<'_>, segments: &[usize], setup: Label) -> Plan {
    let mut order: Vec<usize> = (0..segments.len() - 1).collect();
    for at in (1..order.len()).rev() {
        let other = writer.below(at as u64 + 1) as usize;
        order.swap(at, other);
    }
    let code = Code::Jmp_rel32_64;
    let mut ops = vec![Op::Branch { code, to: setup }];
    let mut units = Vec::new();
    let mut room = GAPS;
    for segment in order {
        let gap = match writer.below(4) {
            0 => writer.below(16) as usize,
            1 => writer.below(room as u64 + 1) as usize,
            _ => 0,
        };
        room -= gap.min(room);
        ops.push(Op::Dead(gap));
        let range = segments[segment]..segments[segment + 1];
        let inside = writer
            .units
            .iter()
            .filter(|unit| range.contains(&unit.start));
        let begin = ops.len();
        units.extend(
            inside.map(|unit| unit.start - range.start + begin..unit.end - range.start + begin),
        );
        ops.extend_from_slice(&writer.ops[range]);
    }
    Plan {
        ops,
        units,
        functions: Vec::new(),
        defined: Vec::new(),
        start: Start {
            fx: [0; _],
            gpr: [0; 16],
            rflags: 0,
            rip: 0,
        },
        offset: 0,
        cost: 0,
    }
}

/// With the places that functions return to for others that jumped to them.
fn with_tails(mut functions: Vec<Function>) -> Vec<Function> {
    // Jumps lead to lower numbers.
    for number in (0..functions.len()).rev() {
        for other in functions[number].tails.clone() {
            let returns = functions[number].returns.clone();
            functions[other].returns.extend(returns);
        }
    }
    functions
}
