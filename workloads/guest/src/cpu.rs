//! The instructions that Rust has no words for, one function each, and the constants they need.

use core::{arch::asm, sync::atomic::AtomicU64};

/// Selector of the kernel's code segment.
pub(crate) const KERNEL_CODE: u16 = 0x08;
/// Selector of the task-state segment.
pub(crate) const TASK_STATE: u16 = 0x30;

/// STAR: what syscall loads CS from (bits 32-47), and sysret (bits 48-63, plus 16; APM 2, 6.1.1).
pub(crate) const STAR: u32 = 0xc000_0081;
/// LSTAR: where syscall enters 64-bit kernels.
pub(crate) const LSTAR: u32 = 0xc000_0082;
/// SFMASK: flags that syscall clears.
pub(crate) const SFMASK: u32 = 0xc000_0084;

/// Reads a port.
#[inline(always)]
pub(crate) fn port_in(port: u16) -> u8 {
    let value;
    // SAFETY: no port of this machine writes memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes a port.
#[inline(always)]
pub(crate) fn port_out(port: u16, value: u8) {
    // SAFETY: no port of this machine writes memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

/// Reads 16-bit words from a port to memory, as one string instruction.
///
/// # Safety
/// `words` words from `address` on can be written, and nobody else uses them meanwhile.
#[cfg(not(feature = "hybrid"))]
#[inline(always)]
pub(crate) unsafe fn ports_in(port: u16, address: u64, words: u64) {
    // SAFETY: the caller's contract; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep insw", in("dx") port, inout("rdi") address => _, inout("rcx") words => _,
            options(nostack, preserves_flags));
    }
}

/// Writes 16-bit words from memory to a port, as one string instruction.
///
/// # Safety
/// `words` words from `address` on can be read.
#[cfg(not(feature = "hybrid"))]
#[inline(always)]
pub(crate) unsafe fn ports_out(port: u16, address: u64, words: u64) {
    // SAFETY: the caller's contract; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep outsw", in("dx") port, inout("rsi") address => _, inout("rcx") words => _,
            options(nostack, preserves_flags));
    }
}

/// The time-stamp counter.
#[inline(always)]
pub(crate) fn time_stamp() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// EDX of CPUID leaf 1.
#[inline(always)]
pub(crate) fn feature_flags() -> u32 {
    let edx;
    // SAFETY: reads registers; rbx, which the compiler keeps for itself, is put back.
    unsafe {
        asm!("mov r8, rbx", "cpuid", "mov rbx, r8", inout("eax") 1 => _, out("ecx") _,
            out("edx") edx, out("r8") _, options(nomem, nostack, preserves_flags));
    }
    edx
}

/// EAX, EBX, ECX and EDX of a CPUID leaf.
pub(crate) fn leaf(number: u32) -> [u32; 4] {
    let (eax, ebx, ecx, edx);
    // SAFETY: reads registers; rbx, which the compiler keeps for itself, is put back.
    unsafe {
        asm!("mov r8, rbx", "cpuid", "xchg r8, rbx", inout("eax") number => eax,
            inout("ecx") 0 => ecx, out("edx") edx, out("r8") ebx, options(nomem, nostack));
    }
    let ebx: u64 = ebx;
    [eax, ebx as u32, ecx, edx]
}

/// Reads a model-specific register that exists.
pub(crate) fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading has no effect.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high,
            options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The value leaves the kernel running: entry points and segments in it are this kernel's own.
pub(crate) unsafe fn write_msr(register: u32, value: u64) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// The address that the last page fault was about.
pub(crate) fn fault_address() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The paging root.
#[inline(always)]
pub(crate) fn root() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Loads the paging root, which flushes all translations.
///
/// # Safety
/// The tables at `root` map the kernel as it runs now.
#[inline(always)]
pub(crate) unsafe fn set_root(root: u64) {
    // SAFETY: the caller's contract.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// Invalidates the translation of one page.
#[inline(always)]
pub(crate) fn invalidate(address: u64) {
    // SAFETY: a flush changes no mapping.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// The task priority.
pub(crate) fn priority() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr8", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets the task priority, 0 to 15.
#[inline(always)]
pub(crate) fn set_priority(value: u64) {
    // SAFETY: holds back interrupts, none of which is ever enabled here.
    unsafe { asm!("mov cr8, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// Masks interrupts.
pub(crate) fn mask() {
    // SAFETY: nothing here waits for an interrupt.
    unsafe { asm!("cli", options(nostack)) };
}

/// Masks interrupts, then unmasks them.
#[inline(always)]
pub(crate) fn mask_unmask() {
    // SAFETY: both PICs are masked, so no interrupt arrives.
    unsafe { asm!("cli", "sti", options(nostack)) };
}

/// Makes the lowest bit of `value` the carry, pushes the flags, inverts the carry, pops the flags;
/// returns the carry.
#[inline(always)]
pub(crate) fn keep_carry(value: u64) -> u64 {
    let carry: u32;
    // SAFETY: one push and one pop; the kernel has no red zone. The flags come back as they were.
    unsafe {
        asm!("xor {0:e}, {0:e}", "bt {1}, 0", "pushfq", "cmc", "popfq", "setc {0:l}",
            out(reg) carry, in(reg) value);
    }
    carry.into()
}

/// Copies a page as one string instruction.
///
/// # Safety
/// 4096 bytes can be read at `source` and written at `target`, which nobody else uses meanwhile.
#[inline(always)]
pub(crate) unsafe fn copy_page(source: *const AtomicU64, target: *const AtomicU64) {
    // SAFETY: the caller's contract; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rsi") source => _, inout("rdi") target => _,
            inout("rcx") 4096 => _, options(nostack, preserves_flags));
    }
}

/// Fills a page with `value` as one string instruction.
///
/// # Safety
/// 4096 bytes can be written at `target`, which nobody else uses meanwhile.
#[inline(always)]
pub(crate) unsafe fn fill_page(target: *const AtomicU64, value: u64) {
    // SAFETY: the caller's contract; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep stosq", inout("rdi") target => _, in("rax") value, inout("rcx") 512 => _,
            options(nostack, preserves_flags));
    }
}

/// Takes the interrupts that are pending, and masks again.
#[inline(always)]
pub(crate) fn take_interrupts() {
    // SAFETY: every vector that a controller may deliver has a handler that comes back.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// Lets interrupts through, from the next instruction but one on.
#[inline(always)]
pub(crate) fn let_interrupts() {
    // SAFETY: as above.
    unsafe { asm!("sti", options(nostack)) };
}

/// Masks interrupts.
#[inline(always)]
pub(crate) fn mask_interrupts() {
    // SAFETY: delays interrupts and nothing else.
    unsafe { asm!("cli", options(nostack)) };
}

/// Halts until an interrupt has been taken; masked before and after. One that is pending already
/// wakes at once: sti lets nothing through before the next instruction.
#[inline(always)]
pub(crate) fn halt() {
    // SAFETY: as above.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// RFLAGS.
pub(crate) fn flags() -> u64 {
    let value;
    // SAFETY: one push and one pop.
    unsafe { asm!("pushfq", "pop {}", out(reg) value, options(preserves_flags)) };
    value
}

/// Tells the processor that this is a loop that waits.
#[inline(always)]
pub(crate) fn pause() {
    core::hint::spin_loop();
}
