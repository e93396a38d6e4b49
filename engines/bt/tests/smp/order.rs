//! Which orders of loads and stores vCPUs can see: those of SDM 3A 8.2, and no more.

use iced_x86::code_asm::*;

use crate::vm::{Built, ENTRY, FREE, Vm, WINDOW, happens, program_at};

const ROUNDS: i32 = 100_000;
const LOG: u64 = FREE + 0x1_0000;
const OTHER_LOG: u64 = FREE + 0x21_0000;
const SAMPLES: i32 = 20_000;

/// Places for the two words: ordinary memory, beside code, and across pages.
fn places() -> [(u64, u64); 4] {
    let beside = program_at(0) + 0x800;
    [
        (FREE, FREE + 0x40),
        (beside, FREE),
        (FREE, beside),
        (FREE, WINDOW + 0xffc),
    ]
}

fn vm() -> Vm {
    Vm::new()
        .map(0, (FREE + 0x50_0000) | ENTRY)
        .map(1, (FREE + 0x51_0000) | ENTRY)
}

/// Message passing: one vCPU counts up in `x` and then in `y`, another reads them in `order`. Answers
/// how often the second value read was smaller.
fn backwards(x: u64, y: u64, order: [u64; 2]) -> u64 {
    let result = FREE + 0x8000;
    vm().cpu(move |asm| {
        let mut again = asm.create_label();
        asm.mov(rsi, x)?;
        asm.mov(rdi, y)?;
        asm.xor(eax, eax)?;
        asm.set_label(&mut again)?;
        asm.inc(eax)?;
        asm.mov(dword_ptr(rsi), eax)?;
        asm.mov(dword_ptr(rdi), eax)?;
        asm.cmp(eax, ROUNDS)?;
        asm.jb(again)
    })
    .cpu(move |asm| {
        let mut again = asm.create_label();
        let mut good = asm.create_label();
        asm.mov(rsi, order[0])?;
        asm.mov(rdi, order[1])?;
        asm.xor(ebx, ebx)?;
        asm.set_label(&mut again)?;
        asm.mov(eax, dword_ptr(rsi))?;
        asm.mov(ecx, dword_ptr(rdi))?;
        asm.cmp(ecx, eax)?;
        asm.jae(good)?;
        asm.inc(rbx)?;
        asm.set_label(&mut good)?;
        asm.cmp(ecx, ROUNDS)?;
        asm.jb(again)?;
        asm.cmp(eax, ROUNDS)?;
        asm.jb(again)?;
        asm.mov(qword_ptr(result), rbx)
    })
    .run()
    .word(result)
}

#[test]
fn what_was_written_first_is_seen_first() {
    for (x, y) in places() {
        assert_eq!(backwards(x, y, [y, x]), 0, "{x:#x}, {y:#x}");
    }
}

#[test]
fn reading_in_the_order_of_writing_sees_the_second_behind() {
    assert!(happens(|| backwards(
        FREE,
        FREE + 0x40,
        [FREE, FREE + 0x40]
    ) > 0));
}

fn writer(at: u64) -> impl FnOnce(&mut CodeAssembler) -> Built {
    move |asm| {
        let mut again = asm.create_label();
        asm.mov(rsi, at)?;
        asm.xor(eax, eax)?;
        asm.set_label(&mut again)?;
        asm.inc(rax)?;
        asm.mov(qword_ptr(rsi), rax)?;
        // Until both readers have all their samples.
        asm.cmp(qword_ptr(FREE + 0x100), 2)?;
        asm.jb(again)
    }
}

fn reader(first: u64, second: u64, log: u64) -> impl FnOnce(&mut CodeAssembler) -> Built {
    move |asm| {
        let mut again = asm.create_label();
        asm.mov(rsi, first)?;
        asm.mov(rdi, second)?;
        asm.mov(rbx, log)?;
        asm.mov(ecx, SAMPLES)?;
        asm.set_label(&mut again)?;
        asm.mov(rax, qword_ptr(rsi))?;
        asm.mov(rdx, qword_ptr(rdi))?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.mov(qword_ptr(rbx + 8), rdx)?;
        asm.add(rbx, 16)?;
        asm.dec(ecx)?;
        asm.jne(again)?;
        asm.lock().inc(qword_ptr(FREE + 0x100))
    }
}

/// True if the two readers disagree about which of two writes came first: one saw `x` new and `y`
/// old, the other `y` new and `x` old. Samples rise in both words.
fn disagree(xy: &[(u64, u64)], yx: &[(u64, u64)]) -> bool {
    let mut behind = 0;
    xy.iter().any(|&(x, y)| {
        // The last sample of the other reader with an older `x` has the newest `y` of those.
        while behind < yx.len() && yx[behind].1 < x {
            behind += 1;
        }
        behind > 0 && yx[behind - 1].0 > y
    })
}

#[test]
fn all_agree_on_the_order_of_independent_writes() {
    let (x, y) = (FREE, FREE + 0x40);
    let ran = vm()
        .cpu(writer(x))
        .cpu(writer(y))
        .cpu(reader(x, y, LOG))
        .cpu(reader(y, x, OTHER_LOG))
        .run();
    let samples = |log: u64| -> Vec<(u64, u64)> {
        (0..SAMPLES as u64)
            .map(|index| (ran.word(log + 16 * index), ran.word(log + 16 * index + 8)))
            .collect()
    };
    let (xy, yx) = (samples(LOG), samples(OTHER_LOG));
    assert!(xy.is_sorted_by_key(|sample| sample.0) && yx.is_sorted_by_key(|sample| sample.0));
    assert!(!disagree(&xy, &yx));
}

#[test]
fn disagreement_would_be_found() {
    assert!(disagree(&[(0, 0), (5, 3)], &[(3, 1), (4, 2), (9, 9)]));
    assert!(!disagree(&[(0, 0), (5, 4)], &[(3, 1), (4, 2), (9, 9)]));
}
