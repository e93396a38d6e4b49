//! Writes operations: keeps track of the registers that must not be changed, of those whose range is known,
//! and of what the program costs to run.

use std::ops::Range;

use iced_x86::{Code, Encoder, IcedError, Instruction, InstructionInfoFactory, OpAccess, Register};

use super::plan::{Function, Label, Op, Targets};
use crate::layout::{CODE, DATA, LANDING, PAGE, operand};
use crate::operands::{Builder, gpr32, gpr64};
use crate::random::Random;
use crate::table::Table;

pub(super) const RSP: u8 = 4;
pub(super) const RCX: u8 = 1;

/// Where the stack begins, in the page that no induction variable comes by.
pub(super) const STACK: u64 = DATA + 7 * PAGE - 0x80;
/// Pointers to functions and cases.
pub(super) const POINTERS: u64 = DATA + 6 * PAGE;
pub(super) const POINTERS_END: u64 = POINTERS + 0x400;

/// A register whose value is in a range, and stays there while the scope lasts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) register: u8,
    pub(super) low: i64,
    pub(super) high: i64,
    /// It is elsewhere instead, with this much behind it.
    pub(super) behind: i64,
}

/// What a statement may do.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    /// Registers that it must not change.
    pub(super) pinned: u16,
    /// Those of them whose range is known.
    pub(super) known: Vec<Known>,
    /// Instructions that it may execute.
    pub(super) budget: u64,
    /// How deep statements may nest yet.
    pub(super) depth: u32,
    /// Where the loop around it ends, and its next turn begins, if the stack is as there.
    pub(super) leave: Option<(Label, Label)>,
    /// Functions that it may call: those with lower numbers.
    pub(super) callable: usize,
    /// The function that it is part of, if that may be left where the stack is as it is.
    pub(super) returns: Option<usize>,
    /// It may fault: the program goes on.
    pub(super) faults: bool,
}

impl Scope {
    pub(super) fn pin(&self, register: u8) -> Scope {
        let mut scope = self.clone();
        scope.pinned |= 1 << register;
        scope
    }

    /// With this much of the budget, one level deeper.
    pub(super) fn inside(&self, budget: u64) -> Scope {
        Scope {
            budget,
            depth: self.depth.saturating_sub(1),
            ..self.clone()
        }
    }

    /// Where something is pushed that has to be popped.
    pub(super) fn pushed(&self) -> Scope {
        Scope {
            leave: None,
            returns: None,
            ..self.clone()
        }
    }
}

pub(super) struct Writer<'a> {
    pub(super) builder: Builder<'a>,
    pub(super) table: &'a Table,
    pub(super) ops: Vec<Op>,
    pub(super) units: Vec<Range<usize>>,
    pub(super) functions: Vec<Function>,
    /// What is to be written to memory before the program begins.
    pub(super) pointers: Vec<(u64, Label)>,
    /// The next free place for one.
    pub(super) pointers_used: u64,
    /// General registers changed since somebody cleared this.
    pub(super) clobbered: u16,
    pub(super) cost: u64,
    labels: Label,
    info: InstructionInfoFactory,
    encoder: Encoder,
}

impl<'a> Writer<'a> {
    pub(super) fn new(random: &'a mut Random, table: &'a Table) -> Writer<'a> {
        Writer {
            builder: Builder::new(random, [0; 16]),
            table,
            ops: Vec::new(),
            units: Vec::new(),
            functions: Vec::new(),
            pointers: Vec::new(),
            pointers_used: POINTERS,
            clobbered: 0,
            cost: 0,
            labels: 0,
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
        }
    }

    pub(super) fn random(&mut self) -> &mut Random {
        self.builder.random
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.builder.random.chance(percent)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.builder.random.below(bound)
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        self.builder.random.pick(from)
    }

    pub(super) fn label(&mut self) -> Label {
        self.labels += 1;
        self.labels - 1
    }

    pub(super) fn bind(&mut self, label: Label) {
        self.ops.push(Op::Bind(label));
    }

    /// A label here.
    pub(super) fn here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// General registers that `instr` changes.
    pub(super) fn changes(&mut self, instr: &Instruction) -> u16 {
        let mut changed = 0;
        for used in self.info.info(instr).used_registers() {
            let reads = matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            if used.register().is_gpr() && !reads {
                changed |= 1 << used.register().full_register().number();
            }
        }
        changed
    }

    /// True if `instr` writes to memory.
    pub(super) fn stores(&mut self, instr: &Instruction) -> bool {
        let info = self.info.info(instr);
        info.used_memory().iter().any(|used| {
            !matches!(
                used.access(),
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            )
        })
    }

    /// Adds an instruction; false if there is none such.
    pub(super) fn put(&mut self, instr: Result<Instruction, IcedError>) -> bool {
        let Ok(instr) = instr else { return false };
        let encoded = self.encoder.encode(&instr, CODE).is_ok();
        let _ = self.encoder.take_buffer();
        if encoded {
            self.clobbered |= self.changes(&instr) & !(1 << RSP);
            self.ops.push(Op::Plain(instr));
            self.cost += 1;
        }
        encoded
    }

    pub(super) fn branch(&mut self, code: Code, to: Label) {
        self.ops.push(Op::Branch { code, to });
        self.cost += 1;
    }

    pub(super) fn jump(&mut self, to: Label) {
        self.branch(Code::Jmp_rel32_64, to);
    }

    pub(super) fn address(&mut self, register: u8, of: Label) {
        self.clobbered |= 1 << register;
        self.ops.push(Op::Address {
            register: gpr64(register.into()),
            of,
        });
        self.cost += 1;
    }

    pub(super) fn indirect(&mut self, instr: Result<Instruction, IcedError>, to: Targets) {
        let instr = instr.expect("a form");
        self.ops.push(Op::Indirect { instr, to });
        self.cost += 1;
    }

    /// Loads a register, in one of a few ways.
    pub(super) fn set(&mut self, register: u8, value: u64) {
        let instr = if value >> 32 == 0 && self.chance(80) {
            Instruction::with2(Code::Mov_r32_imm32, gpr32(register.into()), value as u32)
        } else if value as i32 as u64 == value && self.chance(70) {
            Instruction::with2(Code::Mov_rm64_imm32, gpr64(register.into()), value as i32)
        } else {
            Instruction::with2(Code::Mov_r64_imm64, gpr64(register.into()), value)
        };
        self.put(instr);
    }

    /// A register that may be changed; None if there are few left.
    pub(super) fn free(&mut self, scope: &Scope) -> Option<u8> {
        let taken = scope.pinned | 1 << RSP;
        if taken.count_ones() > 11 {
            return None;
        }
        loop {
            let number = self.below(16) as u8;
            if taken >> number & 1 == 0 {
                return Some(number);
            }
        }
    }

    pub(super) fn two_free(&mut self, scope: &Scope) -> Option<(u8, u8)> {
        let first = self.free(scope)?;
        Some((first, self.free(&scope.pin(first))?))
    }

    pub(super) fn is_free(&self, scope: &Scope, register: u8) -> bool {
        (scope.pinned | 1 << RSP) >> register & 1 == 0
    }

    /// What `write` writes can be left out together.
    pub(super) fn unit(&mut self, write: impl FnOnce(&mut Writer<'a>)) {
        let begin = self.ops.len();
        write(self);
        if self.ops.len() > begin {
            self.units.push(begin..self.ops.len());
        }
    }

    /// A part of the program begins, which goes on at `next` after a fault, with this stack.
    pub(super) fn land(&mut self, next: Option<Label>, stack: u64) {
        let landing = operand(LANDING);
        if let Some(next) = next {
            self.address(0, next);
            self.put(Instruction::with2(
                Code::Mov_rm64_r64,
                landing,
                Register::RAX,
            ));
        } else {
            self.put(Instruction::with2(Code::Mov_rm64_imm32, landing, 0));
        }
        self.put(Instruction::with2(
            Code::Mov_r64_imm64,
            Register::RSP,
            stack,
        ));
    }

    pub(super) fn push(&mut self, register: u8) {
        self.put(Instruction::with1(Code::Push_r64, gpr64(register.into())));
    }

    /// Pops what was there before: it doesn't count as changed.
    pub(super) fn restore(&mut self, register: u8) {
        let before = self.clobbered;
        self.put(Instruction::with1(Code::Pop_r64, gpr64(register.into())));
        self.clobbered = before;
    }

    /// A memory operand of a register and a displacement.
    pub(super) fn at(base: Register, displacement: i64) -> iced_x86::MemoryOperand {
        iced_x86::MemoryOperand::with_base_displ(base, displacement)
    }
}
