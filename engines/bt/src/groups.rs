//! Accesses that can share one lookup.
//!
//! Compilers touch memory in runs: pushes, pops, fields of one structure, neighbouring elements.
//! Accesses of a block with the same base and index, unchanged in between, differ by constants, so
//! one lookup that covers all of them (at the first) serves the rest, which then cost what they
//! cost natively. Pushes and pops count as accesses relative to RSP, whose moves are known.
//!
//! The first access checks for all, before any of them has happened. If the check fails, nothing
//! is concluded: the run loop executes those instructions one by one, each with its own lookup, so
//! the guest sees exactly the fault, or the device access, that it would have seen.
//!
//! Reads are never grouped with writes: they look into different tables.
//!
//! Invariant: a group's register is nobody else's until the last access. So it isn't RAX where flags live
//! at any instruction in between, since they move through RAX; and every access in between, the heads of
//! other groups among them, finds registers for a lookup of its own.

use iced_x86::{Code, Mnemonic, OpKind, Register};

use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode, gpr_bit},
    lower::{RAX, RSP},
};

/// Bytes that one lookup may cover.
const REACH: i64 = 256;
/// Groups alive at once: each keeps a register.
const ALIVE: u8 = 2;
/// Registers that an access borrows besides those that groups keep, and one for what else it holds.
const BORROWED: u32 = 3;

/// Accesses that share a lookup.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    /// Index of the first instruction, which looks up.
    pub head: usize,
    /// Index of the last one, after which the register is free.
    pub last: usize,
    pub base: Register,
    pub index: Register,
    pub scale: u32,
    /// Displacement of the lowest byte, as the head's registers stand.
    pub low: i64,
    pub bytes: u32,
    pub write: bool,
    /// Registers that the instructions from head to last use, and RAX where flags may move through it.
    pub used: u16,
    /// Holds the host address once the head has looked it up.
    pub register: u8,
}

/// An instruction's place in its group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub group: usize,
    /// Bytes from the group's lowest to the operand.
    pub offset: i32,
}

/// Which instructions of a block share lookups. A buffer that serves one block after the other.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub groups: Vec<Group>,
    members: Vec<Option<Member>>,
    accesses: Vec<Option<Access>>,
    alive: Vec<u8>,
    found: Vec<usize>,
}

impl Plan {
    /// The group that the instruction at `at` belongs to.
    pub(crate) fn member(&self, at: usize) -> Option<Member> {
        self.members.get(at).copied().flatten()
    }

    /// Every access looks up for itself.
    pub(crate) fn clear(&mut self) {
        self.groups.clear();
        self.members.clear();
    }
}

/// An access relative to registers in one of their versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    base: Register,
    index: Register,
    scale: u32,
    versions: (u32, u32),
    write: bool,
}

#[derive(Clone, Copy, Debug)]
struct Access {
    key: Key,
    /// Displacement as if RSP stood where the block found it.
    at: i64,
    size: i64,
    /// How far RSP is from there.
    moved: i64,
}

/// Finds the groups of a block.
pub(crate) fn plan(insns: &[Insn], mode: Mode, plan: &mut Plan) {
    plan.clear();
    if mode.bits != Bits::Bits64 || mode.single || mode.limited != 0 {
        return;
    }
    let Plan {
        groups,
        members,
        accesses: list,
        alive,
        found,
    } = plan;
    list.clear();
    if !worthwhile(insns) {
        return;
    }
    accesses(insns, list);
    let accesses = &list[..];
    members.resize(insns.len(), None);
    alive.clear();
    alive.resize(insns.len(), 0);
    for head in 0..insns.len() {
        let (Some(first), None) = (accesses[head], members[head]) else {
            continue;
        };
        let (mut low, mut high) = (first.at, first.at + first.size);
        found.clear();
        found.push(head);
        for (index, access) in accesses.iter().enumerate().skip(head + 1) {
            if alive[index] >= ALIVE || crowded(&insns[index]) {
                break;
            }
            let Some(access) = access else { continue };
            let (from, to) = (low.min(access.at), high.max(access.at + access.size));
            if access.key == first.key && members[index].is_none() && to - from <= REACH {
                (low, high) = (from, to);
                found.push(index);
            }
        }
        let last = found[found.len() - 1];
        let used = insns[head..=last].iter().fold(RSP, |used, insn| {
            used | insn.used() | if insn.live_in != 0 { RAX } else { 0 }
        });
        // The head's own lookup takes two that nobody uses, and another group may keep one.
        if found.len() < 2 || alive[head] >= ALIVE || used.count_ones() + BORROWED > 16 {
            continue;
        }
        let group = groups.len();
        for &index in found.iter() {
            if let Some(access) = accesses[index] {
                let offset = (access.at - low) as i32;
                members[index] = Some(Member { group, offset });
            }
        }
        alive[head..=last].iter_mut().for_each(|count| *count += 1);
        let moved = if first.key.base == Register::RSP {
            first.moved
        } else {
            0
        };
        groups.push(Group {
            head,
            last,
            base: first.key.base,
            index: first.key.index,
            scale: first.key.scale,
            low: low - moved,
            bytes: (high - low) as u32,
            write: first.key.write,
            used,
            register: 0,
        });
    }
}

/// True if an access could not borrow what it needs from what it and [`ALIVE`] groups leave.
fn crowded(insn: &Insn) -> bool {
    // Beside AH, BH, CH and DH nothing can be named that wants a REX prefix.
    let high = if insn.high_byte { 0xff00 } else { 0 };
    let taken = insn.used() | RSP | RAX | high;
    insn.memory.is_some() && taken.count_ones() + u32::from(ALIVE) + BORROWED > 16
}

/// Two accesses of one kind, by their classes: most blocks have no more than one.
fn worthwhile(insns: &[Insn]) -> bool {
    let (mut reads, mut writes) = (0, 0);
    for insn in insns {
        match insn.class {
            Class::Push | Class::Call | Class::CallIndirect | Class::CallInline => writes += 1,
            Class::Pop | Class::Return => reads += 1,
            Class::Memory if insn.memory.is_some_and(|memory| memory.write) => writes += 1,
            Class::Memory => reads += 1,
            Class::Plain
            | Class::Nop
            | Class::Lea
            | Class::BitString
            | Class::MaskedMove
            | Class::Leave
            | Class::Cli
            | Class::Sti
            | Class::Jump
            | Class::JumpIndirect
            | Class::Branch
            | Class::Loop
            | Class::ReturnInline
            | Class::Privileged
            | Class::System
            | Class::Fault(_) => {}
        }
    }
    reads >= 2 || writes >= 2
}

fn accesses(insns: &[Insn], list: &mut Vec<Option<Access>>) {
    let mut versions = [0u32; 16];
    let mut moved = 0i64;
    list.extend(insns.iter().map(|insn| {
        let version = |register: Register| match register {
            Register::None => 0,
            register => versions[register.number()],
        };
        let access = operand(insn, moved).map(|(base, index, scale, at, size, write)| Access {
            key: Key {
                base,
                index,
                scale,
                versions: (version(base), version(index)),
                write,
            },
            at,
            size,
            moved,
        });
        if insn.instr.mnemonic() == Mnemonic::Invlpg {
            // What was looked up before counts no more.
            versions.iter_mut().for_each(|version| *version += 1);
        }
        let step = rsp_step(insn);
        moved = step.map_or(0, |step| moved + step);
        let mut changed = insn.modifies;
        if step.is_some() {
            changed &= !(1 << Register::RSP.number());
        }
        while changed != 0 {
            versions[changed.trailing_zeros() as usize] += 1;
            changed &= changed - 1;
        }
        access
    }));
}

type Operand = (Register, Register, u32, i64, i64, bool);

fn operand(insn: &Insn, moved: i64) -> Option<Operand> {
    let instr = &insn.instr;
    let stack = |at: i64, size: i64, write: bool| {
        Some((Register::RSP, Register::None, 1, moved + at, size, write))
    };
    let plain = (0..instr.op_count()).all(|operand| instr.op_kind(operand) != OpKind::Memory);
    let step = i64::from(instr.stack_pointer_increment());
    match insn.class {
        Class::Push | Class::Call | Class::CallIndirect | Class::CallInline if plain => {
            stack(step, -step, true)
        }
        Class::Pop if plain && gpr_bit(instr.op0_register()) != 1 << Register::RSP.number() => {
            stack(0, step, false)
        }
        Class::Return => stack(0, 8, false),
        Class::Memory => {
            let (base, index) = (instr.memory_base(), instr.memory_index());
            let memory = insn.memory?;
            let wide = base.is_gpr64() && (index == Register::None || index.is_gpr64());
            let segment = matches!(instr.memory_segment(), Register::FS | Register::GS);
            if !wide || segment || insn.high_byte || memory.size == 0 || memory.size > 64 {
                return None;
            }
            let extra = if base == Register::RSP { moved } else { 0 };
            let at = instr.memory_displacement64() as i64 + extra;
            // Far from the ends of what a displacement holds: the group's may differ a little.
            if at.abs() > 1 << 30 {
                return None;
            }
            let scale = instr.memory_index_scale();
            Some((base, index, scale, at, memory.size.into(), memory.write))
        }
        Class::Push
        | Class::Pop
        | Class::Call
        | Class::CallIndirect
        | Class::CallInline
        | Class::ReturnInline
        | Class::Plain
        | Class::Nop
        | Class::Lea
        | Class::BitString
        | Class::MaskedMove
        | Class::Leave
        | Class::Cli
        | Class::Sti
        | Class::Jump
        | Class::JumpIndirect
        | Class::Branch
        | Class::Loop
        | Class::Privileged
        | Class::System
        | Class::Fault(_) => None,
    }
}

/// How far RSP moves, if that is known; Some(0) for instructions that leave it alone.
fn rsp_step(insn: &Insn) -> Option<i64> {
    let instr = &insn.instr;
    if insn.modifies >> Register::RSP.number() & 1 == 0 {
        return Some(0);
    }
    match insn.class {
        Class::Push | Class::Pop
            if gpr_bit(instr.op0_register()) != 1 << Register::RSP.number()
                || insn.class == Class::Push =>
        {
            Some(i64::from(instr.stack_pointer_increment()))
        }
        Class::CallInline | Class::ReturnInline => Some(i64::from(instr.stack_pointer_increment())),
        Class::Plain if instr.op0_register() == Register::RSP => match instr.code() {
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 => Some(instr.immediate(1) as i64),
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 => {
                Some((instr.immediate(1) as i64).wrapping_neg())
            }
            _ => None,
        },
        Class::Lea
            if instr.op0_register() == Register::RSP
                && instr.memory_base() == Register::RSP
                && instr.memory_index() == Register::None =>
        {
            Some(instr.memory_displacement64() as i64)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode_whole;

    const MODE: Mode = Mode {
        user: true,
        ring_0: false,
        interrupts: false,
        ..Mode::LONG
    };

    fn check(bytes: &[u8], expected: &[(usize, usize, i64, u32)]) {
        let decoded = decode_whole(bytes, MODE).expect("decodes");
        let mut groups = Plan::default();
        plan(&decoded.insns, MODE, &mut groups);
        let found: Vec<_> = groups
            .groups
            .iter()
            .map(|group| (group.head, group.last, group.low, group.bytes))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn pushes_of_a_prologue_share_a_lookup() {
        // push rbp; push rbx; sub rsp, 24; mov [rsp+8], rax; call +0
        check(
            b"\x55\x53\x48\x83\xec\x18\x48\x89\x44\x24\x08\xe8\0\0\0\0",
            &[(0, 4, -48, 48)],
        );
    }

    #[test]
    fn a_changed_base_ends_a_group() {
        // mov rax, [rsi]; add rsi, 8; mov rbx, [rsi]; ret
        check(b"\x48\x8b\x06\x48\x83\xc6\x08\x48\x8b\x1e\xc3", &[]);
        // mov rsi, [rsi]; mov rax, [rsi]; mov rbx, [rsi+8]; ret
        check(
            b"\x48\x8b\x36\x48\x8b\x06\x48\x8b\x5e\x08\xc3",
            &[(1, 2, 0, 16)],
        );
    }

    #[test]
    fn reads_and_writes_stay_apart() {
        // mov rax, [rsi]; mov [rsi+8], rax; ret
        check(b"\x48\x8b\x06\x48\x89\x46\x08\xc3", &[]);
    }

    #[test]
    fn pops_and_the_return_share_a_lookup() {
        // add rsp, 8; pop rbx; pop rbp; ret
        check(b"\x48\x83\xc4\x08\x5b\x5d\xc3", &[(1, 3, 0, 24)]);
    }
}
