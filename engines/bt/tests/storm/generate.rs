//! Random lives of page tables, in which everything is invalidated that has to be, and no more: what
//! each access finds is certain (SDM 3A 4.10.4), and nothing else is ever dropped for the asking.
//!
//! The plan knows of each process-context identifier whose tables its translations come from. An entry
//! that was not present needs no invalidation; all others get one of those that suffice, at once for the
//! space that runs, and for the others at the load of CR3 that enters them.

use crate::functions::{page, target};
use crate::layout::*;
use crate::model::{Model, Registers};
use crate::random::Random;
use crate::step::Step;
use crate::tables::Space;

/// What translations there may be with a process-context identifier.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    /// Those of the space, as its tables are.
    Space(usize),
    /// Some that are no longer true.
    Old,
}

/// What one vCPU does, and what is to come of it.
#[derive(Default)]
pub(crate) struct Life {
    /// How it starts.
    pub(crate) registers: Registers,
    pub(crate) steps: Vec<Step>,
    /// The sum before each step.
    pub(crate) sums: Vec<u64>,
}

/// A guest, with memory as it is at first.
pub(crate) struct Plan {
    pub(crate) memory: Vec<u8>,
    pub(crate) lives: Vec<Life>,
}

/// A vCPU. Its tables are its own, frames are everybody's.
#[derive(Default)]
pub(crate) struct Cpu {
    life: Life,
    /// Between its turns.
    registers: Registers,
    pub(crate) spaces: Vec<Space>,
    pub(crate) global: u64,
    current: usize,
    held: Vec<(u64, Held)>,
    /// Code that was called lately: most calls are of that again.
    lately: [u64; 6],
}

pub(crate) struct Generator {
    pub(crate) random: Random,
    pub(crate) model: Model,
    cpus: Vec<Cpu>,
    /// Whose turn it is.
    me: usize,
    pub(crate) next_table: u64,
}

/// A guest of so many vCPUs and, together, about so many steps.
pub(crate) fn plan(seed: u64, cpus: usize, steps: usize) -> Plan {
    let mut generator = Generator {
        random: Random::new(seed),
        model: Model::new(),
        cpus: Vec::new(),
        me: 0,
        next_table: TABLES,
    };
    for number in 0..FRAMES {
        let bytes = page(&mut generator.random);
        generator.model.put(frame(number), &bytes);
    }
    for _ in 0..cpus {
        generator.begin(cpus);
    }
    let memory = generator.model.memory.clone();
    let mut ticket = 0;
    while generator
        .cpus
        .iter()
        .map(|cpu| cpu.life.steps.len())
        .sum::<usize>()
        < steps
    {
        generator.me = generator.random.below(cpus as u64) as usize;
        generator.model.registers = generator.cpu().registers;
        generator.then(Step::Wait(ticket));
        for _ in 0..if cpus == 1 { 50 } else { 3 } {
            generator.turn();
        }
        ticket += 1;
        generator.then(Step::Pass(ticket));
        generator.cpu().registers = generator.model.registers;
    }
    for me in 0..cpus {
        generator.me = me;
        generator.model.registers = generator.cpu().registers;
        generator.then(Step::End);
    }
    Plan {
        memory,
        lives: generator.cpus.into_iter().map(|cpu| cpu.life).collect(),
    }
}

impl Generator {
    pub(crate) fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpus[self.me]
    }

    /// Adds a vCPU.
    fn begin(&mut self, cpus: usize) {
        self.me = self.cpus.len();
        self.cpus.push(Cpu::default());
        let pcids = self.random.chance(70);
        let global_kernel = self.random.chance(50);
        self.tables(pcids, global_kernel, cpus);
        let root = &self.cpu().spaces[0];
        let registers = Registers {
            cr0: CR0 | CR0_WP,
            cr3: root.root | root.pcid,
            cr4: CR4 | CR4_PGE | if pcids { CR4_PCIDE } else { 0 },
            sum: 0,
        };
        self.hold(Held::Space(0));
        let lately = std::array::from_fn(|_| target(&mut self.random, &ENTRIES));
        let cpu = self.cpu();
        cpu.lately = lately;
        cpu.registers = registers;
        cpu.life.registers = registers;
    }

    fn then(&mut self, step: Step) {
        let sum = self.model.registers.sum;
        self.model.step(step);
        let life = &mut self.cpu().life;
        life.sums.push(sum);
        life.steps.push(step);
    }

    fn pcid(&mut self) -> u64 {
        let cpu = self.cpu();
        cpu.spaces[cpu.current].pcid
    }

    fn held(&mut self, pcid: u64) -> Held {
        let found = self.cpu().held.iter().find(|held| held.0 == pcid);
        found.map_or(Held::Nothing, |held| held.1)
    }

    fn set_held(&mut self, pcid: u64, held: Held) {
        let all = &mut self.cpu().held;
        all.retain(|other| other.0 != pcid);
        all.push((pcid, held));
    }

    /// What the identifier of the space that runs holds from now on.
    fn hold(&mut self, held: Held) {
        let pcid = self.pcid();
        self.set_held(pcid, held);
    }

    /// Changes an entry of a table that `space` uses. True if that has to be invalidated.
    fn change(&mut self, space: usize, at: u64, value: u64) -> bool {
        let before = self.model.word(at);
        self.then(Step::Store { at, value });
        if before & PRESENT == 0 || before & !USED == value & !USED {
            return false;
        }
        let pcid = self.cpu().spaces[space].pcid;
        let current = self.cpu().current;
        if self.held(pcid) == Held::Space(space) && space != current {
            self.set_held(pcid, Held::Old);
        }
        space == current
    }

    /// Loads CR3. Keeps translations only if they are true.
    fn enter(&mut self, space: usize) {
        let Space { root, pcid, .. } = self.cpu().spaces[space];
        let held = self.held(pcid);
        let valid = held == Held::Nothing || held == Held::Space(space);
        let keep = self.model.registers.cr4 & CR4_PCIDE != 0 && valid && self.random.chance(75);
        self.cpu().current = space;
        self.then(Step::Cr3(root | pcid));
        if keep {
            let step = Step::Cr3(root | pcid | CR3_KEEP);
            *self.cpu().life.steps.last_mut().expect("the load") = step;
        }
        self.hold(Held::Space(space));
    }

    /// Drops everything, global translations too.
    fn toggle_global(&mut self) {
        let cr4 = self.model.registers.cr4;
        self.then(Step::Cr4(cr4 & !CR4_PGE));
        self.then(Step::Cr4(cr4));
        self.nothing_else();
    }

    fn invpcid(&mut self, kind: u64, at: u64) {
        let pcid = self.pcid();
        self.then(Step::Invpcid { kind, pcid, at });
        if kind >= 2 {
            self.nothing_else();
        }
        let current = self.cpu().current;
        self.hold(Held::Space(current));
    }

    /// All is dropped, of other identifiers too.
    fn nothing_else(&mut self) {
        let current = self.cpu().current;
        self.cpu().held.clear();
        self.hold(Held::Space(current));
    }

    /// Invalidates what was changed in the space that runs: these addresses, or more.
    fn invalidate(&mut self, addresses: &[u64], global: bool, structure: bool) {
        let mut ways = vec![0, 1];
        if !global {
            ways.extend([2, 3, 4]);
        }
        if !structure {
            ways.extend([5, 5, 5, 5]);
            if !global {
                ways.push(6);
            }
        }
        match self.random.pick(&ways) {
            0 => self.toggle_global(),
            1 => self.invpcid(2, 0),
            2 => {
                // Without the bit that keeps.
                let current = self.cpu().current;
                self.hold(Held::Old);
                self.enter(current);
            }
            3 => self.invpcid(1, 0),
            4 => self.invpcid(3, 0),
            5 => {
                for &at in addresses {
                    let within = self.random.below(PAGE);
                    self.then(Step::Invlpg(at + within));
                }
            }
            _ => {
                for &at in addresses {
                    self.invpcid(0, at);
                }
            }
        }
    }

    fn table_of(&mut self, space: usize, region: Region) -> u64 {
        let cpu = self.cpu();
        let space = &cpu.spaces[space];
        match region {
            Region::Private => space.private,
            Region::Large => space.large,
            Region::Global => cpu.global,
            Region::Upper => space.upper,
        }
    }

    fn any_space(&mut self) -> usize {
        let count = self.cpu().spaces.len() as u64;
        self.random.below(count) as usize
    }

    /// Gives pages of a region other frames or rights.
    fn remap(&mut self) {
        let region = self.random.pick(&Region::ALL);
        let elsewhere = region != Region::Global && self.random.chance(30);
        let space = if elsewhere {
            self.any_space()
        } else {
            self.cpu().current
        };
        let table = self.table_of(space, region);
        let mut stale = Vec::new();
        for _ in 0..=self.random.below(3) {
            let page = self.random.below(REGION_PAGES);
            let entry = self.entry(region);
            if self.change(space, table + page * 8, entry) {
                stale.extend(region.bases().iter().map(|base| base + page * PAGE));
            }
        }
        if !stale.is_empty() {
            self.invalidate(&stale, region == Region::Global, false);
        }
    }

    /// Maps the large region by a table, or by a page of 2 MiB.
    fn resize(&mut self) {
        let space = if self.random.chance(30) {
            self.any_space()
        } else {
            self.cpu().current
        };
        let Space {
            large_entry, large, ..
        } = self.cpu().spaces[space];
        let mut entry = match self.random.below(3) {
            0 => large,
            _ => self.random.pick(&GROUPS) | LARGE,
        };
        entry |= PRESENT | WRITABLE;
        if self.random.chance(95) {
            entry |= USER;
        }
        if self.random.chance(50) {
            entry |= if entry & LARGE != 0 {
                USED
            } else {
                USED & !(1 << 6)
            };
        }
        if self.change(space, large_entry, entry) {
            self.invalidate(&[], false, true);
        }
    }

    /// An address of data, or of an immediate operand of code.
    fn place(&mut self) -> u64 {
        self.random.pick(&[
            DATA,
            DATA + 4,
            ENTRIES[0] + 1,
            ENTRIES[1] + 1,
            ENTRIES[9] + 1,
        ])
    }

    fn mapped(&mut self) -> u64 {
        let region = self.random.pick(&Region::ALL);
        let page = self.random.below(REGION_PAGES);
        self.random.pick(region.bases()) + page * PAGE
    }

    fn write(&mut self) {
        let place = self.place();
        let value = self.random.next() as u32;
        match self.random.below(5) {
            4 => {
                let from = frame(self.random.below(FRAMES));
                let to = frame(self.random.below(FRAMES));
                self.then(Step::Device { from, to });
            }
            0 => {
                let at = frame(self.random.below(FRAMES)) + place;
                self.then(Step::Patch { at, value });
            }
            1 => {
                let at = self.mapped() + place;
                self.then(Step::Write { at, value });
            }
            2 => {
                let at = self.mapped() + place;
                self.then(Step::WriteUser { at, value });
            }
            _ => {
                let from = frame(self.random.below(FRAMES));
                let to = if self.random.chance(50) {
                    frame(self.random.below(FRAMES))
                } else {
                    self.mapped()
                };
                let bytes = PAGE;
                self.then(Step::Copy { from, to, bytes });
            }
        }
    }

    fn call(&mut self) {
        let slot = self.random.below(6) as usize;
        if self.random.chance(25) {
            self.cpu().lately[slot] = target(&mut self.random, &ENTRIES);
        }
        let at = self.cpu().lately[slot];
        let step = match self.random.below(4) {
            0 | 1 => Step::Call(at),
            2 => Step::CallUser(at),
            _ => Step::CallSysret(at),
        };
        for _ in 0..=self.random.below(3) {
            self.then(step);
        }
    }

    fn turn(&mut self) {
        let closed = self.model.registers.cr4 & (CR4_SMEP | CR4_SMAP);
        // Soon open again, or nothing of ring 3's could be called.
        if closed != 0 && self.random.chance(25) {
            let cr4 = self.model.registers.cr4 & !closed;
            self.then(Step::Cr4(cr4));
        }
        match self.random.below(100) {
            0..50 => self.call(),
            50..57 => {
                let at = self.mapped() + DATA;
                let step = if self.random.chance(50) {
                    Step::Load(at)
                } else {
                    Step::LoadUser(at)
                };
                self.then(step);
            }
            57..69 => self.write(),
            69..80 => self.remap(),
            80..84 => self.resize(),
            84..96 => {
                let space = self.any_space();
                self.enter(space);
            }
            96 => {
                let cr0 = self.model.registers.cr0 ^ CR0_WP;
                self.then(Step::Cr0(cr0));
            }
            97 | 98 => {
                let bit = self.random.pick(&[CR4_SMEP, CR4_SMAP]);
                let cr4 = self.model.registers.cr4 | bit;
                self.then(Step::Cr4(cr4));
            }
            _ => self.toggle_global(),
        }
    }
}
