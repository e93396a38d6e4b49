//! What single forms don't reach: branches, loops, calls, repeated strings, bit strings, division,
//! flags through the stack, odd prefixes.
//!
//! A unit is a few items that belong together; branches lead to unit boundaries only.

use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpKind, Register};

use crate::layout::{COMPARED_FLAGS, DATA, PAGE};
use crate::operands::{Builder, gpr64};
use crate::sequence::Item;
use crate::table::{Table, acceptable};

/// A stack pointer with room on both sides.
pub(crate) fn stack(builder: &mut Builder<'_>) -> u64 {
    let near = [DATA + PAGE + 0x800, DATA + 2 * PAGE, DATA + 3 * PAGE + 4];
    match builder.random.below(100) {
        // Close to where nothing is mapped, and where nothing may be written.
        0..2 => DATA + builder.random.below(24),
        2..4 => DATA + 4 * PAGE + 8 * builder.random.below(3),
        4 => DATA + 5 * PAGE - builder.random.below(16),
        5 => builder.random.next(),
        _ => builder.random.pick(&near) & !7 | u64::from(builder.random.chance(10)),
    }
}

impl Builder<'_> {
    /// A defined value for every flag.
    pub(crate) fn define_flags(&mut self) {
        let (left, right) = (self.register(), self.register());
        let instr = Instruction::with2(Code::Cmp_rm64_r64, gpr64(left), gpr64(right));
        self.push(instr.expect("cmp"));
    }

    /// push imm; popfq, as one piece that nothing can be taken out of.
    pub(crate) fn set_flags(&mut self) {
        let value = (self.random.next() & (COMPARED_FLAGS | 1 << 21)) as u32 | 2;
        let mut bytes = vec![0x68];
        bytes.extend(value.to_le_bytes());
        bytes.push(0x9d);
        self.items.push(Item::Raw(bytes));
    }

    pub(crate) fn string(&mut self, table: &Table) {
        let code = self.random.pick(&table.string);
        let Some(mut instr) = self.form(code) else {
            return;
        };
        let size = 8;
        let down = self.random.chance(25);
        let count = match self.random.below(10) {
            0 => 0,
            1 => 1,
            2 => self.random.below(3 * PAGE),
            3 => self.random.next(),
            _ => self.random.below(40),
        };
        for register in [6, 7] {
            if self.random.chance(90) {
                let address = self.target(size, 1);
                self.set(register, address);
            }
        }
        if self.random.chance(30) {
            // Overlapping operands.
            let near = self.random.below(16);
            if let Some(source) = self.known[6] {
                self.set(7, source.wrapping_add(near).wrapping_sub(8));
            }
        }
        match self.random.below(4) {
            0 => {}
            1 => instr.set_has_repne_prefix(true),
            _ => instr.set_has_rep_prefix(true),
        }
        if self.random.chance(95) {
            self.set(1, count);
        }
        if self.random.chance(12) {
            for operand in 0..instr.op_count() {
                match instr.op_kind(operand) {
                    OpKind::MemorySegRSI => instr.set_op_kind(operand, OpKind::MemorySegESI),
                    OpKind::MemoryESRDI => instr.set_op_kind(operand, OpKind::MemoryESEDI),
                    _ => {}
                }
            }
        }
        if self.random.chance(8) {
            instr.set_segment_prefix(Register::GS);
            if let Some(source) = self.known[6] {
                self.set(6, source.wrapping_sub(crate::layout::GS_BASE));
            }
        }
        if down {
            self.push(Instruction::with(Code::Std));
        }
        self.push(instr);
        if down && self.random.chance(90) {
            self.push(Instruction::with(Code::Cld));
        }
    }

    /// xsave and its kin, and xrstor from what they stored, all or some of it.
    pub(crate) fn extended_state(&mut self) {
        use Code::*;
        // Natively XCR0 has more than the guest's: nothing beyond AVX may be asked for.
        let mask = self.random.pick(&[7u64, 7, 7, 6, 5, 4, 3, 2, 1, 0]);
        let area = DATA + 64 * self.random.below(PAGE / 64 * 3);
        let area = area + u64::from(self.random.chance(3)) * self.random.below(64);
        let at = crate::layout::operand(area);
        let mut instructions = Vec::new();
        let ask = |instructions: &mut Vec<Instruction>, mask: u64| {
            let set = |register, value| Instruction::with2(Mov_r32_imm32, register, value);
            instructions.push(set(Register::EAX, mask as u32).expect("mov"));
            instructions.push(set(Register::EDX, 0).expect("mov"));
        };
        let clear = |instructions: &mut Vec<Instruction>| {
            for word in (512..576).step_by(8) {
                let at = crate::layout::operand((area & !63) + word);
                let instr = Instruction::with2(Mov_rm64_imm32, at, 0i32);
                instructions.push(instr.expect("mov"));
            }
        };
        ask(&mut instructions, mask);
        // What lies in memory before is no header.
        clear(&mut instructions);
        let store = self.random.pick(&[
            Xsave_mem,
            Xsave64_mem,
            Xsaveopt_mem,
            Xsaveopt64_mem,
            Xsavec_mem,
            Xsavec64_mem,
        ]);
        instructions.push(Instruction::with1(store, at).expect("xsave"));
        if self.random.chance(70) {
            let some = mask & self.random.below(8);
            let again = self.random.pick(&[mask, some]);
            ask(&mut instructions, again);
            let load = self.random.pick(&[Xrstor_mem, Xrstor64_mem]);
            instructions.push(Instruction::with1(load, at).expect("xrstor"));
        }
        // All or nothing: other masks would ask for state that the guest doesn't have.
        let mut encoder = Encoder::new(64);
        for instr in &instructions {
            encoder.encode(instr, 0).expect("encodable");
        }
        self.items.push(Item::Raw(encoder.take_buffer()));
        self.known[0] = None;
        self.known[2] = None;
    }

    /// bt and its kin on memory, with offsets that reach backward and forward.
    pub(crate) fn bit_string(&mut self) {
        let code = self.random.pick(&[
            Code::Bt_rm16_r16,
            Code::Bt_rm32_r32,
            Code::Bt_rm64_r64,
            Code::Bts_rm16_r16,
            Code::Bts_rm32_r32,
            Code::Bts_rm64_r64,
            Code::Btr_rm16_r16,
            Code::Btr_rm32_r32,
            Code::Btr_rm64_r64,
            Code::Btc_rm16_r16,
            Code::Btc_rm32_r32,
            Code::Btc_rm64_r64,
        ]);
        let number = self.register();
        let offset = match self.random.below(5) {
            0 => self.random.value(),
            _ => self.random.below(1 << 15).wrapping_sub(1 << 14),
        };
        self.set(number, offset);
        let mut instr = Instruction::default();
        instr.set_code(code);
        let address = DATA + PAGE + self.random.below(2 * PAGE);
        self.memory(&mut instr, 0, address);
        instr.set_op_kind(1, OpKind::Register);
        let register = match code.op_code().operand_size() {
            16 => Register::AX + number as u32,
            32 => Register::EAX + number as u32,
            _ => gpr64(number),
        };
        instr.set_op_register(1, register);
        let changes = instr.mnemonic() != iced_x86::Mnemonic::Bt;
        instr.set_has_lock_prefix(changes && self.random.chance(25));
        self.push(instr);
    }

    /// maskmovq and maskmovdqu where they may write.
    pub(crate) fn masked_move(&mut self) {
        let address = DATA + self.random.below(4 * PAGE - 16);
        self.set(7, address);
        let code = if self.random.chance(50) {
            Code::Maskmovq_rDI_mm_mm
        } else {
            Code::Maskmovdqu_rDI_xmm_xmm
        };
        if let Some(instr) = self.form(code) {
            self.push(instr);
        }
    }

    /// A division that mostly succeeds.
    pub(crate) fn division(&mut self) {
        let code = self.random.pick(&[
            Code::Div_rm8,
            Code::Div_rm16,
            Code::Div_rm32,
            Code::Div_rm64,
            Code::Idiv_rm8,
            Code::Idiv_rm16,
            Code::Idiv_rm32,
            Code::Idiv_rm64,
        ]);
        if self.random.chance(85) {
            let high = self.random.pick(&[0, 0, 0, u64::MAX, 1]);
            let low = if matches!(code, Code::Div_rm8 | Code::Idiv_rm8) {
                self.random.below(256)
            } else {
                self.random.next() >> 1
            };
            self.set(0, low);
            self.set(2, high);
        }
        if let Some(instr) = self.form(code) {
            if instr.op0_kind() == OpKind::Register && self.random.chance(85) {
                let number = instr.op0_register().full_register().number();
                let divisor = self.random.next() | 0x8040;
                if !matches!(number, 0 | 2 | 4) {
                    self.set(number, divisor);
                }
            }
            self.push(instr);
        }
        // Division leaves every flag undefined.
        self.define_flags();
    }

    /// cmpxchg and its wide kin, in the case where they store.
    pub(crate) fn exchange(&mut self) {
        let code = self.random.pick(&[
            Code::Cmpxchg_rm8_r8,
            Code::Cmpxchg_rm16_r16,
            Code::Cmpxchg_rm32_r32,
            Code::Cmpxchg_rm64_r64,
            Code::Cmpxchg8b_m64,
            Code::Cmpxchg16b_m128,
        ]);
        let Some(instr) = self.form(code) else { return };
        if (0..instr.op_count()).any(|operand| instr.op_kind(operand) == OpKind::Memory)
            && ![Register::RAX, Register::RDX, Register::EAX, Register::EDX]
                .iter()
                .any(|&register| {
                    register == instr.memory_base() || register == instr.memory_index()
                })
        {
            let load = |code: Code, register: Register, by: i64| {
                let mut load = instr;
                load.set_has_lock_prefix(false);
                load.set_code(code);
                load.set_op0_kind(OpKind::Register);
                load.set_op0_register(register);
                load.set_op1_kind(OpKind::Memory);
                load.set_memory_displacement64(
                    load.memory_displacement64().wrapping_add(by as u64),
                );
                load
            };
            let wide = code == Code::Cmpxchg16b_m128;
            let (low, high, step) = if wide {
                (Register::RAX, Register::RDX, 8)
            } else {
                (Register::EAX, Register::EDX, 4)
            };
            let code = if wide {
                Code::Mov_r64_rm64
            } else {
                Code::Mov_r32_rm32
            };
            if self.random.chance(70) {
                self.push(load(code, low, 0));
                let displaced = load(code, high, step);
                if displaced.memory_displ_size() == 8 || displaced.is_ip_rel_memory_operand() {
                    self.push(displaced);
                }
            }
        }
        self.push(instr);
    }

    /// A forward conditional or unconditional branch; returns its item, to be given its target.
    pub(crate) fn forward(&mut self) -> usize {
        let code = match self.random.below(20) {
            0 => Code::Jmp_rel8_64,
            1 => Code::Jmp_rel32_64,
            2 => Code::Jrcxz_rel8_64,
            3 => Code::Jecxz_rel8_64,
            4 => Code::Loop_rel8_64_RCX,
            5 => Code::Loope_rel8_64_RCX,
            6 => Code::Loopne_rel8_64_ECX,
            number => {
                let condition = self.random.below(16) as u32;
                let base = if number % 2 == 0 {
                    Code::Jo_rel8_64
                } else {
                    Code::Jo_rel32_64
                };
                conditional(base, condition)
            }
        };
        if matches!(
            code,
            Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_ECX
        ) {
            self.known[1] = None;
        }
        let item = self.items.len();
        self.items.push(Item::Branch { code, to: 0 });
        item
    }

    /// A loop of a few rounds over harmless forms.
    pub(crate) fn counted_loop(&mut self, table: &Table) {
        let rounds = 1 + self.random.below(20);
        let by_dec = self.random.chance(30);
        self.set(1, rounds);
        let head = self.items.len();
        for _ in 0..1 + self.random.below(3) {
            let code = self.random.pick(&table.integer);
            let known = self.known;
            if let Some(instr) = self.form(code) {
                self.forget(&instr);
                // The count belongs to the loop.
                if self.known[1].is_some() && self.known[4].is_some() {
                    self.items.push(Item::Plain(instr));
                } else {
                    self.known = known;
                }
            }
        }
        if by_dec {
            let dec = Instruction::with1(Code::Dec_rm64, Register::RCX).expect("dec");
            self.items.push(Item::Plain(dec));
        }
        let code = if by_dec {
            Code::Jne_rel8_64
        } else {
            self.random
                .pick(&[Code::Loop_rel8_64_RCX, Code::Loop_rel8_64_ECX])
        };
        self.items.push(Item::Branch { code, to: head });
        self.known[1] = None;
    }

    /// call over a body that returns; or a call through a register or memory.
    pub(crate) fn call(&mut self, table: &Table) {
        let rsp = stack(self);
        self.set(4, rsp);
        self.define_flags();
        let call = self.items.len();
        let indirect = self.random.below(3);
        let scratch = loop {
            let number = self.random.below(16) as usize;
            if number != 4 {
                break number;
            }
        };
        if indirect != 0 {
            self.items.push(Item::Label {
                register: gpr64(scratch),
                to: 0,
            });
            self.known[scratch] = None;
        }
        match indirect {
            1 => {
                let instr = Instruction::with1(Code::Call_rm64, gpr64(scratch));
                self.items.push(Item::Plain(instr.expect("call")));
            }
            2 => {
                let place = DATA + 8 * self.random.below(64);
                let at = crate::layout::operand(place);
                let store = Instruction::with2(Code::Mov_rm64_r64, at, gpr64(scratch));
                self.items.push(Item::Plain(store.expect("mov")));
                let instr = Instruction::with1(Code::Call_rm64, at);
                self.items.push(Item::Plain(instr.expect("call")));
            }
            _ => self.items.push(Item::Branch {
                code: Code::Call_rel32_64,
                to: 0,
            }),
        }
        self.known[4] = Some(rsp.wrapping_sub(8));
        let over = self.items.len();
        self.items.push(Item::Branch {
            code: Code::Jmp_rel32_64,
            to: 0,
        });
        let target = self.items.len();
        for _ in 0..self.random.below(3) {
            let code = self.random.pick(&table.integer);
            let known = self.known;
            if let Some(instr) = self.form(code) {
                self.forget(&instr);
                if self.known[4].is_some() {
                    self.items.push(Item::Plain(instr));
                } else {
                    self.known = known;
                }
            }
        }
        self.define_flags();
        let ret = if self.random.chance(30) {
            let bytes = self.random.below(64) as u32 * 8;
            Instruction::with1(Code::Retnq_imm16, bytes).expect("ret")
        } else {
            Instruction::with(Code::Retnq)
        };
        self.items.push(Item::Plain(ret));
        self.known[4] = None;
        let after = self.items.len();
        for item in [call, call] {
            match &mut self.items[item] {
                Item::Branch { to, .. } | Item::Label { to, .. } => *to = target,
                Item::Plain(_) | Item::Raw(_) => {}
            }
        }
        if let Item::Branch { to, .. } = &mut self.items[over] {
            *to = after;
        }
    }

    /// An indirect jump: to the next item, or astray.
    pub(crate) fn jump(&mut self) {
        self.define_flags();
        let register = loop {
            let number = self.random.below(16) as usize;
            if number != 4 {
                break number;
            }
        };
        let astray = self.random.chance(4);
        let item = self.items.len();
        if astray {
            let target = match self.random.below(4) {
                0 => DATA + self.random.below(PAGE),
                1 => self.random.next(),
                2 => crate::layout::slot(0) - 1 - self.random.below(16),
                _ => (1 << 47) + self.random.below(64),
            };
            self.set(register, target);
        } else {
            self.items.push(Item::Label {
                register: gpr64(register),
                to: 0,
            });
            self.known[register] = None;
        }
        match self.random.below(3) {
            0 => {
                let instr = Instruction::with1(Code::Jmp_rm64, gpr64(register));
                self.items.push(Item::Plain(instr.expect("jmp")));
            }
            1 => {
                let place = DATA + self.random.below(4 * PAGE - 8);
                let at = crate::layout::operand(place);
                let store = Instruction::with2(Code::Mov_rm64_r64, at, gpr64(register));
                self.items.push(Item::Plain(store.expect("mov")));
                let instr = Instruction::with1(Code::Jmp_rm64, at).expect("jmp");
                self.items.push(Item::Plain(instr));
            }
            _ => {
                // Push and return.
                let push = Instruction::with1(Code::Push_r64, gpr64(register));
                self.items.push(Item::Plain(push.expect("push")));
                self.items.push(Item::Plain(Instruction::with(Code::Retnq)));
            }
        }
        let after = self.items.len();
        if let Item::Label { to, .. } = &mut self.items[item] {
            *to = after;
        }
    }

    /// A known form under prefixes that it doesn't need, or bytes that happen to decode.
    pub(crate) fn odd_bytes(&mut self, table: &Table) {
        let bytes = if self.random.chance(60) {
            let group = match self.random.below(4) {
                0 => &table.sse,
                1 => &table.string,
                2 => &table.stack,
                _ => &table.integer,
            };
            let code = self.random.pick(group);
            let Some(instr) = self.form(code) else { return };
            let mut encoder = Encoder::new(64);
            if encoder.encode(&instr, 0).is_err() {
                return;
            }
            let mut bytes = encoder.take_buffer();
            for _ in 0..1 + self.random.below(2) {
                let prefix = self.random.pick(&[
                    0x66u8, 0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x65, 0x40, 0x48, 0x41,
                    0x44, 0x4f,
                ]);
                bytes.insert(0, prefix);
            }
            bytes
        } else {
            (0..15).map(|_| self.random.next() as u8).collect()
        };
        let mut decoder = Decoder::new(64, &bytes, DecoderOptions::NONE);
        let instr = decoder.decode();
        if acceptable(&instr) {
            let length = instr.len();
            self.forget(&instr);
            self.items.push(Item::Raw(bytes[..length].to_vec()));
        }
    }

    /// The ways to end up in the kernel.
    pub(crate) fn trap(&mut self, table: &Table) {
        match self.random.below(5) {
            0 => self.push(Instruction::with(Code::Int3)),
            1 => self.push(Instruction::with(Code::Int1)),
            2 => {
                let vector = loop {
                    let vector = self.random.below(256) as u32;
                    // Linux's own.
                    if vector != 0x80 {
                        break vector;
                    }
                };
                self.push(Instruction::with1(Code::Int_imm8, vector).expect("int"));
            }
            _ => {
                let code = self.random.pick(&table.forbidden);
                if let Some(instr) = self.form(code) {
                    self.push(instr);
                }
            }
        }
    }
}

/// The branch of the family of `base` with condition number `condition`.
fn conditional(base: Code, condition: u32) -> Code {
    const SHORT: [Code; 16] = [
        Code::Jo_rel8_64,
        Code::Jno_rel8_64,
        Code::Jb_rel8_64,
        Code::Jae_rel8_64,
        Code::Je_rel8_64,
        Code::Jne_rel8_64,
        Code::Jbe_rel8_64,
        Code::Ja_rel8_64,
        Code::Js_rel8_64,
        Code::Jns_rel8_64,
        Code::Jp_rel8_64,
        Code::Jnp_rel8_64,
        Code::Jl_rel8_64,
        Code::Jge_rel8_64,
        Code::Jle_rel8_64,
        Code::Jg_rel8_64,
    ];
    let short = SHORT[condition as usize];
    if base == Code::Jo_rel8_64 {
        short
    } else {
        let mut instr = Instruction::default();
        instr.set_code(short);
        instr.as_near_branch();
        instr.code()
    }
}
