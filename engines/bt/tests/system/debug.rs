//! Debug exceptions: single steps, breakpoints, general detect, and alignment checks.
//!
//! A handler of their own notes where each happened and what DR6 said, sets RF so that an
//! instruction breakpoint lets its instruction pass, and goes on.

use iced_x86::code_asm::*;

use crate::kernel::{ALL, Asm, Built, IDT, Kernel, SCRATCH, Steps, USER_CS, page, window};
use crate::run::{report, report_as_qemu};

pub(crate) const HANDLER: u64 = 0x43_0000;
/// Number of exceptions, then (rip, DR6) of each.
pub(crate) const COUNT: u64 = SCRATCH + 0x400;
const NOTES: u64 = COUNT + 8;
pub(crate) const ACTIVE_LOW: u64 = 0xffff_0ff0;
pub(crate) const BS: u64 = 1 << 14;
pub(crate) const BD: u64 = 1 << 13;

pub(crate) fn kernel() -> Kernel {
    Kernel::new().code(HANDLER, HANDLER, |asm| {
        asm.push(rax)?;
        asm.push(rbx)?;
        asm.mov(rbx, qword_ptr(COUNT))?;
        asm.shl(rbx, 4)?;
        asm.mov(rax, qword_ptr(rsp + 16))?;
        asm.mov(qword_ptr(rbx + NOTES), rax)?;
        asm.mov(rax, dr6)?;
        asm.mov(qword_ptr(rbx + (NOTES + 8)), rax)?;
        asm.inc(qword_ptr(COUNT))?;
        asm.mov(eax, ACTIVE_LOW as u32)?;
        asm.mov(dr6, rax)?;
        asm.or(dword_ptr(rsp + 32), 1 << 16)?;
        asm.pop(rbx)?;
        asm.pop(rax)?;
        asm.iretq()
    })
}

/// Makes HANDLER the gate of vector 1.
pub(crate) fn install(asm: &mut Asm) -> Built {
    let low = HANDLER & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48;
    asm.mov(rax, low)?;
    asm.mov(qword_ptr(IDT + 16), rax)?;
    asm.mov(qword_ptr(IDT + 24), 0)
}

/// Sets or clears TF by popf.
pub(crate) fn trap_flag(asm: &mut Asm, on: bool) -> Built {
    asm.pushfq()?;
    if on {
        asm.or(dword_ptr(rsp), 0x100)?;
    } else {
        asm.and(dword_ptr(rsp), !0x100)?;
    }
    asm.popfq()
}

/// The notes as results: the count, then distances of the addresses from `here` and DR6.
pub(crate) fn results(asm: &mut Asm, here: u64, most: u64) -> Built {
    asm.mov(rax, qword_ptr(COUNT))?;
    asm.result(0, rax)?;
    asm.mov(rcx, qword_ptr(here))?;
    for number in 0..most {
        asm.mov(rax, qword_ptr(NOTES + number * 16))?;
        asm.sub(rax, rcx)?;
        asm.result(1 + 2 * number, rax)?;
        asm.mov(rax, qword_ptr(NOTES + number * 16 + 8))?;
        asm.result(2 + 2 * number, rax)?;
    }
    Ok(())
}

/// Where a test keeps the address that it counts from.
pub(crate) const HERE: u64 = SCRATCH + 0x3f8;

pub(crate) fn note_here(asm: &mut Asm) -> Built {
    let mut here = asm.create_label();
    asm.lea(rax, qword_ptr(here))?;
    asm.mov(qword_ptr(HERE), rax)?;
    asm.set_label(&mut here)?;
    asm.zero_bytes()
}

#[test]
fn every_instruction_is_a_step_while_tf_is_set() {
    let report = report_as_qemu(kernel(), |asm| {
        install(asm)?;
        note_here(asm)?;
        trap_flag(asm, true)?; // 1 + 7 + 1 bytes: ends at 9
        asm.inc(eax)?; // 11
        asm.inc(eax)?; // 13
        asm.cpuid()?; // 15
        asm.mov(dx, 0x3fd)?; // 19
        asm.in_(al, dx)?; // 20
        trap_flag(asm, false)?; // 21, 28, 29
        asm.nop()?;
        results(asm, HERE, 9)
    });
    assert_eq!(report.results[0], 8);
    let rips: Vec<u64> = (0..8).map(|n| report.results[1 + 2 * n]).collect();
    assert_eq!(rips, [11, 13, 15, 19, 20, 21, 28, 29]);
    assert!((0..8).all(|n| report.results[2 + 2 * n] == ACTIVE_LOW | BS));
}

#[test]
fn a_step_waits_for_the_shadow_of_mov_ss_but_not_of_sti() {
    let report = report(kernel(), |asm| {
        install(asm)?;
        asm.mov(ax, ss)?;
        asm.mov(ecx, eax)?;
        note_here(asm)?;
        trap_flag(asm, true)?; // 9
        asm.mov(ss, ecx)?; // 11
        asm.nop()?; // 12
        asm.sti()?; // 13
        asm.cli()?; // 14
        trap_flag(asm, false)?; // 15, 22, 23
        results(asm, HERE, 7)
    });
    assert_eq!(report.results[0], 6);
    let rips: Vec<u64> = (0..6).map(|n| report.results[1 + 2 * n]).collect();
    assert_eq!(rips, [12, 13, 14, 15, 22, 23]);
}

#[test]
fn a_repeated_string_steps_by_element() {
    let report = report_as_qemu(kernel(), |asm| {
        install(asm)?;
        asm.mov(edi, SCRATCH as u32)?;
        asm.mov(ecx, 3)?;
        note_here(asm)?;
        trap_flag(asm, true)?; // 9
        asm.rep().stosb()?; // 11
        trap_flag(asm, false)?;
        results(asm, HERE, 6)
    });
    assert_eq!(report.results[0], 6);
    let rips: Vec<u64> = (0..4).map(|n| report.results[1 + 2 * n]).collect();
    assert_eq!(rips, [9, 9, 11, 12]);
}

#[test]
fn breakpoints_stop_before_an_instruction_and_after_an_access() {
    let report = report_as_qemu(kernel().map(0, page(0) | ALL), |asm| {
        install(asm)?;
        asm.mov(rbx, window(0))?;
        asm.mov(rax, window(0) + 8)?;
        asm.mov(dr1, rax)?;
        asm.mov(dr3, rbx)?;
        let mut here = asm.create_label();
        asm.lea(rax, qword_ptr(here))?;
        asm.mov(qword_ptr(HERE), rax)?;
        asm.mov(dr2, rax)?;
        // DR2 on execution, DR1 on 4-byte writes, DR3 on 8-byte reads and writes.
        asm.mov(
            eax,
            0x400 | 2 << 4 | 2 << 2 | 2 << 6 | 0xd << 20 | 0xb << 28,
        )?;
        asm.mov(dr7, rax)?;
        asm.set_label(&mut here)?;
        asm.inc(edx)?; // 0: DR2
        asm.mov(eax, dword_ptr(rbx + 8))?; // 2, a read: nothing
        asm.mov(byte_ptr(rbx + 11), al)?; // 5: DR1 after it, at 8
        asm.mov(dword_ptr(rbx + 12), eax)?; // 8: beyond
        asm.add(byte_ptr(rbx + 7), 1)?; // 11: DR3, at 15
        asm.mov(rax, qword_ptr(rbx + 4))?; // 15: DR3, at 19
        asm.push(qword_ptr(rbx))?; // 19: DR3, at 21
        asm.pop(rax)?;
        asm.mov(eax, 0x400)?;
        asm.mov(dr7, rax)?;
        results(asm, HERE, 6)
    });
    let found: Vec<(u64, u64)> = (0..5)
        .map(|n| (report.results[1 + 2 * n], report.results[2 + 2 * n]))
        .collect();
    assert_eq!(report.results[0], 5);
    assert_eq!(found[0], (0, ACTIVE_LOW | 4));
    assert_eq!(found[1], (8, ACTIVE_LOW | 2));
    assert_eq!(found[2], (15, ACTIVE_LOW | 8));
    assert_eq!((found[3].0, found[4].0), (19, 21));
}

#[test]
fn general_detect_and_aliases_of_debug_registers() {
    let report = report(kernel(), |asm| {
        install(asm)?;
        asm.mov(eax, 0x400 | 1 << 13)?;
        asm.mov(dr7, rax)?;
        note_here(asm)?;
        asm.mov(rcx, dr6)?; // Faults, and goes on with GD clear.
        results(asm, HERE, 1)?;
        asm.mov(rax, dr7)?;
        asm.result(3, rax)?;
        // mov rax, dr4; with CR4.DE clear it is DR6.
        asm.db(&[0x0f, 0x21, 0xe0])?;
        asm.result(4, rax)?;
        asm.mov(rax, cr4)?;
        asm.or(eax, 8)?;
        asm.mov(cr4, rax)?;
        asm.expect(|asm| asm.db(&[0x0f, 0x21, 0xe0]))
    });
    assert_eq!(report.results[..4], [1, 0, ACTIVE_LOW | BD, 0x400]);
    assert_eq!(report.results[4], ACTIVE_LOW);
    assert_eq!(report.log[0].vector, 6);
}

#[test]
fn ring_3_faults_on_misaligned_accesses_if_it_asks() {
    let user = window(0);
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, page(1) | ALL)
        .code(page(0), user, |asm| {
            asm.mov(rbx, window(1))?;
            asm.mov(eax, dword_ptr(rbx + 1))?;
            asm.pushfq()?;
            asm.or(dword_ptr(rsp), 1 << 18)?;
            asm.popfq()?;
            asm.mov(al, byte_ptr(rbx + 1))?;
            asm.mov(rax, qword_ptr(rbx + 8))?;
            asm.mov(word_ptr(rbx + 3), ax)
        });
    let report = report(kernel, |asm| {
        asm.mov(rax, cr0)?;
        asm.or(eax, 1 << 18)?;
        asm.mov(cr0, rax)?;
        asm.in_ring_3(user, 0x202)
    });
    let record = report.log[0];
    assert_eq!((record.vector, record.error, record.cs), (17, 0, USER_CS));
    assert_eq!(record.rip, user + 10 + 3 + 1 + 7 + 1 + 3 + 4);
}
