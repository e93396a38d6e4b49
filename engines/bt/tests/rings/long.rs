//! Random cases of IA-32e mode: 64-bit code and compatibility mode.

use crate::case::Case;
use crate::generate::Maker;
use crate::layout::*;
use crate::random::Random;
use crate::sandbox::*;

impl Maker {
    pub(crate) fn start_long(&mut self) {
        self.ring = self.random.pick(&[0, 0, 3, 3, 1, 2]);
        let narrow = self.random.chance(30);
        let (bits, cs) = if narrow {
            self.ring = self.random.pick(&[0, 3]);
            (
                32,
                if self.ring == 0 {
                    select::CODE_16
                } else {
                    select::USER_CODE_16
                },
            )
        } else {
            (64, select::CODE[usize::from(self.ring)])
        };
        self.bits = bits;
        self.case.set(header::CS, cs.into());
        self.case.set(header::IP, SANDBOX + at::CODE);
        let flags = self.flags() & !0x4000;
        self.case.set(header::FLAGS, flags);
        let usual = select::DATA[usize::from(self.ring)];
        let (ss, sp) = if !narrow && self.ring < 3 && self.random.chance(30) {
            (self.ring.into(), SANDBOX + at::STACK)
        } else {
            (usual, SANDBOX + at::STACK)
        };
        let odd = if self.random.chance(10) {
            self.random.below(16) as u32
        } else {
            0
        };
        self.stack = SANDBOX + at::STACK + odd;
        self.case.set(header::SS, ss.into());
        self.case.set(header::SP, sp + odd);
        for at in [header::DS, header::ES, header::FS, header::GS] {
            let ring = self.ring.max(self.random.below(4) as u8);
            let value = match self.random.below(6) {
                0 => self.random.below(4) as u16,
                _ => select::DATA[usize::from(ring)],
            };
            self.case.set(at, value.into());
        }
        for number in 0..16 {
            let value = self.random.value();
            self.case.set_gpr(number, value);
        }
        let pointer = SANDBOX + at::DATA + 16 * self.random.below(4) as u32;
        for number in [3, 6, 7] {
            self.case.set_gpr(number, pointer.into());
        }
        let count = self.random.below(6);
        self.case.set_gpr(1, count);
    }

    /// The second half of a descriptor of 16 bytes. Bits 40 to 44 are zero or else count, but not those
    /// of a gate in the IDT.
    fn upper(&mut self, typed: bool) -> u64 {
        match self.random.below(12) {
            0 if typed => self.random.next(),
            2 if typed => 0x1_0000 | self.random.below(0x2000) << 40,
            1 => 0xffff_8000,
            3 => 0x8000,
            _ => 0,
        }
    }

    fn tables_long(&mut self) {
        for number in 0..6 {
            let at = at::GDT + FREE + 16 * number;
            let (low, high) = match self.random.below(8) {
                0 | 1 => (self.a_gate(false), self.upper(true)),
                2 => (self.system_segment(), self.upper(true)),
                _ => (self.segment(), self.segment()),
            };
            self.case.qword(at, low);
            self.case.qword(at + 8, high);
        }
        for number in 4..8 {
            let at = at::LDT + 16 * number;
            let (low, high) = match self.random.below(4) {
                0 => (self.a_gate(false), self.upper(true)),
                _ => (self.segment(), self.segment()),
            };
            self.case.qword(at, low);
            self.case.qword(at + 8, high);
        }
        for number in 0..4 {
            let at = at::IDT + 16 * (OWN_VECTORS.start + number);
            let (low, high) = (self.long_gate(), self.upper(false));
            self.case.qword(at, low);
            self.case.qword(at + 8, high);
        }
        if self.random.chance(25) {
            let vector = self
                .random
                .pick(&[0, 1, 3, 4, 6, 10, 11, 12, 13, 13, 13, 14, 17]);
            let at = at::IDT + 16 * vector;
            let (low, high) = (self.long_gate(), self.upper(false));
            self.case.qword(at, low);
            self.case.qword(at + 8, high);
        }
        for place in (4..0x24).step_by(8).chain((0x24..0x54).step_by(8)) {
            if self.random.chance(6) {
                let value = self.random.pick(&[
                    0x8000_0000_0000_0000,
                    0xffff_8000_0000_0000,
                    0x1_7808,
                    0x1_7803,
                    0x40_0000,
                    0,
                ]);
                self.case.qword(at::TSS + place, value);
            }
        }
        if self.random.chance(15) {
            let map = self.random.pick(&[0x68, 0xe0, 0xff, 0x100, 0xfffe, 0xde]) as u16;
            self.case.patch(at::TSS + 0x66, &map.to_le_bytes());
            let bits = self.random.next();
            self.case.qword(at::TSS + 0x68 + 0x20, bits);
        }
    }

    fn long_gate(&mut self) -> u64 {
        let gate = self.a_gate(true);
        // An interrupt stack, sometimes.
        let stack = if self.random.chance(30) {
            self.random.below(8)
        } else {
            0
        };
        gate & !(0xff << 32) | stack << 32
    }

    /// A case of IA-32e mode.
    pub(crate) fn wide(seed: u64) -> Maker {
        let mut maker = Maker {
            random: Random::new(seed),
            case: Case::new(true),
            code: Vec::new(),
            bits: 64,
            ring: 0,
            virtual_8086: false,
            stack: 0,
            edge: false,
        };
        maker.start_long();
        maker.tables_long();
        if maker.random.chance(8) {
            let cr0 = maker.case.get(header::CR0);
            maker.case.set(header::CR0, cr0 | 0x4_0000);
        }
        if maker.random.chance(20) {
            maker.case.set(header::CR4, 0x1_0620);
        }
        if maker.random.chance(50) {
            maker.instruction();
        }
        maker.instruction();
        maker.finish()
    }
}
