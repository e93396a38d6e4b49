//! Functions and their calls: leaves of all sizes, frames, recursion, tail jumps, returns to other places
//! than the call's; calls by registers, by memory, by RSP, and by pushed addresses.
//!
//! A function calls those with lower numbers, or itself. What it changes of its caller's pinned registers is
//! kept on the stack around the call.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::access::{ACROSS, DISTANT, WRITABLE};
use super::control::CONDITIONS;
use super::plan::{Function, Op, Targets};
use super::writer::{Known, RSP, Scope, Writer};
use crate::operands::gpr64;

/// Deepest recursion.
const DEPTH: u64 = 6;
/// What a function may expect behind its pointer.
const ROOM: i64 = 0x800;
const POINTER: Known = Known {
    register: 0,
    low: WRITABLE.low,
    high: WRITABLE.high - ROOM,
    behind: ROOM,
};

impl Writer<'_> {
    /// Writes a function that executes about `budget` instructions at most.
    pub(super) fn function(&mut self, budget: u64) {
        let number = self.functions.len();
        let entry = self.here();
        self.functions.push(Function {
            entry,
            clobbers: 0,
            pointer: None,
            depth: None,
            pops: 0,
            skips: 0,
            cost: 0,
            returns: Vec::new(),
            tails: Vec::new(),
        });
        let (outer, cost) = (std::mem::take(&mut self.clobbered), self.cost);
        let mut scope = Scope {
            pinned: 1 << RSP,
            known: Vec::new(),
            budget,
            depth: 3,
            leave: None,
            callable: number,
            returns: Some(number),
            faults: false,
        };
        match self.below(100) {
            0..40 => {
                if self.chance(15) {
                    self.functions[number].pops = 8 * self.below(4) as i32;
                }
                self.leaf(&scope, number);
            }
            40..48 => self.strange_return(&scope, number),
            48..58 => self.recursive(&mut scope, number),
            _ => self.body(&mut scope, number),
        }
        let function = &mut self.functions[number];
        function.clobbers |= std::mem::replace(&mut self.clobbered, outer);
        function.cost += self.cost - cost;
        self.cost = cost;
    }

    /// The return of function `number`.
    pub(super) fn ret(&mut self, number: usize) {
        let instr = match self.functions[number].pops {
            0 => Ok(Instruction::with(Code::Retnq)),
            pops => Instruction::with1(Code::Retnq_imm16, pops),
        };
        self.indirect(instr, Targets::Callers(number));
    }

    /// Registers alone, and few.
    fn leaf(&mut self, scope: &Scope, number: usize) {
        for _ in 0..self.below(11) {
            match self.below(3) {
                0 => self.flags(scope),
                1 => self.neutral(scope),
                _ => self.straight(scope),
            }
        }
        self.ret(number);
    }

    /// Goes back otherwise than by a plain return, or elsewhere.
    fn strange_return(&mut self, scope: &Scope, number: usize) {
        let Some(register) = self.free(scope) else {
            unreachable!("all registers are free");
        };
        let inner = scope.pin(register);
        let wide = gpr64(register.into());
        let top = Self::at(Register::RSP, 0);
        match self.below(5) {
            0 => {
                let skips = 1 + self.below(15) as usize;
                self.functions[number].skips = skips;
                self.straight(&inner);
                self.put(Instruction::with2(Code::Add_rm64_imm8, top, skips as i32));
                self.ret(number);
            }
            1 => {
                self.put(Instruction::with1(Code::Pop_r64, wide));
                self.straight(&inner);
                let jump = Instruction::with1(Code::Jmp_rm64, wide);
                self.indirect(jump, Targets::Callers(number));
            }
            2 => {
                self.put(Instruction::with1(Code::Pop_r64, wide));
                self.straight(&inner);
                self.push(register);
                self.ret(number);
            }
            3 => {
                self.move_rsp(8);
                self.straight(&inner);
                let below = Self::at(Register::RSP, -8);
                let jump = Instruction::with1(Code::Jmp_rm64, below);
                self.indirect(jump, Targets::Callers(number));
            }
            // Past a caller in between.
            _ => {
                let past = self.label();
                self.straight(&inner);
                self.branch(Code::Call_rel32_64, past);
                self.ops.push(Op::Dead(3));
                self.bind(past);
                self.move_rsp(8);
                self.straight(&inner);
                self.ret(number);
            }
        }
    }

    /// A pointer that callers pass.
    fn parameter(&mut self, scope: &mut Scope, number: usize) {
        if let Some(register) = self.free(scope) {
            self.functions[number].pointer = Some(register);
            *scope = scope.pin(register);
            scope.known.push(Known {
                register,
                ..POINTER
            });
        }
    }

    fn recursive(&mut self, scope: &mut Scope, number: usize) {
        let Some(depth) = self.free(scope) else {
            return;
        };
        self.functions[number].depth = Some(depth);
        *scope = scope.pin(depth).inside(scope.budget / 8);
        scope.returns = None;
        if self.chance(50) {
            self.parameter(scope, number);
        }
        let out = self.label();
        let wide = gpr64(depth.into());
        let begun = self.cost;
        if self.chance(50) {
            self.put(Instruction::with2(Code::Sub_rm64_imm8, wide, 1));
            self.branch(Code::Jb_rel32_64, out);
        } else {
            self.put(Instruction::with1(Code::Dec_rm64, wide));
            self.branch(Code::Js_rel32_64, out);
        }
        let calls = if self.chance(25) { 2 } else { 1 };
        for _ in 0..calls {
            let count = self.below(3);
            self.statements(&scope.inside(scope.budget / 4), count);
            let entry = self.functions[number].entry;
            self.branch(Code::Call_rel32_64, entry);
            let behind = self.here();
            self.functions[number].returns.push(behind);
        }
        let count = self.below(3);
        self.statements(&scope.inside(scope.budget / 4), count);
        self.bind(out);
        self.put(Instruction::with1(Code::Inc_rm64, wide));
        self.ret(number);
        let once = self.cost - begun;
        self.cost += once * if calls == 2 { 2 << DEPTH } else { DEPTH };
    }

    /// Statements, maybe in a frame.
    fn body(&mut self, scope: &mut Scope, number: usize) {
        let frame = self.chance(30);
        if self.chance(50) {
            self.parameter(scope, number);
        }
        if self.chance(20) {
            self.functions[number].pops = 8 * self.below(4) as i32;
        }
        let mut saved = Vec::new();
        const RBP: u8 = 5;
        let frame = frame && self.is_free(scope, RBP);
        if frame {
            self.push(RBP);
            self.put(Instruction::with2(
                Code::Mov_r64_rm64,
                Register::RBP,
                Register::RSP,
            ));
            let by = 8 * self.below(8) as i64;
            self.move_rsp(-by);
            *scope = scope.pin(RBP);
        } else {
            for _ in 0..self.pick(&[0, 0, 1, 2, 3]) {
                if let Some(register) = self.free(scope)
                    && !saved.contains(&register)
                {
                    self.push(register);
                    saved.push(register);
                }
            }
        }
        if frame || !saved.is_empty() {
            scope.returns = None;
        }
        let count = 1 + self.below(6);
        self.statements(scope, count);
        if frame {
            let before = self.clobbered;
            if self.chance(60) {
                self.put(Ok(Instruction::with(Code::Leaveq)));
            } else {
                self.put(Instruction::with2(
                    Code::Mov_r64_rm64,
                    Register::RSP,
                    Register::RBP,
                ));
                self.restore(RBP);
            }
            self.clobbered = before & !(1 << RBP);
        }
        for &register in saved.iter().rev() {
            self.restore(register);
            self.clobbered &= !(1 << register);
        }
        if self.chance(20) && self.tail(scope, number) {
            return;
        }
        self.ret(number);
    }

    /// Ends with a jump to another function that pops as much and expects no more.
    fn tail(&mut self, scope: &Scope, number: usize) -> bool {
        let own = &self.functions[number];
        let fits: Vec<usize> = (0..number)
            .filter(|&other| {
                let other = &self.functions[other];
                other.pops == own.pops
                    && other.skips == 0
                    && other.depth.is_none()
                    && (other.pointer.is_none() || other.pointer == own.pointer)
                    && other.cost < scope.budget
            })
            .collect();
        if fits.is_empty() {
            return false;
        }
        let other = self.pick(&fits);
        let Function {
            entry,
            clobbers,
            cost,
            ..
        } = self.functions[other];
        // Its callers count on this function's pointer.
        if own_pointer(&self.functions[number]) & clobbers != 0 {
            return false;
        }
        if self.chance(50) {
            let code = self.pick(CONDITIONS);
            let on = self.label();
            self.branch(code, on);
            self.jump(entry);
            self.bind(on);
            self.ret(number);
        } else {
            self.jump(entry);
        }
        self.functions[number].tails.push(other);
        self.clobbered |= clobbers;
        self.cost += cost;
        true
    }

    /// Calls one of the functions that may be called here, if there are any.
    pub(super) fn some_call(&mut self, scope: &Scope) {
        const TRIES: u64 = 4;
        if scope.callable == 0 {
            return;
        }
        for _ in 0..TRIES {
            let number = self.below(scope.callable as u64) as usize;
            if self.functions[number].cost < scope.budget {
                self.unit(|writer| writer.call(scope, number));
                return;
            }
        }
    }

    /// Puts what the function expects into its registers; false if they aren't free.
    fn pass(&mut self, scope: &Scope, function: &Function) -> bool {
        if let Some(depth) = function.depth {
            if !self.is_free(scope, depth) {
                return false;
            }
            let value = self.below(DEPTH + 1);
            self.set(depth, value);
        }
        let Some(pointer) = function.pointer else {
            return true;
        };
        if !self.is_free(scope, pointer) {
            return scope.known.iter().any(|known| {
                known.register == pointer && known.low >= POINTER.low && known.high <= POINTER.high
            });
        }
        let target = gpr64(pointer.into());
        for known in &scope.known {
            if fits(known) && self.chance(60) {
                let from = gpr64(known.register.into());
                self.put(Instruction::with2(Code::Mov_r64_rm64, target, from));
                return true;
            }
        }
        let place = self.place();
        self.set(pointer, place);
        // Near or far, as the flags will have it.
        if self.chance(35)
            && let Some(other) =
                self.free(&scope.pin(pointer).pin(function.depth.unwrap_or(pointer)))
        {
            let place = self.place();
            self.set(other, place);
            let code = self.pick(&[
                Code::Cmovb_r64_rm64,
                Code::Cmove_r64_rm64,
                Code::Cmovs_r64_rm64,
                Code::Cmovp_r64_rm64,
                Code::Cmovle_r64_rm64,
            ]);
            self.put(Instruction::with2(code, target, gpr64(other.into())));
        }
        true
    }

    /// Somewhere with room behind it.
    fn place(&mut self) -> u64 {
        let region = self.pick(&[WRITABLE, WRITABLE, WRITABLE, ACROSS, DISTANT]);
        let room = region.high - region.low - ROOM;
        (region.low + self.below(room as u64 + 1) as i64) as u64
    }

    fn call(&mut self, scope: &Scope, number: usize) {
        let function = self.functions[number].clone();
        let begun = self.ops.len();
        if !self.pass(scope, &function) {
            self.ops.truncate(begun);
            return;
        }
        let mut inner = scope.clone();
        for register in [function.depth, function.pointer].into_iter().flatten() {
            inner = inner.pin(register);
        }
        let kept: Vec<u8> = (0..16)
            .filter(|&register| (function.clobbers & scope.pinned) >> register & 1 == 1)
            .collect();
        for &register in &kept {
            self.push(register);
        }
        let register = self.free(&inner);
        let way = if register.is_none() {
            0
        } else {
            self.below(20)
        };
        let register = register.unwrap_or(0);
        let wide = gpr64(register.into());
        let target = Targets::Labels(vec![function.entry]);
        let by_stack = way == 13;
        if by_stack {
            self.address(register, function.entry);
            self.push(register);
        }
        for _ in 0..function.pops / 8 {
            let value = self.random().value() as i32;
            self.put(Instruction::with1(Code::Pushq_imm32, value));
        }
        let behind = self.label();
        match way {
            10..12 => {
                self.address(register, function.entry);
                self.indirect(Instruction::with1(Code::Call_rm64, wide), target);
            }
            12 => match self.pointer_slots(1) {
                Some(slot) => {
                    self.pointers.push((slot, function.entry));
                    let memory = if self.chance(50) {
                        crate::layout::operand(slot)
                    } else {
                        self.set(register, slot - 8);
                        Self::at(wide, 8)
                    };
                    self.indirect(Instruction::with1(Code::Call_rm64, memory), target);
                }
                None => self.branch(Code::Call_rel32_64, function.entry),
            },
            13 => {
                let memory = match self.chance(50) {
                    true => Self::at(Register::RSP, function.pops.into()),
                    false => {
                        self.set(register, function.pops as u64);
                        MemoryOperand::with_base_index(Register::RSP, wide)
                    }
                };
                self.indirect(Instruction::with1(Code::Call_rm64, memory), target);
            }
            // The return address is pushed by hand.
            14 => {
                self.address(register, behind);
                self.push(register);
                self.jump(function.entry);
            }
            15 => {
                self.address(register, behind);
                self.push(register);
                self.address(register, function.entry);
                self.push(register);
                self.indirect(Ok(Instruction::with(Code::Retnq)), target);
            }
            // As retpolines do.
            16 => {
                let (thunk, inside, trap) = (self.label(), self.label(), self.label());
                let over = self.label();
                self.address(register, function.entry);
                self.jump(over);
                self.bind(thunk);
                self.branch(Code::Call_rel32_64, inside);
                self.bind(trap);
                self.put(Ok(Instruction::with(Code::Pause)));
                self.jump(trap);
                self.bind(inside);
                let top = Self::at(Register::RSP, 0);
                self.put(Instruction::with2(Code::Mov_rm64_r64, top, wide));
                self.indirect(Ok(Instruction::with(Code::Retnq)), target);
                self.bind(over);
                self.branch(Code::Call_rel32_64, thunk);
            }
            _ => self.branch(Code::Call_rel32_64, function.entry),
        }
        // By hand, `behind` comes before what is skipped as well.
        self.bind(behind);
        if function.skips > 0 {
            self.ops.push(Op::Dead(function.skips));
        }
        let back = self.here();
        self.functions[number].returns.push(back);
        self.clobbered |= function.clobbers;
        self.cost += function.cost;
        if by_stack {
            self.move_rsp(8);
        }
        for &register in kept.iter().rev() {
            self.restore(register);
        }
    }
}

/// True if a function's pointer may be there.
fn fits(known: &Known) -> bool {
    known.behind >= ROOM
        || known.behind == 0 && known.low >= POINTER.low && known.high <= POINTER.high
}

fn own_pointer(function: &Function) -> u16 {
    function.pointer.map_or(0, |register| 1 << register)
}
