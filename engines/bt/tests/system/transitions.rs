//! Changes of privilege and system registers without the runtime: the paths are warm when the
//! uncommon comes, so what it meets is translated code and not the runtime's first time.
//!
//! Some aren't compared with QEMU, whose error codes count gates in halves, whose faults leave RF clear,
//! whose syscall forgets the arithmetic flags and whose iret looks at the address too late.

use bt::BtVcpu;
use engine_core::{ExitReason, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{
    Asm, Built, GDT, IDT, KERNEL_CS, KERNEL_SS, Kernel, NO_EXECUTE, RESULTS, SCRATCH, Steps,
    USER_CS, USER_SS, page, window,
};
use crate::msr::{FMASK, LSTAR, STAR, wrmsr};
use crate::run::{report, report_as_qemu, run};

/// Often enough for everything to be linked and remembered.
const WARM: i32 = 6;

/// Runs `body` until R15 is `count`. Clobbers R15.
fn repeat(asm: &mut Asm, count: i32, body: impl FnOnce(&mut Asm) -> Built) -> Built {
    let mut head = asm.create_label();
    asm.xor(r15d, r15d)?;
    asm.set_label(&mut head)?;
    body(asm)?;
    asm.inc(r15d)?;
    asm.cmp(r15d, count)?;
    asm.jb(head)
}

/// Points `vector` at `handler`: an interrupt gate of DPL 0. Clobbers RAX.
fn gate(asm: &mut Asm, vector: u64, handler: u64, kind: u64) -> Built {
    let low = handler & 0xffff | KERNEL_CS << 16 | kind << 32 | (handler >> 16 & 0xffff) << 48;
    asm.mov(rax, low)?;
    asm.mov(qword_ptr(IDT + vector * 16), rax)
}

/// Counts at SCRATCH + `slot` and returns.
fn counting_handler(slot: u64) -> impl FnOnce(&mut Asm) -> Built {
    move |asm: &mut Asm| {
        asm.inc(qword_ptr(SCRATCH + slot))?;
        asm.iretq()
    }
}

fn count(vcpu: &BtVcpu, reason: ExitReason) -> u64 {
    vcpu.counts().get(reason)
}

#[test]
fn a_breakpoint_onto_a_stack_that_is_gone_faults_there() {
    let kernel = Kernel::new()
        .on_ist(14)
        .map(3, 0)
        .code(page(8), page(8), counting_handler(0));
    let report = report_as_qemu(kernel, |asm| {
        gate(asm, 3, page(8), 0x8e00)?;
        repeat(asm, WARM, |asm| asm.int3())?;
        asm.mov(rbx, rsp)?;
        asm.expect(|asm| {
            asm.mov(rsp, window(3) + 0x100)?;
            asm.int3()
        })?;
        asm.mov(rsp, rbx)?;
        // And back on a good one.
        asm.int3()?;
        asm.mov(rax, qword_ptr(SCRATCH))?;
        asm.result(0, rax)
    });
    assert_eq!(report.results[0], WARM as u64 + 1);
    assert_eq!(report.faults(), [(14, 2, window(3) + 0xf8)]);
}

#[test]
fn a_gate_that_changes_leads_elsewhere_at_once() {
    let kernel = Kernel::new()
        .code(page(8), page(8), counting_handler(0))
        .code(page(9), page(9), counting_handler(8));
    let report = report(kernel, |asm| {
        gate(asm, 3, page(8), 0x8e00)?;
        repeat(asm, WARM, |asm| asm.int3())?;
        gate(asm, 3, page(9), 0x8e00)?;
        repeat(asm, WARM, |asm| asm.int3())?;
        // Not present, then of another kind.
        gate(asm, 3, page(9), 0x0e00)?;
        asm.expect(|asm| asm.int3())?;
        gate(asm, 3, page(9), 0x8c00)?;
        asm.expect(|asm| asm.int3())?;
        asm.mov(rax, qword_ptr(SCRATCH))?;
        asm.result(0, rax)?;
        asm.mov(rax, qword_ptr(SCRATCH + 8))?;
        asm.result(1, rax)
    });
    assert_eq!(report.results[..2], [WARM as u64; 2]);
    assert_eq!(report.faults(), [(11, 0x1a, 0), (13, 0x1a, 0)]);
}

#[test]
fn ring_3_needs_a_gate_of_its_own_for_breakpoints() {
    let kernel = Kernel::new()
        .code(page(8), page(8), counting_handler(0))
        .code(page(0), page(0), |asm| {
            repeat(asm, WARM, |asm| asm.int3())?;
            asm.hlt()
        });
    let report = report(kernel, |asm| {
        gate(asm, 3, page(8), 0xee00)?;
        asm.in_ring_3(page(0), 0x202)?;
        gate(asm, 3, page(8), 0x8e00)?;
        repeat(asm, WARM, |asm| asm.int3())?;
        asm.in_ring_3(page(0), 0x202)?;
        asm.mov(rax, qword_ptr(SCRATCH))?;
        asm.result(0, rax)
    });
    assert_eq!(report.results[0], 2 * WARM as u64);
    assert_eq!(report.faults(), [(13, 0, 0), (13, 0x1a, 0)]);
    assert_eq!((report.log[1].cs, report.log[1].ss), (USER_CS, USER_SS));
}

#[test]
fn divide_errors_show_the_flags_and_stack_of_the_division() {
    let kernel = Kernel::new().code(page(8), page(8), |asm| {
        // RFLAGS with RF, and how far the stack has moved.
        asm.mov(rax, qword_ptr(rsp + 16))?;
        asm.mov(qword_ptr(SCRATCH), rax)?;
        asm.mov(rax, qword_ptr(rsp + 24))?;
        asm.mov(qword_ptr(SCRATCH + 8), rax)?;
        asm.add(qword_ptr(rsp), 2)?;
        asm.iretq()
    });
    let report = report(kernel, |asm| {
        gate(asm, 0, page(8), 0x8e00)?;
        asm.mov(r14, rsp)?;
        asm.sub(rsp, 24)?;
        repeat(asm, WARM, |asm| {
            asm.xor(ecx, ecx)?;
            asm.mov(eax, 1)?;
            asm.xor(edx, edx)?;
            asm.std()?;
            asm.stc()?;
            asm.db(&[0xf7, 0xf1])?; // div ecx
            // Flags come back.
            asm.pushfq()?;
            asm.cld()?;
            asm.pop(rbx)
        })?;
        asm.and(rbx, 0x401)?;
        asm.result(0, rbx)?;
        asm.mov(rax, qword_ptr(SCRATCH))?;
        asm.and(eax, 0x1_0600)?;
        asm.result(1, rax)?;
        asm.mov(rax, qword_ptr(SCRATCH + 8))?;
        asm.sub(rax, rsp)?;
        asm.result(2, rax)?;
        asm.mov(rsp, r14)
    });
    assert_eq!(report.results[..3], [0x401, 0x1_0400, 0]);
}

#[test]
fn sysret_to_nowhere_faults_in_ring_0_after_many_good_ones() {
    let kernel = Kernel::new()
        .code(page(0), page(0), |asm| {
            repeat(asm, WARM, |asm| asm.syscall())?;
            asm.mov(ebx, 1)?;
            asm.syscall()?;
            asm.hlt()
        })
        .code(page(1), page(1), |asm| {
            let mut bad = asm.create_label();
            asm.cmp(ebx, 1)?;
            asm.je(bad)?;
            asm.inc(qword_ptr(RESULTS))?;
            asm.sysretq()?;
            asm.set_label(&mut bad)?;
            asm.mov(rcx, 0x8000_0000_0000u64)?;
            asm.sysretq()
        });
    // QEMU raises it in ring 3.
    let report = report(kernel, |asm| {
        asm.xor(ebx, ebx)?;
        wrmsr(asm, STAR, (0x10 << 48) | (KERNEL_CS << 32))?;
        wrmsr(asm, LSTAR, page(1))?;
        wrmsr(asm, FMASK, 0x4_7700)?;
        asm.in_ring_3(page(0), 0x202)
    });
    assert_eq!(report.results[0], WARM as u64);
    assert_eq!(report.faults(), [(13, 0, 0)]);
    assert_eq!(report.log[0].cs, KERNEL_CS);
}

#[test]
fn system_calls_work_on_while_flags_and_masks_change() {
    // Arithmetic flags, DF and AC come and go with r11 and FMASK.
    let kernel = Kernel::new()
        .code(page(0), page(0), |asm| {
            repeat(asm, WARM, |asm| {
                asm.stc()?;
                asm.syscall()?;
                asm.setb(al)?;
                asm.movzx(eax, al)?;
                asm.add(qword_ptr(RESULTS), rax)
            })?;
            asm.push(0x4_0c43)?; // AC OF DF ZF CF
            asm.popfq()?;
            asm.syscall()?;
            asm.pushfq()?;
            asm.pop(rax)?;
            asm.push(2)?;
            asm.popfq()?;
            asm.mov(qword_ptr(RESULTS + 8), rax)?;
            asm.mov(qword_ptr(RESULTS + 16), r11)?;
            asm.hlt()
        })
        .code(page(1), page(1), |asm| {
            asm.pushfq()?;
            asm.pop(r10)?;
            asm.mov(qword_ptr(RESULTS + 24), r10)?;
            asm.sysretq()
        });
    let report = report(kernel, |asm| {
        wrmsr(asm, STAR, (0x10 << 48) | (KERNEL_CS << 32))?;
        wrmsr(asm, LSTAR, page(1))?;
        wrmsr(asm, FMASK, 0x4_0401)?;
        asm.in_ring_3(page(0), 0x202)
    });
    assert_eq!(report.results[0], WARM as u64);
    assert_eq!(report.results[1] & !0x202, 0x4_0c41);
    assert_eq!(report.results[2] & 0x4_0fff, report.results[1] & 0x4_0fff);
    // CF, DF and AC were masked.
    assert_eq!(report.results[3] & 0x4_0c41, 0x840);
    assert_eq!(report.faults(), [(13, 0, 0)]);
}

#[test]
fn iret_refuses_what_is_no_code_segment_any_more() {
    /// A second code segment, like the kernel's.
    const OTHER: u64 = 0x38;
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    let kernel = Kernel::new();
    let report = report(kernel, |asm| {
        let frame = |asm: &mut Asm, selector: u64, rip: CodeLabel| {
            asm.mov(rbx, rsp)?;
            asm.push(KERNEL_SS as i32)?;
            asm.push(rbx)?;
            asm.push(2)?;
            asm.push(selector as i32)?;
            asm.lea(rax, ptr(rip))?;
            asm.push(rax)
        };
        repeat(asm, WARM, |asm| {
            let mut there = asm.create_label();
            frame(asm, KERNEL_CS, there)?;
            asm.iretq()?;
            asm.set_label(&mut there)?;
            asm.inc(qword_ptr(RESULTS))
        })?;
        // A data segment.
        asm.mov(r14, rsp)?;
        asm.expect(|asm| {
            let mut there = asm.create_label();
            asm.set_label(&mut there)?;
            frame(asm, KERNEL_SS, there)?;
            asm.iretq()
        })?;
        // The kernel's own descriptor becomes a data segment's: CS keeps what it holds until it is
        // loaded again. Only iret's own fault is looked at, so the descriptor is whole again in
        // the handler's own way: a spare one is used.
        asm.mov(rsp, r14)?;
        asm.mov(rax, CODE)?;
        asm.mov(qword_ptr(GDT + OTHER), rax)?;
        // A table that holds it.
        asm.sub(rsp, 16)?;
        asm.mov(word_ptr(rsp), 0x3f)?;
        asm.mov(rax, GDT)?;
        asm.mov(qword_ptr(rsp + 2), rax)?;
        asm.lgdt(ptr(rsp))?;
        asm.add(rsp, 16)?;
        repeat(asm, WARM, |asm| {
            let mut there = asm.create_label();
            frame(asm, OTHER, there)?;
            asm.iretq()?;
            asm.set_label(&mut there)?;
            asm.inc(qword_ptr(RESULTS + 8))
        })?;
        // Not present.
        asm.mov(rax, CODE & !(0x80 << 40))?;
        asm.mov(qword_ptr(GDT + OTHER), rax)?;
        asm.expect(|asm| {
            let mut there = asm.create_label();
            asm.set_label(&mut there)?;
            frame(asm, OTHER, there)?;
            asm.iretq()
        })?;
        asm.mov(rsp, r14)?;
        // To no address.
        asm.expect(|asm| {
            asm.push(KERNEL_SS as i32)?;
            asm.push(rbx)?;
            asm.push(2)?;
            asm.push(KERNEL_CS as i32)?;
            asm.mov(rax, 0x8000_0000_0000u64)?;
            asm.push(rax)?;
            asm.iretq()
        })?;
        asm.mov(rsp, r14)
    });
    assert_eq!(report.results[..2], [WARM as u64; 2]);
    let vectors: Vec<_> = report.faults();
    assert_eq!(vectors[..2], [(13, 0x10, 0), (11, OTHER, 0)]);
    assert_eq!(vectors[2].0, 13);
}

#[test]
fn popf_in_ring_3_leaves_iopl_and_what_iopl_protects() {
    let user = |slot: u64| {
        move |asm: &mut Asm| {
            repeat(asm, WARM, |asm| {
                asm.push(0x3ed7)?; // everything but TF
                asm.and(qword_ptr(rsp), !0x200)?;
                asm.popfq()?;
                asm.pushfq()?;
                asm.cld()?;
                asm.pop(rbx)
            })?;
            asm.mov(qword_ptr(RESULTS + 8 * slot), rbx)?;
            asm.hlt()
        }
    };
    let kernel = Kernel::new()
        .code(page(0), page(0), user(0))
        .code(page(1), page(1), user(1));
    let report = report_as_qemu(kernel, |asm| {
        asm.in_ring_3(page(0), 0x202)?;
        asm.in_ring_3(page(1), 0x3202)
    });
    // With IOPL 0 the interrupt flag stays, with 3 it goes.
    assert_eq!(report.results[0], 0x2d7 | 0x400 | 0x800);
    assert_eq!(report.results[1], 0x30d7 | 0x400 | 0x800);
}

#[test]
fn popf_in_ring_0_takes_every_flag() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let images = [0x202, 0x2, 0xcd7, 0x3002, 0x4002, 0x4_0002, 0x20_0002, 0x46];
        asm.mov(r14d, 2)?;
        repeat(asm, WARM, |asm| {
            for (index, image) in (0..).zip(images) {
                asm.push(image)?;
                asm.popfq()?;
                asm.pushfq()?;
                asm.cld()?;
                asm.pop(rbx)?;
                asm.result(index, rbx)?;
            }
            asm.push(2)?;
            asm.popfq()
        })
    });
    assert_eq!(
        report.results[..8],
        [0x202, 0x2, 0xcd7, 0x3002, 0x4002, 0x4_0002, 0x20_0002, 0x46]
    );
}

#[test]
fn a_pushf_onto_a_page_that_is_gone_can_be_repeated() {
    let kernel = Kernel::new().on_ist(14).map(3, 0);
    let report = report_as_qemu(kernel, |asm| {
        asm.mov(rbx, rsp)?;
        repeat(asm, WARM, |asm| {
            asm.pushfq()?;
            asm.popfq()
        })?;
        asm.expect(|asm| {
            asm.mov(rsp, window(3) + 0x100)?;
            asm.stc()?;
            asm.pushfq()
        })?;
        asm.expect(|asm| {
            asm.mov(rsp, window(3) + 0x100)?;
            asm.popfq()
        })?;
        asm.mov(rsp, rbx)
    });
    let expected = [(14, 2, window(3) + 0xf8), (14, 0, window(3) + 0x100)];
    assert_eq!(report.faults(), expected);
    assert_eq!(report.log[0].rsp, window(3) + 0x100);
    assert_eq!(report.log[1].rsp, window(3) + 0x100);
}

#[test]
fn counters_of_what_never_leaves_are_exact() {
    const TIMES: i32 = 100;
    let with = |times: i32| {
        let kernel = Kernel::new().code(page(8), page(8), |asm| {
            asm.mov(rax, cr2)?;
            asm.iretq()
        });
        run(&kernel.guest(|asm| {
            gate(asm, 3, page(8), 0x8e00)?;
            repeat(asm, times, |asm| {
                asm.mov(eax, 1)?;
                asm.cpuid()?;
                asm.mov(eax, 3)?;
                asm.mov(cr8, rax)?;
                asm.mov(rax, cr8)?;
                asm.int3()
            })?;
            asm.xor(eax, eax)?;
            asm.mov(cr8, rax)
        }))
    };
    let (few, many) = (with(10), with(10 + TIMES));
    let more = |reason| count(&many.vcpu, reason) - count(&few.vcpu, reason);
    assert_eq!(more(ExitReason::Cpuid), TIMES as u64);
    assert_eq!(more(ExitReason::ControlRegister), 3 * TIMES as u64);
    assert_eq!(more(ExitReason::GuestFault), TIMES as u64);
    // And none of it has left.
    let entries = many.vcpu.entries() - few.vcpu.entries();
    assert!(entries < 10, "{entries} entries");
}

#[test]
fn code_that_stops_being_executable_stops_at_the_next_return() {
    // The jump caches hold a page that iret returns to; the page loses its right, and TLB entry.
    let kernel = Kernel::new()
        .map(4, page(4) | 3)
        .code(page(4), window(4), |asm| {
            asm.inc(qword_ptr(RESULTS))?;
            asm.jmp(r13)
        });
    let report = report_as_qemu(kernel, |asm| {
        let go = |asm: &mut Asm| {
            asm.mov(rbx, rsp)?;
            asm.push(KERNEL_SS as i32)?;
            asm.push(rbx)?;
            asm.push(2)?;
            asm.push(KERNEL_CS as i32)?;
            asm.mov(rax, window(4))?;
            asm.push(rax)?;
            asm.iretq()
        };
        repeat(asm, WARM, |asm| {
            let mut back = asm.create_label();
            asm.lea(r13, ptr(back))?;
            go(asm)?;
            asm.set_label(&mut back)?;
            asm.nop()
        })?;
        asm.remap_now(4, page(4) | 3 | NO_EXECUTE)?;
        asm.expect(go)
    });
    assert_eq!(report.results[0], WARM as u64);
    assert_eq!(report.faults(), [(14, 0x11, window(4))]);
}

#[test]
fn vector_registers_survive_a_kernel_that_does_without() {
    // The handler leaves for a port, where nobody saves what nobody uses; at the end it uses a vector
    // register itself, in the shadow of an sti.
    let kernel = Kernel::new()
        .code(page(8), page(8), |asm| {
            let mut plain = asm.create_label();
            asm.push(rax)?;
            asm.xor(eax, eax)?;
            asm.out(0x80, al)?;
            asm.cmp(r15d, WARM - 1)?;
            asm.jne(plain)?;
            asm.sti()?;
            asm.movd(xmm9, r15d)?;
            asm.cli()?;
            asm.set_label(&mut plain)?;
            asm.pop(rax)?;
            asm.iretq()
        })
        .code(page(0), page(0), |asm| {
            asm.mov(dword_ptr(RESULTS + 8), 0x3f80)?;
            asm.ldmxcsr(dword_ptr(RESULTS + 8))?;
            asm.mov(ebx, 0x1000)?;
            asm.movd(xmm15, ebx)?;
            repeat(asm, WARM, |asm| {
                asm.movd(xmm3, r15d)?;
                asm.int3()?;
                asm.movd(eax, xmm3)?;
                asm.add(qword_ptr(RESULTS), rax)
            })?;
            asm.movd(eax, xmm15)?;
            asm.add(qword_ptr(RESULTS), rax)?;
            asm.stmxcsr(dword_ptr(RESULTS + 8))?;
            asm.movd(eax, xmm9)?;
            asm.mov(qword_ptr(RESULTS + 16), rax)?;
            asm.hlt()
        });
    let report = report_as_qemu(kernel, |asm| {
        gate(asm, 3, page(8), 0xee00)?;
        asm.in_ring_3(page(0), 0x202)
    });
    let sum = WARM as u64 * (WARM as u64 - 1) / 2;
    assert_eq!(report.results[..3], [0x1000 + sum, 0x3f80, WARM as u64 - 1]);
    assert_eq!(report.faults(), [(13, 0, 0)]);
}

#[test]
fn syscall_of_compatibility_mode_has_a_target_of_its_own() {
    use crate::rig::{CS_64, End, FREE, Rig, USER_CS_32, segment};
    use engine_core::CpuState;
    let mut rig = Rig::long().in_ring_3();
    let user = rig.state;
    let mut kernel = Rig::long();
    kernel.state.rip = FREE;
    rig.state = kernel.state;
    let wrmsr = |asm: &mut Asm, msr: u32, high: u32, low: u32| -> Built {
        asm.mov(ecx, msr)?;
        asm.mov(eax, low)?;
        asm.mov(edx, high)?;
        asm.wrmsr()
    };
    let star = u32::from(USER_CS_32) << 16 | u32::from(CS_64);
    let end = rig.try_code(|asm| {
        wrmsr(asm, 0xc000_0081, star, 0)?;
        wrmsr(asm, 0xc000_0082, 0, 0)?;
        wrmsr(asm, 0xc000_0083, 0, FREE as u32 + 0x800)?;
        wrmsr(asm, 0xc000_0084, 0, 0x100)
    });
    assert_eq!(end, End::Halt);
    // A kernel that has given it none gets #UD instead of a jump to 0.
    let kernel = rig.state;
    let end = rig.try_code(|asm| wrmsr(asm, 0xc000_0083, 0, 0));
    assert_eq!(end, End::Halt);
    rig.state = user;
    rig.state.segments[CpuState::CS] = segment(USER_CS_32, 0, u32::MAX, 0xc0fb);
    rig.bytes(&[0x0f, 0x05]);
    assert_eq!(rig.run(), End::Vector(6));
    rig.state = kernel;
    let end = rig.try_code(|asm| wrmsr(asm, 0xc000_0083, 0, FREE as u32 + 0x800));
    assert_eq!(end, End::Halt);
    // 32-bit code in ring 3, with TF set: the mask clears it before it can trap.
    rig.state = user;
    rig.state.segments[CpuState::CS] = segment(USER_CS_32, 0, u32::MAX, 0xc0fb);
    rig.state.rflags |= 0x100;
    rig.put(FREE + 0x800, &[0xf4]);
    rig.bytes(&[0x0f, 0x05]);
    assert_eq!(rig.run(), End::Halt);
    let state = rig.after();
    assert_eq!(state.rip, FREE + 0x801);
    assert_eq!((state.gpr[1], state.gpr[11]), (crate::rig::CODE + 2, 0x102));
    assert_eq!(state.segments[CpuState::CS].selector, CS_64);
    assert_eq!(state.segments[CpuState::SS].selector, CS_64 + 8);
}
