//! Code that changes by other means than a plain store: strings that run over themselves, frames of
//! exceptions, bits that the processor sets in tables, devices, other mappings; and pages that turn
//! from data into code and back.

use bt::Options;
use engine_core::dma::DeviceMemory;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::{
    ACCESSED, ALL, Asm, Built, DIRTY, GDT, IDT, Kernel, PD, PT, RESULTS, SCRATCH, Steps, TSS,
    USER_CS, page, pte, window,
};
use crate::run::{boot, report_of_all};

/// `mov eax, value; ret; nop; nop`, as a number.
fn constant(value: u32) -> u64 {
    0x9090_c300_0000_00b8 | u64::from(value) << 8
}

/// R13 = R13 * 10 + RAX.
fn append(asm: &mut Asm) -> Built {
    asm.imul_3(r13, r13, 10)?;
    asm.add(r13, rax)
}

#[test]
fn a_string_runs_over_itself() {
    // rep movsb copies its own code from a template, in which only what follows it differs.
    let copier = |value: u32| {
        engine_core::testing::assemble(64, 0, |asm| {
            asm.cld()?;
            asm.mov(ecx, 64)?;
            asm.rep().movsb()?;
            asm.mov(eax, value)?;
            asm.ret()?;
            asm.db(&[0x90; 64])
        })
    };
    // rep stosd fills with its own bytes, f3 ab 90 90, over the inc rbx that follow.
    let filler = |asm: &mut Asm| {
        asm.db(&[0xf3, 0xab, 0x90, 0x90])?;
        for _ in 0..8 {
            asm.inc(ebx)?;
            asm.nop()?;
            asm.nop()?;
        }
        asm.ret()
    };
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, page(0) | ALL)
        .map(2, page(2) | ALL)
        .put(page(0), copier(1))
        .put(page(2), copier(2))
        .put(page(2) + 0x100, copier(3))
        .code(page(0) + 0x400, window(0) + 0x400, filler);
    let body = |asm: &mut Asm| {
        asm.xor(r13d, r13d)?;
        for round in 0..6u64 {
            asm.mov(rsi, window(2) + 0x100 * (round % 2))?;
            // By its own address and by the other one.
            asm.mov(rdi, window(round / 3))?;
            asm.mov(rax, window(0))?;
            asm.call(rax)?;
            append(asm)?;
        }
        asm.xor(ebx, ebx)?;
        asm.mov(rdi, window(0) + 0x400)?;
        asm.mov(rdx, rdi)?;
        asm.mov(eax, 0x9090_abf3u32)?;
        asm.mov(ecx, 5)?;
        asm.call(rdx)?;
        // Four of the eight are left.
        asm.mov(r14, rbx)
    };
    let results = both_rings(kernel, body);
    assert_eq!(results, [[232_323, 4]; 2]);
}

/// Runs `body` in ring 0 and in ring 3, each with the code as it was; R13 and R14 of each.
fn both_rings(kernel: Kernel, body: impl Fn(&mut Asm) -> Built) -> [[u64; 2]; 2] {
    const PLACE: u64 = 100;
    const KEPT: u64 = 110;
    // The code's page, to be restored for ring 3.
    let report = report_of_all(
        kernel
            .map(PLACE, page(PLACE) | ALL)
            .map(PLACE + 1, page(PLACE + 1) | ALL)
            .code(page(PLACE), window(PLACE), |asm| {
                body(asm)?;
                asm.hlt()
            }),
        |asm| {
            let copy = |asm: &mut Asm, from: u64, to: u64| {
                asm.mov(rsi, from)?;
                asm.mov(rdi, to)?;
                asm.mov(ecx, 512)?;
                asm.rep().movsq()
            };
            asm.cld()?;
            copy(asm, page(0), page(KEPT))?;
            body(asm)?;
            asm.result(0, r13)?;
            asm.result(1, r14)?;
            copy(asm, page(KEPT), page(0))?;
            asm.in_ring_3(window(PLACE), 0x202)?;
            asm.result(2, r13)?;
            asm.result(3, r14)
        },
    );
    let word = |at: usize| report.results[at];
    [[word(0), word(1)], [word(2), word(3)]]
}

#[test]
fn an_interrupts_frame_is_code() {
    // RSP0 leads onto a page of code: what ring 3 has in RSP becomes `mov eax, imm; ret` there, which
    // the handler calls.
    const SLOT: u64 = 0x800;
    const VECTOR: u64 = 0x81;
    const HANDLER: u64 = 3;
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, page(1) | ALL)
        .code(page(HANDLER), page(HANDLER), |asm| {
            asm.lea(rbx, ptr(rsp + 24))?;
            for _ in 0..2 {
                asm.call(rbx)?;
                append(asm)?;
            }
            asm.iretq()
        })
        .code(page(1), window(1), |asm| {
            asm.xor(r13d, r13d)?;
            for number in [1, 2, 3, 1] {
                asm.mov(rsp, constant(number))?;
                asm.int(VECTOR as i32)?;
            }
            asm.hlt()
        });
    let report = report_of_all(kernel, |asm| {
        let at = page(HANDLER);
        asm.mov(
            rax,
            at & 0xffff | 0x08 << 16 | 0xee00 << 32 | at >> 16 << 48,
        )?;
        asm.mov(qword_ptr(IDT + VECTOR * 16), rax)?;
        // The frame's RSP lies 16 below its top.
        asm.mov(rax, window(0) + SLOT + 16)?;
        asm.mov(qword_ptr(TSS + 4), rax)?;
        asm.in_ring_3(window(1), 0x202)?;
        asm.result(0, r13)
    });
    assert_eq!(report.results[0], 11_223_311);
    assert_eq!(report.log[0].rsp, constant(1));
}

#[test]
fn a_page_table_is_code() {
    // Entries 200 to 202: nops and 48 b8, an entry as its constant, a ret. Neither neighbour is
    // present.
    let entry = page(20) | ALL;
    let report = report_of_all(Kernel::new(), |asm| {
        asm.mov(rax, 0xb848_9090_9090_9090u64)?;
        asm.mov(qword_ptr(pte(200)), rax)?;
        asm.mov(rax, entry)?;
        asm.mov(qword_ptr(pte(201)), rax)?;
        asm.mov(eax, 0xc390)?;
        asm.mov(qword_ptr(pte(202)), rax)?;
        asm.mov(rbx, pte(200))?;
        let call = |asm: &mut Asm, result: u64| {
            asm.call(rbx)?;
            asm.call(rbx)?;
            asm.result(result, rax)
        };
        call(asm, 0)?;
        asm.mov(rcx, window(201))?;
        asm.mov(edx, dword_ptr(rcx))?;
        call(asm, 1)?;
        asm.mov(dword_ptr(rcx), edx)?;
        call(asm, 2)?;
        // And the table is still one: a write to its code moves the page.
        asm.mov(dword_ptr(page(21)), 77)?;
        asm.add(qword_ptr(pte(201)), 0x1000)?;
        asm.invlpg(byte_ptr(rcx))?;
        call(asm, 3)?;
        asm.mov(edx, dword_ptr(rcx))?;
        asm.result(4, rdx)
    });
    let dirty = entry | ACCESSED | DIRTY;
    assert_eq!(
        report.results[..5],
        [entry, entry | ACCESSED, dirty, dirty + 0x1000, 77]
    );
}

#[test]
fn a_descriptor_table_is_code() {
    // As with the page table: descriptor 0x48, whose accessed bit a load of DS sets.
    const DESCRIPTOR: u64 = 0x00cf_9200_0000_ffff;
    let report = report_of_all(Kernel::new().map(0, page(0) | ALL), |asm| {
        asm.cld()?;
        asm.mov(rsi, GDT)?;
        asm.mov(rdi, window(0))?;
        asm.mov(ecx, 7)?;
        asm.rep().movsq()?;
        asm.mov(rax, 0xb848_9090_9090_9090u64)?;
        asm.mov(qword_ptr(window(0) + 0x40), rax)?;
        asm.mov(rax, DESCRIPTOR)?;
        asm.mov(qword_ptr(window(0) + 0x48), rax)?;
        asm.mov(eax, 0xc390)?;
        asm.mov(qword_ptr(window(0) + 0x50), rax)?;
        asm.mov(word_ptr(SCRATCH), 0x57)?;
        asm.mov(rax, window(0))?;
        asm.mov(qword_ptr(SCRATCH + 2), rax)?;
        asm.lgdt(ptr(SCRATCH))?;
        asm.mov(rbx, window(0) + 0x40)?;
        asm.call(rbx)?;
        asm.result(0, rax)?;
        asm.mov(eax, 0x48)?;
        asm.mov(ds, eax)?;
        asm.call(rbx)?;
        asm.result(1, rax)
    });
    assert_eq!(report.results[..2], [DESCRIPTOR, DESCRIPTOR | 1 << 40]);
}

#[test]
fn data_becomes_code_and_data_again() {
    let kernel = Kernel::new().map(0, page(0) | ALL).map(1, page(0) | ALL);
    let results = both_rings(kernel, |asm| {
        asm.xor(r13d, r13d)?;
        asm.xor(r14d, r14d)?;
        for value in [1, 2, 3] {
            // Data, by both addresses: whatever makes writes fast has the page now.
            for alias in 0..2u64 {
                let mut fill = asm.create_label();
                asm.mov(ecx, 200)?;
                asm.mov(rdi, window(alias))?;
                asm.set_label(&mut fill)?;
                asm.mov(qword_ptr(rdi + rcx * 8), rcx)?;
                asm.dec(ecx)?;
                asm.jne(fill)?;
            }
            asm.mov(rdi, window(0))?;
            asm.mov(rsi, window(1))?;
            asm.mov(rax, constant(value))?;
            asm.mov(qword_ptr(rdi + 0x40), rax)?;
            asm.lea(rbx, ptr(rdi + 0x40))?;
            asm.call(rbx)?;
            append(asm)?;
            // Code now, and written by either address, and run at either.
            asm.mov(byte_ptr(rdi + 0x41), value as i32 + 3)?;
            asm.call(rbx)?;
            append(asm)?;
            asm.mov(byte_ptr(rsi + 0x41), value as i32 + 6)?;
            asm.call(rbx)?;
            append(asm)?;
            asm.lea(rdx, ptr(rsi + 0x40))?;
            asm.call(rdx)?;
            append(asm)?;
            asm.mov(byte_ptr(rdi + 0x41), value as i32)?;
            asm.call(rdx)?;
            append(asm)?;
            // What lies beside is data all the time.
            asm.add(r14, qword_ptr(rsi + 80))?;
        }
        Ok(())
    });
    assert_eq!(results, [[147_712_588_236_993, 30]; 2]);
}

#[test]
fn ring_3_sees_another_page_without_a_write() {
    const TABLE: u64 = 120;
    // The caller and what it calls are linked, or would be: two pages, several rounds each.
    let caller = |asm: &mut Asm| {
        let mut again = asm.create_label();
        asm.mov(ecx, 3)?;
        asm.set_label(&mut again)?;
        asm.call(window(0))?;
        asm.dec(ecx)?;
        asm.jne(again)?;
        // A store by an address that is data at first, and code's later.
        asm.inc(byte_ptr(window(2) + 0x41))?;
        asm.call(window(0) + 0x40)?;
        asm.add(eax, ebx)?;
        asm.hlt()
    };
    let code = |value: u32, second: u32| {
        let mut bytes = constant(value).to_le_bytes().to_vec();
        bytes.resize(0x40, 0x90);
        // mov ebx, second; ret
        bytes.extend([0xbb]);
        bytes.extend(second.to_le_bytes());
        bytes.push(0xc3);
        bytes
    };
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, page(1) | ALL)
        .map(2, page(2) | ALL)
        .put(page(0), code(10, 100))
        .put(page(5), code(20, 200))
        .code(page(1), window(1), caller);
    let report = report_of_all(kernel, |asm| {
        let run = |asm: &mut Asm, result: u64| {
            asm.in_ring_3(window(1), 0x202)?;
            asm.in_ring_3(window(1), 0x202)?;
            asm.result(result, rax)
        };
        run(asm, 0)?;
        asm.remap_now(0, page(5) | ALL)?;
        run(asm, 1)?;
        // The store's page becomes the code's.
        asm.remap_now(2, page(5) | ALL)?;
        run(asm, 2)?;
        // By CR3.
        asm.remap(0, page(0) | ALL)?;
        asm.mov(rax, cr3)?;
        asm.mov(cr3, rax)?;
        run(asm, 3)?;
        asm.remap(2, page(0) | ALL)?;
        asm.mov(rax, cr3)?;
        asm.mov(cr3, rax)?;
        run(asm, 4)?;
        // Another table, in which the code is the second page again.
        asm.cld()?;
        asm.mov(rsi, PT)?;
        asm.mov(rdi, page(TABLE))?;
        asm.mov(ecx, 512)?;
        asm.rep().movsq()?;
        asm.mov(rax, page(5) | ALL)?;
        asm.mov(qword_ptr(page(TABLE)), rax)?;
        asm.mov(rax, page(TABLE) | ALL)?;
        asm.mov(qword_ptr(PD), rax)?;
        asm.mov(rax, cr3)?;
        asm.mov(cr3, rax)?;
        run(asm, 5)
    });
    assert_eq!(report.results[..6], [110, 220, 222, 110, 112, 224]);
    let rings = report.log.iter().map(|record| (record.vector, record.cs));
    assert!(rings.eq([(13, USER_CS); 12]));
}

/// A device that writes constants into code each time it is told to, by a port or by memory.
fn device(held: bool) {
    const DOORBELL: u64 = 0xfeb0_0000;
    let guest = Kernel::new()
        .map(0, page(0) | ALL)
        .map(1, DOORBELL | ALL)
        .map(2, page(2) | ALL)
        .map(3, page(0) | ALL)
        // mov [rdx], eax; mov eax, 0; ret: the device writes to the instruction that follows.
        .put(
            page(0),
            [&[0x89, 0x02][..], &constant(0).to_le_bytes()].concat(),
        )
        .code(page(2), window(2), |asm| {
            asm.xor(r13d, r13d)?;
            asm.mov(rbx, window(0))?;
            asm.mov(rdx, window(1))?;
            for round in 0..3u64 {
                asm.call(rbx)?;
                append(asm)?;
                asm.out(0x80, al)?;
                // By its address and by another one.
                asm.mov(rcx, window(3 * (round % 2)) + 2)?;
                asm.call(rcx)?;
                append(asm)?;
                // By a string of words from a port, into the constant.
                asm.mov(rdi, window(3 * (round % 2)) + 3)?;
                asm.mov(r8, rdx)?;
                asm.mov(edx, 0x81)?;
                asm.insw()?;
                asm.mov(rdx, r8)?;
                asm.call(rcx)?;
                append(asm)?;
            }
            asm.hlt()
        })
        .guest(|asm| {
            // IOPL 3.
            asm.in_ring_3(window(2), 0x3202)?;
            asm.result(0, r13)
        });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    if held && vcpu.hold_window().is_none() {
        return;
    }
    let memory = DeviceMemory::new(&ram, true).expect("an alias");
    let mut pages = Vec::new();
    let mut value = 0u32;
    loop {
        let write = match vcpu.run().expect("it runs") {
            Exit::MmioWrite { addr, .. } => addr.0 == DOORBELL,
            Exit::PioOut { port: 0x80, .. } => true,
            Exit::PioIn {
                port: 0x81, data, ..
            } => {
                value += 1;
                data.copy_from_slice(&(value as u16).to_le_bytes());
                false
            }
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { .. } => false,
            other => panic!("{other:?}"),
        };
        if write {
            value += 1;
            let at = GuestAddress(page(0) + 3);
            memory.ram().write_obj(value, at).expect("guest memory");
            assert!(memory.log().expect("a log").take(&mut pages));
            vcpu.memory_written(&pages);
        }
    }
    let result: u64 = ram.read_obj(GuestAddress(RESULTS)).expect("guest memory");
    assert_eq!(result, 123_456_789);
}

#[test]
fn a_device_overwrites_code_of_ring_3() {
    device(false);
    device(true);
}
