//! Which accesses of a block go through the window, and what has to be compared for that.
//!
//! An access may use the window ([`crate::window`]) if its base and index registers are known to be
//! small. They are compared once and known until they change by anything but a constant; registers
//! that a 32-bit instruction has written are known anyway. A comparison ruins the flags, so it is
//! made where nobody reads them: at the access, or as far before it as the register can be followed
//! back. If it fails, nothing is concluded: the run loop executes the instructions from there to the
//! access one by one, through the software TLB. Accesses that keep failing lose the window.
//!
//! RSP needs no comparison most of the time: blocks meet with RSP inside the window, or [`SLACK`] from
//! it. The run loop sees to it at first ([`Mode::stack`]); pushes, pops and operands based on RSP show
//! that it holds by not faulting; and a block that ends with RSP moved otherwise compares it.
//!
//! Invariant: every register of a [`Route::Direct`] operand has passed its comparison earlier in the
//! same block, and moved by at most [`SLACK`] since.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode, data_segment},
    window::{LONGEST, SLACK},
};

/// How an instruction reaches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Through the software TLB, or not at all.
    Tlb,
    /// Through the window, its operand as it is.
    Direct,
    /// Through the window, the operand's address added up and compared first.
    Sum,
}

/// A register to be compared before an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub register: u8,
    pub index: bool,
    /// Instructions to execute one by one if it fails.
    pub steps: u16,
    /// Instructions that rely on it, one bit each.
    pub users: u64,
}

/// Accesses that didn't find the window useful, one bit for each instruction of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outside {
    /// Their registers are no base and small index; their sum may be inside still.
    pub sum: u64,
    /// Not even that.
    pub tlb: u64,
}

/// What the instructions of a block do.
#[derive(Debug)]
pub(crate) struct Checks {
    pub routes: Vec<Route>,
    /// Comparisons before each instruction.
    pub before: Vec<Vec<Check>>,
    /// The block ends with RSP anywhere: only the run loop may say where to go on.
    pub lost: bool,
}

/// Registers that an access needs compared: as base or as index.
type Needs = [Option<(u8, bool)>; 3];

const RSP: usize = 4;

#[derive(Clone, Copy)]
struct Known {
    /// Small enough for an index.
    index: bool,
    /// How far it is from where it was known.
    moved: i64,
    /// It was inside the window there, not just close to it.
    inside: bool,
    /// The comparison that says so.
    check: Option<(usize, usize)>,
}

struct State {
    known: [Option<Known>; 16],
}

/// Decides for a block.
pub(crate) fn plan(insns: &[Insn], mode: Mode, outside: Outside) -> Checks {
    let mut checks = Checks {
        routes: vec![Route::Tlb; insns.len()],
        before: vec![Vec::new(); insns.len()],
        lost: false,
    };
    if !mode.window || mode.single {
        return checks;
    }
    let wide = mode.bits == Bits::Bits64;
    let mut state = State { known: [None; 16] };
    if mode.stack {
        state.known[RSP] = Some(Known {
            index: false,
            moved: 0,
            inside: false,
            check: None,
        });
    }
    for (at, insn) in insns.iter().enumerate() {
        if let Some(needs) = needs(insn, mode)
            && outside.tlb >> at & 1 == 0
        {
            if outside.sum >> at & 1 == 1 && insn.class == Class::Memory {
                checks.routes[at] = Route::Sum;
            } else {
                checks.routes[at] = Route::Direct;
                for (register, index) in needs.into_iter().flatten() {
                    checks.require(insns, &mut state, at, register, index);
                }
            }
        }
        let leaves = insn.class == Class::Branch || at + 1 == insns.len();
        let direct = checks.routes[at] == Route::Direct;
        if wide && mode.stack && leaves && !insn.class.asks_runtime() {
            let mut after = State { ..state };
            after.follow(insn, mode, direct);
            if !after.stack_holds() {
                checks.compare(insns, &mut state, at, RSP as u8, false);
            }
        }
        state.follow(insn, mode, direct);
        if leaves && wide && mode.stack {
            checks.lost |= !insn.class.asks_runtime() && !state.stack_holds();
        }
    }
    checks
}

impl Checks {
    fn require(&mut self, insns: &[Insn], state: &mut State, at: usize, register: u8, index: bool) {
        if let Some(found) = &state.known[usize::from(register)]
            && (found.index || !index)
        {
            if let Some((place, number)) = found.check {
                self.before[place][number].users |= users(at, register);
            }
            return;
        }
        self.compare(insns, state, at, register, index);
    }

    /// Has `register` compared at `at` or before, where flags are dead and it is the same but for a
    /// constant.
    fn compare(&mut self, insns: &[Insn], state: &mut State, at: usize, register: u8, index: bool) {
        let (mut place, mut moved) = (at, 0i64);
        while insns[place].live_in != 0 {
            let before = place
                .checked_sub(1)
                .filter(|&before| insns[before].class != Class::Branch)
                .and_then(|before| Some((before, step(&insns[before], register)?)));
            match before {
                Some((before, by)) if (moved + by).unsigned_abs() <= SLACK => {
                    (place, moved) = (before, moved + by);
                }
                Some(_) | None => {
                    (place, moved) = (at, 0);
                    break;
                }
            }
        }
        let number = self.before[place].len();
        self.before[place].push(Check {
            register,
            index,
            steps: (at - place + 1) as u16,
            users: users(at, register),
        });
        state.known[usize::from(register)] = Some(Known {
            index,
            moved,
            inside: true,
            check: Some((place, number)),
        });
    }
}

impl State {
    /// RSP is where the next block expects it: inside the window or as good as.
    fn stack_holds(&self) -> bool {
        self.known[RSP].is_some_and(|known| known.inside || known.moved == 0)
    }

    /// What is known of the registers after `insn`, whose accesses go straight through the window or
    /// not.
    fn follow(&mut self, insn: &Insn, mode: Mode, direct: bool) {
        if mode.bits != Bits::Bits64 {
            return;
        }
        // An access that has succeeded says where its base was.
        let touched = direct.then(|| touches(insn)).flatten();
        if let Some(moved) = touched
            && let Some(known) = &mut self.known[RSP]
        {
            (known.moved, known.inside) = (moved, true);
        }
        let copied = copied(insn).map(|source| self.known[source]);
        let target = insn.instr.op0_register().full_register();
        for (register, slot) in self.known.iter_mut().enumerate() {
            if insn.modifies >> register & 1 == 0 {
                continue;
            }
            let stepped = step(insn, register as u8).and_then(|by| {
                let known = (*slot)?;
                let moved = known.moved + by;
                (moved.unsigned_abs() <= SLACK).then_some(Known { moved, ..known })
            });
            *slot = stepped.or_else(|| {
                zero_extends(insn, register as u8, mode).then_some(Known {
                    index: true,
                    moved: 0,
                    inside: true,
                    check: None,
                })
            });
            if let Some(known) = copied
                && target.is_gpr64()
                && target.number() == register
            {
                *slot = known;
            }
        }
        if insn.class == Class::Leave {
            // RBP was compared, and the pop beside it succeeded.
            self.known[RSP] = direct.then_some(Known {
                index: false,
                moved: 8,
                inside: true,
                check: None,
            });
        }
    }
}

/// Who is to blame if a comparison fails. RSP outside is nobody's fault: blocks for that case are made
/// in another mode.
fn users(at: usize, register: u8) -> u64 {
    if usize::from(register) == RSP {
        0
    } else {
        1 << at
    }
}

/// How far RSP is from an address that a successful `insn` has touched, before it moves.
fn touches(insn: &Insn) -> Option<i64> {
    let instr = &insn.instr;
    match insn.class {
        Class::Push | Class::Call | Class::CallIndirect => {
            Some(-i64::from(instr.stack_pointer_increment()))
        }
        Class::Pop | Class::Return => Some(0),
        Class::Memory
            if instr.memory_base() == Register::RSP && instr.memory_index() == Register::None =>
        {
            let by = (instr.memory_displacement64() as i64).wrapping_neg();
            (by.unsigned_abs() <= SLACK).then_some(by)
        }
        _ => None,
    }
}

/// The register that `insn` copies to its target.
fn copied(insn: &Insn) -> Option<usize> {
    let instr = &insn.instr;
    let plain = insn.class == Class::Plain
        && instr.mnemonic() == Mnemonic::Mov
        && instr.op0_kind() == OpKind::Register
        && instr.op1_kind() == OpKind::Register
        && instr.op0_register().is_gpr64()
        && instr.op1_register().is_gpr64();
    plain.then(|| instr.op1_register().number())
}

/// True if `insn` leaves a 32-bit number in `register`, whatever happens.
fn zero_extends(insn: &Insn, register: u8, mode: Mode) -> bool {
    let target = insn.instr.op0_register();
    mode.bits == Bits::Bits64
        && matches!(insn.class, Class::Plain | Class::Memory | Class::Lea)
        && insn.instr.op0_kind() == OpKind::Register
        && target.is_gpr32()
        && target.number() == usize::from(register)
        && matches!(
            insn.instr.mnemonic(),
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
        && insn.modifies.count_ones() == 1
}

/// By how much `insn` moves `register`: Some(0) if it leaves it alone, None if nobody knows.
fn step(insn: &Insn, register: u8) -> Option<i64> {
    let instr = &insn.instr;
    if insn.modifies >> register & 1 == 0 {
        return Some(0);
    }
    let is_target =
        |operand: Register| operand.is_gpr64() && operand.number() == usize::from(register);
    let small = |by: i64| (by.unsigned_abs() <= SLACK).then_some(by);
    match insn.class {
        Class::Push | Class::Call | Class::CallIndirect | Class::Return if register == 4 => {
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

/// What an access through the window needs; None if it can't be one.
fn needs(insn: &Insn, mode: Mode) -> Option<Needs> {
    const STACK: (u8, bool) = (RSP as u8, false);
    const FRAME: (u8, bool) = (5, false);
    let instr = &insn.instr;
    let wide = mode.bits == Bits::Bits64;
    let stack_open = if wide {
        mode.stack
    } else {
        mode.flat && mode.limited >> 2 & 1 == 0 && !mode.narrow_stack
    };
    let stack = |more: Needs| {
        let [first, second, _] = more;
        let own = wide.then_some(STACK);
        stack_open.then_some([first, second, own])
    };
    let has_memory = (0..instr.op_count()).any(|operand| instr.op_kind(operand) == OpKind::Memory);
    match insn.class {
        Class::Memory => {
            let memory = insn.memory?;
            if memory.size == 0 || memory.size > LONGEST || instr.len() > 14 {
                return None;
            }
            operand(instr, mode)
        }
        Class::Push if !has_memory => stack([None; 3]),
        Class::Pop if !has_memory && instr.op0_register().full_register() != Register::RSP => {
            stack([None; 3])
        }
        Class::Call | Class::Return => stack([None; 3]),
        Class::CallIndirect if has_memory => stack(operand(instr, mode)?),
        Class::CallIndirect => stack([None; 3]),
        Class::JumpIndirect if has_memory => operand(instr, mode),
        Class::Leave => stack_open.then_some([wide.then_some(FRAME), None, None]),
        Class::Plain
        | Class::Nop
        | Class::Lea
        | Class::BitString
        | Class::MaskedMove
        | Class::Push
        | Class::Pop
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

/// The address of an operand without registers.
pub(crate) fn constant(instr: &Instruction) -> Option<u64> {
    if instr.is_ip_rel_memory_operand() {
        return Some(instr.ip_rel_memory_address());
    }
    (instr.memory_base() == Register::None && instr.memory_index() == Register::None)
        .then(|| instr.memory_displacement64())
}

fn operand(instr: &Instruction, mode: Mode) -> Option<Needs> {
    let segment = match data_segment(instr, mode.bits) {
        Register::ES => 0,
        Register::SS => 2,
        Register::DS => 3,
        // Their bases have to be added, and code segments are for reading only.
        _ => return None,
    };
    if mode.bits != Bits::Bits64 && (!mode.flat || mode.limited >> segment & 1 == 1) {
        return None;
    }
    if let Some(address) = constant(instr) {
        // What a displacement can say without a sign.
        return (address < 1 << 31).then_some([None; 3]);
    }
    let (base, index) = (instr.memory_base(), instr.memory_index());
    let all = |test: fn(Register) -> bool| {
        [base, index]
            .into_iter()
            .all(|register| register == Register::None || test(register))
    };
    if all(Register::is_gpr32) {
        return Some([None; 3]);
    }
    if !all(Register::is_gpr64) || mode.bits != Bits::Bits64 {
        return None;
    }
    if base == Register::RSP && !mode.stack {
        return None;
    }
    let need = |register: Register, index: bool| {
        (register != Register::None).then(|| (register.number() as u8, index))
    };
    Some([need(base, false), need(index, true), None])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;
    use iced_x86::InstructionInfoFactory;

    const MODE: Mode = Mode {
        user: true,
        window: true,
        stack: true,
        interrupts: false,
        ..Mode::LONG
    };

    /// (before, register, index, users)
    fn check(
        bytes: &[u8],
        outside: Outside,
        routes: &[Route],
        expected: &[(usize, u8, bool, u64)],
    ) {
        let mut info = InstructionInfoFactory::new();
        let decoded = decode(bytes, 0x1000, MODE, &mut info, Vec::new()).expect("decodes");
        let checks = plan(&decoded.insns, MODE, outside);
        assert_eq!(checks.routes, routes);
        let found: Vec<_> = checks
            .before
            .iter()
            .enumerate()
            .flat_map(|(at, before)| before.iter().map(move |check| (at, check)))
            .map(|(at, check)| (at, check.register, check.index, check.users))
            .collect();
        assert_eq!(found, expected);
    }

    const NONE: Outside = Outside { sum: 0, tlb: 0 };
    use Route::{Direct, Sum, Tlb};

    #[test]
    fn pushes_need_no_check_where_blocks_meet_with_rsp_inside() {
        // push rbp; push rbx; sub rsp, 24; mov [rsp+8], rax; test eax, eax; call +0
        check(
            b"\x55\x53\x48\x83\xec\x18\x48\x89\x44\x24\x08\x85\xc0\xe8\0\0\0\0",
            NONE,
            &[Direct, Direct, Tlb, Direct, Tlb, Direct],
            &[],
        );
    }

    #[test]
    fn rsp_is_checked_if_nothing_shows_where_it_went() {
        // sub rsp, 24; xor eax, eax; jz +0
        check(
            b"\x48\x83\xec\x18\x31\xc0\x74\0",
            NONE,
            &[Tlb, Tlb, Tlb],
            &[(1, 4, false, 0)],
        );
        // mov rsp, rbp; pop rbp; xor eax, eax; jz +0
        check(
            b"\x48\x89\xec\x5d\x31\xc0\x74\0",
            NONE,
            &[Tlb, Direct, Tlb, Tlb],
            &[(1, 4, false, 0)],
        );
        // leave; ret
        check(b"\xc9\xc3", NONE, &[Direct, Direct], &[(0, 5, false, 0b1)]);
        // sub rsp, 24; mov [rsp], rax; add rsp, 24; pop rbx; ret
        check(
            b"\x48\x83\xec\x18\x48\x89\x04\x24\x48\x83\xc4\x18\x5b\xc3",
            NONE,
            &[Tlb, Direct, Tlb, Direct, Direct],
            &[],
        );
        // push [rax] goes another way, and shows nothing.
        check(
            b"\xff\x30\x31\xc0\x74\0",
            NONE,
            &[Tlb, Tlb, Tlb],
            &[(1, 4, false, 0)],
        );
    }

    #[test]
    fn a_check_moves_before_whatever_sets_the_flags() {
        // cmp rax, rbx; lea rsi, [rsi+8]; mov rcx, [rsi]; jz +0
        check(
            b"\x48\x39\xd8\x48\x8d\x76\x08\x48\x8b\x0e\x74\0",
            NONE,
            &[Tlb, Tlb, Direct, Tlb],
            &[(0, 6, false, 0b100)],
        );
    }

    #[test]
    fn a_loaded_pointer_is_checked_again() {
        // xor eax, eax; mov rsi, [rsi]; mov rsi, [rsi]; xor eax, eax; ret
        check(
            b"\x31\xc0\x48\x8b\x36\x48\x8b\x36\x31\xc0\xc3",
            NONE,
            &[Tlb, Direct, Direct, Tlb, Direct],
            &[(1, 6, false, 0b10), (2, 6, false, 0b100)],
        );
    }

    #[test]
    fn a_32_bit_index_needs_no_check() {
        // and ecx, 7; mov rax, [rsi+rcx*8]; mov rax, [rsi+rdx*8]; xor eax, eax; jz +0
        check(
            b"\x83\xe1\x07\x48\x8b\x04\xce\x48\x8b\x04\xd6\x31\xc0\x74\0",
            NONE,
            &[Tlb, Direct, Direct, Tlb, Tlb],
            &[(1, 6, false, 0b110), (2, 2, true, 0b100)],
        );
    }

    #[test]
    fn accesses_that_were_outside_go_another_way() {
        // mov rax, [rsi]; mov rax, [rsi+rdx*8]; xor eax, eax; jz +0
        let outside = Outside { sum: 2, tlb: 1 };
        check(
            b"\x48\x8b\x06\x48\x8b\x04\xd6\x31\xc0\x74\0",
            outside,
            &[Tlb, Sum, Tlb, Tlb],
            &[],
        );
    }

    #[test]
    fn far_constants_and_thread_segments_are_left_alone() {
        // mov rax, fs:[rbx]; mov eax, [0xffffffff80000000]; mov eax, [0x7fffffff]; xor eax,eax; jz +0
        check(
            b"\x64\x48\x8b\x03\x8b\x04\x25\0\0\0\x80\x8b\x04\x25\xff\xff\xff\x7f\x31\xc0\x74\0",
            NONE,
            &[Tlb, Tlb, Direct, Tlb, Tlb],
            &[],
        );
    }
}
