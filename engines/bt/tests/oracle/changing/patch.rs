//! Ways to write over a site: every kind of store that code may be changed by.

use super::emit::{EAX, EBP, EBX, ECX, EDI, EDX, ESI, Emitter};
use super::sites::{STRIDE, Site};
use super::{ALTERNATIVES, Counter, KEPT, Mode};
use crate::random::Random;

impl Emitter {
    /// Puts an alternative at the site, or changes it in place. ECX, ESI and EDI are used up, the computed
    /// registers may be; inside of loops that ECX counts it stays.
    pub(super) fn patch(
        &mut self,
        random: &mut Random,
        site: &Site,
        counter: Counter,
        in_loop: bool,
    ) {
        self.address(&[0xbf], site.label);
        let in_place = site.immediate.is_some() && random.chance(60);
        if in_place {
            let at = site.immediate.unwrap_or_default() as u64 + random.below(4);
            return self.change(random, at as i8, site);
        }
        if site.function && random.chance(10) {
            // mov byte [edi], ret
            return self.bytes(&[0xc6, 0x07, 0xc3]);
        }
        let fixed = random.below(ALTERNATIVES as u64) as u32;
        let dynamic = random.chance(70);
        if in_loop {
            // ECX is what the loop counts.
            self.wide();
            self.memory(&[0x89], ECX, EBP, KEPT + 8);
        }
        let first = if dynamic { 0 } else { fixed };
        self.number(&[0xbe], site.table + first * STRIDE as u32);
        if dynamic {
            counter.load(self, ECX);
            // and ecx, 3; shl ecx, 5; add esi, ecx
            self.bytes(&[
                0x83,
                0xe1,
                ALTERNATIVES as u8 - 1,
                0xc1,
                0xe1,
                5,
                0x01,
                0xce,
            ]);
        }
        // A nop whose bytes are changed as an operand would be anything.
        if site.immediate.is_none() && random.chance(8) {
            self.nops(site.bytes);
        } else {
            self.copy(random, site.bytes);
        }
        if in_loop {
            self.wide();
            self.memory(&[0x8b], ECX, EBP, KEPT + 8);
        }
    }

    /// Changes a byte of an operand, or some.
    fn change(&mut self, random: &mut Random, at: i8, site: &Site) {
        let value = random.next() as u8;
        let lock: &[u8] = if random.chance(30) { &[0xf0] } else { &[] };
        let modify = |emitter: &mut Emitter, opcode: u8, extension: u8| {
            emitter.bytes(lock);
            emitter.memory(&[opcode], extension, EDI, at);
        };
        match random.below(12) {
            0 | 1 => modify(self, 0xfe, 0),
            2 => modify(self, 0xfe, 1),
            3 => modify(self, 0xf6, random.pick(&[2, 3])),
            4 => {
                modify(self, 0x80, random.pick(&[0, 1, 4, 5, 6]));
                self.bytes(&[value]);
            }
            5 => {
                self.memory(&[0xc0], random.pick(&[0, 1]), EDI, at);
                self.bytes(&[value & 7]);
            }
            6 => {
                let condition = random.below(16) as u8;
                self.memory(&[0x0f, 0x90 | condition], 0, EDI, at);
            }
            7 => self.memory(&[0x88], random.pick(&[EAX, EDX, EBX]), EDI, at),
            // All four.
            8 => self.memory(&[0x89], random.pick(&[EAX, EDX, EBX]), EDI, 1),
            9 => {
                self.bytes(lock);
                self.memory(&[0x0f, 0xc1], random.pick(&[EAX, EDX, EBX]), EDI, 1);
            }
            10 => {
                self.bytes(lock);
                self.memory(&[0x0f, 0xba], random.pick(&[5, 6, 7]), EDI, 1);
                self.bytes(&[value]);
            }
            // mov dword [edi + 1], value: the same, rarely
            _ => {
                let same = &site.alternatives[0][1..5];
                let mut value: [u8; 4] = std::array::from_fn(|byte| same[byte]);
                if random.chance(70) {
                    value = (random.next() as u32).to_le_bytes();
                }
                self.memory(&[0xc7], 0, EDI, 1);
                self.bytes(&value);
            }
        }
    }

    /// Fills a site with nops.
    fn nops(&mut self, bytes: usize) {
        self.number(&[0xb9], bytes as u32);
        self.bytes(&[0xb0, 0x90, 0xf3, 0xaa]);
    }

    /// Copies an alternative from ESI to EDI, in one way.
    fn copy(&mut self, random: &mut Random, bytes: usize) {
        let word = if self.mode == Mode::Long { 8 } else { 4 };
        match random.below(12) {
            0 => self.string(random, bytes),
            1 if bytes.is_multiple_of(word) => {
                // By pushes, with the stack over the site.
                self.wide();
                self.memory(&[0x89], 4, EBP, KEPT);
                self.wide();
                self.memory(&[0x8d], 4, EDI, bytes as i8);
                for at in (0..bytes).step_by(word).rev() {
                    self.memory(&[0xff], 6, ESI, at as i8);
                }
                self.wide();
                self.memory(&[0x8b], 4, EBP, KEPT);
            }
            2 | 3 if bytes.is_multiple_of(4) => self.atomically(random, bytes),
            4 if bytes.is_multiple_of(8) => {
                for at in (0..bytes as i8).step_by(8) {
                    // cmpxchg8b, twice at most
                    self.memory(&[0x8b], EBX, ESI, at);
                    self.memory(&[0x8b], ECX, ESI, at + 4);
                    self.memory(&[0x8b], EAX, EDI, at);
                    self.memory(&[0x8b], EDX, EDI, at + 4);
                    self.memory(&[0xf0, 0x0f, 0xc7], 1, EDI, at);
                }
            }
            5 | 6 if bytes.is_multiple_of(16) => {
                for at in (0..bytes as i8).step_by(16) {
                    self.memory(&[0xf3, 0x0f, 0x6f], 7, ESI, at);
                    self.memory(
                        &random.pick(&[[0xf3, 0x0f, 0x7f], [0x66, 0x0f, 0x11]]),
                        7,
                        EDI,
                        at,
                    );
                }
            }
            7 if bytes == 16 => {
                // All bytes of the mask: pcmpeqd, then maskmovdqu.
                self.memory(&[0xf3, 0x0f, 0x6f], 7, ESI, 0);
                self.bytes(&[0x66, 0x0f, 0x76, 0xf6, 0x66, 0x0f, 0xf7, 0xfe]);
            }
            8 if bytes == 10 => {
                // fld and fstp of 80 bits
                self.memory(&[0xdb], 5, ESI, 0);
                self.memory(&[0xdb], 7, EDI, 0);
            }
            8 if bytes.is_multiple_of(8) => {
                for at in (0..bytes as i8).step_by(8) {
                    // fild and fistp, or movlps
                    let (load, store): (&[u8], &[u8]) = random.pick(&[
                        (&[0xdf], &[0xdf]),
                        (&[0x0f, 0x12], &[0x0f, 0x13]),
                        (&[0x0f, 0x16], &[0x0f, 0x17]),
                    ]);
                    let x87 = load.len() == 1;
                    self.memory(load, if x87 { 5 } else { 7 }, ESI, at);
                    self.memory(store, 7, EDI, at);
                }
            }
            9 if bytes == 32 && crate::layout::avx() => {
                self.memory(&[0xc5, 0xfe, 0x6f], 7, ESI, 0);
                self.memory(&[0xc5, 0xfe, 0x7f], 7, EDI, 0);
            }
            _ => self.moves(random, bytes),
        }
    }

    /// By string instructions, in either direction.
    fn string(&mut self, random: &mut Random, bytes: usize) {
        let last = bytes as i8 - 1;
        match random.below(4) {
            0 => {
                self.number(&[0xb9], bytes as u32);
                self.bytes(&[0xf3, 0xa4]);
            }
            1 if bytes.is_multiple_of(4) => {
                self.number(&[0xb9], bytes as u32 / 4);
                self.bytes(&[0xf3, 0xa5]);
            }
            2 => {
                self.number(&[0xb9], bytes as u32);
                self.memory(&[0x8d], ESI, ESI, last);
                self.memory(&[0x8d], EDI, EDI, last);
                self.bytes(&[0xfd, 0xf3, 0xa4, 0xfc]);
            }
            _ => {
                self.bytes(&vec![0xa5; bytes / 4]);
                self.bytes(&vec![0xa4; bytes % 4]);
            }
        }
    }

    fn atomically(&mut self, random: &mut Random, bytes: usize) {
        for at in (0..bytes as i8).step_by(4) {
            self.memory(&[0x8b], ECX, ESI, at);
            match random.below(4) {
                0 => self.memory(&[0x87], ECX, EDI, at),
                1 => {
                    self.memory(&[0x8b], EAX, EDI, at);
                    self.memory(&[0xf0, 0x0f, 0xb1], ECX, EDI, at);
                }
                2 => {
                    // The difference, added.
                    self.memory(&[0x2b], ECX, EDI, at);
                    self.memory(&[0xf0, 0x0f, 0xc1], ECX, EDI, at);
                }
                _ => {
                    self.memory(&[0x33], ECX, EDI, at);
                    self.memory(&[0xf0, 0x31], ECX, EDI, at);
                }
            }
        }
    }

    /// By moves of any sizes.
    fn moves(&mut self, random: &mut Random, bytes: usize) {
        let mut at = 0;
        while at < bytes {
            let place = at as i8;
            let room = bytes - at;
            let long = self.mode == Mode::Long;
            at += match random.below(8) {
                0 if room >= 8 && long => {
                    self.memory(&[0x48, 0x8b], ECX, ESI, place);
                    // movnti, or mov
                    let store: &[u8] = random.pick(&[&[0x48, 0x89], &[0x48, 0x0f, 0xc3]]);
                    self.memory(store, ECX, EDI, place);
                    8
                }
                1 if room >= 8 => {
                    // movq
                    self.memory(&[0xf3, 0x0f, 0x7e], 7, ESI, place);
                    self.memory(&[0x66, 0x0f, 0xd6], 7, EDI, place);
                    8
                }
                2 if room >= 2 => {
                    self.memory(&[0x66, 0x8b], ECX, ESI, place);
                    self.memory(&[0x66, 0x89], ECX, EDI, place);
                    2
                }
                3 => {
                    self.memory(&[0x8a], ECX, ESI, place);
                    self.memory(&[0x88], ECX, EDI, place);
                    1
                }
                // pop to memory
                4 if room >= 8 && long || room >= 4 && !long => {
                    self.memory(&[0xff], 6, ESI, place);
                    self.memory(&[0x8f], 0, EDI, place);
                    if long { 8 } else { 4 }
                }
                _ if room >= 4 => {
                    self.memory(&[0x8b], ECX, ESI, place);
                    self.memory(&[0x89], ECX, EDI, place);
                    4
                }
                _ => {
                    self.memory(&[0x8a], ECX, ESI, place);
                    self.memory(&[0x88], ECX, EDI, place);
                    1
                }
            };
        }
    }
}
