//! Page tables: accessed and dirty bits, permissions, invalidation.

use iced_x86::code_asm::*;

use crate::kernel::{
    ACCESSED, ALL, DIRTY, Kernel, LARGE, NO_EXECUTE, PD, PRESENT, PT, SCRATCH, Steps, USER,
    WRITABLE, page, pte, window,
};
use crate::run::{report, report_as_qemu};

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

#[test]
fn smep_and_smap_keep_the_kernel_off_user_pages() {
    const SMEP: i32 = 1 << 20;
    const SMAP: i32 = 1 << 21;
    let kernel = Kernel::new()
        .on_ist(14)
        .map(0, page(0) | ALL)
        .map(1, page(1) | PRESENT | WRITABLE)
        .code(page(0), window(0), |asm| asm.ret());
    let report = report_as_qemu(kernel, |asm| {
        asm.mov(rbx, window(0))?;
        asm.mov(rsi, window(0))?;
        asm.mov(rdi, window(1))?;
        asm.call(rbx)?;
        // The identity map is open to ring 3 otherwise.
        for entry in 0..8 {
            let at = engine_core::testing::TABLES + 0x2000 + entry * 8;
            asm.and(byte_ptr(at), !4)?;
        }
        asm.mov(rax, cr3)?;
        asm.mov(cr3, rax)?;
        asm.mov(rax, cr4)?;
        asm.or(eax, SMEP | SMAP)?;
        asm.mov(cr4, rax)?;
        asm.expect(|asm| asm.call(rbx))?;
        // Reads, writes and strings, with AC clear, set and clear again.
        asm.expect(|asm| asm.mov(ecx, dword_ptr(rbx + 8)))?;
        asm.expect(|asm| asm.mov(dword_ptr(rbx + 8), ecx))?;
        asm.mov(dword_ptr(rdi), ecx)?;
        asm.stac()?;
        asm.mov(dword_ptr(rbx + 8), 0x1234)?;
        asm.mov(ecx, dword_ptr(rbx + 8))?;
        asm.result(0, rcx)?;
        asm.movsb()?;
        asm.clac()?;
        asm.expect(|asm| asm.mov(ecx, dword_ptr(rbx + 8)))?;
        asm.expect(|asm| asm.movsb())?;
        // The stack is no exception.
        asm.mov(rbp, rsp)?;
        asm.lea(rsp, ptr(rbx + 0x800))?;
        asm.expect(|asm| asm.push(rax))?;
        asm.mov(rsp, rbp)?;
        asm.mov(rax, cr4)?;
        asm.and(eax, !(SMEP | SMAP))?;
        asm.mov(cr4, rax)?;
        asm.mov(ecx, dword_ptr(rbx + 8))?;
        asm.result(1, rcx)
    });
    let at = window(0);
    assert_eq!(
        report.faults(),
        [
            (14, 0x11, at),
            (14, 1, at + 8),
            (14, 3, at + 8),
            (14, 1, at + 8),
            (14, 1, at + 1),
            (14, 3, at + 0x7f8),
        ]
    );
    assert_eq!(report.results[..2], [0x1234, 0x1234]);
}

#[test]
fn pcids_and_what_they_demand() {
    const PCIDE: i32 = 1 << 17;
    let report = report(Kernel::new(), |asm| {
        asm.mov(rbx, cr3)?;
        asm.mov(rbp, cr4)?;
        // Low bits of CR3 have to be clear before.
        asm.lea(rax, ptr(rbx + 1))?;
        asm.mov(cr3, rax)?;
        asm.mov(rcx, rbp)?;
        asm.or(ecx, PCIDE)?;
        asm.expect(|asm| asm.mov(cr4, rcx))?;
        asm.mov(cr3, rbx)?;
        asm.mov(cr4, rcx)?;
        // Bit 63 isn't kept.
        asm.lea(rax, ptr(rbx + 5))?;
        asm.bts(rax, 63)?;
        asm.mov(cr3, rax)?;
        asm.mov(rax, cr3)?;
        asm.sub(rax, rbx)?;
        asm.result(0, rax)?;
        // invpcid: kinds 0 to 3, then a kind and a PCID too many.
        asm.mov(qword_ptr(SCRATCH), 5)?;
        asm.mov(qword_ptr(SCRATCH + 8), 0x1000)?;
        for kind in 0..4 {
            asm.mov(ecx, kind)?;
            asm.invpcid(rcx, xmmword_ptr(SCRATCH))?;
        }
        asm.mov(ecx, 4)?;
        asm.expect(|asm| asm.invpcid(rcx, xmmword_ptr(SCRATCH)))?;
        asm.mov(qword_ptr(SCRATCH), 0x1000)?;
        asm.mov(ecx, 3)?;
        asm.expect(|asm| asm.invpcid(rcx, xmmword_ptr(SCRATCH)))?;
        asm.mov(cr3, rbx)?;
        asm.mov(cr4, rbp)?;
        asm.mov(rcx, rbx)?;
        asm.bts(rcx, 63)?;
        asm.expect(|asm| asm.mov(cr3, rcx))
    });
    assert_eq!(report.faults(), [(13, 0, 0); 4]);
    assert_eq!(report.results[0], 5);
}
