//! Which accesses of a block go through the window, and what has to be compared for that.
//!
//! An access may use the window ([`crate::window`]) if its base and index registers are known to be
//! small enough ([`facts`]). What isn't known is compared: best of all once, at the block's head, and
//! else in line.
//!
//! # At the head
//!
//! A register that an access relies on, and that is still what it was at the head but for a constant,
//! is compared there. So is the bound that the guest itself has held it against, if that is one
//! (`cmp index, length; jae`, as compilers check). What the head compares is what its block
//! [needs](Checks::needs). The comparisons stand before the block's second entry: a branch that knows
//! as much of its registers ([`Checks::taken`], [`Checks::end`]) is linked to that one, past them. So
//! a loop compares what it doesn't change when it is entered, and what it counts not at all: an access
//! that has succeeded shows that its registers are in reach for some way yet.
//!
//! A branch back to the head that can't tell what a comparison there would say has it made in line
//! instead, so that others don't have to be repeated for it.
//!
//! # In line
//!
//! A comparison ruins the flags, so it is made where nobody reads them: at the access, or as far before
//! it as the register can be followed back. At the head they are put away for it if somebody reads
//! them, but only for a loop.
//!
//! # When it fails
//!
//! Nothing is concluded: the run loop executes some instructions one by one, through the software TLB.
//! Accesses that keep failing lose first the comparison at the head ([`Outside`]), then that of
//! registers, then the window.
//!
//! # The stack
//!
//! RSP needs no comparison most of the time: blocks meet with RSP inside the window, or
//! [`SLACK`] from it. The run loop sees to it at first ([`Mode::stack`]);
//! pushes, pops and operands based on RSP show that it holds by not faulting; and a block that ends with
//! RSP moved otherwise compares it.
//!
//! Invariant: every register of a [`Route::Direct`] operand is in reach of the reservation, by a
//! comparison earlier in the same block, by what the block needs and whoever enters it behind its
//! comparisons has shown, or by what follows from either.

mod facts;
mod levels;
mod needs;
#[cfg(test)]
mod tests;

use crate::{
    cpu::Bits,
    decode::{Class, Insn, Mode},
    window::SLACK,
};
pub(crate) use facts::step;
use facts::{RSP, State};
pub(crate) use levels::Levels;
use levels::{Level, Origin};
pub(crate) use needs::constant;
use needs::needs;

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

/// A register to be compared before an instruction, or at the head.
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
    /// Their registers may not be what they look like at the head.
    pub head: u64,
    /// Their registers are no base and small index; their sum may be inside still.
    pub sum: u64,
    /// Not even that.
    pub tlb: u64,
}

impl Outside {
    /// Notes that accesses failed once more.
    pub(crate) fn fail(&mut self, missed: Outside) {
        self.tlb |= missed.tlb | self.sum & missed.sum;
        self.sum |= missed.sum;
        self.head |= missed.head;
    }
}

/// What the instructions of a block do.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    /// Nothing of what is listed for each instruction is there in code without the window.
    routes: Vec<Route>,
    /// Comparisons at the head.
    pub head: Vec<Check>,
    /// What they show.
    pub needs: Levels,
    /// Comparisons before each instruction.
    before: Vec<Vec<Check>>,
    /// What is known where the branch of each instruction leads, for conditional ones.
    taken: Vec<Levels>,
    /// What is known at the end.
    pub end: Levels,
    /// Some branch leads back to the head.
    pub repeats: bool,
    /// The block ends with RSP anywhere: only the run loop may say where to go on.
    pub lost: bool,
}

impl Checks {
    /// How the instruction at `at` reaches memory.
    pub(crate) fn route(&self, at: usize) -> Route {
        self.routes.get(at).copied().unwrap_or(Route::Tlb)
    }

    /// What is compared before it.
    pub(crate) fn take_before(&mut self, at: usize) -> Vec<Check> {
        self.before
            .get_mut(at)
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// What is known where its branch leads.
    pub(crate) fn taken(&self, at: usize) -> Levels {
        self.taken.get(at).copied().unwrap_or_default()
    }
}

/// A block being decided for.
struct Planner<'a> {
    insns: &'a [Insn],
    mode: Mode,
    outside: Outside,
    /// Registers that are not compared at the head.
    barred: u16,
    /// Instructions whose accesses are worth a comparison at the head.
    horizon: usize,
    /// What is assumed at the head, and who relies on it.
    assumed: Levels,
    users: [u64; 16],
    state: State,
    checks: Checks,
}

/// Decides for a block.
pub(crate) fn plan(insns: &[Insn], mode: Mode, outside: Outside) -> Checks {
    if !mode.window || mode.single {
        return Checks::default();
    }
    let empty = || Checks {
        routes: vec![Route::Tlb; insns.len()],
        before: vec![Vec::new(); insns.len()],
        taken: vec![Levels::default(); insns.len()],
        ..Checks::default()
    };
    // Where flags live at the head they have to be put away, which only a loop is worth.
    let repeats = || insns.iter().any(|insn| leads_back(insn, insns));
    let comparable = mode.bits == Bits::Bits64
        && insns
            .first()
            .is_some_and(|first| first.live_in == 0 || repeats());
    let mut planner = Planner {
        insns,
        mode,
        outside,
        barred: if comparable { 0 } else { u16::MAX },
        horizon: horizon(insns),
        assumed: Levels::default(),
        users: [0; 16],
        state: State::new(mode),
        checks: empty(),
    };
    // Every round but the last bars a register or assumes more of one.
    loop {
        let before = planner.assumed;
        planner.checks = empty();
        planner.state = State::new(mode);
        planner.pass();
        if planner.assumed == before && !planner.close() {
            return planner.finish();
        }
    }
}

impl Planner<'_> {
    fn pass(&mut self) {
        let Planner { insns, mode, .. } = *self;
        let wide = mode.bits == Bits::Bits64;
        for (at, insn) in insns.iter().enumerate() {
            if let Some(needs) = needs(insn, mode)
                && self.outside.tlb >> at & 1 == 0
            {
                if self.outside.sum >> at & 1 == 1 && insn.class == Class::Memory {
                    self.checks.routes[at] = Route::Sum;
                } else {
                    self.checks.routes[at] = Route::Direct;
                    for (register, level) in needs.into_iter().flatten() {
                        self.require(at, register, level);
                    }
                }
            }
            let leaves = insn.class == Class::Branch || at + 1 == insns.len();
            let route = self.checks.routes[at];
            let assumed = self.assumed;
            if wide && mode.stack && leaves && !insn.class.asks_runtime() {
                let mut after = self.state.clone();
                after.follow(insn, mode, route, assumed);
                if !after.stack_holds() {
                    self.compare(at, RSP as u8, false);
                }
            }
            self.state.follow(insn, mode, route, assumed);
            if leaves && wide && mode.stack {
                self.checks.lost |= !insn.class.asks_runtime() && !self.state.stack_holds();
            }
            if wide && insn.class == Class::Branch {
                self.branch(at);
            }
        }
        if wide && insns.last().is_some_and(|last| leads_back(last, insns)) {
            self.settle(&self.state.clone());
        }
        if wide {
            self.checks.end = self.state.levels(self.assumed);
        }
    }

    /// What is known on either side of the branch at `at`.
    fn branch(&mut self, at: usize) {
        let insn = &self.insns[at];
        let mut taken = self.state.clone();
        if let Some(compare) = at.checked_sub(1).map(|before| &self.insns[before]) {
            taken.branched(compare, insn, true, self.assumed);
            self.state.branched(compare, insn, false, self.assumed);
        }
        self.checks.taken[at] = taken.levels(self.assumed);
        if leads_back(insn, self.insns) {
            self.checks.repeats = true;
            self.settle(&taken);
        }
    }

    /// Bounds whose comparison at the head spares one that a branch back there would ask for each
    /// time.
    fn settle(&mut self, at_branch: &State) {
        for register in 0..16u8 {
            let value = &at_branch.known[usize::from(register)];
            let assumed = self.assumed.get(register);
            if !value.level(self.assumed).covers(assumed)
                && let Some(bound) = value.bound
            {
                let users = self.users[usize::from(register)];
                self.assume(bound, Level::Low, users);
            }
        }
    }

    /// Bars registers of which a branch back to the head can't tell what the head assumes. Returns
    /// true if there are any.
    fn close(&mut self) -> bool {
        let last = self.insns.len().wrapping_sub(1);
        let mut barred = 0;
        for (at, insn) in self.insns.iter().enumerate() {
            if !leads_back(insn, self.insns) {
                continue;
            }
            self.checks.repeats = true;
            let known = if insn.class == Class::Branch {
                self.checks.taken[at]
            } else {
                debug_assert_eq!(at, last);
                self.checks.end
            };
            for register in 0..16u8 {
                if !known.get(register).covers(self.assumed.get(register)) {
                    barred |= 1 << register;
                }
            }
        }
        if barred != 0 {
            self.barred |= barred;
            self.assumed = Levels::default();
            self.users = [0; 16];
        }
        barred != 0
    }

    fn finish(mut self) -> Checks {
        self.checks.needs = self.assumed;
        for register in 0..16u8 {
            let level = self.assumed.get(register);
            let users = self.users[usize::from(register)];
            if level != Level::Any {
                self.checks.head.push(Check {
                    register,
                    index: level.index(),
                    steps: users.trailing_zeros().min(63) as u16 + 1,
                    users,
                });
            }
        }
        self.checks
    }

    /// Makes sure that `register` is at `level` before the instruction at `at`.
    fn require(&mut self, at: usize, register: u8, level: Level) {
        let value = self.state.known[usize::from(register)];
        let user = users(at, register);
        let index = level.index();
        if value.reaches(index, self.assumed) {
            self.blame(value, user);
            return;
        }
        if at < self.horizon && self.outside.head >> at & 1 == 0 {
            for (origin, level) in [(value.origin, level), (value.bound, Level::Low)] {
                let Some(origin) = origin else {
                    continue;
                };
                let before = (self.assumed, self.users);
                if self.assume(origin, level, user) && value.reaches(index, self.assumed) {
                    return;
                }
                (self.assumed, self.users) = before;
            }
        }
        self.compare(at, register, index);
    }

    /// Assumes that a register is at `level` at the head. Returns false if that isn't to be.
    fn assume(&mut self, origin: Origin, level: Level, users: u64) -> bool {
        let register = origin.register;
        if self.barred >> register & 1 == 1 {
            return false;
        }
        self.assumed.raise(register, level);
        self.users[usize::from(register)] |= users;
        true
    }

    /// Who relies on `value` is to blame if what it is known from fails.
    fn blame(&mut self, value: facts::Value, user: u64) {
        if let Some((place, number)) = value.check {
            self.checks.before[place][number].users |= user;
        }
        for origin in [value.origin, value.bound].into_iter().flatten() {
            if self.assumed.get(origin.register) != Level::Any {
                self.users[usize::from(origin.register)] |= user;
            }
        }
    }

    /// Has `register` compared at `at` or before, where flags are dead and it is the same but for a
    /// constant.
    fn compare(&mut self, at: usize, register: u8, index: bool) {
        let insns = self.insns;
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
        let number = self.checks.before[place].len();
        self.checks.before[place].push(Check {
            register,
            index,
            steps: (at - place + 1) as u16,
            users: users(at, register),
        });
        self.state.compared(register, index, moved, (place, number));
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

/// True if `insn` is a branch to the first of `insns`.
fn leads_back(insn: &Insn, insns: &[Insn]) -> bool {
    matches!(insn.class, Class::Branch | Class::Jump)
        && insn.instr.near_branch_target() == insns[0].instr.ip()
}

/// How many instructions are likely to be executed once the block is entered: all of a loop, and what
/// comes before a few branches elsewhere.
fn horizon(insns: &[Insn]) -> usize {
    const BRANCHES: usize = 3;
    if let Some(last) = insns.iter().rposition(|insn| leads_back(insn, insns)) {
        return last + 1;
    }
    insns
        .iter()
        .enumerate()
        .filter(|(_, insn)| insn.class == Class::Branch)
        .nth(BRANCHES)
        .map_or(insns.len(), |(at, _)| at)
}
