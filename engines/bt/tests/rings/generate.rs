//! Random cases of 32-bit tables: descriptors, gates, tasks and frames at random, and one or two
//! instructions that depend on them.

use crate::case::Case;
use crate::layout::*;
use crate::random::Random;
use crate::sandbox::*;

pub(crate) struct Maker {
    pub(crate) random: Random,
    pub(crate) case: Case,
    /// The code so far.
    pub(crate) code: Vec<u8>,
    /// 16, 32 or 64.
    pub(crate) bits: u32,
    pub(crate) ring: u8,
    pub(crate) virtual_8086: bool,
    /// Where the stack is, linear.
    pub(crate) stack: u32,
    /// The stack pointer is at an edge of something.
    pub(crate) edge: bool,
}

pub(crate) const EAX: u8 = 0;

impl Maker {
    pub(crate) fn long(&self) -> bool {
        self.case.get(header::LONG) != 0
    }

    pub(crate) fn ring_or_any(&mut self) -> u8 {
        if self.random.chance(50) {
            self.ring
        } else {
            self.random.below(4) as u8
        }
    }

    /// A selector: of good descriptors, made-up ones, system ones, null, or outside of tables.
    pub(crate) fn selector(&mut self) -> u16 {
        let ring = self.ring_or_any();
        let rpl = if self.random.chance(70) {
            ring
        } else {
            self.random.below(4) as u8
        };
        let index = match self.random.below(20) {
            0 => return self.random.below(4) as u16,
            1 => 0x400 + 8 * self.random.below(4) as u16,
            2 => 0xfff8,
            3..=5 => 8 * self.random.below(0x18) as u16,
            6 => self.random.pick(&[
                select::TSS,
                select::TSS_16,
                select::LDT,
                select::TSS_B,
                select::TSS_C,
            ]),
            7 => 4 | (8 * self.random.below(8) as u16),
            8 => 4 | (8 * self.random.below(18) as u16),
            9 | 10 => 8 + 16 * u16::from(ring) + 8 * self.random.below(2) as u16,
            _ => FREE as u16 + 8 * self.random.below(12) as u16,
        };
        index | u16::from(rpl)
    }

    /// A selector that is good for code of some ring.
    pub(crate) fn code_selector(&mut self) -> u16 {
        match self.random.below(10) {
            0..=3 => select::CODE[self.random.below(4) as usize],
            4 => self.random.pick(&[select::CODE_16, select::USER_CODE_16]),
            5 => self.random.pick(&[0x68, 0x69, 0x6b, 0x70, 0x73, 0x7b]),
            6 => 4 | (16 * self.random.below(4) as u16) | self.random.below(4) as u16,
            _ => self.selector(),
        }
    }

    /// Where to go to.
    pub(crate) fn target(&mut self) -> u32 {
        let pad = at::PADS + 16 * self.random.below(16) as u32;
        match self.random.below(10) {
            0 => pad | 0x10_0000,
            1 => self
                .random
                .pick(&[0, 0xffff, 0x1_0000, 0xfff, 0x1000, 0xffff_ffff]),
            2 | 3 => pad,
            _ => SANDBOX + pad,
        }
    }

    pub(crate) fn limit(&mut self) -> (u32, u8) {
        match self.random.below(8) {
            0..=2 => (0xf_ffff, 8),
            3 | 4 => (0xffff, 0),
            5 => (self.random.pick(&[0, 1, 0x10, 0x67, 0x2b, 0x2c, 0x66]), 0),
            6 => (self.random.pick(&[0, 6, 7, 0xf, 0x16, 0x17, 0x18]), 8),
            _ => (at::PADS + self.random.below(0x200) as u32, 0),
        }
    }

    pub(crate) fn segment(&mut self) -> u64 {
        let base = match self.random.below(8) {
            0..=3 => 0,
            4..=6 => SANDBOX,
            _ => SANDBOX + at::STACKS + self.random.below(16) as u32,
        };
        let (limit, large) = self.limit();
        let ring = self.ring_or_any();
        let present = if self.random.chance(92) { 0x80 } else { 0 };
        let kind = match self.random.below(10) {
            // Of IA-32e mode's 16 bytes only where both halves are made.
            0 if !self.long() => self.random.below(16) as u8,
            0..=4 => self.random.pick(&[2, 3, 2, 3, 0, 1, 6, 7, 4]) | 0x10,
            _ => self.random.pick(&[0xa, 0xb, 0xa, 0xe, 0xf, 8, 0xc]) | 0x10,
        };
        let size = match self.random.below(if self.long() { 4 } else { 8 }) {
            0 => 0,
            1 => 2,
            2 if self.long() => 2,
            3 if self.random.chance(10) => 6,
            _ => 4,
        };
        descriptor(base, limit, kind | present | ring << 5, large | size)
    }

    pub(crate) fn system_segment(&mut self) -> u64 {
        let at = self
            .random
            .pick(&[at::TSS, at::TSS_B, at::TSS_C, at::TSS_16, at::LDT]);
        let (limit, large) = if self.random.chance(60) {
            (0xff, 0)
        } else {
            self.limit()
        };
        let ring = self.ring_or_any();
        let present = if self.random.chance(92) { 0x80 } else { 0 };
        let kind = self.random.pick(&[1, 3, 9, 0xb, 2, 9, 9, 1, 0]);
        descriptor(SANDBOX + at, limit, kind | present | ring << 5, large)
    }

    pub(crate) fn a_gate(&mut self, interrupts: bool) -> u64 {
        let ring = if self.random.chance(60) {
            3
        } else {
            self.ring_or_any()
        };
        let present = if self.random.chance(94) { 0x80 } else { 0 };
        let kind = match (self.random.below(12), interrupts) {
            (0, _) => self.random.below(32) as u8,
            (1 | 2, _) => 5,
            (3, true) => 6,
            (4, true) => 7,
            (5..=7, true) => 0xf,
            (_, true) => 0xe,
            (3..=5, false) => 4,
            (_, false) => 0xc,
        };
        let selector = match kind {
            5 => {
                let any = self.selector();
                self.random.pick(&[
                    select::TSS_B,
                    select::TSS_C,
                    select::TSS_16,
                    select::TSS_B,
                    any,
                ])
            }
            _ => self.code_selector(),
        };
        let target = self.target();
        let parameters = match self.random.below(3) {
            0 => self.random.below(32) as u8,
            1 => self.random.below(5) as u8,
            _ => 0,
        };
        gate(selector, target, kind | present | ring << 5, parameters)
    }

    fn tables(&mut self) {
        for number in 0..12 {
            let value = match self.random.below(12) {
                0 => self.system_segment(),
                1..=3 => self.a_gate(false),
                4 if self.random.chance(20) => self.random.next(),
                _ => self.segment(),
            };
            self.case.qword(at::GDT + FREE + 8 * number, value);
        }
        for number in 8..16 {
            let value = match self.random.below(4) {
                0 => self.a_gate(false),
                1 => self.system_segment(),
                _ => self.segment(),
            };
            self.case.qword(at::LDT + 8 * number, value);
        }
        for number in 0..4 {
            let value = self.a_gate(true);
            self.case
                .qword(at::IDT + 8 * (OWN_VECTORS.start + number), value);
        }
        // A task that can't be resumed is best left to another.
        for vector in [10, 11, 12, 13] {
            if self.random.chance(if vector == 10 { 60 } else { 15 }) {
                self.case
                    .qword(at::IDT + 8 * vector, gate(OWN_TASK, 0, 0x85, 0));
            }
        }
        if self.random.chance(25) {
            let vector = self
                .random
                .pick(&[0, 1, 3, 4, 6, 10, 11, 12, 13, 13, 13, 14, 17]);
            let value = self.a_gate(true);
            self.case.qword(at::IDT + 8 * vector, value);
        }
    }

    fn tasks(&mut self) {
        for (task, at) in [at::TSS, at::TSS_B, at::TSS_C].into_iter().enumerate() {
            let chance = if task == 0 { 12 } else { 40 };
            if !self.random.chance(chance) {
                continue;
            }
            let selector = |maker: &mut Maker| maker.selector().to_le_bytes();
            for ring in 0..3 {
                if self.random.chance(25) {
                    let value = selector(self);
                    self.case.patch(at + 8 + 8 * ring, &value);
                }
                if self.random.chance(15) {
                    let pointer = self
                        .random
                        .pick(&[0, 4, 0x10, at::STACK, 0x1_0000, SANDBOX]);
                    self.case.patch(at + 4 + 8 * ring, &pointer.to_le_bytes());
                }
            }
            if task == 0 {
                continue;
            }
            let target = self.target();
            self.case.patch(at + 0x20, &target.to_le_bytes());
            let flags = self.flags();
            self.case.patch(at + 0x24, &flags.to_le_bytes());
            for segment in 0..6 {
                if self.random.chance(25) {
                    let value = if segment == 1 {
                        self.code_selector()
                    } else {
                        self.selector()
                    };
                    self.case
                        .patch(at + 0x48 + 4 * segment, &value.to_le_bytes());
                }
            }
            if self.random.chance(25) {
                let value = selector(self);
                self.case.patch(at + 0x60, &value);
            }
            if self.random.chance(15) {
                self.case.patch(at + 0x64, &[1]);
            }
        }
        if self.random.chance(30) {
            for segment in 0..4 {
                if self.random.chance(25) {
                    let value = self.code_selector();
                    self.case
                        .patch(at::TSS_16 + 0x22 + 2 * segment, &value.to_le_bytes());
                }
            }
        }
        // Who called the task under way.
        if self.random.chance(60) {
            let value = self
                .random
                .pick(&[select::TSS_B, select::TSS_C, select::TSS_16]);
            let value = if self.random.chance(20) {
                self.selector()
            } else {
                value
            };
            self.case.patch(at::TSS, &value.to_le_bytes());
            // It is busy, mostly.
            for (selector, kind) in [
                (select::TSS_B, 0x8b),
                (select::TSS_C, 0x8b),
                (select::TSS_16, 0x83),
            ] {
                if self.random.chance(40) {
                    self.case.patch(at::GDT + u32::from(selector) + 5, &[kind]);
                }
            }
        }
        if self.random.chance(30) {
            let map = self
                .random
                .pick(&[0x68, 0x68, 0xe0, 0xff, 0x100, 0xfffe, 0xde]) as u16;
            self.case.patch(at::TSS + 0x66, &map.to_le_bytes());
            let bits = self.random.next();
            self.case.qword(at::TSS + 0x68 + 0x20, bits);
        }
    }

    /// EFLAGS: mostly harmless.
    pub(crate) fn flags(&mut self) -> u32 {
        let mut flags = 2 | self.random.next() as u32 & 0xcd5;
        if self.random.chance(40) {
            flags |= (self.random.next() as u32 & 3) << 12;
        }
        if self.random.chance(40) {
            flags |= 0x200;
        }
        if self.random.chance(20) {
            flags |= 0x4000;
        }
        if self.random.chance(10) {
            flags |= self.random.pick(&[0x1_0000, 0x4_0000, 0x20_0000]);
        }
        flags
    }

    /// Something to start from: a ring, code and stack of a size, data segments.
    fn start(&mut self) {
        if self.long() {
            return self.start_long();
        }
        let ring = self.random.pick(&[0, 0, 3, 3, 1, 2]);
        self.ring = ring;
        let narrow = self.random.chance(25);
        self.virtual_8086 = self.random.chance(12);
        let mut flags = self.flags();
        let cs;
        let code;
        if self.virtual_8086 {
            self.ring = 3;
            self.bits = 16;
            flags |= 0x2_0000;
            cs = (SANDBOX >> 4) as u16;
            code = at::CODE;
        } else if narrow {
            self.bits = 16;
            self.ring = self.random.pick(&[0, 3]);
            cs = if self.ring == 0 {
                select::CODE_16
            } else {
                select::USER_CODE_16
            };
            code = at::CODE;
        } else {
            self.bits = 32;
            cs = select::CODE[usize::from(ring)];
            code = SANDBOX + at::CODE;
        }
        self.case.set(header::CS, cs.into());
        self.case.set(header::IP, code);
        let by_iret = self.ring != 0 || self.virtual_8086;
        self.case.set(header::BY_IRET, by_iret.into());
        self.case.set(header::FLAGS, flags);
        // The stack.
        let (ss, sp, stack) = if self.virtual_8086 {
            (cs, at::STACK, SANDBOX + at::STACK)
        } else if self.ring.is_multiple_of(3) && self.random.chance(if narrow { 80 } else { 20 }) {
            let ss = if self.ring == 0 {
                select::DATA_16
            } else {
                select::USER_DATA_16
            };
            let high = if self.random.chance(20) {
                0x1234_0000
            } else {
                0
            };
            (ss, at::STACK | high, SANDBOX + at::STACK)
        } else {
            (
                select::DATA[usize::from(self.ring)],
                SANDBOX + at::STACK,
                SANDBOX + at::STACK,
            )
        };
        let (sp, stack) = if !self.virtual_8086 && self.random.chance(10) {
            // At an edge of 16 bits.
            self.edge = true;
            let edge = self
                .random
                .pick(&[0, 1, 2, 3, 4, 6, 8, 0xfffc, 0xfffe, 0xfff8, 0xffff]);
            let edge = if ss == select::DATA[usize::from(self.ring)] {
                SANDBOX + (edge | 0x8000)
            } else {
                edge
            };
            (edge, SANDBOX + (edge & 0xffff))
        } else {
            (sp, stack)
        };
        self.stack = stack;
        self.case.set(header::SS, ss.into());
        self.case.set(header::SP, sp);
        for at in [header::DS, header::ES, header::FS, header::GS] {
            let value = if self.virtual_8086 {
                self.random.pick(&[SANDBOX >> 4, 0x1700])
            } else if self.random.chance(12) {
                u32::from(self.random.below(4) as u16)
            } else {
                let ring = self.ring.max(self.random.below(4) as u8);
                let any = u32::from(select::DATA[usize::from(ring)]);
                let near = u32::from(if self.ring == 0 {
                    select::DATA_16
                } else {
                    select::USER_DATA_16
                });
                self.random.pick(&[any, any, near])
            };
            self.case.set(at, value);
        }
        for number in 0..8 {
            let value = self.random.value();
            self.case.set_gpr(number, value & 0xffff_ffff);
        }
        let data = self.case.get(header::DS);
        let flat = !self.virtual_8086
            && data != u32::from(select::DATA_16)
            && data != u32::from(select::USER_DATA_16);
        let at = at::DATA + 8 * self.random.below(8) as u32;
        let pointer = if flat { SANDBOX + at } else { at };
        self.case.set_gpr(7, pointer.into());
        self.case.set_gpr(3, pointer.into());
        self.case.set_gpr(6, pointer.into());
        let count = self.random.below(6);
        self.case.set_gpr(1, count);
    }

    /// Puts words on the stack that a return may find.
    pub(crate) fn frame(&mut self, size: u32) {
        let target = self.target();
        let code = self.code_selector();
        let flags = {
            let flags = self.flags();
            if self.random.chance(15) {
                flags | 0x2_0000
            } else {
                flags
            }
        };
        let pointer = self.random.pick(&[
            at::STACK,
            SANDBOX + at::STACK,
            SANDBOX + at::STACK,
            0x1_0000 + at::STACK,
            4,
        ]);
        let rpl = code & 3;
        let stack = if self.random.chance(60) {
            select::DATA[usize::from(rpl)]
        } else {
            self.selector()
        };
        let data = [(); 4].map(|()| u32::from(self.selector()));
        let mut words = vec![target, code.into(), flags, pointer, stack.into()];
        words.extend(data);
        self.words(size, &words);
    }

    /// As `frame`, for a far return.
    pub(crate) fn return_frame(&mut self, size: u32, drop: u32) {
        let target = self.target();
        let code = self.code_selector();
        let pointer = self
            .random
            .pick(&[at::STACK, SANDBOX + at::STACK, SANDBOX + at::STACK, 4]);
        let stack = if self.random.chance(60) {
            select::DATA[usize::from(code & 3)]
        } else {
            self.selector()
        };
        self.words(size, &[target, code.into()]);
        let base = self.stack;
        self.stack = self.stack.wrapping_add(2 * size + drop);
        self.words(size, &[pointer, stack.into()]);
        self.stack = base;
    }

    /// In 64-bit code, sometimes what is not canonical, or nearly so.
    pub(crate) fn address(&mut self, target: u32) -> u64 {
        if self.bits == 64 && self.random.chance(8) {
            let high = self
                .random
                .pick(&[1u64 << 47, 1 << 63, 0xffff << 48, 0xffff_8000 << 32]);
            return high | u64::from(target);
        }
        target.into()
    }

    fn words(&mut self, size: u32, words: &[u32]) {
        // Which bits of an address other code sees differs.
        let canonical = words
            .get(1)
            .is_some_and(|&cs| select::CODE.contains(&(cs as u16)));
        for (number, word) in (0..).zip(words) {
            // RIP and RSP.
            let wide = canonical && (number == 0 || number == 3);
            let word = if wide {
                self.address(*word)
            } else {
                u64::from(*word)
            };
            let bytes = word.to_le_bytes();
            let at = self.stack - SANDBOX + size * number;
            if at + size <= SANDBOX_SIZE {
                self.case.patch(at, &bytes[..size as usize]);
            }
        }
    }

    /// A case of 32-bit tables.
    pub(crate) fn narrow(seed: u64) -> Maker {
        let mut maker = Maker {
            random: Random::new(seed),
            case: Case::new(false),
            code: Vec::new(),
            bits: 32,
            ring: 0,
            virtual_8086: false,
            stack: 0,
            edge: false,
        };
        maker.start();
        maker.tables();
        maker.tasks();
        match maker.random.below(4) {
            0 => maker.case.set(header::CR0, 0x8001_0033),
            1 => {
                maker.case.set(header::CR0, 0x8000_0033);
                maker.case.set(header::CR4, 0x620);
                maker.case.set(header::CR3, SANDBOX + at::TABLES + 0x2000);
            }
            _ => {}
        }
        if maker.random.chance(5) {
            let cr0 = maker.case.get(header::CR0);
            maker.case.set(header::CR0, cr0 | 0x4_0000);
        }
        if maker.random.chance(50) {
            maker.instruction();
        }
        maker.instruction();
        maker.finish()
    }

    pub(crate) fn finish(mut self) -> Maker {
        let vector = 0x70 + self.random.below(16) as u8;
        self.code.extend([0xcd, vector]);
        let code = self.code.clone();
        self.case.patch(at::CODE, &code);
        self
    }
}
