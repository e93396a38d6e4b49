//! What is known of the general registers between two instructions of a block.
//!
//! A register's value is known as a range of signed numbers, as another's value at the block's head
//! and so much more, as below such a value, or not at all. Ranges come from comparisons that the block
//! makes for the window, from comparisons of the guest's with a branch behind them, from immediates and
//! 32-bit results, and from accesses: one through the window that has not faulted was at an address
//! below [`SIZE`], whatever its registers were thought to be.
//!
//! Invariant: what is claimed of a register holds for every value that it can have there, given what
//! is assumed at the block's head ([`Levels`]).

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::{
    Route,
    levels::{Level, Levels, Origin, Range},
    needs::touches,
};
use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode},
    window::{INDEX_LIMIT, MARGIN, SIZE, SLACK},
};

pub(super) const RSP: usize = 4;

/// What is known of one register.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Value {
    pub range: Option<Range>,
    pub origin: Option<Origin>,
    /// It is no more than that, without sign.
    pub bound: Option<Origin>,
    /// The comparison in line that says so.
    pub check: Option<(usize, usize)>,
}

impl Value {
    fn exactly(range: Range) -> Value {
        Value {
            range: Some(range),
            ..Value::default()
        }
    }

    /// Where it lies, given what is assumed at the head.
    pub(super) fn range(&self, head: Levels) -> Option<Range> {
        let told = self.origin.and_then(|origin| origin.range(head));
        let below = self.bound.and_then(|bound| {
            let range = bound.range(head)?;
            // A negative bound is a huge one.
            (range.low >= 0).then_some(Range::new(0, range.high))
        });
        [self.range, told, below]
            .into_iter()
            .flatten()
            .reduce(Range::both)
    }

    /// It may serve an access as base, or as index, on this side of [`MARGIN`].
    pub(super) fn reaches(&self, index: bool, head: Levels) -> bool {
        let wanted = if index { Level::INDEX } else { Level::BASE };
        let wanted = Range::new(wanted.low - MARGIN, wanted.high + MARGIN);
        self.range(head).is_some_and(|range| range.within(wanted))
    }

    /// The most that holds of it.
    pub(super) fn level(&self, head: Levels) -> Level {
        let Some(range) = self.range(head) else {
            return Level::Any;
        };
        let bits = [Level::Base, Level::Index, Level::Inside]
            .into_iter()
            .filter(|level| level.range().is_some_and(|wanted| range.within(wanted)))
            .fold(0, |bits, level| bits | level as u64);
        Level::of(bits)
    }

    fn moved(&self, by: i64, head: Levels) -> Value {
        Value {
            range: self.range(head).and_then(|range| range.moved(by)),
            origin: self.origin.and_then(|origin| {
                let moved = origin.moved.checked_add(by)?;
                (moved.unsigned_abs() <= SLACK).then_some(Origin { moved, ..origin })
            }),
            bound: None,
            check: self.check,
        }
    }
}

/// Where RSP is wherever blocks of a mode with [`Mode::stack`] meet.
const STACK: Range = Range::new(-(SLACK as i64), (SIZE + SLACK) as i64);

#[derive(Clone)]
pub(super) struct State {
    pub known: [Value; 16],
}

impl State {
    /// At the block's head, where every register is its own origin.
    pub(super) fn new(mode: Mode) -> State {
        let mut state = State {
            known: std::array::from_fn(|register| Value {
                origin: Some(Origin {
                    register: register as u8,
                    moved: 0,
                }),
                ..Value::default()
            }),
        };
        state.known[RSP] = Value::default();
        if mode.stack {
            state.known[RSP].range = Some(STACK);
        }
        state
    }

    /// RSP is where the next block expects it: inside the window or as good as.
    pub(super) fn stack_holds(&self) -> bool {
        self.known[RSP]
            .range
            .is_some_and(|range| range.within(STACK))
    }

    /// What all registers but RSP fulfil; that one's place is the mode's business.
    pub(super) fn levels(&self, head: Levels) -> Levels {
        let mut levels = Levels::default();
        for (register, value) in self.known.iter().enumerate() {
            if register != RSP {
                levels.raise(register as u8, value.level(head));
            }
        }
        levels
    }

    /// `register` has passed its comparison.
    pub(super) fn compared(
        &mut self,
        register: u8,
        index: bool,
        moved: i64,
        check: (usize, usize),
    ) {
        let limit = if index { INDEX_LIMIT } else { SIZE };
        let value = &mut self.known[usize::from(register)];
        value.range = Range::new(0, limit as i64 - 1).moved(moved);
        value.check = Some(check);
    }

    /// What is known after `insn`, whose accesses took `route`.
    pub(super) fn follow(&mut self, insn: &Insn, mode: Mode, route: Route, head: Levels) {
        if mode.bits != Bits::Bits64 {
            return;
        }
        let direct = route == Route::Direct;
        if direct {
            self.accessed(insn, head);
        }
        if insn.modifies == 0 {
            return;
        }
        let before = self.clone();
        for register in 0..16u8 {
            if insn.modifies >> register & 1 == 1 {
                self.known[usize::from(register)] = before.result(insn, register, head);
            }
        }
        if insn.class == Class::Leave {
            // What RBP was, and the pop.
            self.known[RSP] = if direct {
                before.known[5].moved(8, head)
            } else {
                Value::default()
            };
            self.known[RSP].origin = None;
        }
    }

    /// An access that has succeeded says where its registers were.
    fn accessed(&mut self, insn: &Insn, head: Levels) {
        if let Some(by) = touches(insn) {
            self.narrow(RSP, Range::new(by, SIZE as i64 - 1 + by), head);
            return;
        }
        if insn.class == Class::Leave {
            self.narrow(5, Range::new(0, SIZE as i64 - 1), head);
            return;
        }
        let instr = &insn.instr;
        let certain =
            insn.class == Class::Memory && insn.memory.is_some_and(|memory| memory.certain);
        let wide = |register: Register| register == Register::None || register.is_gpr64();
        let (base, index) = (instr.memory_base(), instr.memory_index());
        if !certain
            || !wide(base)
            || !wide(index)
            || base == Register::None && index == Register::None
        {
            return;
        }
        // Both ends of what base and index add up to.
        let by = instr.memory_displacement64() as i64;
        let sum = Range::new(-by, SIZE as i64 - 1 - by);
        let value = |register: Register| {
            if register == Register::None {
                Some(Range::new(0, 0))
            } else {
                self.known[register.number()].range(head)
            }
        };
        let (Some(bases), Some(indices)) = (value(base), value(index)) else {
            return;
        };
        let scale = i64::from(instr.memory_index_scale());
        let scaled = Range::new(sum.low - bases.high, sum.high - bases.low);
        let indices_now = Range::new(scaled.low.div_euclid(scale), scaled.high.div_euclid(scale));
        let bases_now = Range::new(
            sum.low - indices.high * scale,
            sum.high - indices.low * scale,
        );
        if base != Register::None {
            self.narrow(base.number(), bases_now, head);
        }
        if index != Register::None {
            self.narrow(index.number(), indices_now, head);
        }
    }

    fn narrow(&mut self, register: usize, range: Range, head: Levels) {
        let value = &mut self.known[register];
        value.range = value
            .range(head)
            .map_or(range, |known| known.both(range))
            .cut();
    }

    /// What `insn` leaves in `register`, which it modifies, from what is known before it.
    fn result(&self, insn: &Insn, register: u8, head: Levels) -> Value {
        let instr = &insn.instr;
        let old = &self.known[usize::from(register)];
        if let Some(by) = step(insn, register) {
            return old.moved(by, head);
        }
        let target = instr.op0_register();
        let own = matches!(insn.class, Class::Plain | Class::Memory | Class::Lea)
            && instr.op0_kind() == OpKind::Register
            && target.full_register().number() == usize::from(register)
            && target.is_gpr()
            && insn.modifies.count_ones() == 1;
        if !own {
            return Value::default();
        }
        let mut value = if target.is_gpr64() {
            self.computed(insn, head)
        } else if target.is_gpr32() && zero_extends(instr) {
            Value::exactly(Range::new(0, u32::MAX.into()))
        } else {
            Value::default()
        };
        if usize::from(register) == RSP {
            value.range = value.range(head);
            (value.origin, value.bound) = (None, None);
        }
        value
    }

    /// What `insn` computes into its 64-bit target.
    fn computed(&self, insn: &Insn, head: Levels) -> Value {
        let instr = &insn.instr;
        let register = |operand: u32| {
            let found = instr.op_register(operand);
            (instr.op_kind(operand) == OpKind::Register && found.is_gpr64())
                .then(|| self.known[found.number()])
        };
        let immediate = (insn.class == Class::Plain && instr.op_count() == 2)
            .then(|| immediate(instr))
            .flatten();
        let range = match (instr.mnemonic(), immediate) {
            (Mnemonic::Mov, Some(value)) => Range::new(value, value).cut(),
            (Mnemonic::And, Some(mask)) if mask >= 0 => Range::new(0, mask).cut(),
            (Mnemonic::Mov, None) => return register(1).unwrap_or_default(),
            (Mnemonic::Movzx, _) => Some(Range::new(0, u16::MAX.into())),
            (Mnemonic::Lea, _) => return self.address(instr, head),
            (Mnemonic::Add, None) => register(0)
                .and_then(|value| value.range(head))
                .zip(register(1).and_then(|value| value.range(head)))
                .and_then(|(first, second)| first.plus(second)),
            (
                Mnemonic::Cmova
                | Mnemonic::Cmovae
                | Mnemonic::Cmovb
                | Mnemonic::Cmovbe
                | Mnemonic::Cmove
                | Mnemonic::Cmovne,
                _,
            ) => register(0)
                .and_then(|value| value.range(head))
                .zip(register(1).and_then(|value| value.range(head)))
                .map(|(first, second)| first.either(second)),
            _ => None,
        };
        range.map_or_else(Value::default, Value::exactly)
    }

    /// What `lea` computes.
    fn address(&self, instr: &Instruction, head: Levels) -> Value {
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let by = instr.memory_displacement64() as i64;
        if !base.is_gpr64() || by.unsigned_abs() > SLACK {
            return Value::default();
        }
        let base = self.known[base.number()];
        if index == Register::None {
            return base.moved(by, head);
        }
        if !index.is_gpr64() {
            return Value::default();
        }
        let scaled = |range: Range| {
            let scale = i64::from(instr.memory_index_scale());
            Range::new(range.low * scale, range.high * scale)
        };
        let index = self.known[index.number()].range(head).map(scaled);
        base.range(head)
            .zip(index)
            .and_then(|(base, index)| base.plus(index)?.moved(by))
            .map_or_else(Value::default, Value::exactly)
    }

    /// The branch of `jump` was taken, or not: what its comparison in `compare`, just before it, says
    /// then.
    pub(super) fn branched(&mut self, compare: &Insn, jump: &Insn, taken: bool, head: Levels) {
        let instr = &compare.instr;
        let left = instr.op0_register();
        if compare.class != Class::Plain
            || instr.mnemonic() != Mnemonic::Cmp
            || instr.op0_kind() != OpKind::Register
            || !left.is_gpr64()
        {
            return;
        }
        // Which side is smaller, and whether by at least one.
        let (left_smaller, strictly) = match (jump.instr.condition_code(), taken) {
            (ConditionCode::b, true) | (ConditionCode::ae, false) => (true, true),
            (ConditionCode::be, true) | (ConditionCode::a, false) => (true, false),
            (ConditionCode::a, true) | (ConditionCode::be, false) => (false, true),
            (ConditionCode::ae, true) | (ConditionCode::b, false) => (false, false),
            _ => return,
        };
        let by = -i64::from(strictly);
        if let Some(value) = immediate(instr) {
            if left_smaller && value >= -by {
                self.narrow(left.number(), Range::new(0, value + by), head);
            }
            return;
        }
        let right = instr.op1_register();
        if instr.op1_kind() != OpKind::Register || !right.is_gpr64() {
            return;
        }
        let (small, large) = if left_smaller {
            (left, right)
        } else {
            (right, left)
        };
        if small.number() == RSP {
            return;
        }
        let limit = self.known[large.number()];
        if let Some(range) = limit.range(head)
            && range.low >= 0
        {
            self.narrow(small.number(), Range::new(0, range.high), head);
        }
        // One that has gone down may have gone below zero.
        self.known[small.number()].bound = limit.origin.filter(|origin| origin.moved >= 0);
    }
}

/// The immediate operand of an instruction with two, its first a 64-bit register.
fn immediate(instr: &Instruction) -> Option<i64> {
    matches!(
        instr.op1_kind(),
        OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::Immediate64
    )
    .then(|| instr.immediate(1) as i64)
}

/// True if an instruction with a 32-bit target leaves a 32-bit number there, whatever happens.
fn zero_extends(instr: &Instruction) -> bool {
    matches!(
        instr.mnemonic(),
        Mnemonic::Mov
            | Mnemonic::Movzx
            | Mnemonic::Lea
            | Mnemonic::And
            | Mnemonic::Add
            | Mnemonic::Sub
            | Mnemonic::Xor
            | Mnemonic::Or
            | Mnemonic::Imul
    )
}

/// By how much `insn` moves `register`: Some(0) if it leaves it alone, None if nobody knows.
pub(crate) fn step(insn: &Insn, register: u8) -> Option<i64> {
    let instr = &insn.instr;
    if insn.modifies >> register & 1 == 0 {
        return Some(0);
    }
    let is_target =
        |operand: Register| operand.is_gpr64() && operand.number() == usize::from(register);
    let small = |by: i64| (by.unsigned_abs() <= SLACK).then_some(by);
    match insn.class {
        Class::Push
        | Class::Call
        | Class::CallIndirect
        | Class::CallInline
        | Class::Return
        | Class::ReturnInline
            if register == 4 =>
        {
            Some(i64::from(instr.stack_pointer_increment()))
        }
        Class::Pop if register == 4 && !is_target(instr.op0_register()) => {
            Some(i64::from(instr.stack_pointer_increment()))
        }
        Class::Plain if instr.op0_kind() == OpKind::Register && is_target(instr.op0_register()) => {
            let by_immediate = instr.op_count() == 2
                && !matches!(instr.op1_kind(), OpKind::Register | OpKind::Memory);
            match instr.mnemonic() {
                Mnemonic::Inc => Some(1),
                Mnemonic::Dec => Some(-1),
                Mnemonic::Add if by_immediate => small(instr.immediate(1) as i64),
                Mnemonic::Sub if by_immediate => small((instr.immediate(1) as i64).wrapping_neg()),
                _ => None,
            }
        }
        Class::Lea
            if is_target(instr.op0_register())
                && is_target(instr.memory_base())
                && instr.memory_index() == Register::None =>
        {
            small(instr.memory_displacement64() as i64)
        }
        _ => None,
    }
}
