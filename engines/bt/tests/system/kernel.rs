//! A kernel of a few hundred bytes for hand-made guests: descriptor tables, a handler for every
//! vector, a window of 4 KiB pages, and a way to tell the outside what happened.
//!
//! A test is 64-bit ring-0 code. What it expects to fault it puts between [`Asm::expect`]'s marks:
//! the handler writes a [`Record`] and goes on after it, in ring 0. Results go to [`RESULTS`].
//! At the end the guest prints log and results on its console, so the same image can be run under
//! another VMM and the texts compared.
//!
//! ```text
//! 0x10_0000  code                      0x42_0000  stacks (IST, RSP0, ring 3), growing down
//! 0x20_0000  boot page tables          0x50_0000  pages for the window
//! 0x40_0000  IDT, GDT, TSS, handlers   0x4000_0000  the window: 512 pages of PT's choosing
//! 0x41_0000  log, results, variables
//! ```

use engine_core::testing::{Guest, TABLES, assemble};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const KERNEL: u64 = 0x40_0000;
pub(crate) const IDT: u64 = KERNEL;
pub(crate) const GDT: u64 = KERNEL + 0x1000;
pub(crate) const TSS: u64 = KERNEL + 0x1800;
const POINTERS: u64 = KERNEL + 0x1f00;
const HANDLERS: u64 = KERNEL + 0x2000;
/// Page table and page directory of the window.
pub(crate) const PT: u64 = KERNEL + 0x6000;
pub(crate) const PD: u64 = KERNEL + 0x7000;
const KERNEL_END: u64 = KERNEL + 0x8000;

const LOG: u64 = 0x41_0000;
pub(crate) const RESULTS: u64 = 0x41_4000;
const RESULT_COUNT: u64 = 40;
const RESUME: u64 = 0x41_8000;
const RESUME_RSP: u64 = 0x41_8008;
/// Free for tests.
pub(crate) const SCRATCH: u64 = 0x41_9000;

pub(crate) const IST1: u64 = 0x42_2000;
pub(crate) const RSP0: u64 = 0x42_4000;
pub(crate) const USER_STACK: u64 = 0x42_8000;
/// Physical pages for the window.
pub(crate) const PAGES: u64 = 0x50_0000;
pub(crate) const WINDOW: u64 = 0x4000_0000;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
pub(crate) const USER: u64 = 4;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// Present, writable, user.
pub(crate) const ALL: u64 = PRESENT | WRITABLE | USER;

pub(crate) const KERNEL_CS: u64 = 0x08;
pub(crate) const KERNEL_SS: u64 = 0x10;
pub(crate) const USER_CS: u64 = 0x23;
pub(crate) const USER_SS: u64 = 0x1b;
const TSS_SELECTOR: u16 = 0x28;

/// Physical address of page `number` behind the window.
pub(crate) fn page(number: u64) -> u64 {
    PAGES + number * 0x1000
}

/// Virtual address of page `number` of the window.
pub(crate) fn window(number: u64) -> u64 {
    WINDOW + number * 0x1000
}

/// Address of the window's page-table entry `number`.
pub(crate) fn pte(number: u64) -> u64 {
    PT + number * 8
}

/// One exception, as the handler saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) vector: u64,
    /// 0 if the vector has none.
    pub(crate) error: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    /// Without arithmetic flags and RF.
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
    pub(crate) cr2: u64,
    /// RSP in the handler, before anything was pushed by it.
    pub(crate) handler_rsp: u64,
}

const RECORD_WORDS: u64 = 9;
/// What the handler keeps of RFLAGS: TF IF DF IOPL NT.
const KEPT_FLAGS: i32 = 0x7700;

/// The 64-bit assembler of a test, and what a test often does.
pub(crate) type Asm = CodeAssembler;
pub(crate) type Built = Result<(), IcedError>;

/// A guest in the making.
pub(crate) struct Kernel {
    window: Vec<(u64, u64)>,
    ist: Vec<(u8, u8)>,
    dpl3: Vec<u8>,
    absent: Vec<u8>,
    contents: Vec<(u64, Vec<u8>)>,
}

impl Kernel {
    pub(crate) fn new() -> Kernel {
        Kernel {
            window: Vec::new(),
            ist: Vec::new(),
            dpl3: Vec::new(),
            absent: Vec::new(),
            contents: Vec::new(),
        }
    }

    /// Maps page `number` of the window by this entry.
    pub(crate) fn map(mut self, number: u64, entry: u64) -> Kernel {
        self.window.push((number, entry));
        self
    }

    /// Lets `vector` use interrupt stack 1.
    pub(crate) fn on_ist(mut self, vector: u8) -> Kernel {
        self.ist.push((vector, 1));
        self
    }

    /// Lets ring 3 use `int vector`.
    pub(crate) fn for_users(mut self, vector: u8) -> Kernel {
        self.dpl3.push(vector);
        self
    }

    /// Leaves `vector` without a present gate.
    pub(crate) fn without_gate(mut self, vector: u8) -> Kernel {
        self.absent.push(vector);
        self
    }

    /// Puts bytes at a physical address.
    pub(crate) fn put(mut self, at: u64, bytes: Vec<u8>) -> Kernel {
        self.contents.push((at, bytes));
        self
    }

    /// Puts 64-bit code at a physical address, assembled to run at `run_at`.
    pub(crate) fn code(self, at: u64, run_at: u64, body: impl FnOnce(&mut Asm) -> Built) -> Kernel {
        let bytes = assemble(64, run_at, body);
        self.put(at, bytes)
    }

    /// The guest that runs `body` in ring 0, prints what happened and ends.
    pub(crate) fn guest(self, body: impl FnOnce(&mut Asm) -> Built) -> Guest {
        let (handlers, finish) = handlers();
        let mut guest = Guest::long(|asm| {
            boot(asm)?;
            body(asm)?;
            asm.mov(rax, finish)?;
            asm.jmp(rax)
        });
        let mut bytes = vec![0; (KERNEL_END - KERNEL) as usize];
        let mut put = |at: u64, value: &[u8]| {
            let at = (at - KERNEL) as usize;
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        for vector in 0..=255u8 {
            let handler = HANDLERS + u64::from(vector) * HANDLER_STRIDE;
            let ist = self.ist.iter().find(|entry| entry.0 == vector);
            let dpl = u64::from(self.dpl3.contains(&vector)) * 3;
            let kind = if self.absent.contains(&vector) {
                0x0e00
            } else {
                0x8e00
            };
            let low = handler & 0xffff
                | KERNEL_CS << 16
                | ist.map_or(0, |entry| u64::from(entry.1)) << 32
                | (kind | dpl << 13) << 32
                | (handler >> 16 & 0xffff) << 48;
            put(IDT + u64::from(vector) * 16, &low.to_le_bytes());
        }
        let gdt: [u64; 7] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            // A 64-bit TSS with a limit of 0x67 bytes.
            0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56,
            TSS >> 32,
        ];
        for (index, entry) in gdt.into_iter().enumerate() {
            put(GDT + index as u64 * 8, &entry.to_le_bytes());
        }
        put(TSS + 4, &RSP0.to_le_bytes());
        put(TSS + 0x24, &IST1.to_le_bytes());
        put(TSS + 0x66, &0x68u16.to_le_bytes());
        put(POINTERS, &(gdt.len() as u16 * 8 - 1).to_le_bytes());
        put(POINTERS + 2, &GDT.to_le_bytes());
        put(POINTERS + 16, &0xfffu16.to_le_bytes());
        put(POINTERS + 18, &IDT.to_le_bytes());
        put(HANDLERS, &handlers);
        for (number, entry) in &self.window {
            put(pte(*number), &entry.to_le_bytes());
        }
        put(PD, &(PT | ALL).to_le_bytes());
        let length = bytes.len() as u64;
        guest.segments.push((KERNEL, bytes, length));
        for (at, content) in self.contents {
            let length = content.len() as u64;
            guest.segments.push((at, content, length));
        }
        guest
    }
}

const EFER: u32 = 0xc000_0080;
const EFER_SCE_NXE: i32 = 1 | 1 << 11;
const CR4_OSXMMEXCPT: i32 = 1 << 10;

/// Loads the tables, opens the window, allows SYSCALL and NX.
fn boot(asm: &mut Asm) -> Built {
    // A PC's timer would interrupt ring 3 through the PICs.
    asm.mov(eax, 0xff)?;
    asm.out(0x21, al)?;
    asm.out(0xa1, al)?;
    asm.lgdt(ptr(POINTERS))?;
    asm.lidt(ptr(POINTERS + 16))?;
    asm.mov(eax, i32::from(TSS_SELECTOR))?;
    asm.ltr(eax)?;
    asm.mov(ecx, EFER)?;
    asm.rdmsr()?;
    asm.or(eax, EFER_SCE_NXE)?;
    asm.wrmsr()?;
    asm.mov(rax, cr4)?;
    asm.or(rax, CR4_OSXMMEXCPT)?;
    asm.mov(cr4, rax)?;
    // The second GiB: the window's page directory.
    asm.mov(rax, PD | ALL)?;
    asm.mov(qword_ptr(TABLES + 0x1008), rax)?;
    asm.xor(eax, eax)?;
    asm.mov(ds, eax)?;
    asm.mov(es, eax)?;
    asm.mov(fs, eax)?;
    asm.mov(gs, eax)
}

const HANDLER_STRIDE: u64 = 16;

/// The handlers of all vectors and what they share; and the address of the code that ends a test.
fn handlers() -> (Vec<u8>, u64) {
    let mut asm = CodeAssembler::new(64).expect("64-bit code");
    asm.set_prefer_short_branch(false);
    let mut finish = asm.create_label();
    let build = |asm: &mut Asm, finish: &mut CodeLabel| -> Built {
        let mut common = asm.create_label();
        let mut print = asm.create_label();
        for vector in 0..256u32 {
            let mut at = 0;
            if !matches!(vector, 8 | 10..=14 | 17 | 21) {
                asm.db(&[0x6a, 0x00])?; // push 0
                at += 2;
            }
            asm.db(&[0x68, vector as u8, 0, 0, 0])?; // push vector
            at += 5;
            asm.jmp(common)?;
            // Branches are of the long form here: 5 bytes.
            let pad = HANDLER_STRIDE as usize - at - 5;
            asm.db(&vec![0xcc; pad])?;
        }
        asm.set_label(&mut common)?;
        // [rsp]: vector, error, rip, cs, rflags, rsp, ss.
        asm.push(rax)?;
        asm.push(rbx)?;
        asm.push(rcx)?;
        asm.mov(rbx, LOG)?;
        asm.mov(rax, qword_ptr(LOG))?;
        asm.inc(qword_ptr(LOG))?;
        asm.imul_3(rax, rax, RECORD_WORDS as i32 * 8)?;
        asm.lea(rbx, ptr(rbx + rax + 8))?;
        for word in 0..7 {
            asm.mov(rax, qword_ptr(rsp + 24 + 8 * word))?;
            if word == 4 {
                asm.and(rax, KEPT_FLAGS)?;
            }
            asm.mov(qword_ptr(rbx + 8 * word), rax)?;
        }
        asm.mov(rax, cr2)?;
        asm.mov(qword_ptr(rbx + 56), rax)?;
        // Where the frame with its error code began.
        asm.lea(rax, ptr(rsp + 24 + 16))?;
        asm.mov(qword_ptr(rbx + 64), rax)?;
        asm.mov(rax, qword_ptr(RESUME))?;
        asm.test(rax, rax)?;
        asm.je(*finish)?;
        asm.mov(qword_ptr(rsp + 24 + 16), rax)?;
        asm.mov(qword_ptr(rsp + 24 + 24), KERNEL_CS as i32)?;
        asm.mov(rax, qword_ptr(RESUME_RSP))?;
        asm.mov(qword_ptr(rsp + 24 + 40), rax)?;
        asm.mov(qword_ptr(rsp + 24 + 48), KERNEL_SS as i32)?;
        asm.mov(qword_ptr(RESUME), 0)?;
        // Interrupts stay as they were in the log, but off here.
        asm.and(qword_ptr(rsp + 24 + 32), !0x100)?;
        asm.pop(rcx)?;
        asm.pop(rbx)?;
        asm.pop(rax)?;
        asm.add(rsp, 16)?;
        asm.iretq()?;

        asm.set_label(finish)?;
        asm.cli()?;
        asm.mov(rsp, engine_core::testing::STACK)?;
        // The log, then the results.
        asm.mov(rbp, qword_ptr(LOG))?;
        asm.imul_3(rbp, rbp, RECORD_WORDS as i32)?;
        asm.mov(rsi, LOG + 8)?;
        let mut section = asm.create_label();
        asm.mov(edi, 0)?;
        asm.set_label(&mut section)?;
        asm.zero_bytes()?;
        let mut next = asm.create_label();
        let mut done = asm.create_label();
        asm.set_label(&mut next)?;
        asm.test(rbp, rbp)?;
        asm.je(done)?;
        asm.mov(rax, qword_ptr(rsi))?;
        asm.call(print)?;
        asm.add(rsi, 8)?;
        asm.dec(rbp)?;
        asm.jmp(next)?;
        asm.set_label(&mut done)?;
        asm.inc(edi)?;
        asm.mov(rsi, RESULTS)?;
        asm.mov(rbp, RESULT_COUNT)?;
        asm.cmp(edi, 1)?;
        asm.je(section)?;
        asm.xor(eax, eax)?;
        asm.out(0xf4, al)?;
        let mut spin = asm.create_label();
        asm.set_label(&mut spin)?;
        asm.hlt()?;
        asm.jmp(spin)?;

        // Prints RAX in hex and a line feed.
        asm.set_label(&mut print)?;
        asm.mov(rbx, rax)?;
        asm.mov(ecx, 16)?;
        asm.mov(edx, 0x3f8)?;
        let mut digit = asm.create_label();
        asm.set_label(&mut digit)?;
        asm.rol(rbx, 4)?;
        asm.mov(eax, ebx)?;
        asm.and(eax, 15)?;
        asm.add(eax, 0x30)?;
        let mut decimal = asm.create_label();
        asm.cmp(eax, 0x3a)?;
        asm.jb(decimal)?;
        asm.add(eax, 0x27)?;
        asm.set_label(&mut decimal)?;
        asm.out(dx, al)?;
        asm.dec(ecx)?;
        asm.jne(digit)?;
        asm.mov(eax, 10)?;
        asm.out(dx, al)?;
        asm.ret()
    };
    build(&mut asm, &mut finish).expect("the handlers can be assembled");
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS
        | iced_x86::BlockEncoderOptions::DONT_FIX_BRANCHES;
    let result = asm
        .assemble_options(HANDLERS, options)
        .expect("the handlers can be encoded");
    let finish = result.label_ip(&finish).expect("it is there");
    let code = result.inner.code_buffer;
    assert!(HANDLERS + code.len() as u64 <= PT);
    (code, finish)
}

/// What a test does between its own instructions.
pub(crate) trait Steps {
    /// Runs `body`, which is to fault; execution goes on after it. Clobbers RAX.
    fn expect(&mut self, body: impl FnOnce(&mut Asm) -> Built) -> Built;
    /// Goes to ring 3 at `target` and comes back by the first exception. Clobbers RAX.
    fn in_ring_3(&mut self, target: u64, flags: i32) -> Built;
    /// Stores a register as result `number`.
    fn result(&mut self, number: u64, value: AsmRegister64) -> Built;
    /// Maps page `number` of the window by `entry`, without an invalidation. Clobbers RAX.
    fn remap(&mut self, number: u64, entry: u64) -> Built;
    /// As `remap`, and invalidates.
    fn remap_now(&mut self, number: u64, entry: u64) -> Built;
}

impl Steps for CodeAssembler {
    fn expect(&mut self, body: impl FnOnce(&mut Asm) -> Built) -> Built {
        let mut after = self.create_label();
        self.lea(rax, ptr(after))?;
        self.mov(qword_ptr(RESUME), rax)?;
        self.mov(qword_ptr(RESUME_RSP), rsp)?;
        body(self)?;
        self.set_label(&mut after)?;
        self.zero_bytes()
    }

    fn in_ring_3(&mut self, target: u64, flags: i32) -> Built {
        self.expect(|asm| {
            asm.push(USER_SS as i32)?;
            asm.push(USER_STACK as i32)?;
            asm.push(flags)?;
            asm.push(USER_CS as i32)?;
            asm.mov(rax, target)?;
            asm.push(rax)?;
            asm.iretq()
        })
    }

    fn result(&mut self, number: u64, value: AsmRegister64) -> Built {
        assert!(number < RESULT_COUNT);
        self.mov(qword_ptr(RESULTS + number * 8), value)
    }

    fn remap(&mut self, number: u64, entry: u64) -> Built {
        self.mov(rax, entry)?;
        self.mov(qword_ptr(pte(number)), rax)
    }

    fn remap_now(&mut self, number: u64, entry: u64) -> Built {
        self.remap(number, entry)?;
        self.mov(rax, window(number))?;
        self.invlpg(byte_ptr(rax))
    }
}

/// Log and results, read back from a guest's console.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) log: Vec<Record>,
    pub(crate) results: Vec<u64>,
}

impl Report {
    pub(crate) fn read(console: &str) -> Report {
        let words: Vec<u64> = console
            .lines()
            .map(|line| u64::from_str_radix(line.trim(), 16).expect("a hexadecimal word"))
            .collect();
        let records = words.len() - RESULT_COUNT as usize;
        let log = words[..records]
            .chunks(RECORD_WORDS as usize)
            .map(|word| Record {
                vector: word[0],
                error: word[1],
                rip: word[2],
                cs: word[3],
                rflags: word[4],
                rsp: word[5],
                ss: word[6],
                cr2: word[7],
                handler_rsp: word[8],
            })
            .collect();
        Report {
            log,
            results: words[records..].to_vec(),
        }
    }

    /// (vector, error, cr2) of each exception; CR2 is left out where it isn't a page fault's.
    pub(crate) fn faults(&self) -> Vec<(u64, u64, u64)> {
        self.log
            .iter()
            .map(|record| {
                let address = if record.vector == 14 { record.cr2 } else { 0 };
                (record.vector, record.error, address)
            })
            .collect()
    }
}
