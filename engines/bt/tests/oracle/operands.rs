//! Operands: registers, immediates, and memory operands whose address is chosen first, so that
//! most accesses hit and the rest miss in every interesting way.
//!
//! The generator knows the value of some registers (those it loaded itself and nothing has
//! changed since) and works displacements out from them.

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, InstructionInfoFactory, OpAccess, OpCodeOperandKind,
    OpKind, Register,
};

use crate::layout::{DATA, GS_BASE, PAGE};
use crate::random::Random;
use crate::sequence::Item;

/// Registers as far as the generator knows them, and the items so far.
pub(crate) struct Builder<'a> {
    pub(crate) random: &'a mut Random,
    pub(crate) known: [Option<u64>; 16],
    pub(crate) items: Vec<Item>,
    info: InstructionInfoFactory,
    encoder: Encoder,
}

const RSP: usize = 4;

pub(crate) fn gpr64(number: usize) -> Register {
    Register::RAX + number as u32
}

pub(crate) fn gpr32(number: usize) -> Register {
    Register::EAX + number as u32
}

impl<'a> Builder<'a> {
    pub(crate) fn new(random: &'a mut Random, gpr: [u64; 16]) -> Builder<'a> {
        Builder {
            random,
            known: gpr.map(Some),
            items: Vec::new(),
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(64),
        }
    }

    /// Adds an instruction and forgets what it changes.
    pub(crate) fn push(&mut self, instr: Instruction) {
        self.forget(&instr);
        self.items.push(Item::Plain(instr));
    }

    /// Adds a register's new value.
    pub(crate) fn set(&mut self, register: usize, value: u64) {
        let instr = if let Ok(narrow) = u32::try_from(value)
            && self.random.chance(50)
        {
            Instruction::with2(Code::Mov_r32_imm32, gpr32(register), narrow)
        } else {
            Instruction::with2(Code::Mov_r64_imm64, gpr64(register), value)
        };
        self.items.push(Item::Plain(instr.expect("mov")));
        self.known[register] = Some(value);
    }

    /// Notes that `instr` changes registers.
    pub(crate) fn forget(&mut self, instr: &Instruction) {
        let by = instr.stack_pointer_increment() as i64 as u64;
        let rsp = self.known[RSP].map(|rsp| rsp.wrapping_add(by));
        let info = self.info.info(instr);
        for used in info.used_registers() {
            if used.register().is_gpr()
                && !matches!(
                    used.access(),
                    OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
                )
            {
                self.known[used.register().full_register().number()] = None;
            }
        }
        let explicit = instr.op_count() > 0
            && instr.op0_kind() == OpKind::Register
            && instr.op0_register().full_register() == Register::RSP;
        if by != 0 && !explicit && instr.mnemonic() != iced_x86::Mnemonic::Leave {
            self.known[RSP] = rsp;
        }
    }

    /// A register that is not RSP, except now and then.
    pub(crate) fn register(&mut self) -> usize {
        loop {
            let number = self.random.below(16) as usize;
            if number != RSP || self.random.chance(3) {
                return number;
            }
        }
    }

    /// An address for an access of `size` bytes that wants this alignment.
    pub(crate) fn target(&mut self, size: u64, align: u64) -> u64 {
        let page = |number: u64| DATA + number * PAGE;
        let size = size.max(1);
        let choice = self.random.below(1000);
        let address = match choice {
            // Well inside, favouring few places so that accesses meet.
            0..700 => page(self.random.below(4)) + self.random.below(256),
            700..800 => page(self.random.below(4)) + self.random.below(PAGE),
            // Across two writable pages.
            800..880 => page(1 + self.random.below(3)) - self.random.below(size) - 1,
            880..900 => page(6) + self.random.below(PAGE - size + 1),
            // Read-only, whole or in the second half.
            900..920 => page(4) + self.random.below(PAGE),
            920..940 => page(4) - self.random.below(size),
            // Unmapped: whole, second half, first half.
            940..950 => page(5) + self.random.below(PAGE),
            950..960 => page(5) - self.random.below(size),
            960..970 => page(6) - self.random.below(size),
            // Just below and above everything.
            970..975 => DATA - self.random.below(size + 8),
            975..980 => page(7) - self.random.below(size),
            // Code: readable, not writable.
            980..985 => crate::layout::CODE + self.random.below(PAGE),
            // The edges of what is canonical, and of everything.
            985..988 => (1 << 47) - self.random.below(size + 16),
            988..990 => (1 << 47) + self.random.below(1 << 40),
            990..993 => 0xffff_8000_0000_0000 - self.random.below(size + 1),
            993..995 => 0u64.wrapping_sub(1 + self.random.below(size + 1)),
            995..997 => self.random.below(PAGE),
            _ => self.random.next(),
        };
        if align > 1 && !self.random.chance(4) {
            address & !(align - 1)
        } else {
            address
        }
    }

    /// Gives `instr` a memory operand in `operand` that leads to `address`.
    pub(crate) fn memory(&mut self, instr: &mut Instruction, operand: u32, address: u64) {
        instr.set_op_kind(operand, OpKind::Memory);
        instr.set_memory_base(Register::None);
        instr.set_memory_index(Register::None);
        instr.set_memory_index_scale(1);
        let mut offset = address;
        if self.random.chance(4) {
            instr.set_segment_prefix(Register::GS);
            offset = address.wrapping_sub(GS_BASE);
        } else if self.random.chance(3) {
            // Segments that mean nothing in 64-bit mode.
            let null = [Register::ES, Register::CS, Register::SS, Register::DS];
            instr.set_segment_prefix(self.random.pick(&null));
        }
        let narrow = offset >> 32 == 0 && self.random.chance(12);
        let base = self.random.below(16) as usize;
        let index = self.random.below(16) as usize;
        let scale = 1u32 << self.random.below(4);
        let with_base = !self.random.chance(15);
        let with_index = index != RSP && self.random.chance(35);
        let part = |register: usize, known: &[Option<u64>; 16]| {
            known[register].map(|value| if narrow { value & 0xffff_ffff } else { value })
        };
        let mut displacement = Some(offset);
        if with_base {
            displacement = displacement
                .zip(part(base, &self.known))
                .map(|(d, value)| d.wrapping_sub(value));
        }
        if with_index {
            displacement = displacement
                .zip(part(index, &self.known))
                .map(|(d, value)| d.wrapping_sub(value.wrapping_mul(scale.into())));
        }
        // A wild operand, now and then.
        if displacement.is_none() && self.random.chance(2) {
            displacement = Some(self.random.next() as i32 as i64 as u64);
        }
        let displacement = displacement.and_then(|d| {
            if narrow {
                Some(d as i32 as i64 as u64)
            } else {
                (d as i32 as i64 as u64 == d).then_some(d)
            }
        });
        match displacement {
            Some(d) if with_base || with_index => {
                let register = if narrow { gpr32 } else { gpr64 };
                if with_base {
                    instr.set_memory_base(register(base));
                }
                if with_index {
                    instr.set_memory_index(register(index));
                    instr.set_memory_index_scale(scale);
                }
                instr.set_memory_displacement64(if narrow { d & 0xffff_ffff } else { d });
                let long = if narrow { 4 } else { 8 };
                let short = d as i8 as i64 as u64 == d;
                instr.set_memory_displ_size(match d {
                    _ if !with_base => long,
                    0 if self.random.chance(70) => 0,
                    _ if short && self.random.chance(80) => 1,
                    _ => long,
                });
            }
            Some(_) if self.random.chance(50) && offset < 1 << 31 => {
                instr.set_memory_displacement64(offset);
                instr.set_memory_displ_size(if narrow { 4 } else { 8 });
            }
            Some(_) | None => {
                // RIP-relative where it reaches, else an absolute one that may lead elsewhere.
                instr.set_memory_base(if narrow { Register::EIP } else { Register::RIP });
                instr.set_memory_displacement64(if offset >> 31 == 0 {
                    offset
                } else {
                    DATA + (offset & 0xfff)
                });
                instr.set_memory_displ_size(if narrow { 4 } else { 8 });
            }
        }
    }

    /// A gather's operand: an index register with small numbers, most of the time, and a base that
    /// leads into the data.
    fn vector_memory(&mut self, instr: &mut Instruction, operand: u32, wide: bool) {
        let index = self.random.below(16) as u32;
        instr.set_op_kind(operand, OpKind::Memory);
        instr.set_memory_index(if wide {
            Register::YMM0 + index
        } else {
            Register::XMM0 + index
        });
        instr.set_memory_index_scale(1 << self.random.below(4));
        let known: Vec<usize> = (0..16).filter(|&at| self.known[at].is_some()).collect();
        let target = DATA + self.random.below(4 * PAGE);
        let reached = (!known.is_empty()).then(|| {
            let base = self.random.pick(&known);
            (base, target.wrapping_sub(self.known[base].unwrap_or(0)))
        });
        match reached {
            Some((base, d)) if d as i32 as i64 as u64 == d => {
                instr.set_memory_base(gpr64(base));
                instr.set_memory_displacement64(d);
            }
            Some(_) | None => instr.set_memory_displacement64(target),
        }
        instr.set_memory_displ_size(8);
    }

    fn immediate(&mut self) -> u64 {
        self.random.value()
    }

    /// An instruction of this form, or None if the operands don't go together.
    pub(crate) fn form(&mut self, code: Code) -> Option<Instruction> {
        (0..6).find_map(|_| {
            let instr = self.try_form(code)?;
            self.encoder.encode(&instr, crate::layout::CODE).ok()?;
            let _ = self.encoder.take_buffer();
            Some(instr)
        })
    }

    fn try_form(&mut self, code: Code) -> Option<Instruction> {
        use OpCodeOperandKind::*;
        let info = code.op_code();
        let mut instr = Instruction::default();
        instr.set_code(code);
        let in_memory = self.random.chance(45);
        let mut has_memory = false;
        for operand in 0..info.op_count() {
            let kind = info.op_kind(operand);
            let set = |instr: &mut Instruction, register: Register| {
                instr.set_op_kind(operand, OpKind::Register);
                instr.set_op_register(operand, register);
            };
            let memory_form = match kind {
                mem | mem_offs | mem_mib => true,
                r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem
                | ymm_or_mem => in_memory,
                mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y => true,
                _ => false,
            };
            if memory_form {
                has_memory = true;
                let size = memory_size(&instr);
                let address = self.target(size, alignment(&instr));
                if matches!(kind, mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y) {
                    let wide = matches!(kind, mem_vsib32y | mem_vsib64y);
                    self.vector_memory(&mut instr, operand, wide);
                } else if kind == mem_offs {
                    instr.set_op_kind(operand, OpKind::Memory);
                    instr.set_memory_displacement64(address);
                    instr.set_memory_displ_size(8);
                } else {
                    self.memory(&mut instr, operand, address);
                }
                continue;
            }
            match kind {
                r8_or_mem | r8_reg | r8_opcode => {
                    let number = self.register();
                    let high = number < 4 && self.random.chance(35);
                    let low = [
                        Register::AL,
                        Register::CL,
                        Register::DL,
                        Register::BL,
                        Register::SPL,
                        Register::BPL,
                        Register::SIL,
                        Register::DIL,
                    ];
                    set(
                        &mut instr,
                        if high {
                            Register::AH + number as u32
                        } else if number < 8 {
                            low[number]
                        } else {
                            Register::R8L + (number as u32 - 8)
                        },
                    );
                }
                r16_or_mem | r16_reg | r16_reg_mem | r16_rm | r16_opcode => {
                    let register = Register::AX + self.register() as u32;
                    set(&mut instr, register);
                }
                r32_or_mem | r32_reg | r32_reg_mem | r32_rm | r32_opcode | r32_vvvv => {
                    let register = gpr32(self.register());
                    set(&mut instr, register);
                }
                r64_or_mem | r64_reg | r64_reg_mem | r64_rm | r64_opcode | r64_vvvv => {
                    let register = gpr64(self.register());
                    set(&mut instr, register);
                }
                mm_or_mem | mm_reg | mm_rm => {
                    let register = Register::MM0 + self.random.below(8) as u32;
                    set(&mut instr, register);
                }
                xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 | xmm_is5 => {
                    let register = Register::XMM0 + self.random.below(16) as u32;
                    set(&mut instr, register);
                }
                ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 | ymm_is5 => {
                    let register = Register::YMM0 + self.random.below(16) as u32;
                    set(&mut instr, register);
                }
                seg_reg => {
                    // As a destination it would ask the descriptor tables.
                    if operand == 0 {
                        return Option::None;
                    }
                    let register = Register::ES + self.random.below(4) as u32;
                    set(&mut instr, register);
                }
                fs | gs | es | cs | ss | ds => {
                    if instr.mnemonic() != iced_x86::Mnemonic::Push {
                        return Option::None;
                    }
                    set(
                        &mut instr,
                        if kind == fs {
                            Register::FS
                        } else {
                            Register::GS
                        },
                    );
                }
                cr_reg => set(&mut instr, Register::CR0),
                dr_reg => set(&mut instr, Register::DR0),
                al => set(&mut instr, Register::AL),
                cl => set(&mut instr, Register::CL),
                ax => set(&mut instr, Register::AX),
                dx => set(&mut instr, Register::DX),
                eax => set(&mut instr, Register::EAX),
                rax => set(&mut instr, Register::RAX),
                st0 => set(&mut instr, Register::ST0),
                sti_opcode => {
                    let register = Register::ST0 + self.random.below(8) as u32;
                    set(&mut instr, register);
                }
                imm8 | imm4_m2z => {
                    let value = if code.mnemonic() == iced_x86::Mnemonic::Enter {
                        self.random.pick(&[0, 0, 1, 2, 5, 33])
                    } else {
                        self.immediate() as u8
                    };
                    if operand > 0 && instr.op_kind(operand - 1) == OpKind::Immediate16 {
                        instr.set_op_kind(operand, OpKind::Immediate8_2nd);
                        instr.set_immediate8_2nd(value);
                    } else {
                        instr.set_op_kind(operand, OpKind::Immediate8);
                        instr.set_immediate8(value);
                    }
                }
                imm8_const_1 => {
                    instr.set_op_kind(operand, OpKind::Immediate8);
                    instr.set_immediate8(1);
                }
                imm8sex16 => {
                    instr.set_op_kind(operand, OpKind::Immediate8to16);
                    instr.set_immediate8to16(self.immediate() as i8 as i16);
                }
                imm8sex32 => {
                    instr.set_op_kind(operand, OpKind::Immediate8to32);
                    instr.set_immediate8to32(self.immediate() as i8 as i32);
                }
                imm8sex64 => {
                    instr.set_op_kind(operand, OpKind::Immediate8to64);
                    instr.set_immediate8to64(self.immediate() as i8 as i64);
                }
                imm16 => {
                    instr.set_op_kind(operand, OpKind::Immediate16);
                    let mask = if info.is_stack_instruction() {
                        0x1ff
                    } else {
                        0xffff
                    };
                    instr.set_immediate16(self.immediate() as u16 & mask);
                }
                imm32 => {
                    instr.set_op_kind(operand, OpKind::Immediate32);
                    instr.set_immediate32(self.immediate() as u32);
                }
                imm32sex64 => {
                    instr.set_op_kind(operand, OpKind::Immediate32to64);
                    instr.set_immediate32to64(self.immediate() as i32 as i64);
                }
                imm64 => {
                    instr.set_op_kind(operand, OpKind::Immediate64);
                    instr.set_immediate64(self.immediate());
                }
                seg_rSI => instr.set_op_kind(operand, OpKind::MemorySegRSI),
                es_rDI => instr.set_op_kind(operand, OpKind::MemoryESRDI),
                seg_rDI => instr.set_op_kind(operand, OpKind::MemorySegRDI),
                seg_rBX_al => {
                    instr.set_op_kind(operand, OpKind::Memory);
                    instr.set_memory_base(Register::RBX);
                    instr.set_memory_index(Register::AL);
                }
                _ => return Option::None,
            }
        }
        if has_memory && info.can_use_lock_prefix() && instr.op0_kind() == OpKind::Memory {
            instr.set_has_lock_prefix(self.random.chance(25));
        }
        Some(instr)
    }
}

/// Bytes that the memory operand of this form has; fxrstor says nothing of itself.
fn memory_size(instr: &Instruction) -> u64 {
    match instr.memory_size().size() {
        0 => 1,
        size => size as u64,
    }
}

/// What the form would fault on if the address weren't a multiple of it.
pub(crate) fn alignment(instr: &Instruction) -> u64 {
    use iced_x86::Mnemonic::*;
    let size = memory_size(instr);
    match instr.mnemonic() {
        Fxrstor | Fxrstor64 | Cmpxchg16b => 16,
        Movups | Movupd | Movdqu | Lddqu => 1,
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => size,
        _ if instr.code().op_code().encoding() == EncodingKind::VEX => 1,
        _ if size == 16 => 16,
        _ => 1,
    }
}
