//! The instructions that cases are made of.

use crate::generate::*;
use crate::layout::*;
use crate::sandbox::*;

impl Maker {
    pub(crate) fn emit(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// An operand size, with the prefix it takes: bytes.
    pub(crate) fn size(&mut self) -> u32 {
        if self.bits == 64 && self.random.chance(40) {
            self.emit(&[0x48]);
            return 8;
        }
        let usual = if self.bits == 16 { 2 } else { 4 };
        if self.random.chance(25) {
            self.emit(&[0x66]);
            6 - usual
        } else {
            usual
        }
    }

    /// mov eax, value
    pub(crate) fn load(&mut self, register: u8, value: u32) {
        if self.bits == 16 {
            self.emit(&[0x66]);
        }
        self.emit(&[0xb8 + register]);
        self.emit(&value.to_le_bytes());
    }

    pub(crate) fn override_segment(&mut self) {
        if self.random.chance(40) {
            let prefix = self.random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]);
            self.emit(&[prefix]);
        }
    }

    /// Where DS:EDI points at the start, as an offset in the sandbox.
    fn data(&self) -> u32 {
        self.case.get(header::GPR + 8 * 7) & 0xffff
    }

    /// Register operand (11) or memory at EDI (or BX), with `register`.
    fn either(&mut self, register: u8, value: u16) {
        if self.random.chance(50) {
            self.load_before(value);
            self.emit(&[0xc0 | register << 3 | EAX]);
        } else {
            let at = self.data();
            self.case.patch(at, &value.to_le_bytes());
            self.emit(&[register << 3 | 7]);
        }
    }

    /// EAX is loaded by the case's start where an opcode has been emitted already.
    fn load_before(&mut self, value: u16) {
        let high = self.random.next() & 0xffff_0000;
        self.case.set_gpr(0, high | u64::from(value));
    }

    fn far_pointer(&mut self, size: u32) -> (u32, u16) {
        let selector = self.code_selector();
        let mut target = self.target();
        if size == 2 {
            target &= 0xffff;
        }
        (target, selector)
    }

    fn far_in_memory(&mut self, size: u32) {
        let (target, selector) = self.far_pointer(size);
        let at = self.data();
        let target = if select::CODE.contains(&selector) {
            self.address(target)
        } else {
            target.into()
        };
        self.case.patch(at, &target.to_le_bytes()[..size as usize]);
        self.case.patch(at + size, &selector.to_le_bytes());
    }

    pub(crate) fn instruction(&mut self) {
        match self.random.below(100) {
            0..=11 => self.load_a_segment(),
            12..=27 => self.far_transfer(),
            28..=35 => self.far_return(),
            36..=47 => self.interrupt_return(),
            48..=55 => self.software_interrupt(),
            56..=61 => self.look_at_selector(),
            62..=67 => self.system_table(),
            68..=71 => self.control(),
            72..=77 => self.flags_instruction(),
            78..=81 => self.port(),
            82..=87 => self.stack_instruction(),
            88..=93 => self.access(),
            94..=95 => self.fast_call(),
            96..=97 => self.debug(),
            _ => self.other(),
        }
    }

    fn load_a_segment(&mut self) {
        let selector = self.selector();
        match self.random.below(4) {
            0 => {
                let segment = self.random.pick(&[0, 2, 2, 3, 4, 5, 0, 3, 1, 6]);
                self.load(EAX, selector.into());
                self.size();
                self.emit(&[0x8e, 0xc0 | segment << 3]);
            }
            1 => {
                let segment = self.random.pick(&[0, 2, 2, 3, 4, 5]);
                let at = self.data();
                self.case.patch(at, &selector.to_le_bytes());
                self.override_segment();
                self.emit(&[0x8e, segment << 3 | 7]);
            }
            2 if !self.edge => {
                self.size();
                let any = self.random.next() as u32 & 0xffff_0000;
                let at = self.case.get(header::SP) & 0xffff;
                self.case.patch(
                    at.min(SANDBOX_SIZE - 4),
                    &(any | u32::from(selector)).to_le_bytes(),
                );
                let code: &[u8] = self.random.pick(&[
                    &[0x07u8] as &[u8],
                    &[0x17],
                    &[0x17],
                    &[0x1f],
                    &[0x0f, 0xa1],
                    &[0x0f, 0xa9],
                ]);
                self.emit(code);
            }
            _ => {
                self.override_segment();
                let size = self.size();
                self.far_in_memory(size);
                let at = self.data() + size;
                if self.random.chance(70) {
                    self.case.patch(at, &selector.to_le_bytes());
                }
                let code: &[u8] = self.random.pick(&[
                    &[0xc4u8] as &[u8],
                    &[0xc5],
                    &[0x0f, 0xb2],
                    &[0x0f, 0xb2],
                    &[0x0f, 0xb4],
                    &[0x0f, 0xb5],
                ]);
                self.emit(code);
                self.emit(&[6 << 3 | 7]);
            }
        }
        // What it has loaded shows at the next use.
        if self.random.chance(60) {
            self.access();
        }
    }

    fn far_transfer(&mut self) {
        let null = self.long() && self.case.get(header::SS) & 0xfffc == 0;
        // Whether a call out of 64-bit code finds its null SS before it pushes differs.
        let calls = !null && self.random.chance(60);
        let size = self.size();
        if self.bits != 64 && self.random.chance(60) {
            let (target, selector) = self.far_pointer(size);
            self.emit(&[if calls { 0x9a } else { 0xea }]);
            self.emit(&target.to_le_bytes()[..size as usize]);
            self.emit(&selector.to_le_bytes());
        } else {
            self.far_in_memory(size);
            self.emit(&[0xff, if calls { 3 } else { 5 } << 3 | 7]);
        }
    }

    fn far_return(&mut self) {
        if self.edge {
            return self.stack_instruction();
        }
        let size = self.size();
        if self.random.chance(50) {
            let drop = self.random.pick(&[0, 4, 8, 2, 1, 0x10]);
            self.return_frame(size, drop);
            self.emit(&[0xca]);
            self.emit(&(drop as u16).to_le_bytes());
        } else {
            self.return_frame(size, 0);
            self.emit(&[0xcb]);
        }
    }

    fn interrupt_return(&mut self) {
        // What a frame across an edge means differs.
        if self.edge {
            return self.stack_instruction();
        }
        // 64-bit code returns with 64 bits: with less, who pops SS:RSP differs.
        let size = if self.bits == 64 {
            self.emit(&[0x48]);
            8
        } else if self.virtual_8086 {
            // With 32 bits a target beyond the segment differs.
            2
        } else {
            self.size()
        };
        self.frame(size);
        self.emit(&[0xcf]);
    }

    fn software_interrupt(&mut self) {
        let vector = match self.random.below(8) {
            0 => self.random.below(32) as u8,
            1 => 0x7f + self.random.below(3) as u8,
            2 => {
                let code = self.random.pick(&[0xcc, 0xce, 0xf1]);
                self.emit(&[code]);
                return;
            }
            _ => OWN_VECTORS.start as u8 + self.random.below(5) as u8,
        };
        self.emit(&[0xcd, vector]);
    }

    fn look_at_selector(&mut self) {
        let selector = self.selector();
        match self.random.below(5) {
            0 | 1 => {
                self.size();
                let code = self.random.pick(&[2, 3]);
                self.emit(&[0x0f, code]);
                let register = self.random.pick(&[0, 1, 2, 5, 6]);
                self.either(register, selector);
            }
            2 | 3 => {
                self.emit(&[0x0f, 0]);
                let register = self.random.pick(&[4, 5]);
                self.either(register, selector);
            }
            _ => {
                self.emit(&[0x63]);
                self.either(1, selector);
            }
        }
    }

    fn system_table(&mut self) {
        match self.random.below(6) {
            0 | 1 => {
                let selector = match self.random.below(3) {
                    0 => self.selector(),
                    _ => self.random.pick(&[
                        select::TSS_B,
                        select::TSS_C,
                        select::TSS_16,
                        select::LDT,
                        select::LDT | 3,
                        select::TSS,
                        0,
                        3,
                    ]),
                };
                self.emit(&[0x0f, 0]);
                let register = self.random.pick(&[2, 3]);
                self.either(register, selector);
            }
            2 => {
                self.size();
                let register = self.random.pick(&[0, 1]);
                self.emit(&[0x0f, 0]);
                self.either(register, 0);
            }
            3 | 4 => {
                self.size();
                self.override_segment();
                let register = self.random.pick(&[0, 1, 0, 1, 2, 3]);
                if register >= 2 {
                    // Something to load that leaves handlers in reach.
                    let from = if register == 2 {
                        header::GDTR
                    } else {
                        header::IDTR
                    };
                    let mut bytes = Vec::new();
                    bytes.extend(self.case.get(from).to_le_bytes());
                    bytes.extend(&self.case.get(from + 4).to_le_bytes()[..2]);
                    let at = self.data();
                    self.case.patch(at, &bytes);
                }
                self.emit(&[0x0f, 1, register << 3 | 7]);
            }
            _ => {
                self.size();
                let register = self.random.pick(&[4, 6]);
                let value = self.random.pick(&[0, 1, 3, 0xd, 0xfff1, 0xf]);
                self.emit(&[0x0f, 1]);
                self.either(register, value);
            }
        }
    }

    fn control(&mut self) {
        let register = self.random.pick(&[0, 0, 2, 3, 4, 4, 1, 8]);
        let to = self.random.chance(60);
        if to {
            let value = match register {
                0 => {
                    let base = self.case.get(header::CR0);
                    base ^ self.random.pick(&[
                        0,
                        8,
                        2,
                        4,
                        0x20,
                        0x1_0000,
                        0x4_0000,
                        0x2000_0000,
                        0x6000_0000,
                        0x10,
                        0x1000_0000,
                        0x8000,
                    ])
                }
                4 => {
                    let base = self.case.get(header::CR4);
                    base ^ self.random.pick(&[
                        0,
                        4,
                        8,
                        0x10,
                        0x80,
                        0x100,
                        0x4000,
                        0x1000,
                        1 << 31,
                        1 << 25,
                    ])
                }
                3 => self.case.get(header::CR3),
                _ => self.random.value() as u32,
            };
            self.load(EAX, value);
        }
        let mode = if self.random.chance(90) { 0xc0 } else { 0 };
        self.emit(&[
            0x0f,
            if to { 0x22 } else { 0x20 },
            mode | (register & 7) << 3,
        ]);
    }

    fn flags_instruction(&mut self) {
        match self.random.below(6) {
            0 => {
                let code = self.random.pick(&[0xfa, 0xfb, 0xfc, 0xfd]);
                self.emit(&[code]);
            }
            1 => {
                self.size();
                self.emit(&[0x9c]);
            }
            2 => self.emit(&[0x0f, 6]),
            _ => {
                let size = self.size();
                let mut flags = self.flags();
                if self.random.chance(20) {
                    flags |= 0x100;
                }
                if self.random.chance(10) {
                    flags |= self.random.next() as u32;
                }
                let at = self.case.get(header::SP) & 0xffff;
                self.case.patch(
                    at.min(SANDBOX_SIZE - 8),
                    &u64::from(flags).to_le_bytes()[..size as usize],
                );
                self.emit(&[0x9d]);
            }
        }
    }

    fn fast_call(&mut self) {
        let cs = self.selector() & 0xfffc;
        let good = self.random.pick(&[0x08, 0, 0x18, 3, 0xffff_0008u32]);
        self.case.set(
            header::MSR,
            if self.random.chance(30) {
                cs.into()
            } else {
                good
            },
        );
        self.case.set(header::MSR + 8, SANDBOX + at::STACK);
        let entry = self.target();
        self.case.set(header::MSR + 16, entry);
        let pointer = self.target();
        let pointer = self.address(pointer);
        self.case.set_gpr(2, pointer);
        self.case.set_gpr(1, (SANDBOX + at::STACK).into());
        if self.long() {
            let star = u32::from(self.code_selector()) | u32::from(self.selector()) << 16;
            let good = self
                .random
                .pick(&[0x0028_0008, 0x002b_0008, 0x0010_0008, 0x0048_000b]);
            self.case.set(
                header::MSR + 28,
                if self.random.chance(30) { star } else { good },
            );
            for field in [32, 40] {
                let entry = self.target() & 0xf_ffff;
                self.case.set(header::MSR + field, entry);
            }
            let mask = self.random.next() as u32;
            self.case.set(header::MSR + 48, mask);
            self.case.set_gpr(11, (mask.rotate_left(7) & !0x100).into());
            if self.random.chance(50) {
                self.case.set_gpr(1, pointer);
            }
            if self.random.chance(8) {
                self.case.set(header::EFER, 0xd00);
            }
        }
        // Some processors know syscall in compatibility mode.
        let call = if self.long() && self.bits != 64 {
            0x07
        } else {
            0x05
        };
        let code = self
            .random
            .pick(&[0x34, 0x35, 0x34, 0x35, call, 0x07, call, 0x07]);
        if self.bits == 64 && (code == 0x07 || self.random.chance(30)) {
            self.emit(&[0x48]);
        }
        self.emit(&[0x0f, code]);
    }

    fn debug(&mut self) {
        match self.random.below(4) {
            0 => {
                let number = self.random.below(8) as u8;
                if !(2..4).contains(&number) {
                    self.emit(&[0x0f, 0x21, 0xc0 | number << 3]);
                }
            }
            1 => {
                let number = self.random.pick(&[0, 1, 4, 5, 6]);
                self.emit(&[0x0f, 0x23, 0xc0 | number << 3]);
            }
            _ => {
                // A breakpoint on code or data that may be met.
                let here = SANDBOX + at::CODE + self.code.len() as u32;
                let at = match self.random.below(4) {
                    0 => here,
                    1 => SANDBOX + at::PADS + 16 * self.random.below(16) as u32,
                    2 => SANDBOX + at::STACK - 4 * self.random.below(8) as u32,
                    _ => SANDBOX + self.data(),
                };
                self.case.set(header::DR0, at);
                let kind = self.random.pick(&[0, 0, 0, 1, 3, 0xd, 0xf, 5]);
                self.case.set(
                    header::DR7,
                    0x400 | kind << 16 | self.random.pick(&[1, 2, 3]),
                );
            }
        }
    }

    fn other(&mut self) {
        let code: &[u8] = match self.random.below(12) {
            0 => &[0x0f, 0x0b],
            1 => &[0x0f, 0x08],
            2 => &[0x0f, 0x09],
            3 => &[0x9b],
            4 => &[0x0f, 0x01, 0xd0],
            5 => &[0x0f, 0x01, 0xf8],
            6 => &[0x0f, 0x01, 0x3f],
            7 => &[0xf0, 0x0f, 0xa3, 0x07],
            8 => &[0xd8, 0xc0],
            9 => &[0x0f, 0x58, 0xc0],
            10 if self.ring != 0 => &[0xf4],
            _ if self.long() && self.random.chance(50) => self.random.pick(&[
                &[0x0fu8, 0x01, 0xf8] as &[u8],
                &[0xf3, 0x0f, 0xae, 0xc7],
                &[0xf3, 0x48, 0x0f, 0xae, 0xd7],
                &[0xf3, 0x48, 0x0f, 0xae, 0xcf],
                &[0x0f, 0x01, 0xd1],
                &[0x48, 0x0f, 0xc7, 0x0f],
                &[0x66, 0x0f, 0x38, 0x82, 0x07],
                &[0x0f, 0x22, 0xc0],
                &[0x44, 0x0f, 0x22, 0xc0],
                &[0x44, 0x0f, 0x20, 0xc1],
            ]),
            _ => {
                let msr = self.random.pick(&[
                    0x174,
                    0x175,
                    0xc000_0080u32,
                    0xc000_0081,
                    0xc000_0102,
                    0x12345,
                    0x277,
                ]);
                self.load(1, msr);
                if self.random.chance(50) {
                    &[0x0f, 0x32]
                } else {
                    &[0x0f, 0x30]
                }
            }
        };
        self.emit(code);
    }
}
