//! Page tables: accessed and dirty bits, permissions, invalidation.

use iced_x86::code_asm::*;

use crate::kernel::{
    ACCESSED, ALL, DIRTY, Kernel, LARGE, NO_EXECUTE, PD, PRESENT, PT, Steps, USER, WRITABLE, page,
    pte, window,
};
use crate::run::report_as_qemu;

#[test]
fn accessed_and_dirty_bits_follow_the_accesses() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(1) | ALL)
            .map(2, page(2) | ALL)
            .map(3, page(3) | ALL)
            .map(4, page(4) | PRESENT)
            .map(5, page(5) | ALL)
            .map(6, page(6) | ALL)
            .put(page(3), vec![0xc3]),
        |asm| {
            asm.mov(eax, dword_ptr(window(0)))?;
            asm.mov(dword_ptr(window(1)), eax)?;
            // Read first, written later: the second access sets the dirty bit.
            asm.mov(eax, dword_ptr(window(2)))?;
            asm.mov(rax, qword_ptr(pte(2)))?;
            asm.result(8, rax)?;
            asm.mov(dword_ptr(window(2)), eax)?;
            asm.mov(rax, window(3))?;
            asm.call(rax)?;
            // A write that faults sets nothing dirty.
            asm.expect(|asm| asm.mov(dword_ptr(window(4)), eax))?;
            // Across two pages.
            asm.mov(dword_ptr(window(5) + 0xffe), eax)?;
            for number in 0..8 {
                asm.mov(rax, qword_ptr(pte(number)))?;
                asm.result(number, rax)?;
            }
            // Cleared bits come back after an invalidation.
            asm.remap_now(1, page(1) | ALL)?;
            asm.mov(eax, dword_ptr(window(1)))?;
            asm.mov(rax, qword_ptr(pte(1)))?;
            asm.result(9, rax)?;
            asm.mov(rax, qword_ptr(PD))?;
            asm.result(10, rax)
        },
    );
    let (a, d) = (ACCESSED, DIRTY);
    assert_eq!(
        report.results[..11],
        [
            page(0) | ALL | a,
            page(1) | ALL | a | d,
            page(2) | ALL | a | d,
            page(3) | ALL | a,
            page(4) | PRESENT,
            page(5) | ALL | a | d,
            page(6) | ALL | a | d,
            0,
            page(2) | ALL | a,
            page(1) | ALL | a,
            PT | ALL | a,
        ]
    );
    assert_eq!(report.faults(), [(14, 3, window(4))]);
}

#[test]
fn write_protection_binds_ring_0_by_choice() {
    let report = report_as_qemu(Kernel::new().map(0, page(0) | PRESENT | USER), |asm| {
        asm.expect(|asm| asm.mov(dword_ptr(window(0)), eax))?;
        asm.mov(rbx, cr0)?;
        asm.mov(rax, rbx)?;
        asm.and(rax, !0x1_0000)?;
        asm.mov(cr0, rax)?;
        asm.mov(dword_ptr(window(0)), 0x55)?;
        asm.mov(cr0, rbx)?;
        // The write went through, and is refused again.
        asm.expect(|asm| asm.mov(dword_ptr(window(0)), 0x66))?;
        asm.mov(eax, dword_ptr(window(0)))?;
        asm.result(0, rax)
    });
    assert_eq!(report.faults(), [(14, 3, window(0)); 2]);
    assert_eq!(report.results[0], 0x55);
}

#[test]
fn stale_translations_go_with_invlpg_and_cr3() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(0) | ALL)
            .put(page(0), vec![1])
            .put(page(1), vec![2])
            .put(page(2), vec![3]),
        |asm| {
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.mov(dword_ptr(window(0) + 8), eax)?;
            asm.movzx(eax, byte_ptr(window(1)))?;
            asm.remap_now(0, page(1) | ALL)?;
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.result(0, rax)?;
            asm.mov(dword_ptr(window(0) + 8), 77)?;
            asm.mov(eax, dword_ptr(page(1) + 8))?;
            asm.result(1, rax)?;
            asm.remap(0, page(2) | ALL)?;
            asm.mov(rax, cr3)?;
            asm.mov(cr3, rax)?;
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.result(2, rax)?;
            // More rights need no invalidation: a fault looks at the tables again.
            asm.remap_now(0, page(2) | PRESENT)?;
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.remap(0, page(2) | PRESENT | WRITABLE)?;
            asm.mov(byte_ptr(window(0)), 9)?;
            asm.movzx(eax, byte_ptr(page(2)))?;
            asm.result(3, rax)
        },
    );
    assert_eq!(report.results[..4], [2, 77, 3, 9]);
    assert!(report.log.is_empty());
}

#[test]
fn one_invlpg_drops_a_whole_large_page() {
    // The window as one 2 MiB page, moved from one 2 MiB of memory to another.
    const FROM: u64 = 0x60_0000;
    const TO: u64 = 0x80_0000;
    let mut marks = vec![0; 0x3000];
    for (index, mark) in marks.chunks_mut(0x1000).enumerate() {
        mark[0] = 0x10 + index as u8;
    }
    let report = report_as_qemu(Kernel::new().put(TO, marks), |asm| {
        asm.mov(rax, FROM | ALL | LARGE)?;
        asm.mov(qword_ptr(PD), rax)?;
        asm.mov(rax, cr3)?;
        asm.mov(cr3, rax)?;
        for number in 0..3 {
            asm.movzx(eax, byte_ptr(window(number)))?;
            asm.mov(byte_ptr(window(number) + 1), al)?;
        }
        asm.mov(rax, TO | ALL | LARGE)?;
        asm.mov(qword_ptr(PD), rax)?;
        asm.mov(rax, window(1))?;
        asm.invlpg(byte_ptr(rax))?;
        for number in 0..3 {
            asm.movzx(eax, byte_ptr(window(number)))?;
            asm.result(number, rax)?;
            asm.mov(byte_ptr(window(number) + 1), 0x77)?;
            asm.movzx(eax, byte_ptr(TO + number * 0x1000 + 1))?;
            asm.result(number + 3, rax)?;
        }
        asm.mov(rax, qword_ptr(PD))?;
        asm.result(6, rax)
    });
    assert_eq!(
        report.results[..7],
        [
            0x10,
            0x11,
            0x12,
            0x77,
            0x77,
            0x77,
            TO | ALL | LARGE | ACCESSED | DIRTY
        ]
    );
}

#[test]
fn user_and_execute_rights_come_from_every_level() {
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .put(page(0), vec![0xc3])
        .code(page(1), page(1), |asm| {
            asm.mov(eax, dword_ptr(window(0)))?;
            asm.hlt()
        });
    let report = report_as_qemu(kernel, |asm| {
        let reload = |asm: &mut CodeAssembler, bits: u64| {
            asm.mov(rax, PT | bits)?;
            asm.mov(qword_ptr(PD), rax)?;
            asm.mov(rax, cr3)?;
            asm.mov(cr3, rax)
        };
        asm.in_ring_3(page(1), 0x202)?;
        reload(asm, PRESENT | WRITABLE)?;
        asm.in_ring_3(page(1), 0x202)?;
        reload(asm, PRESENT | USER)?;
        asm.in_ring_3(page(1), 0x202)?;
        asm.expect(|asm| asm.mov(dword_ptr(window(0)), eax))?;
        reload(asm, ALL | NO_EXECUTE)?;
        asm.mov(rbx, window(0))?;
        asm.mov(r14, rsp)?;
        asm.expect(|asm| asm.call(rbx))?;
        asm.mov(rsp, r14)?;
        reload(asm, ALL)?;
        asm.call(rbx)
    });
    assert_eq!(
        report.faults(),
        [
            (13, 0, 0),
            (14, 5, window(0)),
            (13, 0, 0),
            (14, 3, window(0)),
            (14, 17, window(0)),
        ]
    );
}
