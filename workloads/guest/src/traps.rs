//! Traps: descriptor tables, and what happens on a trap that asm/traps.s does not mend itself.
//!
//! There is one rule: a trap while ring 3 or a guarded call runs ends that; any other is a crash.
//! So no trap's frame is ever returned to here, and the trap stack can be dropped as it is.
//! Interrupts do return: see `interrupts`. They are taken in ring 0 alone, where a driver waits.

use crate::{cpu, crash};
use core::{
    arch::global_asm,
    mem::size_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};
use programs::{Fault, Ring};

global_asm!(include_str!("asm/entry.s"));
global_asm!(include_str!("asm/traps.s"));

/// Vectors with an entry; the IDT ends there. No controller is given a higher vector, which would
/// come as a general-protection fault.
const VECTORS: usize = 64;
/// Vectors that end the guest whatever was running: NMI, double fault, machine check.
const FATAL: [u64; 3] = [2, 8, 18];

unsafe extern "C" {
    static trap_entries: [u64; VECTORS];
    static gdt_tss: [AtomicU64; 2];
    static trap_stack_top: u8;
    static nested_stack_top: u8;
    safe fn resume() -> !;
    /// See asm/traps.s.
    pub(crate) safe fn enter_user(
        function: u64,
        arena: u64,
        words: u64,
        size: u64,
        iterations: u64,
    ) -> Ended;
    fn guarded(function: extern "C" fn(u64) -> u64, argument: u64) -> Ended;
}

/// Stack pointer of the last `enter_user` or `guarded` under way, 0 if none is.
#[unsafe(no_mangle)]
static resume_stack: AtomicU64 = AtomicU64::new(0);
/// Faults mended by the short paths.
#[unsafe(no_mangle)]
pub(crate) static trap_count: AtomicU64 = AtomicU64::new(0);
/// 1 while divide errors are expected.
#[unsafe(no_mangle)]
pub(crate) static divide_armed: AtomicU64 = AtomicU64::new(0);
/// 1 while breakpoints are expected.
#[unsafe(no_mangle)]
pub(crate) static breakpoint_armed: AtomicU64 = AtomicU64::new(0);
/// Address whose page faults are mended.
#[unsafe(no_mangle)]
pub(crate) static expected_fault: AtomicU64 = AtomicU64::new(NO_FAULT);

/// An address that no page fault is ever about, as it is not canonical.
pub(crate) const NO_FAULT: u64 = 1 << 63;

/// How `enter_user` or `guarded` came back.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Ended {
    /// What the function returned.
    pub(crate) value: u64,
    /// 1 if a trap ended it, which [`last`] describes.
    pub(crate) trapped: u64,
}

/// What trap_common pushes, and the processor before it.
#[repr(C)]
#[derive(Debug)]
#[allow(
    missing_docs,
    reason = "registers are named as the processor names them"
)]
pub(crate) struct Frame {
    pub(crate) r15: u64,
    pub(crate) r14: u64,
    pub(crate) r13: u64,
    pub(crate) r12: u64,
    pub(crate) r11: u64,
    pub(crate) r10: u64,
    pub(crate) r9: u64,
    pub(crate) r8: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rbp: u64,
    pub(crate) rbx: u64,
    pub(crate) rdx: u64,
    pub(crate) rcx: u64,
    pub(crate) rax: u64,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
}

/// The last trap that ended something: vector, error, rip, cs, address, rax.
static LAST: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

/// The last trap that ended something, and what rax held.
pub(crate) fn last() -> (Fault, u64) {
    let [vector, error, rip, cs, address, rax] = LAST.each_ref().map(|word| word.load(Relaxed));
    let fault = Fault {
        ring: if cs & 3 == 3 {
            Ring::User
        } else {
            Ring::Kernel
        },
        vector: vector as u8,
        error,
        rip,
        address,
    };
    (fault, rax)
}

/// Calls a function that may trap.
pub(crate) fn guard(function: extern "C" fn(u64) -> u64, argument: u64) -> Result<u64, Fault> {
    // SAFETY: the functions that this module's callers hand over own nothing, so that leaving
    // them half done drops nothing.
    let ended = unsafe { guarded(function, argument) };
    if ended.trapped == 0 {
        Ok(ended.value)
    } else {
        Err(last().0)
    }
}

#[unsafe(no_mangle)]
extern "C" fn trap(frame: &Frame) -> ! {
    let address = if frame.vector == 14 {
        cpu::fault_address()
    } else {
        0
    };
    if resume_stack.load(Relaxed) == 0 || FATAL.contains(&frame.vector) {
        crash::fault(frame, address);
    }
    let words = [
        frame.vector,
        frame.error,
        frame.rip,
        frame.cs,
        address,
        frame.rax,
    ];
    for (slot, word) in LAST.iter().zip(words) {
        slot.store(word, Relaxed);
    }
    resume()
}

/// Task-state segment, of which long mode uses stack pointers only (SDM 3A 8.7), in 32-bit parts
/// since its 64-bit fields are not aligned.
static TSS: [AtomicU32; 26] = [const { AtomicU32::new(0) }; 26];

static IDT: [[AtomicU64; 2]; VECTORS] = [const { [const { AtomicU64::new(0) }; 2] }; VECTORS];

/// Operand of lgdt and lidt.
#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Fills and loads IDT and TSS.
pub(crate) fn set_up() {
    // IST 1 for all, IST 2 for what may come while IST 1 is in use.
    let stacks = [&raw const trap_stack_top, &raw const nested_stack_top];
    for (index, stack) in stacks.into_iter().enumerate() {
        let at = 9 + 2 * index;
        TSS[at].store(stack as u64 as u32, Relaxed);
        TSS[at + 1].store((stack as u64 >> 32) as u32, Relaxed);
    }
    // No I/O permission map: its offset is the segment's end.
    TSS[25].store((size_of_val(&TSS) as u32) << 16, Relaxed);

    // SAFETY: written by the assembler, never changed.
    for (vector, (gate, &entry)) in IDT.iter().zip(unsafe { &trap_entries }).enumerate() {
        let stack = if FATAL.contains(&(vector as u64)) {
            2
        } else {
            1
        };
        // A 64-bit interrupt gate, DPL 0 (SDM 3A 6.14.1).
        let low = entry & 0xffff
            | u64::from(cpu::KERNEL_CODE) << 16
            | stack << 32
            | 0x8e << 40
            | (entry >> 16 & 0xffff) << 48;
        gate[0].store(low, Relaxed);
        gate[1].store(entry >> 32, Relaxed);
    }

    let base = TSS.as_ptr() as u64;
    let limit = size_of_val(&TSS) as u64 - 1;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let idt = Pointer {
        limit: (VECTORS * size_of::<[AtomicU64; 2]>() - 1) as u16,
        base: IDT.as_ptr() as u64,
    };
    // SAFETY: the descriptor is the TSS's own, and the tables live for ever.
    unsafe {
        gdt_tss[0].store(low, Relaxed);
        gdt_tss[1].store(base >> 32, Relaxed);
        core::arch::asm!("lidt [{}]", in(reg) &raw const idt, options(readonly, nostack, preserves_flags));
        core::arch::asm!("ltr {:x}", in(reg) cpu::TASK_STATE, options(nostack, preserves_flags));
    }
}
