//! What there is to know of an instruction by its code alone: which operands it reads and writes, which
//! flags, and mostly its class.
//!
//! Asking iced for all of that costs several times what decoding costs. A code's answers are put together
//! when it is first met, from what iced says of a probe: that instruction, its general registers replaced by
//! ones that no instruction uses unsaid. What is said of the probe beyond its operands is said of the code.
//! Codes about which more matters than that, and instructions whose values change the answer, are asked about
//! each time.
//!
//! Invariant: [`Forms::complete`] says of every instruction what [`ask`] says of it.

use iced_x86::{
    CodeSize, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use super::{
    ALL_FLAGS, Class, Insn, Memory, Mode,
    classify::{self, Ready},
    liveness,
};
use crate::features::alignment;

/// Arithmetic flags of one instruction, in iced's numbering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub read: u8,
    /// It leaves them in another state, defined or not.
    pub modified: u8,
    /// As `modified`, whatever they were and whatever its operands are.
    pub killed: u8,
}

impl Flags {
    fn of(instr: &Instruction) -> Flags {
        Flags {
            read: (instr.rflags_read() & ALL_FLAGS) as u8,
            modified: (instr.rflags_modified() & ALL_FLAGS) as u8,
            killed: liveness::kills(instr) as u8,
        }
    }
}

/// What becomes of an operand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Access {
    #[default]
    None,
    Read,
    Write,
    /// Read, and perhaps written.
    Change,
    /// Read, and written whole.
    Extend,
}

impl From<OpAccess> for Access {
    fn from(access: OpAccess) -> Access {
        match access {
            OpAccess::None | OpAccess::NoMemAccess => Access::None,
            OpAccess::Read | OpAccess::CondRead => Access::Read,
            OpAccess::Write => Access::Write,
            OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => Access::Change,
        }
    }
}

/// General registers of an instruction, as [`Insn`] has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    reads: u16,
    writes: u16,
    modifies: u16,
}

impl Used {
    /// `bit` is the register's, all of which is written if `whole`.
    fn add(&mut self, bit: u16, whole: bool, access: Access) {
        match access {
            Access::None => {}
            Access::Read => self.reads |= bit,
            Access::Write if whole => {
                self.writes |= bit;
                self.modifies |= bit;
            }
            Access::Write | Access::Change => {
                self.reads |= bit;
                self.modifies |= bit;
            }
            Access::Extend => {
                self.reads |= bit;
                self.writes |= bit;
                self.modifies |= bit;
            }
        }
    }
}

/// How a code's registers are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Not at all.
    Asked,
    /// They are its operands.
    Operands,
    /// They are its operands, and RSP, which it moves.
    Stack,
}

/// What a code says.
#[derive(Clone, Debug)]
struct Form {
    known: Known,
    /// Of the first operands.
    accesses: [Access; OPERANDS],
    operands: u8,
    memory: Option<Memory>,
    flags: Flags,
    /// A shift or rotation by an immediate, which leaves the flags alone if that is zero.
    counted: bool,
    /// It reads the registers of its memory operand.
    addressed: bool,
    /// Writes zero, whatever was there, if its operands are one register.
    clears: bool,
    ready: Ready,
    faults: bool,
}

/// Operands that a [`Form`] tells of.
const OPERANDS: usize = 3;

/// Of a register.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Of a general register's 64-bit parent, or 0.
    bit: u16,
    /// Writing it leaves nothing of what was in the parent.
    whole: bool,
    /// ah, ch, dh, bh.
    high: bool,
}

/// Forms of the codes met so far.
pub(crate) struct Forms {
    /// One more than the form's number, or 0, by code, whether that is 64-bit code, and whether there is
    /// a memory operand.
    numbers: Vec<u16>,
    forms: Vec<Form>,
    places: [Place; 256],
    factory: InstructionInfoFactory,
}

impl Forms {
    pub(crate) fn new() -> Forms {
        let mut places = [Place::default(); 256];
        for register in Register::values() {
            places[register as usize] = Place {
                bit: super::gpr_bit(register),
                whole: register.size() >= 4,
                high: is_high(register),
            };
        }
        Forms {
            numbers: vec![0; 4 * iced_x86::Code::values().len()],
            forms: Vec::new(),
            places,
            factory: InstructionInfoFactory::new(),
        }
    }

    /// Gives the instruction in `insn` its class in `mode` and all else that lowering needs to know.
    #[inline]
    pub(super) fn complete(&mut self, insn: &mut Insn, mode: &Mode) {
        let instr = &insn.instr;
        let number = self.number(instr);
        insn.class = match self.forms[number].ready.class(mode) {
            // What a branch is doesn't follow from its code alone.
            Some(Class::Jump | Class::Branch | Class::Loop | Class::Call)
                if classify::leads_nowhere(instr, *mode) =>
            {
                Class::System
            }
            Some(class) => class,
            None => classify::classify(instr, *mode),
        };
        self.analyse(insn, number);
    }

    /// As [`Forms::complete`], with a class that is known.
    pub(super) fn complete_as(&mut self, insn: &mut Insn, class: Class) {
        let number = self.number(&insn.instr);
        insn.class = class;
        self.analyse(insn, number);
    }

    /// Its flags.
    pub(super) fn flags(&mut self, instr: &Instruction) -> Flags {
        let number = self.number(instr);
        self.forms[number].flags(instr)
    }

    #[inline]
    fn analyse(&mut self, insn: &mut Insn, number: usize) {
        let instr = &insn.instr;
        let form = &self.forms[number];
        let mut used = Used::default();
        let mut high_byte = false;
        let mut memory = form.memory;
        let cleared = form.clears
            && instr.op1_kind() == OpKind::Register
            && instr.op0_register() == instr.op1_register();
        match form.known {
            Known::Asked => {
                (used, memory) = ask(&mut self.factory, instr);
                high_byte = names_high_byte(instr);
            }
            Known::Operands | Known::Stack => {
                for at in 0..form.operands {
                    if instr.op_kind(at.into()) == OpKind::Register {
                        let place = self.places[instr.op_register(at.into()) as usize];
                        let access = form.accesses[usize::from(at)];
                        used.add(place.bit, place.whole, access);
                        high_byte |= place.high;
                    }
                }
                if cleared {
                    let place = self.places[instr.op0_register() as usize];
                    used = Used::default();
                    used.add(place.bit, place.whole, Access::Write);
                }
                if form.addressed {
                    used.reads |= self.places[instr.memory_base() as usize].bit
                        | self.places[instr.memory_index() as usize].bit;
                }
                if form.known == Known::Stack {
                    used.add(1 << 4, true, Access::Change);
                }
            }
        }
        insn.flags = form.flags(instr);
        insn.faults = form.faults;
        insn.reads = used.reads;
        insn.writes = used.writes;
        insn.modifies = used.modifies;
        insn.memory = memory;
        insn.high_byte = high_byte;
    }

    /// Where the form of `instr` is.
    fn number(&mut self, instr: &Instruction) -> usize {
        let addressed = addressed(instr);
        let index =
            4 * instr.code() as usize + 2 * usize::from(is_long(instr)) + usize::from(addressed);
        match self.numbers[index] {
            0 => self.learn(instr, addressed, index),
            number => usize::from(number) - 1,
        }
    }

    #[cold]
    fn learn(&mut self, instr: &Instruction, addressed: bool, index: usize) -> usize {
        let form = Form::of(instr, addressed, &mut self.factory);
        self.forms.push(form);
        self.numbers[index] = self.forms.len() as u16;
        self.forms.len() - 1
    }
}

impl Form {
    fn of(instr: &Instruction, addressed: bool, factory: &mut InstructionInfoFactory) -> Form {
        let probe = probe(instr);
        let (used, memory) = ask(factory, &probe);
        let info = factory.info(&probe);
        // What changes half of a register clears the other half in 64-bit code.
        let access = |operand: u32| match info.op_access(operand).into() {
            Access::Change if is_long(&probe) && probe.op_register(operand).size() == 4 => {
                Access::Extend
            }
            access => access,
        };
        let accesses = std::array::from_fn(|operand| access(operand as u32));
        let mut own = Used::default();
        for operand in 0..probe.op_count() {
            let register = probe.op_register(operand);
            if probe.op_kind(operand) == OpKind::Register {
                own.add(
                    super::gpr_bit(register),
                    register.size() >= 4,
                    access(operand),
                );
            }
        }
        let base = super::gpr_bit(probe.memory_base());
        // Some name an address and do nothing with it.
        let addressed = addressed && used.reads & base != 0;
        if addressed {
            own.reads |= base;
        }
        let mut moving = own;
        moving.add(1 << 4, true, Access::Change);
        let several = info.used_memory().len() > 1 || probe.op_count() as usize > OPERANDS;
        let known = match used {
            _ if several || probe.is_vsib() => Known::Asked,
            used if used == own => Known::Operands,
            used if used == moving => Known::Stack,
            _ => Known::Asked,
        };
        use Mnemonic::*;
        let counted = (0..instr.op_count()).any(|at| instr.op_kind(at) == OpKind::Immediate8)
            && matches!(
                instr.mnemonic(),
                Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd
            );
        let ready = classify::ready(instr);
        Form {
            known,
            accesses,
            operands: probe.op_count().min(OPERANDS as u32) as u8,
            memory,
            flags: Flags::of(instr),
            counted,
            addressed,
            clears: matches!(instr.mnemonic(), Xor | Sub),
            // Divisions, and what a control register may forbid or an exception mask let through.
            faults: !ready.is_quiet() || matches!(instr.mnemonic(), Div | Idiv),
            ready,
        }
    }

    fn flags(&self, instr: &Instruction) -> Flags {
        if self.counted {
            Flags::of(instr)
        } else {
            self.flags
        }
    }
}

/// `instr` with general registers that are distinct and belong to no instruction by themselves.
fn probe(instr: &Instruction) -> Instruction {
    let mut probe = *instr;
    let mut number = 0;
    for operand in 0..instr.op_count() {
        let register = instr.op_register(operand);
        if instr.op_kind(operand) == OpKind::Register && register.is_gpr() {
            let first = match register.size() {
                1 => Register::R8L,
                2 => Register::R8W,
                4 => Register::R8D,
                _ => Register::R8,
            };
            probe.set_op_register(operand, first + number);
            number += 1;
        }
    }
    if addressed(instr) {
        probe.set_memory_base(Register::R15);
        if !instr.is_vsib() {
            probe.set_memory_index(Register::None);
        }
    }
    probe
}

/// What iced says of `instr`: its registers and its memory operand.
fn ask(factory: &mut InstructionInfoFactory, instr: &Instruction) -> (Used, Option<Memory>) {
    let info = factory.info(instr);
    let mut all = Used::default();
    for used in info.used_registers() {
        let register = used.register();
        let whole = register.size() >= 4;
        all.add(super::gpr_bit(register), whole, used.access().into());
    }
    let memory = info.used_memory().last().map(|used| {
        let access = Access::from(used.access());
        Memory {
            size: used.memory_size().size() as u32,
            // A conditional write still leaves the old value where it doesn't happen.
            read: access != Access::Write,
            write: matches!(access, Access::Write | Access::Change),
            certain: matches!(
                used.access(),
                OpAccess::Read | OpAccess::Write | OpAccess::ReadWrite
            ),
            alignment: alignment(instr),
        }
    });
    (all, memory)
}

fn addressed(instr: &Instruction) -> bool {
    // The memory operand is among the first three of every instruction.
    instr.op0_kind() == OpKind::Memory
        || instr.op1_kind() == OpKind::Memory
        || instr.op2_kind() == OpKind::Memory
}

fn is_long(instr: &Instruction) -> bool {
    instr.code_size() == CodeSize::Code64
}

fn is_high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

fn names_high_byte(instr: &Instruction) -> bool {
    (0..instr.op_count()).any(|operand| {
        instr.op_kind(operand) == OpKind::Register && is_high(instr.op_register(operand))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cpu::Bits,
        decode::{Fpu, OPTIONS, encodings},
    };
    use iced_x86::Decoder;

    /// What the table says of every instruction is what asking says, in a width and in these modes.
    fn check(width: u32, modes: &[Mode]) {
        let mut forms = Forms::new();
        let mut factory = InstructionInfoFactory::new();
        let (mut met, mut known) = (0u64, 0u64);
        encodings::every(|bytes| {
            let mut decoder = Decoder::with_ip(width, bytes, 0x1000, OPTIONS);
            let instr = decoder.decode();
            if instr.is_invalid() {
                return;
            }
            let (used, memory) = ask(&mut factory, &instr);
            // In turn, and so each of them about each code.
            let mode = modes[met as usize % modes.len()];
            let mut insn = Insn::place();
            insn.instr = instr;
            forms.complete(&mut insn, &mode);
            let found = Used {
                reads: insn.reads,
                writes: insn.writes,
                modifies: insn.modifies,
            };
            assert_eq!(found, used, "registers of {instr}: {bytes:02x?}");
            assert_eq!(insn.memory, memory, "memory of {instr}: {bytes:02x?}");
            assert_eq!(
                insn.flags,
                Flags::of(&instr),
                "flags of {instr}: {bytes:02x?}"
            );
            assert_eq!(
                insn.high_byte,
                names_high_byte(&instr),
                "high byte of {instr}"
            );
            let class = classify::classify(&instr, mode);
            assert_eq!(
                insn.class, class,
                "class of {instr}: {bytes:02x?} in {mode:?}"
            );
            let number = forms.number(&instr);
            met += 1;
            known += u64::from(forms.forms[number].known != Known::Asked);
        });
        assert!(known * 100 > met * 87, "{known} of {met} are known");
    }

    /// Modes of which each differs from the first in something that classes look at.
    fn modes(bits: Bits) -> Vec<Mode> {
        let avx = Fpu {
            avx: true,
            ..Fpu::READY
        };
        let first = Mode {
            bits,
            fpu: avx,
            ..Mode::LONG
        };
        let user = Mode {
            user: true,
            ring_0: false,
            interrupts: false,
            tsc: false,
            ..first
        };
        let away = Fpu {
            switched: true,
            monitored: true,
            ..avx
        };
        let emulated = Fpu {
            emulated: true,
            sse: false,
            ..avx
        };
        vec![
            first,
            user,
            Mode {
                single: true,
                ..first
            },
            Mode {
                exact: true,
                ..user
            },
            Mode {
                vectors: false,
                ..first
            },
            Mode { fpu: away, ..user },
            Mode {
                fpu: emulated,
                ..first
            },
            Mode {
                window: true,
                interrupts: true,
                ..user
            },
        ]
    }

    #[test]
    fn the_table_says_of_every_64_bit_instruction_what_asking_says() {
        check(64, &modes(Bits::Bits64));
    }

    #[test]
    fn the_table_says_of_every_narrow_instruction_what_asking_says() {
        check(32, &modes(Bits::Bits32)[..2]);
        check(16, &modes(Bits::Bits16)[..1]);
    }
}
