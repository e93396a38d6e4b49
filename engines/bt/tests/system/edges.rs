//! Edges of what is there: the last code below the addresses that aren't canonical, operands beyond them,
//! registers and encodings that don't exist.

use engine_core::testing::TABLES;
use iced_x86::code_asm::*;

use crate::kernel::{
    ALL, Asm, Built, KERNEL_CS, KERNEL_SS, Kernel, PT, Report, SCRATCH, Steps, page, pte, window,
};
use crate::run::{report, report_as_qemu};

/// The first address that isn't canonical.
const EDGE: u64 = 1 << 47;
/// Tables that lead to the page below it.
const LAST_TABLES: u64 = 0x60_0000;

fn last_page() -> Kernel {
    let mut kernel = Kernel::new().put(page(3), vec![0x90; 0x1000]);
    for (level, next) in [LAST_TABLES + 0x1000, LAST_TABLES + 0x2000, page(3)]
        .into_iter()
        .enumerate()
    {
        let at = LAST_TABLES + 0x1000 * level as u64 + 511 * 8;
        kernel = kernel.put(at, (next | ALL).to_le_bytes().to_vec());
    }
    kernel
}

/// Lets the last page be reached, and has RBX say where it ends.
fn open(asm: &mut Asm) -> Built {
    asm.mov(rax, LAST_TABLES | ALL)?;
    asm.mov(qword_ptr(TABLES + 255 * 8), rax)?;
    asm.mov(rbx, EDGE)
}

/// Writes code `from` bytes before the edge, runs it there and expects a fault.
fn place_and_run(asm: &mut Asm, from: u64, bytes: &[u8]) -> Built {
    for (byte, at) in bytes.iter().zip(page(3) + 0x1000 - from..) {
        asm.mov(byte_ptr(at), i32::from(*byte as i8))?;
    }
    asm.expect(|asm| {
        asm.lea(rax, ptr(rbx - from as i32))?;
        asm.jmp(rax)
    })
}

#[test]
fn code_runs_up_to_the_last_canonical_address_and_faults_behind_it() {
    let report = report(last_page(), |asm| {
        open(asm)?;
        let mut run = |from, bytes: &[u8]| place_and_run(asm, from, bytes);
        // nop to the end; vmmcall, which isn't there; half of an instruction.
        run(3, &[0x90; 3])?;
        run(3, &[0x0f, 0x01, 0xd9])?;
        run(1, &[0x48])?;
        // Twice, for the second finds the code translated.
        run(3, &[0x90; 3])?;
        run(3, &[0x90; 3])
    });
    assert_eq!(
        faults(&report),
        [(13, 0), (6, -3), (13, -1), (13, 0), (13, 0)]
    );
}

/// Vectors, and how far from the edge they were raised.
fn faults(report: &Report) -> Vec<(u64, i64)> {
    let from = |rip: u64| rip.wrapping_sub(EDGE) as i64;
    let log = report.log.iter();
    log.map(|record| (record.vector, from(record.rip)))
        .collect()
}

#[test]
fn a_branch_to_no_canonical_address_faults_before_it_is_taken() {
    let report = report(last_page(), |asm| {
        open(asm)?;
        let mut run = |bytes: &[u8]| place_and_run(asm, bytes.len() as u64, bytes);
        // jmp, call, and of jz and jnz the one that is taken.
        run(&[0xeb, 0x10])?;
        run(&[0xe8, 0x10, 0, 0, 0])?;
        run(&[0x74, 0x10])?;
        run(&[0x75, 0x10])?;
        asm.mov(rcx, 0x1_0000_0002u64)?;
        // loop, by RCX and ECX; a fault leaves the count.
        place_and_run(asm, 2, &[0xe2, 0x10])?;
        place_and_run(asm, 3, &[0x67, 0xe2, 0x10])?;
        asm.result(0, rcx)?;
        asm.mov(ecx, 1)?;
        place_and_run(asm, 2, &[0xe2, 0x10])?;
        asm.result(1, rcx)
    });
    let mut found = faults(&report);
    let branches: Vec<_> = found.drain(2..4).collect();
    assert_eq!(found, [(13, -2), (13, -5), (13, -2), (13, -3), (13, 0)]);
    assert!(matches!(
        branches[..],
        [(13, -2), (13, 0)] | [(13, 0), (13, -2)]
    ));
    assert_eq!(report.results[..2], [0x1_0000_0002, 0]);
    // Nothing was pushed.
    assert_eq!(report.log[1].rsp, report.log[0].rsp);
}

#[test]
fn operands_that_are_not_canonical() {
    let report = report(Kernel::new(), |asm| {
        asm.mov(rbx, EDGE)?;
        asm.mov(qword_ptr(SCRATCH), 0)?;
        asm.mov(qword_ptr(SCRATCH + 8), 0)?;
        // No address to invalidate is no fault.
        asm.invlpg(ptr(rbx))?;
        asm.mov(ecx, 2)?;
        asm.expect(|asm| asm.invpcid(rcx, xmmword_ptr(rbx)))?;
        asm.expect(|asm| asm.clflush(ptr(rbx)))?;
        asm.expect(|asm| asm.lgdt(ptr(rbx)))?;
        // Of the operand's bytes the last ones.
        asm.expect(|asm| asm.invpcid(rcx, xmmword_ptr(rbx - 8)))?;
        // Where invpcid is to invalidate, of kind 0 alone.
        asm.mov(qword_ptr(SCRATCH + 8), rbx)?;
        asm.invpcid(rcx, xmmword_ptr(SCRATCH))?;
        asm.xor(ecx, ecx)?;
        asm.expect(|asm| asm.invpcid(rcx, xmmword_ptr(SCRATCH)))
    });
    let vectors: Vec<u64> = report.log.iter().map(|record| record.vector).collect();
    assert_eq!(vectors[..3], [13; 3]);
    // Whichever half is looked at first.
    assert!(matches!(vectors[3], 13 | 14), "{vectors:?}");
    assert_eq!(vectors[4..], [13]);
}

#[test]
fn extended_control_registers_have_32_bit_numbers() {
    if engine_core::cpuid::pinned(0xd, 0)[0] == 0 {
        eprintln!("skipped: no XSAVE");
        return;
    }
    let report = report(Kernel::new(), |asm| {
        // Off: neither is there.
        asm.xor(ecx, ecx)?;
        asm.expect(|asm| asm.xgetbv())?;
        asm.expect(|asm| asm.xsetbv())?;
        asm.mov(rax, cr4)?;
        asm.bts(rax, 18)?;
        asm.mov(cr4, rax)?;
        asm.mov(rcx, 0x1234_5678_0000_0000u64)?;
        asm.mov(eax, 3)?;
        asm.xor(edx, edx)?;
        asm.xsetbv()?;
        asm.xgetbv()?;
        asm.result(0, rax)?;
        for number in [2, 5, 1 << 31] {
            asm.mov(ecx, number as u32)?;
            asm.expect(|asm| asm.xgetbv())?;
        }
        for number in [1, 2, 1 << 31] {
            asm.mov(ecx, number as u32)?;
            asm.expect(|asm| {
                asm.mov(eax, 1)?;
                asm.xsetbv()
            })?;
        }
        asm.xor(ecx, ecx)?;
        for value in [0, 2, 4, 5] {
            asm.expect(|asm| {
                asm.mov(eax, value)?;
                asm.xsetbv()
            })?;
        }
        asm.xgetbv()?;
        asm.result(1, rax)
    });
    let vectors: Vec<u64> = report.log.iter().map(|record| record.vector).collect();
    assert_eq!(vectors[..2], [6; 2]);
    assert_eq!(vectors[2..], [13; 10]);
    assert_eq!(report.results[..2], [3, 3]);
}

#[test]
fn encodings_that_are_none() {
    // lea and movbe of registers; clwb of one; pcommit, rdpru, vmcall, vmmcall, xbegin, which nothing
    // announces; the prefix that some hypervisors take for a request.
    const NONE: [&[u8]; 9] = [
        &[0x8d, 0xc0],
        &[0x0f, 0x38, 0xf0, 0xc0],
        &[0x66, 0x0f, 0xae, 0xf0],
        &[0x66, 0x0f, 0xae, 0xf8],
        &[0x0f, 0x01, 0xfd],
        &[0x0f, 0x01, 0xc1],
        &[0x0f, 0x01, 0xd9],
        &[0xc7, 0xf8, 0, 0, 0, 0],
        &[0x0f, 0x0b, b'k', b'v', b'm', 0x90],
    ];
    let report = report(Kernel::new(), |asm| {
        for bytes in NONE {
            asm.expect(|asm| asm.db(bytes))?;
        }
        // A counter that isn't there is a bad operand.
        asm.mov(ecx, 64)?;
        asm.expect(|asm| asm.rdpmc())
    });
    let vectors: Vec<u64> = report.log.iter().map(|record| record.vector).collect();
    assert_eq!(vectors[..NONE.len()], [6; NONE.len()]);
    assert_eq!(vectors[NONE.len()..], [13]);
}

#[test]
fn a_page_table_may_be_a_stack() {
    // Page 1 of the window is its own page table, and delivery writes entries at its end.
    let kernel = Kernel::new().map(1, PT | ALL).map(2, page(0) | ALL);
    let report = report_as_qemu(kernel, |asm| {
        asm.mov(rbp, rsp)?;
        asm.mov(rbx, window(1))?;
        // The entry where CS goes is in use before.
        asm.mov(rax, page(0) | ALL)?;
        asm.mov(qword_ptr(pte(506)), rax)?;
        asm.mov(rdi, window(506))?;
        asm.mov(qword_ptr(rdi), 0x77)?;
        asm.expect(|asm| {
            asm.lea(rsp, ptr(rbx + 4095))?;
            asm.int(0x33)
        })?;
        asm.mov(rsp, rbp)?;
        asm.mov(rax, qword_ptr(pte(509)))?;
        asm.result(0, rax)?;
        asm.mov(rax, qword_ptr(pte(506)))?;
        asm.result(1, rax)?;
        asm.invlpg(ptr(rdi))?;
        asm.expect(|asm| asm.mov(rax, qword_ptr(rdi)))
    });
    assert_eq!(report.log[0].vector, 0x33);
    assert_eq!(report.log[0].rsp, window(1) + 4095);
    assert_eq!(report.log[0].handler_rsp, window(1) + 0xff0 - 40);
    assert_eq!(report.results[..2], [KERNEL_SS, KERNEL_CS]);
    let last = report.log[1];
    assert_eq!((last.vector, last.error, last.cr2), (14, 0, window(506)));
}
