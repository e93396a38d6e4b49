//! Loops: every way to count, up and down, and what moves along.
//!
//! Invariant: the counter is pinned in the body, so it ends.

use iced_x86::{Code, Instruction, Register};

use super::access::{ACROSS, DISTANT, WRITABLE};
use super::writer::{Known, RCX, Scope, Writer};
use crate::operands::{gpr32, gpr64};

/// How a loop counts and goes back.
struct Count {
    register: u8,
    start: i64,
    step: i64,
    /// The counter is 32 bits wide.
    narrow: bool,
    way: Way,
}

enum Way {
    /// By the flags of the step.
    Step(Code),
    /// By a comparison with what it is at the end.
    Compare {
        with: i64,
        code: Code,
        kept: Option<u8>,
    },
    /// By `loop`, `loope` or `loopne`.
    Loop(Code),
}

impl Writer<'_> {
    pub(super) fn counted_loop(&mut self, scope: &Scope) {
        let most = (scope.budget / 6).max(1);
        let turns = self.pick(&[1, 2, 3, 5, 8, 16, 33, 100, 300]).min(most) as i64;
        if self.chance(10) {
            self.loop_in_memory(scope, turns);
            return;
        }
        let Some(register) = self.free(scope) else {
            return;
        };
        let count = self.count(scope, register, turns);
        self.unit(|writer| writer.write_loop(scope, &count, turns));
    }

    /// Chooses how to count.
    fn count(&mut self, scope: &Scope, register: u8, turns: i64) -> Count {
        let narrow = self.chance(35);
        let by = self.pick(&[1, 1, 1, 2, 4, 8, 8, 16, 24, 64]);
        if self.chance(12) && self.is_free(scope, RCX) {
            let code = self.pick(&[
                Code::Loop_rel8_64_RCX,
                Code::Loop_rel8_64_RCX,
                Code::Loop_rel8_64_ECX,
                Code::Loope_rel8_64_RCX,
                Code::Loopne_rel8_64_RCX,
            ]);
            return Count {
                register: RCX,
                start: turns,
                step: -1,
                narrow: false,
                way: Way::Loop(code),
            };
        }
        let total = turns * by;
        match self.below(8) {
            // Down to zero, or below.
            0..3 => {
                let ends = [Code::Jne_rel32_64, Code::Jne_rel32_64, Code::Jg_rel32_64];
                let code = self.pick(&ends);
                Count {
                    register,
                    start: total,
                    step: -by,
                    narrow,
                    way: Way::Step(code),
                }
            }
            3 => Count {
                register,
                start: total - by + self.below(by as u64) as i64,
                step: -by,
                narrow,
                way: Way::Step(self.pick(&[Code::Jns_rel32_64, Code::Jge_rel32_64])),
            },
            // Up to zero: 32-bit ones wrap there.
            4 => Count {
                register,
                start: -total,
                step: by,
                narrow,
                way: Way::Step(self.pick(&[Code::Jne_rel32_64, Code::Js_rel32_64])),
            },
            // Up or down to a bound.
            way => {
                let up = way > 5;
                let region = WRITABLE;
                let room = (region.high - region.low - total).max(1) as u64;
                let low = match self.below(4) {
                    0 => 0,
                    1 => self.below(1000) as i64,
                    // A pointer.
                    _ if region.low >> 31 == 0 || !narrow => region.low + self.below(room) as i64,
                    _ => 1,
                };
                let (start, end, step) = if up {
                    (low, low + total, by)
                } else {
                    (low + total, low, -by)
                };
                let codes: &[Code] = match (up, narrow) {
                    (true, _) => &[Code::Jne_rel32_64, Code::Jb_rel32_64, Code::Jl_rel32_64],
                    (false, _) => &[Code::Jne_rel32_64, Code::Ja_rel32_64, Code::Jg_rel32_64],
                };
                let code = self.pick(codes);
                let far = end >> 31 != 0;
                let kept = if far || self.chance(35) {
                    self.free(&scope.pin(register))
                } else {
                    None
                };
                if far && kept.is_none() {
                    return Count {
                        register,
                        start: total,
                        step: -by,
                        narrow,
                        way: Way::Step(Code::Jne_rel32_64),
                    };
                }
                Count {
                    register,
                    start,
                    step,
                    narrow,
                    way: Way::Compare {
                        with: end,
                        code,
                        kept,
                    },
                }
            }
        }
    }

    fn write_loop(&mut self, scope: &Scope, count: &Count, turns: i64) {
        let &Count {
            register,
            start,
            step,
            narrow,
            ..
        } = count;
        let mut inner = scope.inside(scope.budget / turns as u64).pin(register);
        let start = if narrow {
            i64::from(start as u32)
        } else {
            start
        };
        self.set(register, start as u64);
        let last = start + step * (turns - 1);
        inner.known.push(Known {
            register,
            low: start.min(last),
            high: start.max(last),
            behind: 0,
        });
        if let Way::Compare {
            with,
            kept: Some(kept),
            ..
        } = count.way
        {
            inner = inner.pin(kept);
            self.set(kept, with as u64);
        }
        let mut along = Vec::new();
        for _ in 0..self.pick(&[0, 0, 1, 1, 2]) {
            along.extend(self.mover(&mut inner, turns));
        }
        let (head, leave, again) = (self.label(), self.label(), self.label());
        // Tested at the top, or before the first turn as well.
        let compared = matches!(count.way, Way::Compare { .. });
        let at_top = compared && self.chance(20);
        let (test, body) = (self.label(), self.label());
        if at_top {
            self.bind(test);
            self.test(count, body);
            self.jump(leave);
            self.bind(body);
        }
        self.bind(head);
        inner.leave = Some((leave, again));
        let begun = self.cost;
        if self.chance(50) {
            // A block that is its own successor.
            for _ in 0..1 + self.below(4) {
                match self.below(10) {
                    0..6 => self.access(&inner),
                    6..8 => self.straight(&inner),
                    _ => self.flags(&inner),
                }
            }
        } else {
            let statements = 1 + self.below(4);
            self.statements(&inner, statements);
        }
        for (register, by) in along {
            self.step(register, by, false, false);
        }
        self.bind(again);
        if !matches!(count.way, Way::Loop(_)) {
            let flags = matches!(count.way, Way::Step(_));
            self.step(register, step, narrow, flags);
        }
        if at_top {
            self.jump(test);
        } else {
            self.test(count, head);
        }
        self.bind(leave);
        self.cost = begun + (self.cost - begun) * turns as u64;
    }

    /// A pointer that moves along with the counter.
    fn mover(&mut self, inner: &mut Scope, turns: i64) -> Option<(u8, i64)> {
        let register = self.free(inner)?;
        let by = self.pick(&[1i64, 2, 4, 8, 8, 8, 16, 32, 24, 64, 0x100]);
        let total = by * turns;
        // Beyond the window as well: what isn't known of it has to be compared.
        let region = self.pick(&[WRITABLE, WRITABLE, WRITABLE, ACROSS, DISTANT]);
        let room = region.high - region.low;
        // Those that leave the pages do so in steps that can't pass over what isn't mapped.
        if total > room + 0x1000 {
            return None;
        }
        let up = self.chance(65);
        let low = if total + 64 > room {
            region.low
        } else {
            region.low + self.below((room - total) as u64) as i64
        };
        let (start, by) = if up { (low, by) } else { (low + total, -by) };
        let last = start + by * (turns - 1);
        self.set(register, start as u64);
        inner.known.push(Known {
            register,
            low: start.min(last),
            high: start.max(last),
            behind: 0,
        });
        *inner = inner.pin(register);
        Some((register, by))
    }

    /// Moves a counter or pointer, with flags or without.
    fn step(&mut self, register: u8, by: i64, narrow: bool, flags: bool) {
        let wide = gpr64(register.into());
        let half = gpr32(register.into());
        let target = if narrow { half } else { wide };
        let code =
            |narrow: Code, wide: Code, is_narrow: bool| if is_narrow { narrow } else { wide };
        let instr = match self.below(4) {
            0 | 1 if by == 1 => {
                Instruction::with1(code(Code::Inc_rm32, Code::Inc_rm64, narrow), target)
            }
            0 | 1 if by == -1 => {
                Instruction::with1(code(Code::Dec_rm32, Code::Dec_rm64, narrow), target)
            }
            2 if !flags => {
                let code = code(Code::Lea_r32_m, Code::Lea_r64_m, narrow);
                Instruction::with2(code, target, Self::at(wide, by))
            }
            _ if self.chance(50) && by != -128 => {
                let code = code(Code::Sub_rm32_imm32, Code::Sub_rm64_imm32, narrow);
                Instruction::with2(code, target, -by as i32)
            }
            _ => {
                let code = code(Code::Add_rm32_imm32, Code::Add_rm64_imm32, narrow);
                Instruction::with2(code, target, by as i32)
            }
        };
        self.put(instr);
    }

    /// Goes to `head` for another turn.
    fn test(&mut self, count: &Count, head: super::plan::Label) {
        let register = if count.narrow {
            gpr32(count.register.into())
        } else {
            gpr64(count.register.into())
        };
        match count.way {
            Way::Step(code) => self.branch(code, head),
            Way::Loop(code) => self.branch(code, head),
            Way::Compare { with, code, kept } => {
                let instr = match (kept, count.narrow) {
                    (Some(kept), true) => {
                        Instruction::with2(Code::Cmp_r32_rm32, register, gpr32(kept.into()))
                    }
                    (Some(kept), false) => {
                        Instruction::with2(Code::Cmp_r64_rm64, register, gpr64(kept.into()))
                    }
                    (None, true) => Instruction::with2(Code::Cmp_rm32_imm32, register, with as i32),
                    (None, false) => {
                        Instruction::with2(Code::Cmp_rm64_imm32, register, with as i32)
                    }
                };
                self.put(instr);
                self.branch(code, head);
            }
        }
    }

    /// Counts in a word on the stack.
    fn loop_in_memory(&mut self, scope: &Scope, turns: i64) {
        self.unit(|writer| {
            let rsp = Register::RSP;
            writer.put(Instruction::with1(Code::Pushq_imm32, turns as i32));
            let (head, leave, again) = (writer.here(), writer.label(), writer.label());
            let begun = writer.cost;
            let mut inner = scope.pushed().inside(scope.budget / turns as u64);
            inner.leave = Some((leave, again));
            let statements = 1 + writer.below(3);
            writer.statements(&inner, statements);
            writer.bind(again);
            if writer.chance(50) {
                writer.put(Instruction::with1(Code::Dec_rm64, Self::at(rsp, 0)));
            } else {
                writer.put(Instruction::with2(Code::Sub_rm32_imm8, Self::at(rsp, 0), 1));
            }
            writer.branch(Code::Jne_rel32_64, head);
            writer.cost = begun + (writer.cost - begun) * turns as u64;
            writer.bind(leave);
            writer.move_rsp(8);
        });
    }
}
