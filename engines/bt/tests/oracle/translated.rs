//! The engine under test: the same sequences in ring 3 of a guest with the same pages.
//!
//! The guest is nothing but page tables, descriptor tables and an exception handler per vector,
//! which saves the FPU state and halts. It is entered by `set_state` at the common prologue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bt::insn::enter;
use bt::{BtVcpu, Options};
use engine_core::{CpuState, DescriptorTable, Exit, GuestRam, Segment, Vcpu};
use iced_x86::code_asm::{
    CodeAssembler, eax, edx, ptr, qword_ptr, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx,
    rcx, rdi, rdx, rsi, rsp,
};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{
    CONTROL, DATA_BYTES, DATA_PAGES, DIRECTION, End, GS_BASE, LANDING, LANDING_FLAGS, MOST_NOTES,
    NOTE_DIRECTION, NOTE_RIP, NOTE_VECTOR, NOTED, NOTES, Note, OUTCOME_ENDED, PAGE, PROLOGUE,
    SLOT_BYTES, SLOTS, Start, USER_CS, USER_SS, avx, data_page, slot,
};
use crate::prologue::prologue;

/// Guest-physical places.
const TABLES: u64 = 0x10_0000;
const KERNEL_PHYS: u64 = 0x20_0000;
const PROLOGUE_PHYS: u64 = 0x30_0000;
const CONTROL_PHYS: u64 = 0x30_1000;
const DATA_PHYS: u64 = 0x31_0000;
const CODE_PHYS: u64 = 0x40_0000;
const RAM_MIB: u64 = 12;

/// Supervisor pages: IDT, GDT, TSS, handlers, stack, FPU image. In the upper half, as the host's: an
/// access of ring 3 finds a page there on both sides, and below nothing that the host hasn't.
const KERNEL: u64 = 0xffff_ffff_ad5a_3000;
const KERNEL_PAGES: u64 = 14;
const IDT: u64 = KERNEL;
const GDT: u64 = KERNEL + PAGE;
const TSS: u64 = KERNEL + PAGE + 0x800;
const HANDLERS: u64 = KERNEL + 2 * PAGE;
const HANDLER_STRIDE: u64 = 128;
/// What notes a fault after which the program goes on.
const LAND: u64 = KERNEL + 10 * PAGE;
const FX: u64 = KERNEL + 11 * PAGE;
/// Bytes from [`LANDING`] to the end of the notes.
const NOTES_BYTES: usize = (NOTES - LANDING) as usize + MOST_NOTES * size_of::<Note>();
/// RAX and RDX while a handler uses them.
const KEPT: u64 = FX + 0xc00;
const STACK: u64 = KERNEL + 14 * PAGE;

const KERNEL_CS: u16 = 0x10;
const TSS_SELECTOR: u16 = 0x40;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// A guest for sequences.
pub(crate) struct Translated {
    ram: Arc<GuestRam>,
    vcpu: BtVcpu,
    load: u64,
    /// Next free page for page tables.
    next_table: u64,
}

impl Translated {
    pub(crate) fn new() -> Translated {
        let ram = engine_core::memory::create(RAM_MIB).expect("guest memory");
        let vcpu = vcpu(&ram, LARGE_CACHE);
        let prologue = prologue();
        let mut guest = Translated {
            ram,
            vcpu,
            load: prologue.load,
            next_table: TABLES + PAGE,
        };
        guest.map(PROLOGUE, PROLOGUE_PHYS, USER);
        guest.map(CONTROL, CONTROL_PHYS, USER | WRITABLE | NO_EXECUTE);
        for index in 0..SLOTS {
            for page in 0..SLOT_BYTES as u64 / PAGE {
                let phys = CODE_PHYS + (index * SLOT_BYTES) as u64 + page * PAGE;
                guest.map(slot(index) + page * PAGE, phys, USER);
            }
        }
        for (index, (number, writable)) in DATA_PAGES.into_iter().enumerate() {
            let bits = USER | NO_EXECUTE | if writable { WRITABLE } else { 0 };
            guest.map(data_page(number), DATA_PHYS + index as u64 * PAGE, bits);
        }
        for page in 0..KERNEL_PAGES {
            guest.map(KERNEL + page * PAGE, KERNEL_PHYS + page * PAGE, WRITABLE);
        }
        guest.put(PROLOGUE_PHYS, &prologue.code);
        guest.kernel();
        guest
    }

    /// Forgets all translations: code slots may be filled anew. A tight code cache is emptied all
    /// the time.
    pub(crate) fn reset(&mut self, tight: bool) {
        let bytes = if tight { TIGHT_CACHE } else { LARGE_CACHE };
        self.vcpu = vcpu(&self.ram, bytes);
    }

    /// Sends accesses through the window from now to the next reset. False on a host without one.
    pub(crate) fn hold_window(&mut self) -> bool {
        self.vcpu.hold_window().is_some()
    }

    /// Leaves accesses to the software TLB from now to the next reset.
    pub(crate) fn refuse_window(&mut self) {
        self.vcpu.refuse_window();
    }

    /// Puts code into a slot. Nothing of the slot may have been run since the last reset.
    pub(crate) fn load_code(&mut self, index: usize, code: &[u8]) {
        self.put(CODE_PHYS + (index * SLOT_BYTES) as u64, code);
    }

    /// The handle that stops a sequence that does not end.
    pub(crate) fn kick_handle(&self) -> engine_core::kick::KickHandle {
        self.vcpu.kick_handle()
    }

    /// Runs one sequence on this data.
    ///
    /// # Errors
    /// What the engine did instead of delivering an exception.
    pub(crate) fn run(
        &mut self,
        start: &Start,
        template: &[u8; DATA_BYTES],
    ) -> Result<End, String> {
        self.put(DATA_PHYS, template);
        // SAFETY: `Start` is plain integers without padding that matters; read as bytes.
        let bytes = unsafe {
            std::slice::from_raw_parts(
                std::ptr::from_ref(start).cast::<u8>(),
                std::mem::size_of::<Start>(),
            )
        };
        self.put(CONTROL_PHYS, bytes);
        let mut notes = [0; NOTES_BYTES];
        notes[8..16].copy_from_slice(&NOTES.to_le_bytes());
        self.put(CONTROL_PHYS + LANDING - CONTROL, &notes);
        let mut state = self.initial();
        state.rip = self.load;
        let vcpu = &mut self.vcpu;
        let stopped = catch_unwind(AssertUnwindSafe(|| {
            vcpu.set_state(&state).map_err(|error| error.to_string())?;
            match vcpu.run().map_err(|error| error.to_string())? {
                Exit::Hlt => Ok(()),
                Exit::Interrupted => Err("does not end".to_owned()),
                other => Err(format!("{other:?}")),
            }
        }));
        stopped.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        })?;
        self.end()
    }

    fn end(&mut self) -> Result<End, String> {
        let state = self.vcpu.state().map_err(|error| error.to_string())?;
        let mut end = End::new();
        end.gpr = state.gpr;
        end.vector = state.rip.wrapping_sub(HANDLERS) / HANDLER_STRIDE;
        if end.vector > 255 {
            return Err(format!("halted at {:#x}", state.rip));
        }
        let mut frame = state.gpr[4];
        if frame >> 12 != (STACK - 1) >> 12 {
            return Err(format!("handler's stack pointer is {frame:#x}"));
        }
        if has_error_code(end.vector) {
            end.error = self.word(frame);
            frame += 8;
        }
        end.rip = self.word(frame);
        let cs = self.word(frame + 8);
        end.rflags = self.word(frame + 16);
        end.gpr[4] = self.word(frame + 24);
        let ss = self.word(frame + 32);
        if (cs, ss) != (USER_CS.into(), USER_SS.into()) {
            return Err(format!("frame has cs {cs:#x} and ss {ss:#x}"));
        }
        end.cr2 = state.cr2;
        self.get(FX - KERNEL + KERNEL_PHYS, &mut end.fx);
        self.get(DATA_PHYS, &mut end.memory);
        let words = end.notes.as_flattened_mut().iter_mut();
        for (word, at) in words.zip((CONTROL_PHYS + NOTES - CONTROL..).step_by(8)) {
            *word = self.phys_word(at);
        }
        end.outcome = OUTCOME_ENDED;
        Ok(end)
    }

    fn initial(&self) -> CpuState {
        let flat = Segment::flat;
        let null = Segment::default();
        CpuState {
            rflags: 0x202,
            segments: [
                null,
                flat(USER_CS, 0xa0fb),
                flat(USER_SS, 0xc0f3),
                null,
                null,
                Segment {
                    base: GS_BASE,
                    ..null
                },
            ],
            ldtr: Segment::no_ldt(),
            tr: Segment::tss(TSS_SELECTOR, TSS),
            gdtr: DescriptorTable {
                base: GDT,
                limit: 0x4f,
            },
            idtr: DescriptorTable {
                base: IDT,
                limit: 0xfff,
            },
            // PE MP ET NE WP PG.
            cr0: 0x8001_0033,
            cr3: TABLES,
            // PAE OSFXSR OSXMMEXCPT FSGSBASE, OSXSAVE.
            cr4: 0x1_0620 | u64::from(avx()) << 18,
            // LME LMA NXE, and no SCE.
            efer: 0xd00,
            ..CpuState::default()
        }
    }

    fn kernel(&mut self) {
        let phys = |virt: u64| virt - KERNEL + KERNEL_PHYS;
        for vector in 0..256u64 {
            let handler = HANDLERS + vector * HANDLER_STRIDE;
            // int3 and into may be used by ring 3, as under Linux.
            let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
            let low = handler & 0xffff
                | u64::from(KERNEL_CS) << 16
                | 0x8e00 << 32
                | dpl << 45
                | (handler >> 16 & 0xffff) << 48;
            self.put_word(phys(IDT) + 16 * vector, low);
            self.put_word(phys(IDT) + 16 * vector + 8, handler >> 32);
            let mut asm = CodeAssembler::new(64).expect("64-bit code");
            let mut build = || {
                let mut ends = asm.create_label();
                asm.cmp(qword_ptr(LANDING), 0)?;
                asm.je(ends)?;
                asm.mov(qword_ptr(KEPT), rax)?;
                if has_error_code(vector) {
                    asm.pop(rax)?;
                }
                asm.mov(eax, vector as u32)?;
                asm.jmp(LAND)?;
                asm.set_label(&mut ends)?;
                if !avx() {
                    asm.fxsave64(ptr(FX))?;
                    return asm.hlt();
                }
                asm.mov(qword_ptr(KEPT), rax)?;
                asm.mov(qword_ptr(KEPT + 8), rdx)?;
                asm.mov(eax, 7)?;
                asm.mov(edx, 0)?;
                asm.xsave64(ptr(FX))?;
                asm.mov(rax, qword_ptr(KEPT))?;
                asm.mov(rdx, qword_ptr(KEPT + 8))?;
                asm.hlt()
            };
            build().expect("encodable");
            let code = asm.assemble(handler).expect("encodable");
            assert!(code.len() as u64 <= HANDLER_STRIDE);
            self.put(phys(handler), &code);
        }
        let code = land().assemble(LAND).expect("encodable");
        self.put(phys(LAND), &code);
        let gdt = [
            (KERNEL_CS, 0x00af_9b00_0000_ffffu64),
            (USER_SS, 0x00cf_f300_0000_ffff),
            (USER_CS, 0x00af_fb00_0000_ffff),
        ];
        for (selector, descriptor) in gdt {
            self.put_word(phys(GDT) + u64::from(selector & !7), descriptor);
        }
        self.put_word(phys(TSS) + 4, STACK);
        // No I/O bitmap.
        self.put(phys(TSS) + 0x66, &0x68u16.to_le_bytes());
    }

    fn map(&mut self, virt: u64, phys: u64, bits: u64) {
        let next = &mut self.next_table;
        let page = || {
            let fresh = *next;
            *next += PAGE;
            if fresh < KERNEL_PHYS {
                Ok(fresh)
            } else {
                Err(fresh)
            }
        };
        enter(&self.ram, TABLES, virt, phys | bits | PRESENT, page).expect("room for tables");
    }

    fn put(&mut self, phys: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(phys))
            .expect("in guest memory");
    }

    fn put_word(&mut self, phys: u64, value: u64) {
        self.put(phys, &value.to_le_bytes());
    }

    fn get(&self, phys: u64, bytes: &mut [u8]) {
        self.ram
            .read_slice(bytes, GuestAddress(phys))
            .expect("in guest memory");
    }

    fn phys_word(&self, phys: u64) -> u64 {
        let mut bytes = [0; 8];
        self.get(phys, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A word of the supervisor's pages.
    fn word(&self, virt: u64) -> u64 {
        self.phys_word(virt - KERNEL + KERNEL_PHYS)
    }
}

fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// Notes the fault whose vector is in RAX, with RAX itself at [`KEPT`], and returns to where the program goes on.
fn land() -> CodeAssembler {
    let mut asm = CodeAssembler::new(64).expect("64-bit code");
    let mut build = || {
        let at = |word: usize| qword_ptr(rdx + 8 * word);
        asm.mov(qword_ptr(KEPT + 8), rdx)?;
        asm.mov(rdx, qword_ptr(NOTED))?;
        asm.mov(at(NOTE_VECTOR), rax)?;
        let others = [rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        let numbers = [3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        for (number, register) in numbers.into_iter().zip(others) {
            asm.mov(at(number), register)?;
        }
        asm.mov(at(1), rcx)?;
        // What is elsewhere: RAX, RDX, and the frame's.
        let kept = [
            (0, qword_ptr(KEPT)),
            (2, qword_ptr(KEPT + 8)),
            (4, qword_ptr(rsp + 24)),
            (NOTE_RIP, qword_ptr(rsp)),
        ];
        for (number, from) in kept {
            asm.mov(rax, from)?;
            asm.mov(at(number), rax)?;
        }
        asm.mov(rax, qword_ptr(rsp + 16))?;
        asm.and(eax, DIRECTION as i32)?;
        asm.mov(at(NOTE_DIRECTION), rax)?;
        asm.add(qword_ptr(NOTED), size_of::<Note>() as i32)?;
        asm.mov(rax, qword_ptr(LANDING))?;
        asm.mov(qword_ptr(rsp), rax)?;
        asm.mov(qword_ptr(LANDING), 0)?;
        asm.mov(qword_ptr(rsp + 16), LANDING_FLAGS as i32)?;
        asm.mov(rdx, qword_ptr(KEPT + 8))?;
        asm.mov(rax, qword_ptr(KEPT))?;
        asm.iretq()
    };
    build().expect("encodable");
    asm
}

const LARGE_CACHE: usize = 4 << 20;
const TIGHT_CACHE: usize = 64 << 10;

fn vcpu(ram: &Arc<GuestRam>, code_cache: usize) -> BtVcpu {
    let options = Options {
        code_cache,
        // Code that counts is code too: one of the two counts.
        count_paths: code_cache == TIGHT_CACHE,
    };
    let mut vcpu = BtVcpu::new(Arc::clone(ram), options).expect("a vCPU");
    if avx() {
        vcpu.set_xcr0(7);
    }
    vcpu
}
