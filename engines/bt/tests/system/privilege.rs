//! Moving between rings, and the registers that only ring 0 may touch.

use iced_x86::code_asm::*;

use crate::kernel::{
    KERNEL_CS, KERNEL_SS, Kernel, RESULTS, SCRATCH, Steps, USER_CS, USER_SS, USER_STACK, page,
};
use crate::msr::{FMASK, FS_BASE, GS_BASE, KERNEL_GS_BASE, LSTAR, STAR, wrmsr};
use crate::run::{report, report_as_qemu};

#[test]
fn syscall_and_sysret_go_there_and_back() {
    let kernel = Kernel::new()
        // Ring 3: three system calls, then out by a fault.
        .code(page(0), page(0), |asm| {
            let mut head = asm.create_label();
            asm.xor(ebx, ebx)?;
            asm.mov(r12d, 3)?;
            asm.set_label(&mut head)?;
            asm.std()?;
            asm.stc()?;
            asm.syscall()?;
            // Flags came back by r11.
            asm.setb(al)?;
            asm.movzx(eax, al)?;
            asm.add(rbx, rax)?;
            asm.cld()?;
            asm.dec(r12d)?;
            asm.jne(head)?;
            asm.mov(qword_ptr(RESULTS), rbx)?;
            asm.mov(qword_ptr(RESULTS + 8), rsp)?;
            asm.mov(eax, cs)?;
            asm.mov(qword_ptr(RESULTS + 16), rax)?;
            asm.mov(eax, ss)?;
            asm.mov(qword_ptr(RESULTS + 24), rax)?;
            asm.hlt()
        })
        // The kernel's side: RSP is still the user's.
        .code(page(1), page(1), |asm| {
            asm.mov(qword_ptr(RESULTS + 32), rcx)?;
            asm.mov(qword_ptr(RESULTS + 40), r11)?;
            asm.pushfq()?;
            asm.pop(rdx)?;
            asm.and(edx, 0x600)?;
            asm.mov(qword_ptr(RESULTS + 48), rdx)?;
            asm.mov(eax, cs)?;
            asm.mov(qword_ptr(RESULTS + 56), rax)?;
            asm.mov(eax, ss)?;
            asm.mov(qword_ptr(RESULTS + 64), rax)?;
            asm.inc(qword_ptr(RESULTS + 72))?;
            asm.sysretq()
        });
    let report = report_as_qemu(kernel, |asm| {
        wrmsr(asm, STAR, (0x10 << 48) | (KERNEL_CS << 32))?;
        wrmsr(asm, LSTAR, page(1))?;
        // IF and DF go.
        wrmsr(asm, FMASK, 0x600)?;
        asm.in_ring_3(page(0), 0x202)
    });
    let results = &report.results;
    assert_eq!(results[..4], [3, USER_STACK, USER_CS, USER_SS]);
    assert!(results[4] > page(0) && results[4] < page(0) + 0x40);
    // CF DF IF were set before; IF and DF are masked.
    assert_eq!(results[5] & 0x601, 0x601);
    assert_eq!(results[6], 0);
    assert_eq!(results[7..10], [KERNEL_CS, KERNEL_SS, 3]);
    assert_eq!(report.faults(), [(13, 0, 0)]);
    assert_eq!((report.log[0].cs, report.log[0].ss), (USER_CS, USER_SS));
}

#[test]
fn sysret_refuses_addresses_that_are_not_canonical() {
    let report = report(Kernel::new(), |asm| {
        wrmsr(asm, STAR, (0x10 << 48) | (KERNEL_CS << 32))?;
        asm.expect(|asm| {
            asm.mov(rcx, 0x8000_0000_0000u64)?;
            asm.mov(r11d, 0x202)?;
            asm.sysretq()
        })?;
        // iretq looks before it leaves, too.
        asm.expect(|asm| {
            asm.push(USER_SS as i32)?;
            asm.push(USER_STACK as i32)?;
            asm.push(0x202)?;
            asm.push(USER_CS as i32)?;
            asm.mov(rax, 0x8000_0000_0000u64)?;
            asm.push(rax)?;
            asm.iretq()
        })
    });
    assert_eq!(report.faults(), [(13, 0, 0); 2]);
    assert_eq!(report.log[0].cs, KERNEL_CS);
    assert_eq!(report.log[1].cs, KERNEL_CS);
}

#[test]
fn iretq_within_ring_0_restores_stack_and_flags() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut there = asm.create_label();
        asm.mov(rbx, rsp)?;
        asm.push(KERNEL_SS as i32)?;
        asm.push((USER_STACK - 0x100) as i32)?;
        asm.push(0x4d5 | 2)?;
        asm.push(KERNEL_CS as i32)?;
        asm.lea(rax, ptr(there))?;
        asm.push(rax)?;
        asm.iretq()?;
        asm.ud2()?;
        asm.set_label(&mut there)?;
        asm.mov(rcx, rsp)?;
        asm.pushfq()?;
        asm.pop(rdx)?;
        asm.cld()?;
        asm.mov(rsp, rbx)?;
        asm.result(0, rcx)?;
        asm.result(1, rdx)
    });
    assert_eq!(report.results[..2], [USER_STACK - 0x100, 0x4d7]);
}

#[test]
fn gs_and_fs_have_bases_of_their_own_and_swapgs_swaps() {
    let kernel = Kernel::new()
        .put(page(0), vec![1, 0, 0, 0, 0, 0, 0, 0])
        .put(page(1), vec![2, 0, 0, 0, 0, 0, 0, 0])
        .put(page(2), vec![3, 0, 0, 0, 0, 0, 0, 0])
        .code(page(3), page(3), |asm| {
            asm.mov(rax, qword_ptr(0).gs())?;
            asm.mov(qword_ptr(RESULTS + 40), rax)?;
            asm.swapgs()
        });
    let report = report_as_qemu(kernel, |asm| {
        wrmsr(asm, FS_BASE, page(0))?;
        wrmsr(asm, GS_BASE, page(1))?;
        wrmsr(asm, KERNEL_GS_BASE, page(2))?;
        asm.xor(ebx, ebx)?;
        asm.mov(rax, qword_ptr(rbx).fs())?;
        asm.result(0, rax)?;
        asm.mov(rax, qword_ptr(rbx).gs())?;
        asm.result(1, rax)?;
        asm.swapgs()?;
        asm.mov(rax, qword_ptr(rbx).gs())?;
        asm.result(2, rax)?;
        asm.mov(ecx, KERNEL_GS_BASE)?;
        asm.rdmsr()?;
        asm.result(3, rax)?;
        // Negative offsets from the base, and 32-bit addresses.
        wrmsr(asm, FS_BASE, page(0) + 8)?;
        asm.mov(rax, qword_ptr(rbx - 8).fs())?;
        asm.result(4, rax)?;
        asm.in_ring_3(page(3), 0x202)?;
        // Loading a null selector clears the base (Intel).
        wrmsr(asm, FS_BASE, page(0))?;
        asm.mov(ecx, FS_BASE)?;
        asm.rdmsr()?;
        asm.result(6, rax)
    });
    assert_eq!(report.results[..7], [1, 2, 3, page(1), 1, 3, page(0)]);
    assert_eq!(report.faults(), [(13, 0, 0)]);
}

#[test]
fn registers_refuse_reserved_bits() {
    // Not compared with QEMU, which takes some of these.
    let report = report(Kernel::new(), |asm| {
        let write_cr4 = |asm: &mut CodeAssembler, bit: u64| {
            asm.expect(|asm| {
                asm.mov(rbx, cr4)?;
                asm.mov(rcx, bit)?;
                asm.xor(rbx, rcx)?;
                asm.mov(cr4, rbx)
            })
        };
        write_cr4(asm, 1 << 63)?;
        write_cr4(asm, 1 << 15)?;
        // PAE can't go in long mode.
        write_cr4(asm, 1 << 5)?;
        for address in [0x8000_0000_0000u64, 0xffff_7fff_ffff_ffff] {
            for msr in [LSTAR, FS_BASE, GS_BASE, KERNEL_GS_BASE] {
                asm.expect(|asm| wrmsr(asm, msr, address))?;
            }
        }
        // Paging without protection, not-write-through without cache-disable, high bits.
        for bits in [0x8000_0000u64, 0xa001_0033, 0x1_8001_0033] {
            asm.expect(|asm| {
                asm.mov(rbx, bits)?;
                asm.mov(cr0, rbx)
            })?;
        }
        asm.expect(|asm| wrmsr(asm, 0xc000_0080, 1 << 20))?;
        asm.expect(|asm| {
            asm.mov(eax, 16)?;
            asm.mov(cr8, rax)
        })?;
        asm.expect(|asm| {
            asm.mov(eax, 0x123)?;
            asm.mov(ds, eax)
        })
    });
    let mut expected = vec![(13, 0, 0); 3 + 8 + 3 + 2];
    expected.push((13, 0x120, 0));
    assert_eq!(report.faults(), expected);
}

#[test]
fn ring_3_may_not_run_privileged_instructions() {
    let forbidden: [&[u8]; 14] = [
        b"\xf4",         // hlt
        b"\xfa",         // cli
        b"\xfb",         // sti
        b"\x0f\x20\xc0", // mov rax, cr0
        b"\x0f\x22\xd8", // mov cr3, rax
        b"\x0f\x21\xc0", // mov rax, dr0
        b"\x0f\x32",     // rdmsr
        b"\x0f\x30",     // wrmsr
        b"\x0f\x01\x38", // invlpg [rax]
        b"\x0f\x01\x10", // lgdt [rax]
        b"\x0f\x01\xf8", // swapgs
        b"\x0f\x06",     // clts
        b"\xe4\x80",     // in al, 0x80
        b"\xee",         // out dx, al
    ];
    let mut kernel = Kernel::new();
    for (index, bytes) in forbidden.iter().enumerate() {
        kernel = kernel.put(page(0) + 32 * index as u64, bytes.to_vec());
    }
    let report = report_as_qemu(kernel, |asm| {
        for index in 0..forbidden.len() {
            asm.in_ring_3(page(0) + 32 * index as u64, 0x202)?;
        }
        Ok(())
    });
    assert_eq!(report.faults(), vec![(13, 0, 0); forbidden.len()]);
    for (index, record) in report.log.iter().enumerate() {
        assert_eq!(record.rip, page(0) + 32 * index as u64);
    }
}

#[test]
fn iopl_and_the_bitmap_open_ports_to_ring_3() {
    let kernel = Kernel::new()
        .code(page(0), page(0), |asm| {
            asm.mov(edx, 0x80)?;
            asm.out(dx, al)?;
            asm.cli()?;
            asm.pushfq()?;
            asm.pop(rbx)?;
            asm.sti()?;
            asm.mov(qword_ptr(RESULTS), rbx)?;
            asm.hlt()
        })
        .code(page(1), page(1), |asm| {
            asm.mov(edx, 0x80)?;
            asm.out(dx, al)?;
            asm.out(dx, ax)?;
            asm.hlt()
        });
    let report = report_as_qemu(kernel, |asm| {
        asm.in_ring_3(page(0), 0x3202)?;
        asm.in_ring_3(page(1), 0x202)
    });
    // With IOPL 3 all is allowed but hlt; without, not even the port.
    assert_eq!(report.faults(), [(13, 0, 0), (13, 0, 0)]);
    assert_eq!(report.log[0].rflags, 0x3200);
    assert_eq!(report.log[1].rip, page(1) + 5);
    assert_eq!(report.results[0] & 0x200, 0);
}

#[test]
fn popf_in_ring_3_leaves_the_interrupt_flag() {
    let kernel = Kernel::new().code(page(0), page(0), |asm| {
        asm.pushfq()?;
        asm.pop(rax)?;
        asm.and(rax, !0x200)?;
        asm.or(rax, 0x3000)?;
        asm.push(rax)?;
        asm.popfq()?;
        asm.pushfq()?;
        asm.pop(rbx)?;
        asm.mov(qword_ptr(RESULTS), rbx)?;
        asm.hlt()
    });
    let report = report_as_qemu(kernel, |asm| asm.in_ring_3(page(0), 0x202));
    assert_eq!(report.results[0] & 0x3200, 0x200);
}

#[test]
fn descriptors_can_be_asked_about() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut number = 0;
        for selector in [0u32, 0x08, 0x10, 0x1b, 0x23, 0x28, 0x30, 0x123] {
            asm.mov(ecx, selector)?;
            asm.mov(eax, 0x5555)?;
            asm.lar(eax, ecx)?;
            asm.setz(dl)?;
            // Processors show the limit's upper bits, QEMU doesn't.
            asm.and(eax, 0xfff0_ffff_u32 as i32)?;
            asm.movzx(edx, dl)?;
            asm.shl(rdx, 32)?;
            asm.or(rax, rdx)?;
            asm.result(number, rax)?;
            asm.mov(eax, 0x5555)?;
            asm.lsl(eax, ecx)?;
            asm.setz(dl)?;
            asm.verr(cx)?;
            asm.setz(dh)?;
            asm.movzx(edx, dx)?;
            asm.shl(rdx, 32)?;
            asm.or(rax, rdx)?;
            asm.verw(cx)?;
            asm.setz(dl)?;
            asm.movzx(edx, dl)?;
            asm.shl(rdx, 60)?;
            asm.or(rax, rdx)?;
            asm.result(number + 1, rax)?;
            number += 2;
        }
        Ok(())
    });
    let refused = 0x5555;
    assert_eq!(report.results[0..2], [refused, refused]);
    assert_eq!(report.results[2], 0x1_00a0_9b00);
    assert_eq!(report.results[3], 0x101_ffff_ffff);
    assert_eq!(report.results[5], 0x1000_0101_ffff_ffff);
    // A busy TSS.
    assert_eq!(report.results[10], 0x1_0000_8b00);
    assert_eq!(report.results[14..16], [refused, refused]);
}

#[test]
fn far_jumps_and_returns_reload_the_code_segment() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut first = asm.create_label();
        let mut second = asm.create_label();
        asm.mov(rbx, rsp)?;
        asm.push(KERNEL_CS as i32)?;
        asm.lea(rax, ptr(first))?;
        asm.push(rax)?;
        asm.db(&[0x48, 0xcb])?;
        asm.ud2()?;
        asm.set_label(&mut first)?;
        asm.mov(rcx, rsp)?;
        asm.result(0, rcx)?;
        // jmp m16:64
        asm.lea(rax, ptr(second))?;
        asm.mov(qword_ptr(SCRATCH), rax)?;
        asm.mov(word_ptr(SCRATCH + 8), KERNEL_CS as i32)?;
        asm.db(&[0x48, 0xff, 0x2c, 0x25])?;
        asm.dd(&[SCRATCH as u32])?;
        asm.ud2()?;
        asm.set_label(&mut second)?;
        asm.mov(eax, cs)?;
        asm.result(1, rax)?;
        // A data segment is no code.
        asm.expect(|asm| {
            asm.push(KERNEL_SS as i32)?;
            asm.push(0)?;
            asm.db(&[0x48, 0xcb])
        })?;
        asm.mov(rsp, rbx)
    });
    assert_eq!(report.results[..2], [0x30_0000, KERNEL_CS]);
    assert_eq!(report.faults(), [(13, KERNEL_SS, 0)]);
}
