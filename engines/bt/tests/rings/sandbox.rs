//! What every case starts from: descriptor tables, tasks, page tables, places to go to.

use crate::layout::*;

/// The sandbox of 32-bit tables, or of IA-32e mode.
pub(crate) struct Sandbox {
    pub(crate) bytes: Vec<u8>,
    long: bool,
}

/// A segment descriptor; `kind` is the byte with type, S, DPL and P, `flags` G, D/B, L and AVL.
pub(crate) fn descriptor(base: u32, limit: u32, kind: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(kind) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(flags & 15) << 52
        | (base >> 24) << 56
}

/// A gate, or the first half of one of 16 bytes.
pub(crate) fn gate(selector: u16, target: u32, kind: u8, parameters: u8) -> u64 {
    let target = u64::from(target);
    target & 0xffff
        | u64::from(selector) << 16
        | u64::from(parameters) << 32
        | u64::from(kind) << 40
        | (target >> 16) << 48
}

/// Vectors of gates that are good and open to every ring.
pub(crate) const GOOD_VECTORS: std::ops::Range<u32> = 0x70..0x80;
pub(crate) const IDT_ENTRIES: u32 = 0x80;
/// Vectors of gates that cases make up.
pub(crate) const OWN_VECTORS: std::ops::Range<u32> = 0x20..0x30;
/// First descriptor that cases make up.
pub(crate) const FREE: u32 = 0xc0;

/// Selectors of the first descriptors; see [`Sandbox::new`].
pub(crate) mod select {
    pub(crate) const CODE: [u16; 4] = [0x08, 0x19, 0x2a, 0x3b];
    pub(crate) const DATA: [u16; 4] = [0x10, 0x21, 0x32, 0x43];
    pub(crate) const CODE_16: u16 = 0x48;
    pub(crate) const DATA_16: u16 = 0x50;
    pub(crate) const USER_CODE_16: u16 = 0x5b;
    pub(crate) const USER_DATA_16: u16 = 0x63;
    pub(crate) const TSS: u16 = 0x80;
    pub(crate) const TSS_16: u16 = 0x88;
    pub(crate) const LDT: u16 = 0x90;
    pub(crate) const TSS_B: u16 = 0xa0;
    pub(crate) const TSS_C: u16 = 0xb0;
}

/// Descriptors that the executive needs itself.
pub(crate) fn own_descriptors() -> [(u16, u64); 4] {
    [
        (OWN_CODE, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
        (OWN_DATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
        (OWN_CODE_64, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
        (OWN_TASK, descriptor(OWN_TSS, 0x67, 0x89, 0)),
    ]
}

impl Sandbox {
    pub(crate) fn new(long: bool) -> Sandbox {
        let mut sandbox = Sandbox {
            bytes: vec![0; SANDBOX_SIZE as usize],
            long,
        };
        sandbox.descriptors();
        sandbox.interrupts();
        sandbox.tasks();
        sandbox.tables();
        sandbox.places();
        sandbox
    }

    pub(crate) fn put(&mut self, at: u32, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, at: u32, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn qword(&mut self, at: u32, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn descriptors(&mut self) {
        let flat = |kind, flags| descriptor(0, 0xf_ffff, kind, flags);
        let near = |kind, flags| descriptor(SANDBOX, 0xffff, kind, flags);
        // 32-bit code, or 64-bit code in IA-32e mode, where the other is 32-bit code.
        let (code, other) = if self.long { (0xa, 0xc) } else { (0xc, 0) };
        let base = if self.long { 0 } else { SANDBOX };
        for ring in 0..4u8 {
            let at = 8 + 16 * u32::from(ring);
            self.qword(at, flat(0x9b | ring << 5, code));
            self.qword(at + 8, flat(0x93 | ring << 5, 0xc));
        }
        let limit = if self.long { 0xf_ffff } else { 0xffff };
        self.qword(0x48, descriptor(base, limit, 0x9b, other));
        self.qword(0x50, near(0x93, 0));
        self.qword(0x58, descriptor(base, limit, 0xfb, other));
        self.qword(0x60, near(0xf3, 0));
        self.qword(0x68, flat(0x9f, code));
        self.qword(0x70, flat(0xde, 0xc));
        self.qword(0x78, flat(0xf9, code));
        let system = |at, kind| descriptor(SANDBOX + at, 0xff, kind, 0);
        self.qword(0x80, system(at::TSS, 0x89));
        self.qword(0xa0, system(at::TSS_B, 0x89));
        self.qword(0xb0, system(at::TSS_C, 0x89));
        self.qword(0x90, descriptor(SANDBOX + at::LDT, 0x7f, 0x82, 0));
        if !self.long {
            self.qword(0x88, system(at::TSS_16, 0x81));
        }
        for (selector, value) in own_descriptors() {
            self.qword(selector.into(), value);
        }
        for ring in 0..4u8 {
            let at = at::LDT + 16 * u32::from(ring);
            self.qword(at, flat(0x9a | ring << 5, code));
            self.qword(at + 8, flat(0x92 | ring << 5, 0xc));
        }
    }

    fn interrupts(&mut self) {
        for vector in 0..IDT_ENTRIES {
            let open = GOOD_VECTORS.contains(&vector) || vector == 3 || vector == 4;
            let kind = if open { 0xee } else { 0x8e };
            if self.long {
                let target = LONG_HANDLERS + HANDLER_STEP * vector;
                let stack = if vector == 8 { 7 } else { 0 };
                let entry = gate(OWN_CODE_64, target, kind, stack);
                self.qword(at::IDT + 16 * vector, entry);
            } else if vector == 8 {
                self.qword(at::IDT + 8 * vector, gate(OWN_TASK, 0, 0x85, 0));
            } else {
                let target = HANDLERS + HANDLER_STEP * vector;
                self.qword(at::IDT + 8 * vector, gate(OWN_CODE, target, kind, 0));
            }
        }
    }

    fn tasks(&mut self) {
        let stacks = SANDBOX + at::STACKS;
        if self.long {
            for ring in 0..3 {
                self.qword(
                    at::TSS + 4 + 8 * ring,
                    u64::from(stacks + 0x200 * (ring + 1)),
                );
            }
            for number in 0..7 {
                // The last is for double faults, and out of the way.
                let top = if number == 6 {
                    STACK - 0x1000
                } else {
                    stacks + 0x600 - 0x40 * number
                };
                self.qword(at::TSS + 0x24 + 8 * number, u64::from(top));
            }
            self.word(at::TSS + 0x64, 0x68 << 16);
            return;
        }
        for (task, at) in [at::TSS, at::TSS_B, at::TSS_C].into_iter().enumerate() {
            for ring in 0..3u32 {
                self.word(at + 4 + 8 * ring, stacks + 0x200 * (ring + 1));
                let selector = 0x10 + 0x11 * ring;
                self.word(at + 8 + 8 * ring, selector);
            }
            self.word(at + 0x64, 0x68 << 16);
            self.word(at + 0x1c, SANDBOX + at::TABLES);
            self.word(at + 0x20, SANDBOX + at::PADS + 16 * task as u32);
            self.word(at + 0x24, 2);
            for register in 0..8 {
                self.word(
                    at + 0x28 + 4 * register,
                    0x1111_0000 * task as u32 + register,
                );
            }
            self.word(at + 0x38, SANDBOX + at::STACK);
            for segment in 0..6 {
                let selector = if segment == 1 { 8 } else { 0x10 };
                self.word(at + 0x48 + 4 * segment, selector);
            }
            self.word(at + 0x60, if task == 1 { 0x90 } else { 0 });
        }
        let near = at::TSS_16;
        for ring in 0..3u32 {
            let pointer = (at::STACKS + 0x200 * (ring + 1)) | (0x50 << 16);
            self.word(near + 2 + 4 * ring, pointer);
        }
        let half = |sandbox: &mut Sandbox, at: u32, value: u32| {
            sandbox.put(near + at, &(value as u16).to_le_bytes());
        };
        half(self, 0x0e, at::PADS);
        half(self, 0x10, 2);
        for register in 0..8 {
            half(self, 0x12 + 2 * register, 0x2220 + register);
        }
        half(self, 0x1a, at::STACK);
        for (at, selector) in [(0x22, 0x50), (0x24, 0x48), (0x26, 0x50), (0x28, 0x50)] {
            half(self, at, selector);
        }
        half(self, 0x2a, 0x90);
    }

    /// The first 4 MiB, one to one and for everybody: by 4 KiB pages where the sandbox is.
    fn tables(&mut self) {
        let at = at::TABLES;
        let first = SANDBOX + at;
        if self.long {
            self.qword(at, u64::from(first + 0x1000) | 7);
            self.qword(at + 0x1000, u64::from(first + 0x2000) | 7);
            self.qword(at + 0x2000, u64::from(first + 0x3000) | 7);
            self.qword(at + 0x2008, 0x20_0087);
            for page in 0..512 {
                self.qword(at + 0x3000 + 8 * page, u64::from(page) << 12 | 7);
            }
        } else {
            self.word(at, (first + 0x1000) | 7);
            for page in 0..1024 {
                self.word(at + 0x1000 + 4 * page, page << 12 | 7);
            }
            // PAE.
            let at = at + 0x2000;
            self.qword(at, u64::from(first + 0x3000) | 1);
            self.qword(at + 0x1000, 0x87);
            self.qword(at + 0x1008, 0x20_0087);
        }
    }

    fn places(&mut self) {
        self.bytes[at::CODE as usize..].fill(0xcc);
        for number in 0..16u8 {
            let before: &[u8] = match number {
                1 => &[0x50],                      // push eax
                2 => &[0x8a, 0x07],                // mov al, [edi]
                3 => &[0x88, 0x07],                // mov [edi], al
                4 => &[0x58],                      // pop eax
                5 => &[0x9c, 0x9d],                // pushf; popf
                6 if self.long => &[0x48, 0xcf],   // iretq
                6 => &[0xcf],                      // iret
                7 => &[0xcb],                      // retf
                8 => &[0x26, 0x8b, 0x07],          // mov eax, es:[edi]
                9 => &[0x64, 0x8b, 0x07],          // mov eax, fs:[edi]
                10 => &[0x65, 0x89, 0x07],         // mov gs:[edi], eax
                11 => &[0x1e, 0x07],               // push ds; pop es
                12 => &[0x2e, 0x8b, 0x07],         // mov eax, cs:[edi]
                13 if !self.long => &[0x66, 0xcf], // iret of the other size
                14 => &[0xc8, 8, 0, 1],            // enter 8, 1
                _ => &[],
            };
            let mut code = before.to_vec();
            code.extend([0xcd, 0x70 + number]);
            self.put(at::PADS + 16 * u32::from(number), &code);
        }
    }
}
