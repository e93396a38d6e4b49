//! Instructions of cases that reach memory, stacks and ports, mostly at an edge of something.

use crate::generate::Maker;
use crate::layout::*;

impl Maker {
    pub(crate) fn port(&mut self) {
        let port = 0x500 + self.random.below(64) as u16;
        self.case.set_gpr(2, port.into());
        match self.random.below(4) {
            0 => {
                self.size();
                let code = self.random.pick(&[0xec, 0xed, 0xee, 0xef]);
                self.emit(&[code]);
            }
            1 => {
                let code = self.random.pick(&[0xe4, 0xe5, 0xe6, 0xe7]);
                self.emit(&[code, 0xc7]);
            }
            _ => {
                if self.random.chance(50) {
                    self.emit(&[0xf3]);
                }
                self.size();
                self.override_segment();
                let code = self.random.pick(&[0x6c, 0x6d, 0x6e, 0x6f]);
                self.emit(&[code]);
            }
        }
    }

    pub(crate) fn stack_instruction(&mut self) {
        // Selectors may be moved with 16 bits or with 32: not at an edge.
        let selectors = !self.edge && self.random.chance(25);
        if selectors {
            self.size();
            let code: &[u8] = self.random.pick(&[
                &[0x06u8] as &[u8],
                &[0x0e],
                &[0x16],
                &[0x1e],
                &[0x0f, 0xa0],
                &[0x0f, 0xa8],
            ]);
            self.emit(code);
            return;
        }
        if self.random.chance(30) {
            let edge = self.random.pick(&[
                0, 1, 2, 3, 4, 6, 8, 0x10, 0x1f, 0xffff, 0xfffe, 0xfffc, 0x1_0000,
            ]);
            let high = self.case.get(header::SP) & 0xffff_0000;
            self.edge = true;
            if self.bits == 64 {
                return;
            }
            self.load(4, high | edge);
        }
        if self.bits != 64 {
            self.size();
        }
        match self.random.below(10) {
            0 => self.emit(&[0x50]),
            1 => self.emit(&[0x58]),
            2 => self.emit(&[0x60]),
            3 => self.emit(&[0x61]),
            4 => {
                let level = self.random.pick(&[0, 1, 2, 3, 31, 32, 33]);
                let size = self.random.pick(&[0, 4, 0x10, 0x800, 0xffff]) as u16;
                self.emit(&[0xc8]);
                self.emit(&size.to_le_bytes());
                self.emit(&[level]);
            }
            5 => self.emit(&[0xc9]),
            6 => self.emit(&[0xff, 0x37]),
            7 => self.emit(&[0x8f, 0x07]),
            8 => self.emit(&[0xff, 0xd0]),
            _ => self.emit(&[0xc3]),
        }
    }

    /// A memory access, mostly near the end of a limit.
    pub(crate) fn access(&mut self) {
        if self.random.chance(50) {
            let (limit, _) = match self.random.below(4) {
                0 => (0xffff, 0),
                1 => (at::PADS + 0x100, 0),
                2 => (0x6fff + 0x1000 * self.random.below(3) as u32, 0),
                _ => (self.random.pick(&[0, 0x10, 0x67, 0x17fff, 0x18fff]), 0),
            };
            let at = (limit + 1).saturating_sub(self.random.below(18) as u32);
            self.load(7, at);
            if self.bits == 16 {
                self.load(3, at);
            }
        }
        self.override_segment();
        let mem = |register: u8| register << 3 | 7;
        match self.random.below(18) {
            0 => self.emit(&[0x8a, mem(0)]),
            1 => self.emit(&[0x88, mem(0)]),
            2 | 3 => {
                self.size();
                self.emit(&[0x8b, mem(0)]);
            }
            4 | 5 => {
                self.size();
                self.emit(&[0x89, mem(1)]);
            }
            6 => {
                self.size();
                self.emit(&[0x01, mem(1)]);
            }
            7 => self.emit(&[0x0f, 0x6f, mem(1)]),
            8 => self.emit(&[0x0f, 0x11, mem(1)]),
            9 => self.emit(&[0x0f, 0x10, mem(1)]),
            10 => self.emit(&[0x0f, 0xc7, mem(1)]),
            11 => {
                self.size();
                self.emit(&[0x62, mem(1)]);
            }
            12 => self.emit(&[0xdb, mem(5)]),
            13 => self.emit(&[0xd9, mem(7)]),
            _ => {
                if self.random.chance(60) {
                    self.emit(&[0xf3]);
                }
                self.size();
                let code = self
                    .random
                    .pick(&[0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xad, 0xa6, 0xae]);
                self.emit(&[code]);
            }
        }
    }
}
