//! Delivery of exceptions and software interrupts: frames, stacks, privilege, nesting.

use iced_x86::code_asm::*;

use crate::kernel::{
    ALL, IST1, KERNEL_CS, KERNEL_SS, Kernel, PRESENT, RSP0, Steps, USER, USER_CS, USER_SS,
    USER_STACK, WRITABLE, page, window,
};
use crate::run::{report, report_as_qemu, run};

#[test]
fn ring_0_faults_push_a_frame_on_the_same_stack() {
    // Not compared with QEMU, which knows no #SS for addresses that aren't canonical.
    let report = report(Kernel::new(), |asm| {
        asm.mov(rsp, 0x30_0000u64 - 0x108)?;
        asm.expect(|asm| {
            asm.xor(edx, edx)?;
            asm.mov(eax, 1)?;
            asm.xor(ecx, ecx)?;
            asm.div(rcx)
        })?;
        asm.expect(|asm| asm.ud2())?;
        asm.expect(|asm| {
            asm.mov(rax, 0x8000_0000_0000u64)?;
            asm.mov(rax, qword_ptr(rax))
        })?;
        asm.expect(|asm| {
            asm.mov(rbp, 0x8000_0000_0000u64)?;
            asm.mov(rax, qword_ptr(rbp))
        })
    });
    assert_eq!(
        report.faults(),
        [(0, 0, 0), (6, 0, 0), (13, 0, 0), (12, 0, 0)]
    );
    for record in &report.log {
        assert_eq!((record.cs, record.ss), (KERNEL_CS, KERNEL_SS));
        assert_eq!(record.rsp, 0x30_0000 - 0x108);
        // The frame begins at a multiple of 16 and has five words (SDM 3A 6.14.2).
        assert_eq!(record.handler_rsp, 0x30_0000 - 0x110 - 40);
    }
}

#[test]
fn ring_3_faults_switch_to_rsp0() {
    let report = report_as_qemu(
        Kernel::new().code(page(0), page(0), |asm| {
            asm.nop()?;
            asm.hlt()
        }),
        |asm| {
            asm.in_ring_3(page(0), 0x202)?;
            asm.in_ring_3(page(0), 0x602)
        },
    );
    assert_eq!(report.faults(), [(13, 0, 0); 2]);
    for (record, flags) in report.log.iter().zip([0x200, 0x600]) {
        assert_eq!(record.rip, page(0) + 1);
        assert_eq!((record.cs, record.ss), (USER_CS, USER_SS));
        assert_eq!((record.rsp, record.rflags), (USER_STACK, flags));
        assert_eq!(record.handler_rsp, RSP0 - 40);
    }
}

#[test]
fn an_interrupt_stack_is_used_from_both_rings() {
    let report = report_as_qemu(
        Kernel::new()
            .on_ist(6)
            .code(page(0), page(0), |asm| asm.ud2()),
        |asm| {
            asm.expect(|asm| asm.ud2())?;
            asm.in_ring_3(page(0), 0x202)
        },
    );
    assert_eq!(report.faults(), [(6, 0, 0); 2]);
    for record in &report.log {
        assert_eq!(record.handler_rsp, IST1 - 40);
    }
}

#[test]
fn int_n_asks_the_gate_for_its_privilege() {
    // Not compared with QEMU, which counts gates of 16 bytes in the error code. Linux processes
    // on the host see what stands here.
    let report = report(
        Kernel::new()
            .for_users(0x40)
            .without_gate(0x42)
            .code(page(0), page(0), |asm| asm.int(0x40))
            .code(page(1), page(1), |asm| asm.int(0x41))
            .code(page(2), page(2), |asm| asm.int(0x42))
            .code(page(3), page(3), |asm| asm.int3()),
        |asm| {
            for number in 0..4 {
                asm.in_ring_3(page(number), 0x202)?;
            }
            asm.expect(|asm| asm.int(0x41))?;
            asm.expect(|asm| asm.int(0x42))
        },
    );
    assert_eq!(
        report.faults(),
        [
            (0x40, 0, 0),
            (13, 0x41 * 8 + 2, 0),
            // The gate's privilege is looked at before its presence.
            (13, 0x42 * 8 + 2, 0),
            (13, 3 * 8 + 2, 0),
            (0x41, 0, 0),
            (11, 0x42 * 8 + 2, 0),
        ]
    );
    // After int, the next instruction; at a fault, this one.
    assert_eq!(report.log[0].rip, page(0) + 2);
    assert_eq!(report.log[1].rip, page(1));
}

#[test]
fn a_fault_while_delivering_a_page_fault_is_a_double_fault() {
    let report = report_as_qemu(
        Kernel::new().on_ist(8).map(0, page(0) | PRESENT | WRITABLE),
        |asm| {
            // RSP into a page that is not there: the frame of the page fault can't be written.
            asm.mov(rbx, rsp)?;
            asm.expect(|asm| {
                asm.mov(rsp, window(5))?;
                asm.mov(rax, qword_ptr(window(6)))
            })?;
            asm.mov(rsp, rbx)
        },
    );
    assert_eq!(report.log.len(), 1);
    let record = report.log[0];
    assert_eq!((record.vector, record.error), (8, 0));
    // CR2 is that of the second fault.
    assert_eq!(record.cr2, window(5) - 8);
    assert_eq!(record.handler_rsp, IST1 - 40);
    assert_eq!(record.rsp, window(5));
}

#[test]
fn a_page_fault_while_delivering_a_benign_fault_is_served_first() {
    let report = report_as_qemu(Kernel::new().on_ist(14), |asm| {
        asm.expect(|asm| {
            asm.mov(rsp, window(5))?;
            asm.ud2()
        })
    });
    assert_eq!(report.faults(), [(14, 2, window(5) - 8)]);
    assert_eq!(report.log[0].rsp, window(5));
}

#[test]
fn a_third_fault_is_a_shutdown_with_the_state_at_hand() {
    let guest = Kernel::new().guest(|asm| {
        asm.mov(ebx, 0x1234)?;
        asm.mov(rsp, window(5))?;
        asm.mov(rax, qword_ptr(window(6)))
    });
    let ended = run(&guest);
    match &ended.outcome {
        engine_core::Outcome::Crashed {
            state: Some(state),
            message,
        } => {
            assert_eq!(message, "triple fault");
            assert_eq!(state.gpr[3], 0x1234);
            assert_eq!(state.gpr[4], window(5));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn page_faults_tell_what_was_tried() {
    let kernel = Kernel::new()
        .map(0, page(0) | PRESENT | WRITABLE)
        .map(1, page(1) | PRESENT | USER)
        .map(2, page(2) | ALL | 1 << 63)
        .map(3, page(3) | ALL | 1 << 45)
        .map(4, page(4) | ALL)
        // Ring-3 code, one access each, at fixed places.
        .code(page(4), window(4), |asm| asm.mov(eax, dword_ptr(window(0))))
        .code(page(4) + 0x100, window(4) + 0x100, |asm| {
            asm.mov(dword_ptr(window(0)), eax)
        })
        .code(page(4) + 0x200, window(4) + 0x200, |asm| {
            asm.mov(dword_ptr(window(1)), eax)
        })
        .code(page(4) + 0x300, window(4) + 0x300, |asm| {
            asm.mov(eax, dword_ptr(window(9)))
        })
        .code(page(4) + 0x400, window(4) + 0x400, |asm| {
            asm.add(dword_ptr(window(9)), eax)
        })
        .code(page(4) + 0x500, window(4) + 0x500, |asm| {
            asm.mov(rax, window(2))?;
            asm.jmp(rax)
        })
        .code(page(4) + 0x600, window(4) + 0x600, |asm| {
            asm.mov(rax, window(0))?;
            asm.jmp(rax)
        })
        .code(page(4) + 0x700, window(4) + 0x700, |asm| {
            asm.mov(rax, window(9))?;
            asm.jmp(rax)
        })
        .code(page(4) + 0x800, window(4) + 0x800, |asm| {
            asm.mov(eax, dword_ptr(window(3)))
        });
    // Not compared with QEMU: it calls read-modify-write a read, and reserved bits not present.
    let report = report(kernel, |asm| {
        for number in 0..9 {
            asm.in_ring_3(window(4) + 0x100 * number, 0x202)?;
        }
        // The same from ring 0.
        asm.expect(|asm| asm.mov(eax, dword_ptr(window(9))))?;
        asm.expect(|asm| asm.mov(dword_ptr(window(9)), eax))?;
        asm.expect(|asm| asm.mov(dword_ptr(window(1)), eax))?;
        asm.expect(|asm| {
            asm.mov(rax, window(2))?;
            asm.jmp(rax)
        })?;
        asm.expect(|asm| asm.mov(eax, dword_ptr(window(3))))
    });
    const P: u64 = 1;
    const W: u64 = 2;
    const U: u64 = 4;
    const R: u64 = 8;
    const I: u64 = 16;
    assert_eq!(
        report.faults(),
        [
            (14, U | P, window(0)),
            (14, U | W | P, window(0)),
            (14, U | W | P, window(1)),
            (14, U, window(9)),
            (14, U | W, window(9)),
            (14, U | I | P, window(2)),
            (14, U | I | P, window(0)),
            (14, U | I, window(9)),
            (14, U | R | P, window(3)),
            (14, 0, window(9)),
            (14, W, window(9)),
            (14, W | P, window(1)),
            (14, I | P, window(2)),
            (14, R | P, window(3)),
        ]
    );
    // A fetch faults at its target.
    assert_eq!(report.log[5].rip, window(2));
}

#[test]
fn task_switched_makes_fpu_instructions_fault() {
    let report = report_as_qemu(
        Kernel::new()
            .code(page(0), page(0), |asm| asm.movaps(xmm0, xmm1))
            .code(page(1), page(1), |asm| asm.fld1()),
        |asm| {
            asm.mov(rbx, cr0)?;
            asm.mov(rcx, rbx)?;
            asm.or(rcx, 8)?;
            asm.mov(cr0, rcx)?;
            asm.expect(|asm| asm.fld1())?;
            asm.expect(|asm| asm.movaps(xmm0, xmm1))?;
            asm.expect(|asm| asm.movd(mm0, eax))?;
            asm.in_ring_3(page(0), 0x202)?;
            asm.in_ring_3(page(1), 0x202)?;
            asm.clts()?;
            asm.fninit()?;
            asm.movaps(xmm0, xmm1)?;
            // CR0.EM: x87 is not available, SSE undefined (SDM 3A 2.5).
            asm.mov(rcx, rbx)?;
            asm.or(rcx, 4)?;
            asm.mov(cr0, rcx)?;
            asm.expect(|asm| asm.fld1())?;
            asm.expect(|asm| asm.movaps(xmm0, xmm1))?;
            asm.expect(|asm| asm.movd(mm0, eax))?;
            asm.mov(cr0, rbx)?;
            // CR4.OSFXSR: without it SSE is undefined and x87 works.
            asm.mov(rbx, cr4)?;
            asm.mov(rcx, rbx)?;
            asm.and(rcx, !0x200)?;
            asm.mov(cr4, rcx)?;
            asm.fninit()?;
            asm.expect(|asm| asm.movaps(xmm0, xmm1))?;
            asm.mov(cr4, rbx)
        },
    );
    let vectors: Vec<u64> = report.log.iter().map(|record| record.vector).collect();
    assert_eq!(vectors, [7, 7, 7, 7, 7, 7, 6, 6, 6]);
}

#[test]
fn sse_exceptions_arrive_as_such() {
    let report = report(Kernel::new(), |asm| {
        // Unmask division by zero.
        asm.mov(dword_ptr(0x41_9000u64), 0x1d80)?;
        asm.ldmxcsr(dword_ptr(0x41_9000u64))?;
        asm.xorps(xmm0, xmm0)?;
        asm.mov(eax, 0x3f80_0000u32)?;
        asm.movd(xmm1, eax)?;
        asm.expect(|asm| asm.divss(xmm1, xmm0))?;
        asm.mov(dword_ptr(0x41_9000u64), 0x1f80)?;
        asm.ldmxcsr(dword_ptr(0x41_9000u64))?;
        // x87: an invalid operation waits for the next instruction.
        asm.mov(word_ptr(0x41_9000u64), 0x37e)?;
        asm.fninit()?;
        asm.fldcw(word_ptr(0x41_9000u64))?;
        asm.fldz()?;
        asm.fldz()?;
        asm.mov(rax, cr0)?;
        asm.or(rax, 0x20)?;
        asm.mov(cr0, rax)?;
        asm.fdivp(st1, st0)?;
        asm.expect(|asm| {
            asm.mov(r8d, 0x41_9000)?;
            asm.fild(dword_ptr(r8))
        })?;
        asm.fninit()
    });
    let vectors: Vec<u64> = report.log.iter().map(|record| record.vector).collect();
    assert_eq!(vectors, [19, 16]);
}

#[test]
fn an_instruction_of_sixteen_bytes_is_refused() {
    let mut long = vec![0x66; 15];
    long.push(0x90);
    let report = report_as_qemu(
        Kernel::new()
            .put(page(0), long.clone())
            .put(page(1) + 0xff8, long),
        |asm| {
            for at in [page(0), page(1) + 0xff8] {
                asm.expect(|asm| {
                    asm.mov(rax, at)?;
                    asm.jmp(rax)
                })?;
            }
            Ok(())
        },
    );
    assert_eq!(report.faults(), [(13, 0, 0); 2]);
    assert_eq!(report.log[0].rip, page(0));
}
