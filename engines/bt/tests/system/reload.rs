//! Loads of CR3: what was in use before them is looked up again, in the tables as they are.

use iced_x86::code_asm::*;

use engine_core::testing::TABLES;

use crate::kernel::{
    ACCESSED, ALL, Asm, Built, DIRTY, Kernel, NO_EXECUTE, PRESENT, Steps, page, pte, window,
};
use crate::run::{report_as_qemu, run};

const USED: u64 = ACCESSED | DIRTY;

/// Drops translations by a load of CR3.
fn load(asm: &mut Asm) -> Built {
    asm.mov(rax, cr3)?;
    asm.mov(cr3, rax)
}

/// Drops translations by CR4.PGE, there and back.
fn toggle(asm: &mut Asm) -> Built {
    const PGE: i32 = 1 << 7;
    asm.mov(rax, cr4)?;
    asm.xor(eax, PGE)?;
    asm.mov(cr4, rax)?;
    asm.xor(eax, PGE)?;
    asm.mov(cr4, rax)
}

#[test]
fn code_and_data_follow_the_tables_at_every_load() {
    code_and_data_follow_the_tables(load);
}

#[test]
fn code_and_data_follow_the_tables_when_global_pages_come_and_go() {
    code_and_data_follow_the_tables(toggle);
}

fn code_and_data_follow_the_tables(drop: fn(&mut Asm) -> Built) {
    const ROUNDS: u64 = 200;
    let report = report_as_qemu(
        Kernel::new()
            // mov al, 1 or 2; ret
            .put(page(3), vec![0xb0, 1, 0xc3])
            .put(page(4), vec![0xb0, 2, 0xc3])
            .put(page(5), vec![0x10])
            .put(page(6), vec![0x20]),
        |asm| {
            asm.mov(rsi, page(3) | ALL | USED)?;
            asm.mov(rdi, page(4) | ALL | USED)?;
            asm.mov(r8, page(5) | ALL | USED)?;
            asm.mov(r9, page(6) | ALL | USED)?;
            asm.mov(r10, window(0))?;
            asm.xor(r12d, r12d)?;
            asm.xor(r13d, r13d)?;
            let mut again = asm.create_label();
            let mut same = asm.create_label();
            asm.set_label(&mut again)?;
            asm.mov(qword_ptr(pte(0)), rsi)?;
            asm.mov(qword_ptr(pte(1)), r8)?;
            drop(asm)?;
            asm.xor(eax, eax)?;
            // By a link, and by way of a jump cache.
            asm.call(window(0))?;
            asm.imul_3(r13, r13, 3)?;
            asm.add(r13, rax)?;
            asm.call(r10)?;
            asm.imul_3(r13, r13, 3)?;
            asm.add(r13, rax)?;
            asm.movzx(eax, byte_ptr(window(1)))?;
            asm.imul_3(r13, r13, 3)?;
            asm.add(r13, rax)?;
            asm.inc(byte_ptr(window(1)))?;
            // The tables change after every other round.
            asm.test(r12d, 1)?;
            asm.jz(same)?;
            asm.xchg(rsi, rdi)?;
            asm.xchg(r8, r9)?;
            asm.set_label(&mut same)?;
            asm.inc(r12d)?;
            asm.cmp(r12d, ROUNDS as i32)?;
            asm.jb(again)?;
            asm.result(0, r13)
        },
    );
    let mut bytes = [0x10u8, 0x20];
    let expected = (0..ROUNDS).fold(0u64, |sum, round| {
        let which = (round / 2 % 2) as usize;
        let byte = bytes[which];
        bytes[which] = byte.wrapping_add(1);
        [which as u64 + 1, which as u64 + 1, byte.into()]
            .iter()
            .fold(sum, |sum, value| sum.wrapping_mul(3).wrapping_add(*value))
    });
    assert_eq!(report.results[0], expected);
    assert!(report.log.is_empty());
}

/// How often the runtime enters translated code for each round of a loop that calls code in another page, and
/// does `change`.
fn entries_for(change: fn(&mut Asm) -> Built) -> u64 {
    const PKE: i32 = 1 << 22;
    let entries = |rounds: i32| {
        let kernel = Kernel::new()
            .map(0, page(0) | ALL | USED)
            .put(page(0), vec![0xc3]);
        let ended = run(&kernel.guest(|asm| {
            asm.mov(rax, cr4)?;
            asm.or(eax, PKE)?;
            asm.mov(cr4, rax)?;
            asm.mov(ebx, rounds)?;
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            change(asm)?;
            asm.mov(r10, window(0))?;
            asm.call(window(0))?;
            asm.call(r10)?;
            asm.dec(ebx)?;
            asm.jne(again)
        }));
        ended.report();
        ended.vcpu.entries()
    };
    (entries(900) - entries(100)) / 800
}

#[test]
fn code_stays_linked_when_rights_to_data_change_and_when_the_tables_have_not() {
    let none = entries_for(|_| Ok(()));
    let loads = entries_for(load);
    let toggles = entries_for(toggle);
    let keys = entries_for(|asm| {
        asm.xor(ecx, ecx)?;
        asm.xor(edx, edx)?;
        asm.lea(eax, ptr(rbx * 4))?;
        // wrpkru
        asm.db(&[0x0f, 0x01, 0xef])
    });
    println!("entries a round: {none}, load {loads}, toggle {toggles}, keys {keys}");
    assert_eq!(none, 0);
    // The instructions themselves, and an access after them.
    assert!(loads <= 2 && toggles <= 3 && keys <= 3);
}

#[test]
fn looking_up_again_leaves_no_trace_and_gives_no_right() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(1) | ALL)
            .map(2, page(2) | ALL)
            .map(3, page(3) | ALL)
            .map(4, page(4) | ALL)
            .map(5, page(5) | ALL)
            .put(page(2), vec![0xc3])
            .put(page(5), vec![0xc3]),
        |asm| {
            for data in [0, 1, 3, 4] {
                asm.mov(eax, dword_ptr(window(data)))?;
                asm.mov(dword_ptr(window(data)), eax)?;
            }
            asm.mov(rbx, window(2))?;
            asm.call(rbx)?;
            asm.mov(rbp, window(5))?;
            asm.call(rbp)?;
            // Neither used; read but not written; code, not used; read-only; gone; not executable.
            asm.remap(0, page(0) | ALL)?;
            asm.remap(1, page(1) | ALL | ACCESSED)?;
            asm.remap(2, page(2) | ALL)?;
            asm.remap(3, page(3) | PRESENT | USED)?;
            asm.remap(4, page(4) | (ALL | USED) & !PRESENT)?;
            asm.remap(5, page(5) | ALL | USED | NO_EXECUTE)?;
            asm.mov(rax, cr3)?;
            asm.mov(cr3, rax)?;
            for number in 0..3 {
                asm.mov(rax, qword_ptr(pte(number)))?;
                asm.result(number, rax)?;
            }
            asm.mov(eax, dword_ptr(window(1)))?;
            asm.mov(rax, qword_ptr(pte(1)))?;
            asm.result(3, rax)?;
            asm.mov(dword_ptr(window(1)), eax)?;
            asm.mov(dword_ptr(window(0)), eax)?;
            asm.call(rbx)?;
            for number in 0..3 {
                asm.mov(rax, qword_ptr(pte(number)))?;
                asm.result(4 + number, rax)?;
            }
            asm.expect(|asm| asm.mov(dword_ptr(window(3)), eax))?;
            asm.expect(|asm| asm.mov(eax, dword_ptr(window(4))))?;
            asm.expect(|asm| asm.call(rbp))
        },
    );
    assert_eq!(
        report.results[..7],
        [
            page(0) | ALL,
            page(1) | ALL | ACCESSED,
            page(2) | ALL,
            page(1) | ALL | ACCESSED,
            page(0) | ALL | USED,
            page(1) | ALL | USED,
            page(2) | ALL | ACCESSED,
        ]
    );
    let faults = report.faults();
    assert_eq!(
        faults,
        [
            (14, 3, window(3)),
            (14, 0, window(4)),
            (14, 0x11, window(5))
        ]
    );
}

/// Two roots; in the second one, the window's directory leads to one of two tables, and changes before
/// a load of CR3 and before an invalidation of one page, which goes for all paging-structure caches
/// (SDM 3A 4.10.4.1).
#[test]
fn every_root_keeps_its_own_translations_and_sees_its_upper_entries_change() {
    const ROUNDS: u64 = 300;
    for bits in [ALL, ALL | ACCESSED] {
        let (root, upper, directory) = (page(16), page(17), page(18));
        let tables = [page(19), page(20)];
        let frame = |number: u64| (page(number) | ALL | USED).to_le_bytes();
        let kernel = Kernel::new()
            .map(0, page(9) | ALL | USED)
            .put(page(5), vec![0x10])
            .put(page(6), vec![0x20])
            .put(page(7), vec![0x30])
            .put(page(8), vec![0x40])
            .put(page(9), vec![0x50])
            .put(tables[0], [frame(5), frame(6)].concat())
            .put(tables[1], [frame(7), frame(8)].concat());
        let report = report_as_qemu(kernel, |asm| {
            let add = |asm: &mut CodeAssembler, at: u64| {
                asm.movzx(eax, byte_ptr(at))?;
                asm.imul_3(r13, r13, 3)?;
                asm.add(r13, rax)?;
                asm.inc(byte_ptr(at))
            };
            for (from, to) in [(TABLES, root), (TABLES + 0x1000, upper)] {
                asm.mov(rsi, from)?;
                asm.mov(rdi, to)?;
                asm.mov(ecx, 512)?;
                asm.rep().movsq()?;
            }
            asm.mov(rax, upper | bits)?;
            asm.mov(qword_ptr(root), rax)?;
            asm.mov(rax, directory | bits)?;
            asm.mov(qword_ptr(upper + 8), rax)?;
            asm.mov(rsi, tables[0] | bits)?;
            asm.mov(rdi, tables[1] | bits)?;
            asm.mov(r8, cr3)?;
            asm.mov(r9, root)?;
            asm.xor(r12d, r12d)?;
            asm.xor(r13d, r13d)?;
            let mut again = asm.create_label();
            let mut same = asm.create_label();
            asm.set_label(&mut again)?;
            asm.mov(cr3, r8)?;
            add(asm, window(0))?;
            asm.mov(qword_ptr(directory), rsi)?;
            asm.mov(cr3, r9)?;
            add(asm, window(0))?;
            asm.mov(qword_ptr(directory), rdi)?;
            asm.mov(rax, window(1))?;
            asm.invlpg(byte_ptr(rax))?;
            add(asm, window(1))?;
            asm.test(r12d, 1)?;
            asm.jz(same)?;
            asm.xchg(rsi, rdi)?;
            asm.set_label(&mut same)?;
            asm.inc(r12d)?;
            asm.cmp(r12d, ROUNDS as i32)?;
            asm.jb(again)?;
            asm.mov(cr3, r8)?;
            asm.result(0, r13)
        });
        // Of the first root; by table and page of the second.
        let mut first = 0x50u8;
        let mut second = [[0x10u8, 0x20], [0x30, 0x40]];
        let mut sum = 0u64;
        let mut add = |byte: &mut u8| {
            sum = sum.wrapping_mul(3).wrapping_add((*byte).into());
            *byte = byte.wrapping_add(1);
        };
        for round in 0..ROUNDS as usize {
            let table = round / 2 % 2;
            add(&mut first);
            add(&mut second[table][0]);
            add(&mut second[1 - table][1]);
        }
        assert_eq!(report.results[0], sum, "entries with {bits:#x}");
        assert!(report.log.is_empty());
    }
}
