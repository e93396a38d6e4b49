//! Interrupt controllers: local APIC, I/O APIC, and the 8259s where there is no I/O APIC.
//!
//! As a PC's operating system does it: the local APIC in x2APIC mode if the processor has that,
//! device lines through the I/O APIC, legacy lines edge-triggered. Nothing is set up before the
//! first driver needs it, and every line is masked while no driver has it open.
//!
//! Interrupts are taken where a driver waits, and nowhere else: RFLAGS.IF is clear otherwise. The
//! handler counts, lets the device's driver acknowledge, and ends the interrupt at the controller;
//! whoever waits looks at the count.
//!
//! Vectors: line N is [`LINES`] + N, whichever controller delivers it; then come the local APIC's own.

use crate::{
    cpu,
    memory::{register, set_register},
};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Vector of line 0.
const LINES: u8 = 0x20;
/// Vector of the local APIC's timer.
pub(crate) const TIMER: u8 = 0x30;
/// Vector of interrupts to itself.
pub(crate) const SELF: u8 = 0x31;
/// Spurious-interrupt vector: bits 0 to 3 are set on every processor (SDM 3A 11.9).
const SPURIOUS: u8 = 0x3f;

/// The PIT's line.
pub(crate) const PIT_LINE: u8 = 0;

const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
/// Offset of the I/O APIC's data window.
const WINDOW: u64 = 0x10;

/// IA32_APIC_BASE: the local APIC is on (bit 11), in x2APIC mode (bit 10).
const APIC_BASE: u32 = 0x1b;
/// First MSR of a local APIC in x2APIC mode.
const X2APIC: u32 = 0x800;
/// IA32_X2APIC_SELF_IPI.
const SELF_IPI: u32 = 0x83f;

/// Registers of the local APIC (SDM 3A table 11-1).
pub(crate) mod apic {
    pub(crate) const ID: u32 = 0x20;
    pub(crate) const TASK_PRIORITY: u32 = 0x80;
    pub(crate) const END: u32 = 0xb0;
    pub(crate) const SPURIOUS: u32 = 0xf0;
    pub(crate) const COMMAND: u32 = 0x300;
    pub(crate) const TIMER: u32 = 0x320;
    pub(crate) const LINT0: u32 = 0x350;
    pub(crate) const INITIAL_COUNT: u32 = 0x380;
    pub(crate) const CURRENT_COUNT: u32 = 0x390;
    pub(crate) const DIVIDE: u32 = 0x3e0;
    /// A local vector's mask bit.
    pub(crate) const MASKED: u32 = 1 << 16;
}

/// What delivers the lines. 0 until set up.
static CONTROLLER: AtomicU8 = AtomicU8::new(0);
const PICS: u8 = 1;
const APICS: u8 = 2;

/// How the local APIC is reached. 0 if there is none.
static LOCAL: AtomicU8 = AtomicU8::new(0);
const MEMORY: u8 = 1;
const REGISTERS: u8 = 2;

/// Interrupts taken, by vector from [`LINES`] on.
static TAKEN: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];
/// Time stamp at the last handler's beginning.
static BEGAN: AtomicU64 = AtomicU64::new(0);

/// The trigger of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// As ISA has it.
    Edge,
    /// Delivered again as long as the device asks.
    #[cfg_attr(
        not(feature = "hybrid"),
        allow(dead_code, reason = "no ISA device has it")
    )]
    Level,
}

/// Called by asm/traps.s, interrupts masked.
#[unsafe(no_mangle)]
extern "C" fn interrupt(vector: u64) {
    let now = cpu::time_stamp();
    BEGAN.store(now, Relaxed);
    let vector = vector as u8;
    if vector == SPURIOUS {
        return;
    }
    if let Some(count) = TAKEN.get(usize::from(vector.wrapping_sub(LINES))) {
        count.store(count.load(Relaxed) + 1, Relaxed);
    }
    if vector < TIMER {
        crate::devices::acknowledge(vector - LINES);
    }
    if vector >= TIMER || CONTROLLER.load(Relaxed) == APICS {
        set_local(apic::END, 0);
        return;
    }
    // A non-specific end of interrupt, to both if the line is the second's.
    const END: u8 = 0x20;
    if vector >= LINES + 8 {
        cpu::port_out(0xa0, END);
    }
    cpu::port_out(0x20, END);
}

/// Interrupts taken at a vector so far.
#[inline(always)]
fn taken_at(vector: u8) -> u64 {
    TAKEN
        .get(usize::from(vector.wrapping_sub(LINES)))
        .map_or(0, |count| count.load(Relaxed))
}

/// Interrupts of a line so far.
#[inline(always)]
pub(crate) fn taken(line: u8) -> u64 {
    taken_at(LINES + line)
}

/// Interrupts of one of the local APIC's vectors so far.
#[inline(always)]
pub(crate) fn taken_local(vector: u8) -> u64 {
    taken_at(vector)
}

/// When the last handler began.
#[inline(always)]
pub(crate) fn began() -> u64 {
    BEGAN.load(Relaxed)
}

/// Waits until `done`, halted; the first look is free of a halt. With a limit in ticks it does not
/// halt, and comes back with `false` when that has passed.
#[inline(always)]
pub(crate) fn wait(limit: Option<u64>, mut done: impl FnMut() -> bool) -> bool {
    if done() {
        return true;
    }
    // What is pending already needs no halt.
    cpu::take_interrupts();
    let start = cpu::time_stamp();
    loop {
        if done() {
            return true;
        }
        match limit {
            None => cpu::halt(),
            Some(limit) if cpu::time_stamp().wrapping_sub(start) > limit => return false,
            Some(_) => cpu::take_interrupts(),
        }
    }
}

/// Reads a register of the local APIC.
#[inline(always)]
pub(crate) fn local(offset: u32) -> u32 {
    if LOCAL.load(Relaxed) == REGISTERS {
        cpu::read_msr(X2APIC + (offset >> 4)) as u32
    } else {
        register(LOCAL_APIC + u64::from(offset))
    }
}

/// Writes a register of the local APIC.
#[inline(always)]
pub(crate) fn set_local(offset: u32, value: u32) {
    if LOCAL.load(Relaxed) == REGISTERS {
        // SAFETY: a register of the local APIC, which delivers to this kernel's handlers alone.
        unsafe { cpu::write_msr(X2APIC + (offset >> 4), value.into()) };
    } else {
        set_register(LOCAL_APIC + u64::from(offset), value);
    }
}

/// True if there is a local APIC; [`set_up`] has been called.
pub(crate) fn has_local() -> bool {
    LOCAL.load(Relaxed) != 0
}

/// Sends itself an interrupt at [`SELF`].
#[inline(always)]
pub(crate) fn send_self() {
    if LOCAL.load(Relaxed) == REGISTERS {
        // SAFETY: the vector has a handler.
        unsafe { cpu::write_msr(SELF_IPI, SELF.into()) };
    } else {
        // Fixed delivery, destination shorthand: self (SDM 3A 11.6.1).
        set_register(
            LOCAL_APIC + u64::from(apic::COMMAND),
            1 << 18 | 1 << 14 | u32::from(SELF),
        );
    }
}

fn io_apic(index: u32) -> u32 {
    set_register(IO_APIC, index);
    register(IO_APIC + WINDOW)
}

fn set_io_apic(index: u32, value: u32) {
    set_register(IO_APIC, index);
    set_register(IO_APIC + WINDOW, value);
}

/// Sets the controllers up, all lines masked. Once; later calls do nothing.
pub(crate) fn set_up() {
    if CONTROLLER.load(Relaxed) != 0 {
        return;
    }
    set_up_pics();
    let [_, _, ecx, edx] = cpu::leaf(1);
    if edx & 1 << 9 != 0 {
        set_up_local(ecx & 1 << 21 != 0);
    }
    // The version register: at least 24 pins, and not what an empty bus reads.
    let version = io_apic(1);
    let pins = version >> 16 & 0xff;
    if !has_local() || version == u32::MAX || !(23..=239).contains(&pins) {
        if has_local() {
            // Virtual wire: the PICs' interrupts through LINT0, as external ones.
            set_local(apic::LINT0, 0x700);
        }
        CONTROLLER.store(PICS, Relaxed);
        return;
    }
    for pin in 0..=pins {
        set_io_apic(0x10 + 2 * pin, apic::MASKED);
    }
    set_local(apic::LINT0, apic::MASKED);
    CONTROLLER.store(APICS, Relaxed);
}

/// Initialises both 8259s: edge-triggered, cascaded at line 2, vectors from [`LINES`] on, all masked
/// (Intel 8259A data sheet, initialization command words).
fn set_up_pics() {
    for (port, vector, cascade) in [(0x20, LINES, 4), (0xa0, LINES + 8, 2)] {
        cpu::port_out(port, 0x11);
        cpu::port_out(port + 1, vector);
        cpu::port_out(port + 1, cascade);
        cpu::port_out(port + 1, 1);
        cpu::port_out(port + 1, 0xff);
    }
}

fn set_up_local(x2apic: bool) {
    LOCAL.store(MEMORY, Relaxed);
    if x2apic {
        let base = cpu::read_msr(APIC_BASE);
        // SAFETY: the processor has the mode, and nothing was told the memory's address.
        unsafe { cpu::write_msr(APIC_BASE, base | 3 << 10) };
        LOCAL.store(REGISTERS, Relaxed);
    }
    set_local(apic::SPURIOUS, 1 << 8 | u32::from(SPURIOUS));
    set_local(apic::TASK_PRIORITY, 0);
    set_local(apic::TIMER, apic::MASKED | u32::from(TIMER));
}

/// Lets a line through.
pub(crate) fn unmask(line: u8, trigger: Trigger) {
    if CONTROLLER.load(Relaxed) == APICS {
        let id = local(apic::ID);
        let id = if LOCAL.load(Relaxed) == REGISTERS {
            id << 24
        } else {
            id & 0xff00_0000
        };
        let level = match trigger {
            Trigger::Edge => 0,
            Trigger::Level => 1 << 15,
        };
        let entry = 0x10 + 2 * pin(line);
        set_io_apic(entry + 1, id);
        set_io_apic(entry, level | u32::from(LINES + line));
        return;
    }
    if trigger == Trigger::Level {
        // The edge/level control registers of ISA bridges (82371SB data sheet, 4.2.5).
        let (port, bit) = control(0x4d0, 0x4d1, line);
        cpu::port_out(port, cpu::port_in(port) | bit);
    }
    if line >= 8 {
        cpu::port_out(0x21, cpu::port_in(0x21) & !4);
    }
    let (port, bit) = control(0x21, 0xa1, line);
    cpu::port_out(port, cpu::port_in(port) & !bit);
}

/// Holds a line back.
pub(crate) fn mask(line: u8) {
    if CONTROLLER.load(Relaxed) == APICS {
        set_io_apic(0x10 + 2 * pin(line), apic::MASKED);
    } else {
        let (port, bit) = control(0x21, 0xa1, line);
        cpu::port_out(port, cpu::port_in(port) | bit);
    }
    // What was on its way belongs to nobody now.
    cpu::take_interrupts();
}

/// The register and bit of a line at the 8259s.
fn control(first: u16, second: u16, line: u8) -> (u16, u8) {
    if line < 8 {
        (first, 1 << line)
    } else {
        (second, 1 << (line & 7))
    }
}

/// The I/O APIC's pin of a line: the PIT's is wired to pin 2 on every PC.
fn pin(line: u8) -> u32 {
    if line == PIT_LINE { 2 } else { line.into() }
}
