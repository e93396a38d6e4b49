//! A program as it is generated: operations with labels, in statements that can be left out, and how it
//! becomes a sequence at its place.
//!
//! Where indirect branches lead is part of the plan, so that flags can be followed through all of it.
//! Who would read flags that the manual leaves undefined gets a comparison before it that defines them.
//!
//! Invariant: a plan without some of its statements is a plan, and ends as well.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use iced_x86::{Code, Instruction, Register};

use crate::flags::{self, Flags};
use crate::layout::Start;
use crate::sequence::{Item, Placed, Sequence};

/// A place in a program.
pub(super) type Label = usize;

/// Where an indirect branch may lead.
#[derive(Clone, Debug)]
pub(super) enum Targets {
    Labels(Vec<Label>),
    /// Wherever this function returns to.
    Callers(usize),
}

/// One operation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Plain(Instruction),
    /// A direct branch or call.
    Branch {
        code: Code,
        to: Label,
    },
    /// `lea register, [label]`.
    Address {
        register: Register,
        of: Label,
    },
    Indirect {
        instr: Instruction,
        to: Targets,
    },
    /// Bytes that nobody runs.
    Dead(usize),
    Bind(Label),
}

impl Op {
    fn binds(&self) -> Option<Label> {
        match self {
            Op::Bind(label) => Some(*label),
            Op::Plain(_)
            | Op::Branch { .. }
            | Op::Address { .. }
            | Op::Indirect { .. }
            | Op::Dead(_) => None,
        }
    }
}

/// A function, as far as its callers need to know it.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) entry: Label,
    /// General registers that it changes, one bit each.
    pub(super) clobbers: u16,
    /// The register that has to lead into the data, and that it leaves alone.
    pub(super) pointer: Option<u8>,
    /// The register that says how deep it may recurse, and that has its value again at the end.
    pub(super) depth: Option<u8>,
    /// Bytes that it pops besides the return address.
    pub(super) pops: i32,
    /// Bytes behind the call that it skips.
    pub(super) skips: usize,
    /// Instructions that it executes at most.
    pub(super) cost: u64,
    /// Where it returns to.
    pub(super) returns: Vec<Label>,
    /// Functions that it ends with a jump to.
    pub(super) tails: Vec<usize>,
}

/// A program.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) ops: Vec<Op>,
    /// Statements, which may contain others.
    pub(super) units: Vec<Range<usize>>,
    pub(super) functions: Vec<Function>,
    /// Operations that need their flags defined.
    pub(super) defined: Vec<bool>,
    pub(super) start: Start,
    /// Offset in its slot.
    pub(super) offset: usize,
    /// Instructions that it executes at most, faults aside.
    pub(super) cost: u64,
}

/// Items with the items that may follow them.
type Leads = Vec<(usize, Vec<usize>)>;

/// A plan at its place.
pub(super) struct Prepared {
    pub(super) placed: Placed,
    pub(super) flags: Flags,
}

impl Plan {
    /// Without the statements whose numbers are marked.
    pub(super) fn without(&self, removed: &[bool]) -> Plan {
        let mut gone = vec![false; self.ops.len()];
        for (unit, _) in self.units.iter().zip(removed).filter(|(_, gone)| **gone) {
            gone[unit.clone()].fill(true);
        }
        let mut plan = self.clone();
        plan.units.clear();
        for (op, _) in plan.ops.iter_mut().zip(gone).filter(|(_, gone)| *gone) {
            *op = Op::Dead(0);
        }
        plan
    }

    /// Encodes it for slot `index`, with every flag defined that somebody reads; None if it can't be.
    pub(super) fn prepare(&mut self, index: usize) -> Option<Prepared> {
        const ROUNDS: usize = 40;
        self.defined.resize(self.ops.len(), false);
        for _ in 0..ROUNDS {
            let (sequence, numbers, targets) = self.sequence();
            let placed = sequence.place(index)?;
            let find = |item: usize| {
                let ip = placed.at[item]?;
                placed.code.binary_search_by_key(&ip, Instruction::ip).ok()
            };
            let mut next: Vec<_> = (0..placed.code.len())
                .map(|at| flags::successors(&placed.code, at))
                .collect();
            for (item, to) in &targets {
                let to: Option<Vec<usize>> = to.iter().map(|&to| find(to)).collect();
                next[find(*item)?] = Some(to?);
            }
            let wrong = match flags::follow_along(&placed.code, &next) {
                Ok(flags) => return Some(Prepared { placed, flags }),
                Err(wrong) => wrong,
            };
            // Back from instructions to operations.
            let mut op_at: Vec<(u64, usize)> = Vec::new();
            for (op, item) in numbers.iter().enumerate() {
                if let Some(ip) = item.and_then(|item| placed.at[item]) {
                    op_at.push((ip, op));
                }
            }
            let mut last = None;
            for at in wrong {
                // The one after it may find its flags defined then.
                if last.replace(at).is_some_and(|last| last + 2 >= at) {
                    continue;
                }
                let ip = placed.code[at].ip();
                let op = op_at.binary_search_by_key(&ip, |&(ip, _)| ip).ok()?;
                self.defined[op_at[op].1] = true;
            }
        }
        None
    }

    /// As a sequence; the items of operations; and where the indirect branches among the items lead.
    fn sequence(&self) -> (Sequence, Vec<Option<usize>>, Leads) {
        // Where labels are, by item.
        let bound: HashSet<Label> = self.ops.iter().filter_map(Op::binds).collect();
        let mut places = HashMap::new();
        let mut items = 0;
        for (number, op) in self.ops.iter().enumerate() {
            match op {
                Op::Bind(label) => {
                    places.insert(*label, items);
                }
                Op::Address { of, .. } if !bound.contains(of) => {}
                Op::Dead(bytes) => items += bytes.div_ceil(16),
                Op::Plain(_) | Op::Branch { .. } | Op::Address { .. } | Op::Indirect { .. } => {
                    items += 1 + usize::from(self.defined[number]);
                }
            }
        }
        let place = |label: Label| places.get(&label).copied();
        let mut items = Vec::new();
        let mut targets = Vec::new();
        let mut numbers = Vec::with_capacity(self.ops.len());
        for (op, defined) in self.ops.iter().zip(&self.defined) {
            let comparison = || {
                let code = Code::Cmp_r64_rm64;
                let instr = Instruction::with2(code, Register::RDX, Register::R9);
                Item::Plain(instr.expect("a form"))
            };
            let skipped = match op {
                Op::Bind(_) | Op::Dead(_) => true,
                Op::Address { of, .. } => place(*of).is_none(),
                Op::Plain(_) | Op::Branch { .. } | Op::Indirect { .. } => false,
            };
            if !skipped && *defined {
                items.push(comparison());
            }
            numbers.push((!skipped).then_some(items.len()));
            match op {
                Op::Bind(_) => {}
                Op::Dead(bytes) => {
                    items.extend(
                        dead(*bytes)
                            .chunks(16)
                            .map(|bytes| Item::Raw(bytes.to_vec())),
                    );
                }
                Op::Plain(instr) => items.push(Item::Plain(*instr)),
                Op::Branch { code, to } => items.push(Item::Branch {
                    code: *code,
                    to: place(*to).unwrap_or(0),
                }),
                Op::Address { register, of } => {
                    items.extend(place(*of).map(|to| Item::Label {
                        register: *register,
                        to,
                    }));
                }
                Op::Indirect { instr, to } => {
                    let labels = match to {
                        Targets::Labels(labels) => labels,
                        Targets::Callers(function) => &self.functions[*function].returns,
                    };
                    let to = labels.iter().filter_map(|&label| place(label)).collect();
                    targets.push((items.len(), to));
                    items.push(Item::Plain(*instr));
                }
            }
        }
        let sequence = Sequence {
            items,
            start: self.start.clone(),
            offset: self.offset,
            open_end: false,
        };
        (sequence, numbers, targets)
    }
}

/// So many bytes that nobody runs: few instructions, to be followed quickly.
fn dead(bytes: usize) -> Vec<u8> {
    const NOP: [u8; 8] = [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
    let mut dead = NOP.repeat(bytes / NOP.len());
    dead.resize(bytes, 0xcc);
    dead
}
