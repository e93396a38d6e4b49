//! Statements: diamonds on flags that some earlier block made, switches, the stack, and what is in them.

use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::plan::{Op, Targets};
use super::writer::{POINTERS_END, Scope, Writer};
use crate::layout::{DATA, PAGE, operand};
use crate::operands::{gpr32, gpr64};

pub(super) const CONDITIONS: &[Code] = &[
    Code::Jo_rel32_64,
    Code::Jno_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jbe_rel32_64,
    Code::Ja_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jp_rel32_64,
    Code::Jnp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jge_rel32_64,
    Code::Jle_rel32_64,
    Code::Jg_rel32_64,
];

/// Flags of RFLAGS that ring 3 may set as it likes, TF and AC aside.
const SETTABLE: u32 = 0xcd5;

impl Writer<'_> {
    /// Some statements.
    pub(super) fn statements(&mut self, scope: &Scope, count: u64) {
        let begun = self.cost;
        for _ in 0..count {
            let Some(left) = scope.budget.checked_sub(self.cost - begun) else {
                return;
            };
            self.statement(&Scope {
                budget: left,
                ..scope.clone()
            });
        }
    }

    fn statement(&mut self, scope: &Scope) {
        let nest = scope.depth > 0 && scope.budget > 12;
        if scope.faults && self.chance(4) {
            return self.fault();
        }
        match self.below(100) {
            0..16 => self.straight(scope),
            16..22 => self.flags(scope),
            22..42 => self.access(scope),
            42..57 if nest => self.counted_loop(scope),
            57..70 if nest => self.diamond(scope),
            70..84 => self.some_call(scope),
            84..87 if nest => self.switch(scope),
            87..89 => self.string(scope),
            89..93 => self.flags_word(scope),
            93..95 => self.stack(scope),
            95..97 => self.leave_loop(scope),
            97..98 => self.early_return(scope),
            98..99 => self.block_ends(),
            _ => self.straight(scope),
        }
    }

    /// A fault, or not: no memory, no right to it, no instruction.
    fn fault(&mut self) {
        self.unit(|writer| {
            let over = writer.label();
            if writer.chance(70) {
                let code = writer.pick(CONDITIONS);
                writer.branch(code, over);
            }
            let page = writer.pick(&[4, 5]);
            let nowhere = operand(DATA + page * PAGE + writer.below(PAGE - 64));
            let number = writer.below(16) as usize;
            let (register, vector) = (gpr64(number), Register::XMM0 + number as u32);
            let instr = match writer.below(8) {
                0 => Instruction::with2(Code::Mov_rm64_r64, nowhere, register),
                1 => Instruction::with2(Code::Adc_rm64_r64, nowhere, register),
                2 => Instruction::with2(Code::Movups_xmmm128_xmm, nowhere, vector),
                3 => Instruction::with1(Code::Pop_rm64, nowhere),
                4 => Instruction::with2(Code::Xadd_rm64_r64, nowhere, register),
                5 => Instruction::with1(Code::Inc_rm32, nowhere),
                6 => Instruction::with2(Code::Shl_rm64_CL, nowhere, Register::CL),
                _ => Ok(Instruction::with(Code::Ud2)),
            };
            writer.put(instr);
            writer.bind(over);
        });
    }

    /// A block ends, and nothing else happens.
    fn block_ends(&mut self) {
        self.unit(|writer| {
            let over = writer.label();
            writer.jump(over);
            let bytes = writer.below(40) as usize;
            writer.ops.push(Op::Dead(bytes));
            writer.bind(over);
        });
    }

    /// Flags are made here, or weren't; what leaves them alone comes between, another block maybe.
    fn producer(&mut self, scope: &Scope) {
        if self.chance(60) {
            self.flags(scope);
        }
        for _ in 0..self.below(3) {
            match self.below(5) {
                0 => self.block_ends(),
                1 => self.some_call(&scope.inside(scope.budget / 4)),
                _ => self.neutral(scope),
            }
        }
    }

    /// if/else.
    fn diamond(&mut self, scope: &Scope) {
        self.unit(|writer| {
            writer.producer(scope);
            let (otherwise, end) = (writer.label(), writer.label());
            let code = writer.pick(CONDITIONS);
            writer.branch(code, otherwise);
            let inner = scope.inside(scope.budget / 3);
            let count = writer.below(4);
            writer.statements(&inner, count);
            let both = writer.chance(60);
            if both {
                writer.jump(end);
            }
            writer.bind(otherwise);
            if both {
                let count = writer.below(4);
                writer.statements(&inner, count);
            }
            writer.bind(end);
            // Who reads the flags that either side left.
            if writer.chance(40) {
                writer.flags(scope);
            }
        });
    }

    /// Out of the loop, or to its next turn.
    fn leave_loop(&mut self, scope: &Scope) {
        let Some((leave, again)) = scope.leave else {
            return;
        };
        self.unit(|writer| {
            let code = writer.pick(CONDITIONS);
            let to = if writer.chance(60) { leave } else { again };
            writer.branch(code, to);
        });
    }

    fn early_return(&mut self, scope: &Scope) {
        let Some(function) = scope.returns else {
            return;
        };
        self.unit(|writer| {
            let on = writer.label();
            let code = writer.pick(CONDITIONS);
            writer.branch(code, on);
            writer.ret(function);
            writer.bind(on);
        });
    }

    /// A switch: by a table of pointers, in one of the ways that compilers know.
    fn switch(&mut self, scope: &Scope) {
        let Some((index, target)) = self.two_free(scope) else {
            return;
        };
        let cases = self.pick(&[2u64, 4, 4, 8]);
        let Some(table) = self.pointer_slots(cases) else {
            return;
        };
        self.unit(|writer| {
            let labels: Vec<_> = (0..cases).map(|_| writer.label()).collect();
            let end = writer.label();
            for (at, &label) in (table..).step_by(8).zip(&labels) {
                writer.pointers.push((at, label));
            }
            let known = scope
                .known
                .iter()
                .find(|known| known.behind == 0 && known.low >= 0 && known.high < 1 << 31);
            let from = match known {
                Some(known) if writer.chance(50) => known.register,
                Some(_) | None => writer.below(16) as u8,
            };
            let (index32, from32) = (gpr32(index.into()), gpr32(from.into()));
            writer.put(Instruction::with2(Code::Mov_r32_rm32, index32, from32));
            let mask = cases as i32 - 1;
            writer.put(Instruction::with2(Code::And_rm32_imm8, index32, mask));
            let index = gpr64(index.into());
            let target64 = gpr64(target.into());
            let to = Targets::Labels(labels.clone());
            let by_table = MemoryOperand::with_base_index_scale(target64, index, 8);
            match writer.below(4) {
                0 if table >> 31 == 0 => {
                    let memory = MemoryOperand::new(
                        Register::None,
                        index,
                        8,
                        table as i64,
                        8,
                        false,
                        Register::None,
                    );
                    writer.indirect(Instruction::with1(Code::Jmp_rm64, memory), to);
                }
                0 | 1 => {
                    writer.set(target, table);
                    writer.indirect(Instruction::with1(Code::Jmp_rm64, by_table), to);
                }
                2 => {
                    writer.set(target, table);
                    writer.put(Instruction::with2(Code::Mov_r64_rm64, target64, by_table));
                    writer.indirect(Instruction::with1(Code::Jmp_rm64, target64), to);
                }
                _ => {
                    writer.set(target, table);
                    writer.put(Instruction::with1(Code::Push_rm64, by_table));
                    writer.indirect(Ok(Instruction::with(Code::Retnq)), to);
                }
            }
            let inner = scope.inside(scope.budget / 3);
            for label in labels {
                writer.bind(label);
                let count = writer.below(3);
                writer.statements(&inner, count);
                if writer.chance(75) {
                    writer.jump(end);
                }
            }
            writer.bind(end);
        });
    }

    /// Room for pointers.
    pub(super) fn pointer_slots(&mut self, count: u64) -> Option<u64> {
        let used = self.pointers_used;
        (used + 8 * count <= POINTERS_END).then(|| {
            self.pointers_used += 8 * count;
            used
        })
    }

    /// pushf and popf: flags and DF change, or wait on the stack for a while.
    fn flags_word(&mut self, scope: &Scope) {
        self.unit(|writer| match writer.below(5) {
            0 => {
                let value = (writer.random().next() as u32 & SETTABLE | 0x202) as i32;
                writer.put(Instruction::with1(Code::Pushq_imm32, value));
                writer.put(Ok(Instruction::with(Code::Popfq)));
            }
            1 => {
                let bits = (writer.random().next() as u32 & SETTABLE) as i32;
                let top = Self::at(Register::RSP, 0);
                writer.put(Ok(Instruction::with(Code::Pushfq)));
                writer.put(Instruction::with2(Code::Xor_rm64_imm32, top, bits));
                writer.put(Ok(Instruction::with(Code::Popfq)));
            }
            2 => {
                // Kept over something else.
                writer.put(Ok(Instruction::with(Code::Pushfq)));
                let count = writer.below(3);
                writer.statements(&scope.pushed().inside(scope.budget / 2), count);
                writer.put(Ok(Instruction::with(Code::Popfq)));
            }
            3 => {
                writer.put(Ok(Instruction::with(Code::Pushfq)));
                writer.pop_any(scope);
            }
            _ => {
                let code = writer.pick(&[Code::Std, Code::Cld, Code::Stc, Code::Clc, Code::Cmc]);
                writer.put(Ok(Instruction::with(code)));
            }
        });
    }

    /// Something waits on the stack; RSP moves in other ways than by push and pop.
    fn stack(&mut self, scope: &Scope) {
        self.unit(|writer| {
            let count = writer.below(3);
            let inner = scope.pushed().inside(scope.budget / 2);
            let register = writer.below(16) as u8;
            match writer.below(3) {
                0 => {
                    writer.push(register);
                    writer.statements(&inner, count);
                    writer.pop_any(scope);
                }
                1 => {
                    let by = 8 * (1 + writer.below(6) as i64);
                    writer.move_rsp(-by);
                    writer.statements(&inner, count);
                    writer.move_rsp(by);
                }
                _ => {
                    let value = writer.random().value() as i32;
                    writer.put(Instruction::with1(Code::Pushq_imm32, value));
                    writer.statements(&inner, count);
                    writer.pop_any(scope);
                }
            }
        });
    }

    /// Takes a word off the stack.
    fn pop_any(&mut self, scope: &Scope) {
        match self.free(scope) {
            Some(register) => {
                self.put(Instruction::with1(Code::Pop_r64, gpr64(register.into())));
            }
            None => self.move_rsp(8),
        }
    }

    pub(super) fn move_rsp(&mut self, by: i64) {
        let rsp = Register::RSP;
        match self.below(3) {
            0 => self.put(Instruction::with2(Code::Add_rm64_imm8, rsp, by as i32)),
            1 => self.put(Instruction::with2(Code::Sub_rm64_imm8, rsp, -by as i32)),
            _ => self.put(Instruction::with2(Code::Lea_r64_m, rsp, Self::at(rsp, by))),
        };
    }
}
