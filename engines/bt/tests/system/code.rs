//! Code that changes under the translator's feet, and code that lies awkwardly.

use bt::Options;
use engine_core::dma::DeviceMemory;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::{ALL, Kernel, RESULTS, SCRATCH, Steps, USER_STACK, page, pte, window};
use crate::run::{boot, report_as_qemu, run};

/// `mov eax, value; ret`, with the value at offset 1.
fn constant(value: u32) -> Vec<u8> {
    let mut bytes = vec![0xb8];
    bytes.extend(value.to_le_bytes());
    bytes.push(0xc3);
    bytes
}

#[test]
fn a_write_into_the_next_instruction_takes_effect() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut target = asm.create_label();
        asm.lea(rdi, ptr(target))?;
        asm.xor(ebx, ebx)?;
        asm.mov(dword_ptr(rdi + 1), 0x2222)?;
        asm.set_label(&mut target)?;
        asm.db(&[0xb8, 0x11, 0x11, 0, 0])?; // mov eax, 0x1111
        asm.result(0, rax)?;
        // The same by push, call and pop to memory, which move RSP beside.
        let mut second = asm.create_label();
        asm.mov(r15, rsp)?;
        asm.mov(eax, 0x9090_9090u32 as i32)?;
        asm.mov(r14, 0x9090_9090_9090_9090u64)?;
        asm.lea(rsp, ptr(second))?;
        asm.add(rsp, 8)?;
        asm.push(r14)?;
        asm.set_label(&mut second)?;
        asm.db(&[0x48, 0xff, 0xc3])?; // inc rbx
        asm.db(&[0x48, 0xff, 0xc3])?;
        asm.db(&[0x90, 0x90])?;
        asm.mov(rcx, rsp)?;
        asm.mov(rsp, r15)?;
        asm.result(1, rbx)?;
        asm.lea(rdx, ptr(second))?;
        asm.sub(rcx, rdx)?;
        asm.result(2, rcx)?;
        let mut third = asm.create_label();
        asm.push(r14)?;
        asm.lea(rdi, ptr(third))?;
        asm.pop(qword_ptr(rdi))?;
        asm.set_label(&mut third)?;
        asm.db(&[0x48, 0xff, 0xc3])?;
        asm.db(&[0x48, 0xff, 0xc3])?;
        asm.db(&[0x90, 0x90])?;
        asm.result(3, rbx)?;
        asm.mov(rcx, rsp)?;
        asm.sub(rcx, r15)?;
        asm.result(4, rcx)
    });
    assert_eq!(report.results[..5], [0x2222, 0, 0, 0, 0]);
}

#[test]
fn a_loop_that_rewrites_its_own_body_runs_each_version_once() {
    // Adds 0, 1, 2 ... by rewriting the immediate of the add ahead.
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut head = asm.create_label();
        let mut patched = asm.create_label();
        asm.lea(rdi, ptr(patched))?;
        asm.xor(eax, eax)?;
        asm.xor(ecx, ecx)?;
        asm.set_label(&mut head)?;
        asm.mov(dword_ptr(rdi + 1), ecx)?;
        asm.set_label(&mut patched)?;
        asm.db(&[0x05, 0xff, 0, 0, 0])?; // add eax, imm32
        asm.inc(ecx)?;
        asm.cmp(ecx, 1000)?;
        asm.jb(head)?;
        asm.result(0, rax)
    });
    assert_eq!(report.results[0], 999 * 1000 / 2);
}

#[test]
fn writes_through_an_alias_reach_the_code() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(0) | ALL)
            .put(page(0), constant(1)),
        |asm| {
            asm.mov(rbx, window(0))?;
            asm.call(rbx)?;
            asm.result(0, rax)?;
            // Through another virtual address, twice, then through the identity map.
            asm.mov(dword_ptr(window(1) + 1), 2)?;
            asm.call(rbx)?;
            asm.result(1, rax)?;
            asm.mov(dword_ptr(window(1) + 1), 3)?;
            asm.call(rbx)?;
            asm.result(2, rax)?;
            asm.mov(dword_ptr(page(0) + 1), 4)?;
            asm.call(rbx)?;
            asm.result(3, rax)?;
            // By string instruction, and byte by byte.
            asm.mov(eax, 5)?;
            asm.mov(edi, (page(0) + 1) as i32)?;
            asm.mov(ecx, 1)?;
            asm.rep().stosd()?;
            asm.call(rbx)?;
            asm.result(4, rax)?;
            asm.mov(byte_ptr(window(0) + 2), 1)?;
            asm.call(rbx)?;
            asm.result(5, rax)
        },
    );
    assert_eq!(report.results[..6], [1, 2, 3, 4, 5, 0x105]);
}

#[test]
fn code_that_a_device_overwrites_is_executed_anew() {
    const DOORBELL: u64 = 0xfeb0_0000;
    let guest = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, DOORBELL | ALL)
        // mov [rdx], eax; mov eax, 1; ret: the device writes to the instruction that follows.
        .put(page(0), [vec![0x89, 0x02], constant(1)].concat())
        .guest(|asm| {
            asm.mov(rbx, window(0))?;
            asm.mov(rdx, window(1))?;
            let mut again = asm.create_label();
            asm.xor(r12d, r12d)?;
            asm.xor(r13d, r13d)?;
            asm.set_label(&mut again)?;
            asm.mov(eax, r12d)?;
            asm.call(rbx)?;
            asm.imul_3(r13d, r13d, 10)?;
            asm.add(r13d, eax)?;
            // By port, with the code far from the access.
            asm.out(0x80, al)?;
            asm.lea(rax, ptr(rbx + 2))?;
            asm.call(rax)?;
            asm.imul_3(r13d, r13d, 10)?;
            asm.add(r13d, eax)?;
            asm.inc(r12d)?;
            asm.cmp(r12d, 3)?;
            asm.jb(again)?;
            asm.result(0, r13)
        });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    let memory = DeviceMemory::new(&ram, true).expect("an alias");
    let mut pages = Vec::new();
    let mut value = 1u32;
    loop {
        let write = match vcpu.run().expect("it runs") {
            Exit::MmioWrite { addr, .. } => addr.0 == DOORBELL,
            Exit::PioOut { port: 0x80, .. } => true,
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { .. } => false,
            other => panic!("{other:?}"),
        };
        if write {
            value += 1;
            let at = GuestAddress(page(0) + 3);
            memory.ram().write_obj(value, at).expect("guest memory");
            assert!(memory.log().expect("a log").take(&mut pages));
            assert_eq!(pages, [page(0) >> 12]);
            vcpu.memory_written(&pages);
        }
    }
    let result: u64 = ram.read_obj(GuestAddress(RESULTS)).expect("guest memory");
    assert_eq!(result, 234_567);
}

#[test]
fn code_on_the_stack_is_made_anew_each_time() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        let mut head = asm.create_label();
        asm.xor(r8d, r8d)?;
        asm.mov(ecx, 500)?;
        asm.set_label(&mut head)?;
        // mov eax, ecx's value; ret: eight bytes on the stack.
        asm.mov(rdx, 0xc300_0000_00b8_u64)?;
        asm.mov(eax, ecx)?;
        asm.shl(rax, 8)?;
        asm.or(rdx, rax)?;
        asm.push(rdx)?;
        asm.call(rsp)?;
        asm.add(rsp, 8)?;
        asm.add(r8, rax)?;
        asm.dec(ecx)?;
        asm.jne(head)?;
        asm.result(0, r8)
    });
    assert_eq!(report.results[0], 500 * 501 / 2);
}

#[test]
fn a_page_that_is_remapped_brings_other_code_without_a_write() {
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, page(2) | ALL)
        .put(page(0), constant(10))
        .put(page(1), constant(20))
        // A caller in another page, linked to what it calls.
        .code(page(2), window(1), |asm| {
            asm.call(window(0))?;
            asm.ret()
        });
    let report = report_as_qemu(kernel, |asm| {
        asm.mov(rbx, window(1))?;
        for result in 0..4 {
            // Twice each, so that links are made.
            asm.call(rbx)?;
            asm.call(rbx)?;
            asm.result(result, rax)?;
            let next = if result % 2 == 0 { page(1) } else { page(0) };
            if result < 2 {
                asm.remap_now(0, next | ALL)?;
            } else {
                asm.remap(0, next | ALL)?;
                asm.mov(rax, cr3)?;
                asm.mov(cr3, rax)?;
            }
        }
        asm.call(rbx)?;
        asm.result(4, rax)
    });
    assert_eq!(report.results[..5], [10, 20, 10, 20, 10]);
}

#[test]
fn instructions_across_pages_follow_both_mappings() {
    // mov eax, imm32 with its immediate on the next page; then ret there.
    let first = |at: u64| (at + 0xfff, vec![0xb8]);
    let second = |value: u32| {
        let mut bytes = value.to_le_bytes().to_vec();
        bytes.push(0xc3);
        bytes
    };
    let (at, byte) = first(page(0));
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(1) | ALL)
            .put(at, byte)
            .put(page(1), second(1))
            .put(page(2), second(2)),
        |asm| {
            asm.mov(rbx, window(0) + 0xfff)?;
            let call = |asm: &mut CodeAssembler, result: u64| {
                asm.call(rbx)?;
                asm.call(rbx)?;
                asm.result(result, rax)
            };
            call(asm, 0)?;
            asm.remap_now(1, page(2) | ALL)?;
            call(asm, 1)?;
            asm.remap_now(1, page(1) | ALL)?;
            call(asm, 2)?;
            // A write to the second half alone.
            asm.mov(dword_ptr(window(1)), 3)?;
            call(asm, 3)?;
            // The second page vanishes: the fetch faults there, at the instruction's start.
            asm.mov(r14, rsp)?;
            asm.remap_now(1, 0)?;
            asm.expect(|asm| asm.call(rbx))?;
            asm.mov(rsp, r14)?;
            asm.remap_now(1, page(2) | ALL)?;
            call(asm, 4)?;
            // And comes back without rights to execute.
            asm.remap_now(1, page(2) | ALL | 1 << 63)?;
            asm.expect(|asm| asm.call(rbx))?;
            asm.mov(rsp, r14)
        },
    );
    assert_eq!(report.results[..5], [1, 2, 1, 3, 2]);
    assert_eq!(report.faults(), [(14, 16, window(1)), (14, 17, window(1))]);
    assert_eq!(report.log[0].rip, window(0) + 0xfff);
}

#[test]
fn a_page_of_code_and_data_stays_correct_in_a_hot_loop() {
    // The counter lies beside the code that counts.
    let mut bytes = constant(0);
    bytes.resize(64, 0);
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .put(page(0), bytes)
        .code(page(0) + 0x100, window(0) + 0x100, |asm| {
            let mut head = asm.create_label();
            asm.mov(ecx, 20_000)?;
            asm.set_label(&mut head)?;
            asm.inc(qword_ptr(window(0) + 0x800))?;
            asm.mov(rax, qword_ptr(window(0) + 0x800))?;
            asm.mov(qword_ptr(window(0) + 0x808), rax)?;
            asm.dec(ecx)?;
            asm.jne(head)?;
            asm.ret()
        });
    let guest = kernel.guest(|asm| {
        asm.mov(rbx, window(0) + 0x100)?;
        asm.call(rbx)?;
        asm.result(0, rax)?;
        asm.mov(rax, qword_ptr(window(0) + 0x808))?;
        asm.result(1, rax)
    });
    let ended = run(&guest);
    assert_eq!(ended.report().results[..2], [20_000, 20_000]);
    // Data beside code doesn't throw the code away.
    let counts = ended.vcpu.counts();
    let flushes = counts.get(engine_core::ExitReason::SmcFlush);
    assert!(flushes < 100, "{flushes} flushes");
}

#[test]
fn flags_that_a_block_left_out_come_back_when_its_successor_changes() {
    // The successor overwrites all flags at first, and reads them later.
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .code(page(0), window(0), |asm| {
            let mut tail = asm.create_label();
            asm.cmp(rdi, 5)?;
            // An access, so that keeping the flags would cost something.
            asm.mov(rdx, qword_ptr(SCRATCH))?;
            asm.jmp(tail)?;
            asm.nops_with_size(64)?;
            asm.set_label(&mut tail)?;
            asm.db(&[0x31, 0xc0, 0x90, 0xc3]) // xor eax, eax; nop; ret
        });
    let report = report_as_qemu(kernel, |asm| {
        asm.mov(rbx, window(0))?;
        asm.mov(edi, 5)?;
        asm.call(rbx)?;
        asm.call(rbx)?;
        asm.result(0, rax)?;
        // setz al; ret
        asm.mov(rsi, window(0))?;
        let mut find = asm.create_label();
        asm.set_label(&mut find)?;
        asm.inc(rsi)?;
        asm.cmp(dword_ptr(rsi), 0xc390_c031u32 as i32)?;
        asm.jne(find)?;
        asm.mov(dword_ptr(rsi), 0xc3c0_940fu32 as i32)?;
        asm.mov(eax, 0x100)?;
        asm.call(rbx)?;
        asm.result(1, rax)?;
        asm.mov(eax, 0x100)?;
        asm.mov(edi, 6)?;
        asm.call(rbx)?;
        asm.result(2, rax)
    });
    assert_eq!(report.results[..3], [0, 0x101, 0x100]);
}

#[test]
fn ring_3_code_changes_itself_too() {
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .code(page(0), window(0), |asm| {
            let mut target = asm.create_label();
            let mut head = asm.create_label();
            asm.xor(ebx, ebx)?;
            asm.mov(ecx, 100)?;
            asm.lea(rdi, ptr(target))?;
            asm.set_label(&mut head)?;
            asm.mov(dword_ptr(rdi + 2), ecx)?;
            asm.set_label(&mut target)?;
            asm.db(&[0x81, 0xc3, 0, 0, 0, 0])?; // add ebx, imm32
            asm.dec(ecx)?;
            asm.jne(head)?;
            asm.mov(qword_ptr(RESULTS), rbx)?;
            asm.push(rbx)?;
            asm.hlt()
        });
    let report = report_as_qemu(kernel, |asm| asm.in_ring_3(window(0), 0x202));
    assert_eq!(report.results[0], 5050);
    assert_eq!(report.log[0].vector, 13);
    assert_eq!(report.log[0].rsp, USER_STACK - 8);
}

#[test]
fn a_page_table_that_lies_beside_code_still_counts() {
    // The entry is written by code on the very page that holds the table... of another window.
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .put(page(0), constant(7)),
        |asm| {
            asm.mov(rbx, window(0))?;
            asm.call(rbx)?;
            asm.result(0, rax)?;
            asm.mov(qword_ptr(pte(0)), 0)?;
            asm.mov(rax, window(0))?;
            asm.invlpg(byte_ptr(rax))?;
            asm.mov(r14, rsp)?;
            asm.expect(|asm| asm.call(rbx))?;
            asm.mov(rsp, r14)
        },
    );
    assert_eq!(report.results[0], 7);
    assert_eq!(report.faults(), [(14, 16, window(0))]);
}
