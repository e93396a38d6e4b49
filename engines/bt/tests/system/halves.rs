//! Two halves of an address space, as page-table isolation has them: each keeps what it knows of code and data
//! while the other is in use.

use iced_x86::code_asm::*;

use engine_core::testing::TABLES;

use crate::kernel::{
    ACCESSED, ALL, Asm, Built, DIRTY, Kernel, LARGE, PD, PT, Steps, page, pte, window,
};
use crate::run::run;

const USED: u64 = ACCESSED | DIRTY;

/// Root of the other half, with tables of its own down to the window's.
const OTHER: u64 = 100;

/// Enables PCIDs and builds the other half: R14 and R15 become what to load for one and the other,
/// keeping translations.
fn two_halves(asm: &mut Asm) -> Built {
    const PCIDE: i32 = 1 << 17;
    for (number, table) in [TABLES, TABLES + 0x1000, PD, PT].into_iter().enumerate() {
        asm.mov(rsi, table)?;
        asm.mov(rdi, page(OTHER + number as u64))?;
        asm.mov(ecx, 512)?;
        asm.rep().movsq()?;
    }
    for (number, entry) in [(0u64, 0u64), (1, 1), (2, 0)] {
        asm.mov(rax, page(OTHER + number + 1) | ALL)?;
        asm.mov(qword_ptr(page(OTHER + number) + 8 * entry), rax)?;
    }
    asm.mov(rax, cr4)?;
    asm.or(eax, PCIDE)?;
    asm.mov(cr4, rax)?;
    let keep = 1u64 << 63;
    asm.mov(r14, TABLES | 1 | keep)?;
    asm.mov(r15, page(OTHER) | 0x801 | keep)
}

/// Code at the same address in both halves, which says where it is: the other half's changes now and
/// then.
fn halves(rounds: i32) -> crate::run::Ended {
    let code = |number: u8| vec![0x04, number, 0xc3]; // add al, number; ret
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .put(page(0), code(1))
        .put(page(1), code(2))
        .put(page(2), code(4));
    run(&kernel.guest(|asm| {
        two_halves(asm)?;
        let changing = page(OTHER + 3);
        asm.mov(rsi, page(1) | ALL | USED)?;
        asm.mov(rdi, page(2) | ALL | USED)?;
        asm.mov(r10, window(0))?;
        asm.xor(r13d, r13d)?;
        asm.mov(ebx, rounds)?;
        let mut again = asm.create_label();
        let mut kept = asm.create_label();
        asm.set_label(&mut again)?;
        asm.mov(cr3, r15)?;
        asm.test(ebx, 7)?;
        asm.jnz(kept)?;
        // A new entry, and a load that drops what was there.
        asm.mov(qword_ptr(changing), rsi)?;
        asm.xchg(rsi, rdi)?;
        asm.mov(rax, r15)?;
        asm.btr(rax, 63)?;
        asm.mov(cr3, rax)?;
        asm.set_label(&mut kept)?;
        asm.xor(eax, eax)?;
        asm.call(window(0))?;
        asm.call(r10)?;
        asm.mov(cr3, r14)?;
        asm.shl(eax, 4)?;
        asm.call(r10)?;
        asm.call(window(0))?;
        asm.imul_3(r13, r13, 31)?;
        asm.add(r13, rax)?;
        asm.dec(ebx)?;
        asm.jne(again)?;
        asm.result(0, r13)
    }))
}

#[test]
fn two_halves_of_a_space_have_code_of_their_own() {
    const ROUNDS: i32 = 400;
    let mut codes = [2u64, 4];
    // Before the first change the other half has a copy of the first one's tables.
    let mut there = 1;
    let expected = (1..=ROUNDS).rev().fold(0u64, |sum, round| {
        if round % 8 == 0 {
            there = codes[0];
            codes.swap(0, 1);
        }
        sum.wrapping_mul(31).wrapping_add((there * 2) << 4 | 2)
    });
    let ended = halves(ROUNDS);
    let report = ended.report();
    assert_eq!(report.results[0], expected);
    assert!(report.log.is_empty());
}

#[test]
fn going_between_the_halves_keeps_what_was_translated() {
    let [few, many] = [80, 880].map(|rounds| halves(rounds).vcpu.entries());
    let each = (many - few) / 800;
    // Two loads a round, and what the changes cost.
    assert!(each <= 4, "{each} entries a round");
}

#[test]
fn what_one_half_drops_for_want_of_room_is_dropped_in_the_other() {
    // So many large pages are not kept account of: the load behind them drops everything.
    const LARGE_PAGES: u64 = 0x8000_0000;
    let code = |number: u8| vec![0x04, number, 0xc3]; // add al, number; ret
    let kernel = Kernel::new()
        .map(0, page(0) | ALL)
        .put(page(0), code(1))
        .put(page(2), code(4));
    let report = run(&kernel.guest(|asm| {
        two_halves(asm)?;
        let directory = page(OTHER + 4);
        asm.mov(rax, directory | ALL)?;
        asm.mov(qword_ptr(TABLES + 0x1000 + 16), rax)?;
        asm.mov(rdi, directory)?;
        asm.mov(eax, (LARGE | ALL) as u32)?;
        asm.mov(ecx, 512)?;
        asm.rep().stosq()?;
        asm.xor(r13d, r13d)?;
        asm.mov(ebx, 4)?;
        let mut again = asm.create_label();
        let mut quiet = asm.create_label();
        let mut touch = asm.create_label();
        asm.set_label(&mut again)?;
        asm.mov(cr3, r15)?;
        asm.xor(eax, eax)?;
        asm.call(window(0))?;
        asm.shl(r13, 4)?;
        asm.add(r13, rax)?;
        asm.mov(cr3, r14)?;
        asm.cmp(ebx, 2)?;
        asm.jne(quiet)?;
        asm.mov(rsi, LARGE_PAGES)?;
        asm.mov(ecx, 400)?;
        asm.set_label(&mut touch)?;
        asm.mov(al, byte_ptr(rsi))?;
        asm.add(rsi, 0x20_0000)?;
        asm.dec(ecx)?;
        asm.jne(touch)?;
        asm.mov(rax, r14)?;
        asm.btr(rax, 63)?;
        asm.mov(cr3, rax)?;
        asm.mov(rax, page(2) | ALL | USED)?;
        asm.mov(qword_ptr(page(OTHER + 3)), rax)?;
        asm.mov(rax, r15)?;
        asm.btr(rax, 63)?;
        asm.mov(cr3, rax)?;
        asm.set_label(&mut quiet)?;
        asm.dec(ebx)?;
        asm.jne(again)?;
        asm.result(0, r13)
    }))
    .report();
    assert_eq!(report.results[0], 0x1114);
    assert!(report.log.is_empty());
}

/// Data at the same address in both halves, counted up in each; the other half's page changes now and then.
fn counts_in_halves(rounds: i32) -> crate::run::Ended {
    let kernel = Kernel::new().map(0, page(0) | ALL);
    run(&kernel.guest(|asm| {
        two_halves(asm)?;
        let changing = page(OTHER + 3);
        asm.mov(rsi, page(1) | ALL | USED)?;
        asm.mov(rdi, page(2) | ALL | USED)?;
        asm.mov(ebx, rounds)?;
        let mut again = asm.create_label();
        let mut kept = asm.create_label();
        asm.set_label(&mut again)?;
        asm.mov(cr3, r15)?;
        asm.test(ebx, 7)?;
        asm.jnz(kept)?;
        asm.mov(qword_ptr(changing), rsi)?;
        asm.xchg(rsi, rdi)?;
        asm.mov(rax, r15)?;
        asm.btr(rax, 63)?;
        asm.mov(cr3, rax)?;
        asm.set_label(&mut kept)?;
        asm.inc(qword_ptr(window(0)))?;
        asm.mov(cr3, r14)?;
        asm.add(qword_ptr(window(0)), 2)?;
        asm.dec(ebx)?;
        asm.jne(again)?;
        for number in 0..3 {
            asm.mov(rax, qword_ptr(page(number)))?;
            asm.result(number, rax)?;
        }
        Ok(())
    }))
}

#[test]
fn two_halves_of_a_space_have_data_of_their_own() {
    const ROUNDS: i32 = 400;
    let report = counts_in_halves(ROUNDS).report();
    // The first rounds of the other half, before its first change, are in the first one's page.
    assert_eq!(report.results[0..3], [800, 200, 200]);
    assert!(report.log.is_empty());
}

#[test]
fn going_between_the_halves_keeps_translations_of_data() {
    let [few, many] = [80, 880].map(|rounds| counts_in_halves(rounds).vcpu.entries());
    let each = (many - few) / 800;
    assert!(each <= 3, "{each} entries a round");
}

#[test]
fn an_invalidation_of_a_global_page_goes_for_both_halves() {
    const GLOBAL: u64 = 1 << 8;
    const ROUNDS: u64 = 50;
    let kernel = Kernel::new()
        .map(0, page(0) | ALL | USED | GLOBAL)
        .put(page(0), vec![1])
        .put(page(1), vec![2]);
    let report = run(&kernel.guest(|asm| {
        two_halves(asm)?;
        asm.mov(rax, cr4)?;
        asm.bts(rax, 7)?;
        asm.mov(cr4, rax)?;
        asm.mov(rsi, page(1) | ALL | USED | GLOBAL)?;
        asm.mov(rdi, page(0) | ALL | USED | GLOBAL)?;
        asm.xor(r13d, r13d)?;
        asm.mov(ebx, ROUNDS as i32)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        for half in [r15, r14] {
            asm.mov(cr3, half)?;
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.imul_3(r13, r13, 3)?;
            asm.add(r13, rax)?;
        }
        asm.mov(qword_ptr(pte(0)), rsi)?;
        asm.mov(qword_ptr(page(OTHER + 3)), rsi)?;
        asm.xchg(rsi, rdi)?;
        asm.mov(rax, window(0))?;
        asm.invlpg(byte_ptr(rax))?;
        asm.dec(ebx)?;
        asm.jne(again)?;
        asm.result(0, r13)
    }))
    .report();
    let expected = (0..ROUNDS).fold(0u64, |sum, round| {
        let byte = round % 2 + 1;
        (sum.wrapping_mul(3).wrapping_add(byte)).wrapping_mul(3) + byte
    });
    assert_eq!(report.results[0], expected);
    assert!(report.log.is_empty());
}

/// One root under a PCID of each half.
#[test]
fn a_root_in_both_halves_is_looked_up_again_in_each() {
    const ROUNDS: u64 = 60;
    const PCIDE: i32 = 1 << 17;
    let kernel = Kernel::new()
        .map(0, page(0) | ALL | USED)
        .put(page(0), vec![1])
        .put(page(1), vec![2]);
    let report = run(&kernel.guest(|asm| {
        asm.mov(rax, cr4)?;
        asm.or(eax, PCIDE)?;
        asm.mov(cr4, rax)?;
        asm.mov(r14, TABLES | 1)?;
        asm.mov(r15, TABLES | 0x801)?;
        asm.mov(rsi, page(1) | ALL | USED)?;
        asm.mov(rdi, page(0) | ALL | USED)?;
        asm.xor(r13d, r13d)?;
        asm.mov(ebx, ROUNDS as i32)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        for half in [r14, r15, r14] {
            asm.mov(cr3, half)?;
            asm.movzx(eax, byte_ptr(window(0)))?;
            asm.imul_3(r13, r13, 3)?;
            asm.add(r13, rax)?;
            asm.mov(qword_ptr(pte(0)), rsi)?;
            asm.xchg(rsi, rdi)?;
        }
        asm.dec(ebx)?;
        asm.jne(again)?;
        asm.result(0, r13)
    }))
    .report();
    let expected = (0..3 * ROUNDS).fold(0u64, |sum, round| {
        sum.wrapping_mul(3).wrapping_add(round % 2 + 1)
    });
    assert_eq!(report.results[0], expected);
    assert!(report.log.is_empty());
}
