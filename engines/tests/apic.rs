//! The local APIC, as guests use it: its timer, interrupts to itself, task priority. The same small
//! guests in every mode of unaware guests, with the VMM's interrupt controllers and with the
//! kernel's, and under QEMU.

mod support;

use engine_core::devices::lapic;
use engine_core::testing::{Guest, end};
use iced_x86::code_asm::*;
use support::everywhere::{succeeds, succeeds_in_modes};
use support::interrupts::*;

const VECTOR: u32 = 0x31;
/// Of the timer's entry in the local vector table.
const PERIODIC: u32 = 1 << 17;

/// Runs a guest everywhere that counts interrupts of [`VECTOR`] and has the local APIC switched on,
/// with its address in rbx; expects it to come to its end.
fn counts(body: impl FnOnce(&mut Asm) -> Built) {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, VECTOR.into(), end_at_lapic)?;
        enable_lapic(asm)?;
        body(asm)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

/// Starts the timer, which counts nanoseconds in our machines.
fn start_timer(asm: &mut Asm, bits: u32, count: i32) -> Built {
    asm.mov(dword_ptr(rbx + 0x3e0), 0b1011)?;
    asm.mov(dword_ptr(rbx + 0x320), (VECTOR | bits) as i32)?;
    asm.mov(dword_ptr(rbx + 0x380), count)
}

/// Has the processor interrupt itself, and leaves it time to.
fn interrupt_itself(asm: &mut Asm) -> Built {
    asm.mov(dword_ptr(rbx + 0x300), (VECTOR | 1 << 18) as i32)?;
    asm.in_(al, 0x80)
}

/// Spins without an exit until the handler has run: the engine has to find the moment by itself.
fn await_interrupt(asm: &mut Asm) -> Built {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.cmp(r12, 0)?;
    asm.je(again)
}

#[test]
fn a_one_shot_timer_wakes_a_halted_guest() {
    counts(|asm| {
        start_timer(asm, 0, 2_000_000)?;
        asm.sti()?;
        asm.hlt()?;
        asm.cli()?;
        expect_count(asm, 1, 2)
    });
}

#[test]
fn a_periodic_timer_wakes_a_halted_guest_again_and_again() {
    counts(|asm| {
        start_timer(asm, PERIODIC, 1_000_000)?;
        halt_until(asm, ENOUGH)
    });
}

#[test]
fn a_periodic_timer_interrupts_a_busy_guest() {
    counts(|asm| {
        let mut again = asm.create_label();
        start_timer(asm, PERIODIC, 2_000_000)?;
        asm.sti()?;
        // No exit in this loop: the host has to stop the guest by itself.
        asm.set_label(&mut again)?;
        asm.cmp(r12, 3)?;
        asm.jb(again)?;
        asm.cli()
    });
}

#[test]
fn a_self_interrupt_waits_for_interrupts_to_be_enabled() {
    counts(|asm| {
        interrupt_itself(asm)?;
        expect_count(asm, 0, 2)?;
        asm.sti()?;
        await_interrupt(asm)?;
        asm.cli()?;
        expect_count(asm, 1, 3)
    });
}

#[test]
fn task_priority_in_the_apic_holds_an_interrupt_back() {
    counts(|asm| {
        asm.sti()?;
        asm.mov(dword_ptr(rbx + 0x80), 0x40)?;
        interrupt_itself(asm)?;
        expect_count(asm, 0, 2)?;
        asm.mov(rax, cr8)?;
        expect(asm, 4, 3)?;
        asm.mov(dword_ptr(rbx + 0x80), 0x20)?;
        await_interrupt(asm)?;
        asm.cli()?;
        expect_count(asm, 1, 4)
    });
}

#[test]
fn task_priority_in_cr8_holds_an_interrupt_back() {
    counts(|asm| {
        asm.sti()?;
        asm.mov(eax, 4)?;
        asm.mov(cr8, rax)?;
        interrupt_itself(asm)?;
        expect_count(asm, 0, 2)?;
        asm.mov(eax, dword_ptr(rbx + 0x80))?;
        expect(asm, 0x40, 3)?;
        asm.xor(eax, eax)?;
        asm.mov(cr8, rax)?;
        await_interrupt(asm)?;
        asm.cli()?;
        expect_count(asm, 1, 4)
    });
}

#[test]
fn the_local_apic_shows_the_priority_in_cr8_while_nothing_waits() {
    counts(|asm| {
        for (priority, code) in [(15, 2), (0, 3), (6, 4)] {
            asm.mov(eax, priority)?;
            asm.mov(cr8, rax)?;
            asm.mov(eax, dword_ptr(rbx + 0x80))?;
            expect(asm, priority << 4, code)?;
        }
        // The processor's priority is the task's where nothing is in service.
        asm.mov(eax, dword_ptr(rbx + 0xa0))?;
        expect(asm, 0x60, 5)
    });
}

#[test]
fn a_tsc_deadline_is_met_and_never_early() {
    const TSC_DEADLINE: u32 = lapic::TSC_DEADLINE;
    let guest = Guest::long(|asm| {
        need(asm, 24)?;
        prepare(asm)?;
        // The handler leaves its own time in r14.
        handler(asm, 0x51, |asm| {
            asm.rdtsc()?;
            asm.shl(rdx, 32)?;
            asm.lea(r14, ptr(rax + rdx))?;
            end_at_lapic(asm)
        })?;
        enable_lapic(asm)?;
        asm.mov(dword_ptr(rbx + 0x320), 0x51 | 2 << 17)?;
        asm.mfence()?;
        for shot in 1..=ENOUGH {
            // Some 1 to 5 ms on.
            asm.rdtsc()?;
            asm.shl(rdx, 32)?;
            asm.lea(r15, ptr(rax + rdx + shot * 2_000_000))?;
            asm.mov(rax, r15)?;
            asm.mov(rdx, r15)?;
            asm.shr(rdx, 32)?;
            asm.mov(ecx, TSC_DEADLINE)?;
            asm.wrmsr()?;
            halt_until(asm, shot)?;
            let mut right = asm.create_label();
            asm.cmp(r14, r15)?;
            asm.jae(right)?;
            end(asm, 2)?;
            asm.set_label(&mut right)?;
            asm.mov(ecx, TSC_DEADLINE)?;
            asm.rdmsr()?;
            asm.or(eax, edx)?;
            expect(asm, 0, 3)?;
        }
        // One that has passed comes at once.
        asm.mov(eax, 1)?;
        asm.xor(edx, edx)?;
        asm.wrmsr()?;
        halt_until(asm, ENOUGH + 1)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn a_tsc_deadline_that_has_passed_interrupts_after_the_wrmsr() {
    let guest = Guest::long(|asm| {
        need(asm, 24)?;
        prepare(asm)?;
        handler(asm, 0x51, end_at_lapic)?;
        enable_lapic(asm)?;
        asm.mov(dword_ptr(rbx + 0x320), 0x51 | 2 << 17)?;
        asm.mfence()?;
        asm.sti()?;
        for shot in 1..=ENOUGH {
            asm.mov(ecx, 0x10)?;
            asm.rdmsr()?;
            asm.mov(ecx, lapic::TSC_DEADLINE)?;
            asm.wrmsr()?;
            asm.nop()?;
            expect_count(asm, shot, 2)?;
            asm.rdmsr()?;
            asm.or(eax, edx)?;
            expect(asm, 0, 3)?;
        }
        end(asm, 0)
    });
    // Elsewhere it comes when the host's timers are looked at.
    succeeds_in_modes(&guest.elf(), &["user"], b"", b"");
}

#[test]
fn x2apic_sends_to_itself() {
    let guest = Guest::long(|asm| {
        need(asm, 21)?;
        prepare(asm)?;
        handler(asm, 0x52, |asm| {
            asm.push(rcx)?;
            asm.mov(ecx, 0x80b)?;
            asm.xor(eax, eax)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()?;
            asm.pop(rcx)
        })?;
        let write = |asm: &mut Asm, index: u32, value: u32| {
            asm.mov(ecx, index)?;
            asm.mov(eax, value)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()
        };
        asm.mov(ecx, lapic::APIC_BASE)?;
        asm.rdmsr()?;
        asm.or(eax, 0xc00)?;
        asm.wrmsr()?;
        write(asm, 0x80f, 0x1ff)?;
        // Id and version.
        asm.mov(ecx, 0x802)?;
        asm.rdmsr()?;
        expect(asm, 0, 2)?;
        asm.mov(ecx, 0x803)?;
        asm.rdmsr()?;
        asm.and(eax, 0xff)?;
        expect(asm, 0x14, 3)?;
        asm.sti()?;
        for (count, (index, value)) in [(0x83f, 0x52), (0x830, 0x52 | 1 << 18), (0x830, 0x52)]
            .into_iter()
            .enumerate()
        {
            write(asm, index, value)?;
            settle(asm)?;
            expect_count(asm, count as i32 + 1, 4 + count as u32)?;
        }
        // CR8 shows as the task priority.
        asm.mov(eax, 3)?;
        asm.mov(cr8, rax)?;
        asm.mov(ecx, 0x808)?;
        asm.rdmsr()?;
        expect(asm, 0x30, 12)?;
        asm.xor(eax, eax)?;
        asm.mov(cr8, rax)?;
        // Held back by the task priority until that falls.
        asm.cli()?;
        write(asm, 0x808, 0x60)?;
        write(asm, 0x83f, 0x52)?;
        asm.sti()?;
        settle(asm)?;
        expect_count(asm, 3, 8)?;
        write(asm, 0x808, 0)?;
        settle(asm)?;
        expect_count(asm, 4, 9)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}
