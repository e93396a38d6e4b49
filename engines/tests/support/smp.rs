//! A Multiboot kernel that brings up every processor of its machine and tries what they can do to
//! each other: the same image for every mode and for QEMU.
//!
//! 64-bit code, which processors enter by way of 32-bit code of one page. The boot processor goes
//! through the steps of [`steps`]; the others count themselves, do their share of [`INCREMENTS`],
//! and then wait for interrupts in `hlt`. Each vector counts who takes it. A check that fails ends
//! the guest with its number; success is 0.

mod steps;
mod words;

use engine_core::testing::{TABLES, assemble, tables};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use words::{end, gate};

type Asm = Result<(), IcedError>;

const LOAD: u32 = 0x10_0000;
const GDT: u32 = LOAD + 0x20;
const GDT_POINTER: u32 = LOAD + 0x40;
const IDT_POINTER: u32 = LOAD + 0x50;
const TRAMPOLINE: u32 = LOAD + 0x100;
/// 32-bit code, entered by the loader and from the trampoline.
const ENTRY: u32 = LOAD + 0x200;
/// 64-bit code.
const CODE: u32 = LOAD + 0x300;
const IDT: u32 = LOAD + 0x2_0000;
const DATA: u32 = LOAD + 0x2_1000;
/// A page of stack for each processor, by id.
const STACKS: u32 = LOAD + 0x3_0000;

/// Selectors.
const CODE_32: u16 = 0x08;
const DATA_SEGMENT: u32 = 0x10;
const CODE_64: u16 = 0x18;

/// Where the other processors start, below 1 MiB.
const START_PAGE: u32 = 8;

const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

// Variables.
const ONLINE: u32 = DATA;
const GO: u32 = DATA + 4;
const COUNTER: u32 = DATA + 8;
const DONE: u32 = DATA + 12;
const IDS: u32 = DATA + 16;
const CPUS: u32 = DATA + 20;
/// By row: how often in all.
const TOTALS: u32 = DATA + 0x100;
/// By row and processor.
const COUNTS: u32 = DATA + 0x200;

/// Locked increments of each processor.
const INCREMENTS: u32 = 100_000;

/// Vectors, and with them rows of counts.
const FIRST: u32 = 0x40;
const FIXED: u32 = 0x40;
const ALL: u32 = 0x41;
const LOGICAL: u32 = 0x42;
const LOWEST: u32 = 0x43;
/// Whose handler sends [`PONG`] to processor 0.
const PING: u32 = 0x44;
const PONG: u32 = 0x45;
/// Whose handler starts the timer, which sends [`TIMER`].
const START_TIMER: u32 = 0x46;
const TIMER: u32 = 0x47;
const LINE: u32 = 0x48;
const LAST: u32 = 0x48;
const NMI_ROW: u32 = 15;

// The ICR's lower half.
const OTHERS: u32 = 0b11 << 18;
const EVERYBODY: u32 = 0b10 << 18;
const ASSERT: u32 = 1 << 14;
const BY_MASK: u32 = 1 << 11;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;
const NMI: u32 = 4 << 8;
const LOWEST_PRIORITY: u32 = 1 << 8;

/// The image. With `x2apic` local APICs are used by MSRs.
pub(crate) fn image(x2apic: bool) -> Vec<u8> {
    let mut kernel = Kernel {
        x2apic,
        known: Addresses::default(),
    };
    // Addresses are known after the first time; the code is as long with them as without.
    kernel.known = kernel.code().1;
    kernel.image()
}

/// Where some of the code lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Addresses {
    handlers: [u32; (LAST - FIRST + 1) as usize],
    nmi: u32,
    fault: u32,
}

struct Kernel {
    x2apic: bool,
    known: Addresses,
}

/// Labels of what is called or jumped to.
struct Labels {
    other: CodeLabel,
    handlers: Vec<CodeLabel>,
    nmi: CodeLabel,
    fault: CodeLabel,
    fail: CodeLabel,
}

fn at(address: u32) -> AsmMemoryOperand {
    dword_ptr(address)
}

impl Kernel {
    fn code(&self) -> (Vec<u8>, Addresses) {
        let mut asm = CodeAssembler::new(64).unwrap();
        let mut labels = Labels {
            other: asm.create_label(),
            handlers: (FIRST..=LAST).map(|_| asm.create_label()).collect(),
            nmi: asm.create_label(),
            fault: asm.create_label(),
            fail: asm.create_label(),
        };
        self.boot(&mut asm, &mut labels).unwrap();
        self.others(&mut asm, &mut labels).unwrap();
        self.handlers(&mut asm, &mut labels).unwrap();
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let code = asm.assemble_options(CODE.into(), options).unwrap();
        let of = |label: &CodeLabel| code.label_ip(label).unwrap() as u32;
        let addresses = Addresses {
            handlers: std::array::from_fn(|index| of(&labels.handlers[index])),
            nmi: of(&labels.nmi),
            fault: of(&labels.fault),
        };
        (code.inner.code_buffer, addresses)
    }

    fn image(&self) -> Vec<u8> {
        let (code, addresses) = self.code();
        assert_eq!(addresses, self.known);
        const FLAGS: u32 = 1 << 16 | 3;
        const MAGIC: u32 = 0x1bad_b002;
        let mut image = vec![0; (CODE - LOAD) as usize];
        let mut put = |address: u32, bytes: &[u8]| {
            let from = (address - LOAD) as usize;
            image[from..from + bytes.len()].copy_from_slice(bytes);
        };
        // It is loaded as it is, page tables and all.
        let header = [
            MAGIC,
            FLAGS,
            0u32.wrapping_sub(MAGIC + FLAGS),
            LOAD,
            LOAD,
            0,
            0,
            ENTRY,
        ];
        put(LOAD, &header.map(u32::to_le_bytes).concat());
        let gdt = [
            0,
            0x00cf_9b00_0000_ffff_u64,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
        ];
        put(GDT, &gdt.map(u64::to_le_bytes).concat());
        let pointer = |limit: u16, base: u32| {
            let mut bytes = limit.to_le_bytes().to_vec();
            bytes.extend(u64::from(base).to_le_bytes());
            bytes
        };
        let gdt_pointer = pointer(31, GDT);
        put(GDT_POINTER, &gdt_pointer);
        put(IDT_POINTER, &pointer(0xfff, IDT));
        put(TRAMPOLINE, &trampoline(&gdt_pointer));
        put(ENTRY, &entry());
        image.extend(code);
        image.resize((TABLES - u64::from(LOAD)) as usize, 0);
        image.extend(tables());
        image
    }

    /// The boot processor, from its entry to the end.
    fn boot(&self, asm: &mut CodeAssembler, labels: &mut Labels) -> Asm {
        self.settle_in(asm)?;
        // Whoever is not the boot processor goes another way.
        asm.mov(ecx, 0x1b)?;
        asm.rdmsr()?;
        asm.test(eax, 1 << 8)?;
        asm.jz(labels.other)?;
        asm.mov(esp, STACKS + 0x1000)?;
        // The 8259s stay silent.
        asm.mov(al, 0xff)?;
        asm.out(0x21, al)?;
        asm.out(0xa1, al)?;
        // Exceptions end the guest.
        for vector in 0..32 {
            gate(asm, vector, self.known.fault)?;
        }
        gate(asm, 2, self.known.nmi)?;
        for (handler, vector) in self.known.handlers.into_iter().zip(FIRST..) {
            gate(asm, vector, handler)?;
        }
        asm.lidt(ptr(IDT_POINTER))?;
        // The number of processors, from fw_cfg.
        asm.mov(dx, 0x510)?;
        asm.mov(ax, 5)?;
        asm.out(dx, ax)?;
        asm.inc(dx)?;
        asm.in_(al, dx)?;
        asm.movzx(eax, al)?;
        asm.mov(at(CPUS), eax)?;
        // Code for the others.
        asm.mov(esi, TRAMPOLINE)?;
        asm.mov(edi, START_PAGE << 12)?;
        asm.mov(ecx, 0x100)?;
        asm.rep().movsb()?;
        self.switch_on(asm)?;
        self.count_in(asm, labels)?;
        self.steps(asm, labels)?;
        for byte in b"smp ok\n" {
            asm.mov(al, u32::from(*byte))?;
            asm.mov(dx, 0x3f8)?;
            asm.out(dx, al)?;
        }
        end(asm, 0)
    }
}

/// 32-bit code that enters 64-bit code at [`CODE`].
fn entry() -> Vec<u8> {
    const EFER: u32 = 0xc000_0080;
    assemble(32, ENTRY.into(), |asm| {
        asm.cli()?;
        // By way of CS: the trampoline's other segments are small.
        asm.db(&[0x2e])?;
        asm.lgdt(ptr(GDT_POINTER))?;
        asm.mov(eax, 1 << 5)?;
        asm.mov(cr4, eax)?;
        asm.mov(eax, TABLES as u32)?;
        asm.mov(cr3, eax)?;
        asm.mov(ecx, EFER)?;
        asm.mov(eax, 1 << 8)?;
        asm.xor(edx, edx)?;
        asm.wrmsr()?;
        asm.mov(eax, 1 << 31 | 1)?;
        asm.mov(cr0, eax)?;
        asm.db(&far_jump(CODE, CODE_64))
    })
}

fn far_jump(to: u32, selector: u16) -> Vec<u8> {
    let mut bytes = vec![0xea];
    bytes.extend(to.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}

/// Real-mode code that enters protected mode at [`ENTRY`], to be copied to [`START_PAGE`].
fn trampoline(gdt_pointer: &[u8]) -> Vec<u8> {
    const POINTER: u8 = 0x80;
    let mut code = vec![0xfa]; // cli
    code.extend([0x31, 0xc0, 0x8e, 0xd8]); // xor ax, ax; mov ds, ax
    code.extend([0x66, 0x0f, 0x01, 0x16, POINTER, (START_PAGE << 4) as u8]); // lgdt
    code.extend([0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // CR0.PE
    code.push(0x66);
    code.extend(far_jump(ENTRY, CODE_32));
    code.resize(POINTER.into(), 0);
    code.extend(gdt_pointer);
    code
}
