//! Guest code to a straight-line block with what lowering needs to know: class of each
//! instruction, registers it uses, and which arithmetic flags are live around it.
//!
//! Deny by default: an instruction is copied to the host only if every CPUID feature that it needs
//! is announced to the guest and it neither branches nor touches system state. Everything else is
//! either lowered by hand (stack, branches), executed by the runtime (`System`), or undefined.

mod classify;
#[cfg(test)]
pub(crate) mod encodings;
mod forms;
pub(crate) mod leaf;
mod liveness;
mod undefined;

use iced_x86::{Decoder, DecoderOptions, Instruction, Register, RflagsBits};

use crate::{
    cpu::Bits,
    fault::{self, Fault},
    tlb::jump_index,
};
pub(crate) use forms::{Flags, Forms};
use leaf::{Leaf, Reader};
use undefined::{LONGEST, ends_behind, too_long};

/// The six arithmetic flags, in iced's numbering.
pub(crate) const ALL_FLAGS: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Opcodes 0F 0D and 0F 18 to 0F 1F do nothing on a processor that lacks what they were given to
/// later: prefetches, MPX, CET (SDM 1 18.3.1, SDM 2B NOP). Compilers emit some of them (rdsspq,
/// endbr64) without asking CPUID. A wbnoinvd is a wbinvd there, with a prefix that says nothing.
const OPTIONS: u32 = DecoderOptions::FORCE_RESERVED_NOP | DecoderOptions::NO_WBNOINVD;

/// Most instructions in one block.
const MAX_INSTRUCTIONS: usize = 64;

/// Bits of CR0 and CR4 that FPU and SSE instructions look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fpu {
    /// CR0.EM.
    pub emulated: bool,
    /// CR0.TS.
    pub switched: bool,
    /// CR0.MP, which only matters to fwait under CR0.TS.
    pub monitored: bool,
    /// CR4.OSFXSR.
    pub sse: bool,
    /// CR4.OSXSAVE, and SSE and AVX state in XCR0.
    pub avx: bool,
}

impl Fpu {
    /// Nothing that needs no AVX faults.
    pub(crate) const READY: Fpu = Fpu {
        emulated: false,
        switched: false,
        monitored: false,
        sse: true,
        avx: false,
    };

    /// Numbers all of them, from 0 to 31.
    fn index(self) -> u32 {
        u32::from(self.emulated)
            | u32::from(self.switched) << 1
            | u32::from(self.monitored) << 2
            | u32::from(self.sse) << 3
            | u32::from(self.avx) << 4
    }

    fn all() -> impl Iterator<Item = Fpu> {
        (0..32u32).map(|index| Fpu {
            emulated: index & 1 != 0,
            switched: index >> 1 & 1 != 0,
            monitored: index >> 2 & 1 != 0,
            sse: index >> 3 & 1 != 0,
            avx: index >> 4 & 1 != 0,
        })
    }
}

/// What translation depends on besides the bytes: blocks made in one mode never run in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode {
    pub bits: Bits,
    /// CPL 3: data accesses obey user permissions.
    pub user: bool,
    /// CPL 0.
    pub ring_0: bool,
    /// The guest's vector registers are in the host's. Code that does without them, as kernels do,
    /// enters and leaves at half the cost.
    pub vectors: bool,
    /// Accesses go through the window where they can.
    pub window: bool,
    /// RSP is inside the window, or close to it, wherever blocks of this mode meet.
    pub stack: bool,
    /// es, cs, ss, ds have base 0, as 64-bit mode enforces.
    pub flat: bool,
    /// Whether FPU and SSE instructions fault.
    pub fpu: Fpu,
    /// rdtsc is allowed here (CR4.TSD clear or CPL 0) and reads the host's counter.
    pub tsc: bool,
    /// cli and sti are allowed (CPL <= IOPL).
    pub interrupts: bool,
    /// Arithmetic flags are exact wherever an exception may show them, read or not.
    pub exact: bool,
    /// One instruction only, for what an interrupt shadow or a store into this code demands.
    pub single: bool,
    /// What it may be linked with: see [`BANKS`](crate::tlb::BANKS).
    pub bank: u8,
    /// Base of CS where it isn't flat: the same bytes are other instructions' neighbours then.
    pub code_base: u32,
    /// Limit of CS, where it has one: no block reaches beyond.
    pub code_limit: u32,
    /// SP is the stack pointer, not ESP.
    pub narrow_stack: bool,
    /// Segments, one bit each as instructions encode them, whose limit or kind has to be looked at
    /// for every access.
    pub limited: u8,
}

impl Mode {
    /// Index of the jump cache that leads to its blocks.
    pub(crate) fn jumps(&self) -> usize {
        jump_index(self.bank.into(), self.user)
    }

    /// What holds for flat code without an oddity.
    pub(crate) const LONG: Mode = Mode {
        bits: Bits::Bits64,
        user: false,
        ring_0: true,
        vectors: true,
        window: false,
        stack: false,
        flat: true,
        fpu: Fpu::READY,
        tsc: true,
        interrupts: true,
        exact: false,
        single: false,
        bank: 0,
        code_base: 0,
        code_limit: u32::MAX,
        narrow_stack: false,
        limited: 0,
    };
}

/// How an instruction is lowered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Registers only: copied.
    Plain,
    /// One memory operand: copied with the operand replaced.
    Memory,
    /// Does nothing that a guest could see.
    Nop,
    Lea,
    /// bt, bts, btr, btc with a register offset into memory.
    BitString,
    /// maskmovq, maskmovdqu: a store through RDI.
    MaskedMove,
    Push,
    Pop,
    Leave,
    Cli,
    /// sti with an instruction after it in the same block, which is its shadow.
    Sti,
    Jump,
    JumpIndirect,
    Branch,
    /// loop, loope, loopne, jcxz, jecxz, jrcxz.
    Loop,
    Call,
    CallIndirect,
    Return,
    /// A call whose callee comes next, and the callee's return ([`leaf`]).
    CallInline,
    ReturnInline,
    /// Has code of its own that acts on system registers, and leaves for the runtime at will.
    Privileged,
    /// Executed by the runtime.
    System,
    /// Raises this.
    Fault(Raised),
}

/// An exception that an instruction raises whatever its operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Raised {
    /// #UD.
    Undefined,
    /// #NM.
    Unavailable,
    /// #GP.
    Protection,
}

impl From<Raised> for Fault {
    fn from(raised: Raised) -> Fault {
        match raised {
            Raised::Undefined => Fault::ud(),
            Raised::Unavailable => Fault::plain(fault::NM),
            Raised::Protection => Fault::gp(),
        }
    }
}

impl Class {
    /// No instruction of the same block follows.
    pub(crate) fn ends_block(self) -> bool {
        match self {
            Class::Plain
            | Class::Memory
            | Class::Nop
            | Class::Lea
            | Class::BitString
            | Class::MaskedMove
            | Class::Push
            | Class::Pop
            | Class::Leave
            | Class::Cli
            | Class::Sti
            | Class::CallInline
            | Class::ReturnInline
            | Class::Privileged => false,
            Class::Jump
            | Class::JumpIndirect
            | Class::Branch
            | Class::Loop
            | Class::Call
            | Class::CallIndirect
            | Class::Return
            | Class::System
            | Class::Fault(_) => true,
        }
    }
}

impl Class {
    /// What comes after it is the run loop's to find.
    pub(crate) fn asks_runtime(self) -> bool {
        matches!(self, Class::System | Class::Fault(_))
    }
}

/// A memory operand as the instruction accesses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub size: u32,
    pub read: bool,
    pub write: bool,
    /// The instruction has done its access when it has not faulted, whatever its other operands are.
    pub certain: bool,
    /// #GP unless the address is a multiple of this (1, 16 or 32); this comes before any page
    /// fault.
    pub alignment: u8,
}

/// One instruction of a block.
#[derive(Clone, Debug)]
pub(crate) struct Insn {
    pub instr: Instruction,
    pub class: Class,
    /// Registers whose value it needs, partial and conditional writes included.
    pub reads: u16,
    /// Registers that it overwrites whole.
    pub writes: u16,
    /// Registers that it changes in any way.
    pub modifies: u16,
    pub memory: Option<Memory>,
    /// It names ah, bh, ch or dh: no REX prefix may be added.
    pub high_byte: bool,
    pub flags: Flags,
    /// The host's processor may fault executing it, memory aside.
    pub faults: bool,
    /// Flags that somebody reads from here on.
    pub live_in: u32,
    /// Flags that somebody reads after it.
    pub live_out: u32,
    /// Flags that somebody reads where it leads, if it is a [`Class::Branch`].
    pub live_taken: u32,
}

impl Insn {
    /// Nothing yet: an instruction is decoded into its place, for one that is moved when its parts have just been
    /// written has the host's processor wait for all of them.
    fn place() -> Insn {
        Insn {
            instr: Instruction::default(),
            class: Class::Nop,
            reads: 0,
            writes: 0,
            modifies: 0,
            memory: None,
            high_byte: false,
            flags: Flags::default(),
            faults: false,
            live_in: 0,
            live_out: 0,
            live_taken: ALL_FLAGS,
        }
    }

    /// Registers that lowering may not borrow here.
    pub(crate) fn used(&self) -> u16 {
        self.reads | self.writes
    }

    /// Flags it leaves in a new state, whatever they were.
    pub(crate) fn kills(&self) -> u32 {
        self.flags.killed.into()
    }
}

/// A decoded block: a buffer that serves one after the other.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    pub insns: Vec<Insn>,
    /// Guest bytes from the first instruction's first to the last one's last.
    pub len: u32,
    /// Guest bytes that the translation depends on: those of the block, and of the code behind it
    /// that was looked at to learn which flags it reads.
    pub watched: u32,
    /// What it goes through elsewhere, which neither counts.
    pub leaf: Option<Leaf>,
}

/// Code to be decoded.
#[derive(Clone, Copy)]
pub(crate) struct Code<'a> {
    /// Up to the end of the page, but for `more`; or exactly one instruction that crosses it.
    pub bytes: &'a [u8],
    /// Guest instruction pointer of the first.
    pub ip: u64,
    /// How many bytes there are behind those.
    pub more: usize,
    /// Asked for leaves.
    pub leaves: &'a Reader<'a>,
}

/// Why nothing was decoded.
#[derive(Debug)]
pub(crate) enum Short {
    /// The first instruction needs more bytes than the page has.
    Crosses,
    /// Some of the bytes that aren't there matter.
    More,
}

/// Decodes the block at the start of `code`.
///
/// # Errors
/// See [`Short`].
pub(crate) fn decode(
    code: Code<'_>,
    mode: Mode,
    forms: &mut Forms,
    decoded: &mut Decoded,
) -> Result<(), Short> {
    let Code {
        bytes, ip, more, ..
    } = code;
    let width = match mode.bits {
        Bits::Bits16 => 16,
        Bits::Bits32 => 32,
        Bits::Bits64 => 64,
    };
    let mut decoder = Decoder::with_ip(width, bytes, ip, OPTIONS);
    let insns = &mut decoded.insns;
    insns.clear();
    let limit = if mode.single { 1 } else { MAX_INSTRUCTIONS };
    let mut len = 0;
    decoded.leaf = None;
    loop {
        let at = insns.len();
        insns.push(Insn::place());
        let insn = &mut insns[at];
        decoder.decode_out(&mut insn.instr);
        let invalid = insn.instr.is_invalid();
        let rest = &bytes[len as usize..];
        let cut = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes;
        if invalid && (cut || rest.len() < LONGEST) {
            let behind = ends_behind(rest, width);
            if more != 0 && (cut || behind) {
                return Err(Short::More);
            }
            if at != 0 && (cut || behind) {
                insns.pop();
                break;
            }
            if behind {
                return Err(Short::Crosses);
            }
        }
        len += insn.instr.len() as u32;
        if invalid && too_long(rest, width) {
            // More than 15 bytes of prefixes and opcode (SDM 2A 2.3.11).
            forms.complete_as(insn, Class::Fault(Raised::Protection));
        } else {
            forms.complete(insn, &mode);
        }
        let class = insn.class;
        if class == Class::Call
            && (decoder.can_decode() || more != 0)
            && let Some(leaf) = leaf::inline(insns, mode, decoded.leaf, code.leaves, forms)
        {
            decoded.leaf = Some(leaf);
            continue;
        }
        // Accesses through the window share nothing that a way out in the middle would have to undo.
        let goes_on = mode.window && matches!(class, Class::Branch);
        let ends = class.ends_block() && !goes_on;
        if ends || insns.len() == limit || !decoder.can_decode() && more == 0 {
            break;
        }
    }
    if leaf::retract(insns) && insns.iter().all(|insn| insn.class != Class::CallInline) {
        decoded.leaf = None;
    }
    decoded.len = len;
    decoded.watched = len;
    decoded.settle_sti();
    if mode.exact {
        decoded.all_live();
        Ok(())
    } else {
        decoded.liveness(code, &mut decoder, forms)
    }
}

/// All of `bytes`, for tests.
#[cfg(test)]
pub(crate) fn decode_whole(bytes: &[u8], mode: Mode) -> Result<Decoded, Short> {
    let mut decoded = Decoded::default();
    let code = Code {
        bytes,
        ip: 0x1000,
        more: 0,
        leaves: leaf::NONE,
    };
    decode(code, mode, &mut Forms::new(), &mut decoded)?;
    Ok(decoded)
}

/// Segment of the memory operand. 64-bit mode ignores prefixes other than fs and gs, so a stack
/// register as base keeps its #SS and others their #GP (SDM 1 3.4.2.1).
pub(crate) fn data_segment(instr: &Instruction, bits: Bits) -> Register {
    match instr.segment_prefix() {
        Register::ES | Register::CS | Register::SS | Register::DS if bits == Bits::Bits64 => {
            match instr.memory_base().full_register() {
                Register::RSP | Register::RBP => Register::SS,
                _ => Register::DS,
            }
        }
        _ => instr.memory_segment(),
    }
}

/// Bit of a general register's 64-bit parent, or 0.
pub(crate) fn gpr_bit(register: Register) -> u16 {
    if register.is_gpr() {
        1 << register.full_register().number()
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: Mode = Mode::LONG;

    fn check(bytes: &[u8], classes: &[Class]) -> Decoded {
        let decoded = decode_whole(bytes, MODE).expect("decodes");
        let found: Vec<Class> = decoded.insns.iter().map(|insn| insn.class).collect();
        assert_eq!(found, classes);
        decoded
    }

    #[test]
    fn a_block_ends_at_its_first_branch() {
        check(
            b"\x48\x01\xd8\x48\x8b\x03\xc3\x90",
            &[Class::Plain, Class::Memory, Class::Return],
        );
    }

    #[test]
    fn flags_die_where_they_are_overwritten() {
        // add rax, rbx; mov rax, [rbx]; xor ecx, ecx; jz +0
        let decoded = check(
            b"\x48\x01\xd8\x48\x8b\x03\x31\xc9\x74\x00",
            &[Class::Plain, Class::Memory, Class::Plain, Class::Branch],
        );
        assert_eq!(decoded.insns[1].live_in, 0);
        assert_ne!(decoded.insns[3].live_in & RflagsBits::ZF, 0);
    }

    #[test]
    fn a_shift_by_cl_kills_no_flag() {
        // add rax, rbx; mov rdx, [rsi]; shl rax, cl; ret
        let decoded = check(
            b"\x48\x01\xd8\x48\x8b\x16\x48\xd3\xe0\xc3",
            &[Class::Plain, Class::Memory, Class::Plain, Class::Return],
        );
        assert_eq!(decoded.insns[1].live_in, ALL_FLAGS);
    }

    #[test]
    fn avx_is_undefined_until_the_guest_enables_it() {
        check(b"\xc5\xf8\x57\xc0", &[Class::Fault(Raised::Undefined)]);
    }

    #[test]
    fn avx_512_is_undefined() {
        // vaddps zmm0, zmm0, zmm0
        check(
            b"\x62\xf1\x7c\x48\x58\xc0",
            &[Class::Fault(Raised::Undefined)],
        );
    }

    #[test]
    fn an_instruction_cut_off_by_the_page_end_is_left_to_the_next_block() {
        let decoded = check(b"\x90\x48\x8b", &[Class::Plain]);
        assert_eq!(decoded.len, 1);
        let cut = decode_whole(b"\x48\x8b", MODE);
        assert!(matches!(cut, Err(Short::Crosses)));
    }
}
