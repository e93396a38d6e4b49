//! Where several debug conditions meet: single steps beside `int1`, general detect, `hlt` and the shadow
//! of `mov ss`, and data breakpoints that wait in that shadow for a software exception.

use iced_x86::code_asm::*;

use crate::debug::{
    ACTIVE_LOW, BD, BS, COUNT, HERE, install, kernel, note_here, results, trap_flag,
};
use crate::kernel::{Asm, Built, IDT, Kernel, SCRATCH, Steps};
use crate::run::report;

/// What `mov ss` loads, under a breakpoint on reads and writes.
const WATCHED: u64 = SCRATCH + 0x300;
/// Entry of [`shifting`].
const SHIFT: u64 = 0x43_1000;

/// (distance from [`note_here`], DR6) of each debug exception.
fn seen(kernel: Kernel, body: impl FnOnce(&mut Asm) -> Built) -> Vec<(u64, u64)> {
    let report = report(kernel, |asm| {
        install(asm)?;
        body(asm)?;
        results(asm, HERE, 12)
    });
    let count = report.results[0];
    assert!(count <= 12, "{count}");
    (0..count as usize)
        .map(|n| (report.results[1 + 2 * n], report.results[2 + 2 * n]))
        .collect()
}

fn int1(asm: &mut Asm) -> Built {
    asm.db(&[0xf1])
}

#[test]
fn int1_in_the_shadow_of_mov_ss_is_no_single_step() {
    let found = seen(kernel(), |asm| {
        asm.mov(ecx, ss)?;
        note_here(asm)?;
        trap_flag(asm, true)?; // 9
        asm.mov(ss, ecx)?; // 11
        int1(asm)?; // 12: itself, and no step
        int1(asm)?; // 13: likewise, which clears TF in its handler and not here
        trap_flag(asm, false) // 14, 21, 22
    });
    let expected = [(12, 0), (13, 0), (14, BS), (21, BS), (22, BS)];
    assert_eq!(found, expected.map(|(at, bits)| (at, ACTIVE_LOW | bits)));
}

#[test]
fn general_detect_is_a_fault_even_in_the_shadow_of_mov_ss() {
    let found = seen(kernel(), |asm| {
        asm.mov(ecx, ss)?;
        asm.mov(edx, ACTIVE_LOW as u32)?;
        asm.mov(eax, 0x400 | 1 << 13)?;
        asm.mov(dr7, rax)?;
        note_here(asm)?;
        trap_flag(asm, true)?; // 9
        asm.mov(ss, ecx)?; // 11
        asm.mov(dr6, rdx)?; // 11: refused once; 14
        trap_flag(asm, false) // 15, 22, 23
    });
    let expected = [(11, BD), (14, BS), (15, BS), (22, BS), (23, BS)];
    assert_eq!(found, expected.map(|(at, bits)| (at, ACTIVE_LOW | bits)));
}

#[test]
fn a_step_over_hlt_does_not_halt() {
    let found = seen(kernel(), |asm| {
        note_here(asm)?;
        trap_flag(asm, true)?; // 9
        asm.hlt()?; // 10, with interrupts disabled: nothing else could end it
        trap_flag(asm, false) // 11, 18, 19
    });
    let expected = [10, 11, 18, 19];
    assert_eq!(found, expected.map(|at| (at, ACTIVE_LOW | BS)));
}

/// A handler of vector 1 that shifts a one into [`COUNT`], with flags of its own.
fn shifting() -> Kernel {
    kernel().code(SHIFT, SHIFT, |asm| {
        asm.stc()?;
        asm.rcl(qword_ptr(COUNT), 1)?;
        asm.iretq()
    })
}

/// Loads SS from [`WATCHED`] under its breakpoint, then does `last`; how often the handler was there.
fn loads_ss_then(last: impl FnOnce(&mut Asm) -> Built) -> (u64, Vec<u64>) {
    let report = report(shifting().for_users(3), |asm| {
        let low = SHIFT & 0xffff | 0x08 << 16 | 0x8e00 << 32 | (SHIFT >> 16 & 0xffff) << 48;
        asm.mov(rax, low)?;
        asm.mov(qword_ptr(IDT + 16), rax)?;
        asm.mov(qword_ptr(IDT + 24), 0)?;
        asm.mov(eax, WATCHED as u32)?;
        asm.mov(dr1, rax)?;
        asm.mov(ecx, ss)?;
        asm.mov(dword_ptr(WATCHED), ecx)?;
        // DR1: 4 bytes, reads and writes.
        asm.mov(eax, 0x400 | 2 << 2 | 0xf << 20)?;
        asm.mov(dr7, rax)?;
        asm.clc()?;
        asm.expect(|asm| {
            asm.mov(ss, word_ptr(WATCHED))?;
            last(asm)?;
            asm.mov(eax, 0x400)?;
            asm.mov(dr7, rax)
        })?;
        asm.mov(rax, qword_ptr(COUNT))?;
        asm.result(0, rax)
    });
    let vectors = report.log.iter().map(|record| record.vector).collect();
    (report.results[0], vectors)
}

#[test]
fn a_breakpoint_that_waits_in_the_shadow_comes_with_the_software_exception() {
    // Whatever comes next: a step behind `nop`.
    assert_eq!(loads_ss_then(|asm| asm.nop()), (1, vec![]));
    // With `int1` it is one exception.
    assert_eq!(
        loads_ss_then(|asm| asm.db(&[0x2e, 0x2e, 0xf1])),
        (1, vec![])
    );
    // `int 1` enters the handler, where the other is served first.
    assert_eq!(loads_ss_then(|asm| asm.int(1)), (3, vec![]));
    // As does `int3`, whose handler comes after it.
    let (count, vectors) = loads_ss_then(|asm| asm.int3());
    assert_eq!((count, vectors), (1, vec![3]));
}
