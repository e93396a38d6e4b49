//! A program around its sites: functions and a loop of statements, in any order and with gaps, so that sites
//! lie across pages, and near to what the program counts in.

use bt::insn::Case;

use super::emit::{EAX, EBP, EBX, ECX, EDX, ESI, Emitter, Label};
use super::sites::{STRIDE, Site, Surroundings, operation, site};
use super::{COUNTED, Counter, DATA, DATA_BYTES, FAR, FRAME, Mode, POINTERS, STACK, TABLES};
use crate::case::CODE;
use crate::layout::PAGE;
use crate::random::Random;

/// Where 32-bit code begins, behind what leads to it.
const BEGIN: u64 = 0x40;
/// Selectors of flat 32-bit code and data, as Linux gives them to processes.
const CODE32: u32 = 0x23;
const DATA32: u32 = 0x2b;

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A site, passed through.
    Inline(usize),
    /// A site, written just before.
    Fresh(usize),
    /// A loop with this site in it.
    Loop(usize),
    Call(usize),
    LoopOfCalls(usize),
    Patch(usize),
    /// A word between functions counts up.
    Near,
    Mix,
}

#[derive(Clone, Copy, Debug)]
struct Statement {
    kind: Kind,
    seed: u64,
}

/// A program, as it follows from a seed.
pub(super) struct Program {
    pub(super) mode: Mode,
    seed: u64,
    around: Surroundings,
    statements: Vec<Statement>,
    counter: Counter,
    turns: u32,
}

/// What is known while a program is written.
struct Parts {
    sites: Vec<Site>,
    words: Vec<Label>,
}

/// The program of this seed.
pub(super) fn program(mode: Mode, seed: u64) -> Program {
    let mut random = Random::new(seed ^ 0x63_6861_6e67_6573);
    let inline = 1 + random.below(4) as usize;
    let functions = inline..inline + random.below(5) as usize;
    let all = functions.end;
    let mut kinds: Vec<Kind> = (0..inline)
        .map(|site| random.pick(&[Kind::Inline(site), Kind::Fresh(site), Kind::Loop(site)]))
        .collect();
    for _ in 0..2 + random.below(8) {
        let site = random.below(all as u64) as usize;
        let function =
            (!functions.is_empty()).then(|| inline + random.below(functions.len() as u64) as usize);
        let kind = match (random.below(12), function) {
            (0..3, Some(function)) => Kind::Call(function),
            (3, Some(function)) => Kind::LoopOfCalls(function),
            (0..8, _) => Kind::Patch(site),
            (8, _) => Kind::Near,
            _ => Kind::Mix,
        };
        let at = random.below(kinds.len() as u64 + 1) as usize;
        kinds.insert(at, kind);
    }
    let statements = kinds.into_iter().map(|kind| Statement {
        kind,
        seed: random.next(),
    });
    let statements = statements.collect();
    let in_register = mode == Mode::Long && random.chance(70);
    Program {
        mode,
        seed,
        statements,
        counter: if in_register {
            Counter::R15
        } else {
            Counter::Memory
        },
        turns: random.pick(&[2, 3, 5, 9, 30, 120]),
        around: Surroundings {
            mode,
            functions,
            undefined: random.chance(20),
        },
    }
}

impl Program {
    pub(super) fn statements(&self) -> usize {
        self.statements.len()
    }

    /// Offset of the first instruction that differs from program to program.
    pub(super) fn begin(&self) -> u64 {
        BEGIN
    }

    /// The program without some of its statements.
    pub(super) fn case(&self, removed: &[usize]) -> Case {
        let mut random = Random::new(self.seed);
        let mut emitter = Emitter::new(self.mode, CODE);
        self.enter(&mut emitter);
        let sites = (0..self.around.functions.end).map(|number| {
            let label = emitter.label();
            let table = TABLES as u32 + (number * super::ALTERNATIVES * STRIDE) as u32;
            site(&mut random, &self.around, label, number, table)
        });
        let sites: Vec<Site> = sites.collect();
        let words = (0..=self.around.functions.len()).map(|_| emitter.label());
        let parts = Parts {
            words: words.collect(),
            sites,
        };
        let main = emitter.label();
        emitter.branch(&[0xe9], main);
        let mut order: Vec<Option<usize>> = self.around.functions.clone().map(Some).collect();
        order.insert(random.below(order.len() as u64 + 1) as usize, None);
        for (part, word) in order.into_iter().zip(&parts.words) {
            gap(
                &mut random,
                &mut emitter,
                part.map(|site| &parts.sites[site]),
            );
            match part {
                Some(number) => {
                    let site = &parts.sites[number];
                    emitter.bind(site.label);
                    emitter.bytes(&site.alternatives[0]);
                    emitter.bytes(&[0xc3]);
                }
                None => {
                    emitter.bind(main);
                    self.main(&mut random, &mut emitter, &parts, removed);
                }
            }
            emitter.bytes(&vec![0xcc; random.below(40) as usize]);
            emitter.bind(*word);
            emitter.bytes(&[0; 4]);
        }
        self.with_memory(&mut random, emitter, &parts)
    }

    /// Loads segments and registers, and goes to the mode.
    fn enter(&self, emitter: &mut Emitter) {
        emitter.number(&[0xbc], STACK as u32);
        emitter.number(&[0xbd], FRAME as u32);
        if self.mode == Mode::Compatible {
            emitter.number(&[0xb8], DATA32);
            // mov ds, eax; mov es, eax; jmp far [FAR]
            emitter.bytes(&[0x8e, 0xd8, 0x8e, 0xc0]);
            emitter.absolute(&[0xff], 5, FAR as u32);
        }
        emitter.code.resize(BEGIN as usize, 0x90);
        for (register, value) in [(EAX, 1), (EDX, 0x1234_5678), (EBX, 0x8000_0000)] {
            emitter.number(&[0xb8 | register], value);
        }
    }

    fn main(&self, random: &mut Random, emitter: &mut Emitter, parts: &Parts, removed: &[usize]) {
        match self.counter {
            Counter::Memory => {
                emitter.memory(&[0xc7], 0, EBP, COUNTED);
                emitter.bytes(&self.turns.to_le_bytes());
            }
            Counter::R15 => emitter.number(&[0x41, 0xbf], self.turns),
        }
        let top = emitter.here();
        for (number, statement) in self.statements.iter().enumerate() {
            if !removed.contains(&number) {
                self.statement(emitter, parts, *statement);
            }
        }
        match self.counter {
            Counter::Memory => emitter.memory(&[0xff], 1, EBP, COUNTED),
            Counter::R15 => emitter.bytes(&[0x41, 0xff, 0xcf]),
        }
        emitter.branch(&[0x0f, 0x85], top);
        // cmp eax, edx; hlt
        emitter.bytes(&[0x39, 0xd0, 0xf4]);
        // What nobody passes through lies somewhere all the same.
        for site in parts.sites.iter().filter(|site| !site.function) {
            if !emitter.is_bound(site.label) {
                gap(random, emitter, Some(site));
                emitter.bind(site.label);
                emitter.bytes(&site.alternatives[0]);
                emitter.bytes(&[0xf4]);
            }
        }
    }

    fn statement(&self, emitter: &mut Emitter, parts: &Parts, statement: Statement) {
        let random = &mut Random::new(statement.seed);
        let skip = random.chance(25).then(|| emitter.label());
        if let Some(skip) = skip {
            self.counter.load(emitter, ECX);
            // test cl, bits; jz or jnz
            emitter.bytes(&[0xf6, 0xc1, random.pick(&[1, 2, 4, 6])]);
            emitter.branch(&[0x0f, random.pick(&[0x84, 0x85])], skip);
        }
        let patch = |random: &mut Random, emitter: &mut Emitter, site: usize, in_loop| {
            emitter.patch(random, &parts.sites[site], self.counter, in_loop);
        };
        match statement.kind {
            Kind::Patch(site) => patch(random, emitter, site, false),
            Kind::Inline(site) => inline(random, emitter, &parts.sites[site]),
            Kind::Fresh(site) => {
                let over = random.chance(30).then(|| emitter.label());
                if let Some(over) = over {
                    // The store is on another page, maybe.
                    emitter.branch(&[0xe9], over);
                    gap(random, emitter, None);
                    emitter.bind(over);
                }
                patch(random, emitter, site, false);
                for _ in 0..random.pick(&[0, 0, 1, 3]) {
                    let next = operation(random, &self.around, None);
                    emitter.bytes(&next);
                }
                emitter.bind(parts.sites[site].label);
                emitter.bytes(&parts.sites[site].alternatives[0]);
            }
            Kind::Loop(_) | Kind::LoopOfCalls(_) => {
                emitter.number(&[0xb9], random.pick(&[1, 2, 3, 6, 40]));
                let top = emitter.here();
                let other = random.below(parts.sites.len() as u64) as usize;
                let early = random.chance(30);
                if early {
                    patch(random, emitter, other, true);
                }
                match statement.kind {
                    Kind::Loop(site) => inline(random, emitter, &parts.sites[site]),
                    Kind::LoopOfCalls(function) => {
                        self.call(random, emitter, parts, function);
                    }
                    _ => {}
                }
                if !early && random.chance(30) {
                    patch(random, emitter, other, true);
                }
                // dec ecx; jnz
                emitter.bytes(&[0xff, 0xc9]);
                emitter.branch(&[0x0f, 0x85], top);
            }
            Kind::Call(function) => self.call(random, emitter, parts, function),
            Kind::Near => {
                let word = random.pick(&parts.words);
                emitter.address(&[0xbe], word);
                emitter.bytes(&[0xff, 0x06]);
            }
            Kind::Mix => {
                for _ in 0..1 + random.below(6) {
                    let next = operation(random, &self.around, None);
                    emitter.bytes(&next);
                }
            }
        }
        if let Some(skip) = skip {
            emitter.bind(skip);
        }
    }

    fn call(&self, random: &mut Random, emitter: &mut Emitter, parts: &Parts, function: usize) {
        let number = function - self.around.functions.start;
        let pointer = (POINTERS + 8 * number as u64) as u32;
        match random.below(4) {
            0 | 1 => emitter.branch(&[0xe8], parts.sites[function].label),
            2 => {
                emitter.address(&[0xb8 | ESI], parts.sites[function].label);
                emitter.bytes(&[0xff, 0xd0 | ESI]);
            }
            _ => emitter.absolute(&[0xff], 2, pointer),
        }
    }

    fn with_memory(&self, random: &mut Random, emitter: Emitter, parts: &Parts) -> Case {
        let mut data = vec![0; DATA_BYTES as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = (at - DATA) as usize;
            data[at..at + bytes.len()].copy_from_slice(bytes);
        };
        for word in 0..16 {
            put(FRAME + 4 * word, &(random.value() as u32).to_le_bytes());
        }
        for site in &parts.sites {
            for (number, bytes) in site.alternatives.iter().enumerate() {
                put(u64::from(site.table) + (number * STRIDE) as u64, bytes);
            }
        }
        for (number, site) in parts.sites[self.around.functions.clone()]
            .iter()
            .enumerate()
        {
            let pointer = emitter.place(site.label);
            put(POINTERS + 8 * number as u64, &pointer.to_le_bytes());
        }
        put(FAR, &((CODE + BEGIN) as u32).to_le_bytes());
        put(FAR + 4, &CODE32.to_le_bytes());
        Case {
            code: emitter.finish(),
            load: CODE,
            map: vec![(DATA, DATA_BYTES)],
            mem: vec![(DATA, data)],
        }
    }
}

/// A site, often across pages.
fn inline(random: &mut Random, emitter: &mut Emitter, site: &Site) {
    if random.chance(20) {
        let over = emitter.label();
        emitter.branch(&[0xe9], over);
        gap(random, emitter, Some(site));
        emitter.bind(over);
    }
    emitter.bind(site.label);
    emitter.bytes(&site.alternatives[0]);
}

/// Nothing, some bytes, or so many that the site that follows lies across two pages.
fn gap(random: &mut Random, emitter: &mut Emitter, site: Option<&Site>) {
    const MOST: usize = 5 * PAGE as usize;
    let page = PAGE as usize;
    let at = emitter.code.len();
    let bytes = match (random.below(4), site) {
        (0, Some(site)) => {
            let behind = 1 + random.below(site.bytes as u64 - 1) as usize;
            (2 * page - at % page - behind) % page
        }
        (1, _) => random.below(1000) as usize,
        (2, _) => random.below(20) as usize,
        _ => 0,
    };
    if at + bytes < MOST {
        emitter.bytes(&vec![0xcc; bytes]);
    }
}
