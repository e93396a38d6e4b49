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

use iced_x86::{Code, OpKind, Register};

use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode, gpr_bit},
    lower::{RAX, RSP},
};

/// Bytes that one lookup may cover.
const REACH: i64 = 256;
/// Groups alive at once: each keeps a register.
const ALIVE: usize = 2;
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
    group: u8,
    /// Bytes from the group's lowest to the operand.
    pub offset: i32,
}

impl Member {
    pub(crate) fn group(self) -> usize {
        self.group.into()
    }
}

/// Instructions of a block, one bit each.
type Set = u64;

/// Which instructions of a block share lookups. A buffer that serves one block after the other.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub groups: Vec<Group>,
    members: Vec<Option<Member>>,
    accesses: Vec<Access>,
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

/// What accesses of a group have in common: registers in one of their versions, and what is done, put together
/// so that it is compared at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key(u64);

#[derive(Clone, Copy, Debug)]
struct Access {
    key: Key,
    /// Which instruction this is.
    index: u8,
    size: u8,
    scale: u8,
    write: bool,
    base: Register,
    other: Register,
    /// Displacement as if RSP stood where the block found it.
    at: i64,
    /// How far RSP is from there.
    moved: i64,
}

/// Finds the groups of a block.
pub(crate) fn plan(insns: &[Insn], mode: Mode, plan: &mut Plan) {
    plan.clear();
    if mode.bits != Bits::Bits64 || mode.single || mode.limited != 0 {
        return;
    }
    if !worthwhile(insns) || insns.len() > Set::BITS as usize {
        return;
    }
    let Plan {
        groups,
        members,
        accesses: list,
        found,
    } = plan;
    list.clear();
    accesses(insns, list);
    let crowded = crowded(insns);
    let mut taken: Set = 0;
    // Instructions that one group is alive at, or more, and so on.
    let mut alive: [Set; ALIVE] = [0; ALIVE];
    for (number, first) in list.iter().enumerate() {
        let head = usize::from(first.index);
        if (taken | alive[ALIVE - 1]) >> head & 1 == 1 {
            continue;
        }
        let behind = Set::MAX.checked_shl(head as u32 + 1).unwrap_or(0);
        let end = ((crowded | alive[ALIVE - 1]) & behind).trailing_zeros();
        let (mut low, mut high) = (first.at, first.at + i64::from(first.size));
        found.clear();
        found.push(number);
        for (number, access) in list.iter().enumerate().skip(number + 1) {
            if u32::from(access.index) >= end {
                break;
            }
            if access.key != first.key || taken >> access.index & 1 == 1 {
                continue;
            }
            let to = access.at + i64::from(access.size);
            let (from, to) = (low.min(access.at), high.max(to));
            if to - from <= REACH {
                (low, high) = (from, to);
                found.push(number);
            }
        }
        let &[_, .., last] = found.as_slice() else {
            continue;
        };
        let last = usize::from(list[last].index);
        let used = insns[head..=last].iter().fold(RSP, |used, insn| {
            used | insn.used() | if insn.live_in != 0 { RAX } else { 0 }
        });
        // The head's own lookup takes two that nobody uses, and another group may keep one.
        if used.count_ones() + BORROWED > 16 {
            continue;
        }
        members.resize(insns.len(), None);
        let group = groups.len() as u8;
        for &number in found.iter() {
            let access = &list[number];
            let offset = (access.at - low) as i32;
            members[usize::from(access.index)] = Some(Member { group, offset });
            taken |= 1 << access.index;
        }
        let range = Set::MAX << head & !(Set::MAX << 1 << last);
        for count in (1..ALIVE).rev() {
            alive[count] |= alive[count - 1] & range;
        }
        alive[0] |= range;
        let moved = if first.base == Register::RSP {
            first.moved
        } else {
            0
        };
        groups.push(Group {
            head,
            last,
            base: first.base,
            index: first.other,
            scale: first.scale.into(),
            low: low - moved,
            bytes: (high - low) as u32,
            write: first.write,
            used,
            register: 0,
        });
    }
}

/// Accesses that could not borrow what they need from what they and [`ALIVE`] groups leave.
fn crowded(insns: &[Insn]) -> Set {
    let one = |insn: &Insn| {
        // Beside AH, BH, CH and DH nothing can be named that wants a REX prefix.
        let high = if insn.high_byte { 0xff00 } else { 0 };
        let taken = insn.used() | RSP | RAX | high;
        insn.memory.is_some() && taken.count_ones() + ALIVE as u32 + BORROWED > 16
    };
    let set = insns.iter().rev();
    set.fold(0, |set, insn| set << 1 | Set::from(one(insn)))
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

fn accesses(insns: &[Insn], list: &mut Vec<Access>) {
    // The instruction that changed a register last, or one more than its number.
    let mut versions = [0u8; 16];
    let mut moved = 0i64;
    for (index, insn) in (0u8..).zip(insns) {
        if let Some((base, other, scale, at, size, write)) = operand(insn, moved) {
            let part = |register: Register| match register {
                Register::None => 0xffff,
                register => {
                    let number = register.number();
                    (number as u64) << 8 | u64::from(versions[number])
                }
            };
            let key =
                part(base) << 48 | part(other) << 32 | u64::from(scale) << 8 | u64::from(write);
            list.push(Access {
                key: Key(key),
                index,
                size,
                scale,
                write,
                base,
                other,
                at,
                moved,
            });
        }
        let mut changed = insn.modifies;
        if insn.instr.code() == Code::Invlpg_m {
            // What was looked up before counts no more.
            changed = u16::MAX;
        }
        if insn.modifies >> Register::RSP.number() & 1 == 1 {
            match rsp_step(insn) {
                Some(step) => {
                    moved += step;
                    changed &= !RSP;
                }
                None => moved = 0,
            }
        }
        while changed != 0 {
            versions[changed.trailing_zeros() as usize] = index + 1;
            changed &= changed - 1;
        }
    }
}

type Operand = (Register, Register, u8, i64, u8, bool);

fn operand(insn: &Insn, moved: i64) -> Option<Operand> {
    let instr = &insn.instr;
    let stack = |at: i64, size: i64, write: bool| {
        Some((
            Register::RSP,
            Register::None,
            1,
            moved + at,
            size as u8,
            write,
        ))
    };
    let plain = || (0..instr.op_count()).all(|operand| instr.op_kind(operand) != OpKind::Memory);
    let step = || i64::from(instr.stack_pointer_increment());
    match insn.class {
        Class::Push | Class::Call | Class::CallIndirect | Class::CallInline if plain() => {
            stack(step(), -step(), true)
        }
        Class::Pop if plain() && gpr_bit(instr.op0_register()) != 1 << Register::RSP.number() => {
            stack(0, step(), false)
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
            let scale = instr.memory_index_scale() as u8;
            Some((base, index, scale, at, memory.size as u8, memory.write))
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

/// How far an instruction that changes RSP moves it, if that is known.
fn rsp_step(insn: &Insn) -> Option<i64> {
    let instr = &insn.instr;
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
