//! Pages full of functions that add and multiply, call and jump to each other in this page and its
//! neighbours, read and write data there, and change each other.

use crate::layout::{DATA, ENTRIES, PAGE, POINTER, REGION_PAGES, Region};
use crate::random::Random;

/// A page that is being written.
struct Page<'r> {
    bytes: Vec<u8>,
    at: usize,
    random: &'r mut Random,
}

impl Page<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    /// An instruction whose last 4 bytes, before `tail`, are the way to `offset` of a page nearby.
    fn relative(&mut self, opcode: &[u8], offset: u64, distance: i64, tail: &[u8]) {
        let end = self.at + opcode.len() + 4 + tail.len();
        let by = offset as i64 + distance * PAGE as i64 - end as i64;
        self.put(opcode);
        self.put(&(by as i32).to_le_bytes());
        self.put(tail);
    }

    fn add(&mut self) {
        let value = self.random.next() as u32;
        self.put(&[0x05]);
        self.put(&value.to_le_bytes());
    }

    fn multiply(&mut self) {
        let value = self.random.next() as u32 | 1;
        self.put(&[0x69, 0xc0]);
        self.put(&value.to_le_bytes());
    }

    /// How many pages away: most often none.
    fn distance(&mut self) -> i64 {
        self.random.pick(&[-1, 0, 0, 1, 1])
    }

    fn add_data(&mut self) {
        let distance = self.distance();
        self.relative(&[0x03, 0x05], DATA, distance, &[]);
    }

    fn call(&mut self, number: usize) {
        let distance = self.distance();
        self.relative(&[0xe8], ENTRIES[number], distance, &[]);
    }

    fn jump(&mut self, number: usize) {
        let distance = self.distance();
        self.relative(&[0xe9], ENTRIES[number], distance, &[]);
    }

    fn ret(&mut self) {
        self.put(&[0xc3]);
    }
}

/// The address of a function in some region.
pub(crate) fn target(random: &mut Random, functions: &[u64]) -> u64 {
    let region = random.pick(&Region::ALL);
    let page = random.below(REGION_PAGES);
    random.pick(region.bases()) + page * PAGE + random.pick(functions)
}

pub(crate) fn page(random: &mut Random) -> Vec<u8> {
    let pointer = target(random, &ENTRIES[..3]);
    let mut page = Page {
        bytes: vec![0xcc; PAGE as usize],
        at: 0,
        random,
    };
    // The end of an instruction of the page before, and a return.
    let value = page.random.next() as u16;
    page.put(&value.to_le_bytes());
    page.ret();
    for (number, offset) in ENTRIES.into_iter().enumerate() {
        page.at = offset as usize;
        match number {
            0 => {
                page.add();
                page.ret();
            }
            1 => {
                page.add();
                page.jump(0);
            }
            2 => {
                page.multiply();
                page.call(1);
                page.add();
                page.jump(0);
            }
            3 => {
                page.add_data();
                page.call(2);
                page.multiply();
                page.ret();
            }
            4 => {
                let rounds = page.random.below(3) as u32 + 1;
                page.put(&[0xb9]);
                page.put(&rounds.to_le_bytes());
                let again = page.at;
                page.add();
                page.put(&[0xff, 0xc9, 0x75]);
                page.put(&[(again as i64 - (page.at as i64 + 1)) as u8]);
                page.jump(3);
            }
            5 => page.relative(&[0xff, 0x25], POINTER, 0, &[]),
            6 => {
                // Changes function 0 of this page or the next, and calls it.
                let distance = page.random.below(2) as i64;
                page.relative(&[0x83, 0x05], ENTRIES[0] + 1, distance, &[1]);
                page.relative(&[0xe8], ENTRIES[0], distance, &[]);
                page.ret();
            }
            7 => {
                // Goes on where a pointer leads, by a return that nobody called for.
                page.relative(&[0xff, 0x35], POINTER, 0, &[]);
                page.ret();
            }
            8 => {
                page.call(6);
                page.call(0);
                page.multiply();
                page.call(7);
                page.jump(4);
            }
            _ => {
                // Runs into the next page, in the middle of an instruction.
                page.add();
                let value = page.random.next() as u16;
                page.put(&[0x05]);
                page.put(&value.to_le_bytes());
            }
        }
    }
    page.at = DATA as usize;
    let data = page.random.next();
    page.put(&data.to_le_bytes());
    page.at = POINTER as usize;
    page.put(&pointer.to_le_bytes());
    page.bytes
}
