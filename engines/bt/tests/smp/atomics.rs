//! Locked instructions are atomic wherever their operand lies, and aligned accesses arrive whole.

use bt::Guarantee;
use iced_x86::code_asm::*;

use crate::vm::{Built, ENTRY, FREE, Ran, Vm, WINDOW, happens, program_at};

const CPUS: usize = 4;
const TIMES: i32 = 20_000;

/// How a vCPU adds one to the word at RDI; RSI leads to a free word beside it.
type Add = fn(&mut CodeAssembler) -> Built;

fn increment(asm: &mut CodeAssembler) -> Built {
    asm.lock().inc(qword_ptr(rdi))
}

fn exchange_add(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, 1)?;
    asm.lock().xadd(qword_ptr(rdi), rax)
}

fn compare_exchange(asm: &mut CodeAssembler) -> Built {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(rax, qword_ptr(rdi))?;
    asm.lea(rbx, ptr(rax + 1))?;
    asm.lock().cmpxchg(qword_ptr(rdi), rbx)?;
    asm.jne(again)
}

/// The word and the one after it; the high one counts beside.
fn compare_exchange_16(asm: &mut CodeAssembler) -> Built {
    let mut again = asm.create_label();
    asm.xor(eax, eax)?;
    asm.xor(edx, edx)?;
    asm.set_label(&mut again)?;
    asm.lea(rbx, ptr(rax + 1))?;
    asm.mov(rcx, rdx)?;
    asm.lock().cmpxchg16b(xmmword_ptr(rdi))?;
    asm.jne(again)
}

fn compare_exchange_8(asm: &mut CodeAssembler) -> Built {
    let mut again = asm.create_label();
    asm.xor(eax, eax)?;
    asm.xor(edx, edx)?;
    asm.set_label(&mut again)?;
    asm.lea(ebx, ptr(rax + 1))?;
    asm.mov(ecx, edx)?;
    asm.lock().cmpxchg8b(qword_ptr(rdi))?;
    asm.jne(again)
}

/// A lock by xchg, whose bus lock needs no prefix, around an ordinary increment.
fn behind_exchange(asm: &mut CodeAssembler) -> Built {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(eax, 1)?;
    asm.xchg(dword_ptr(rsi), eax)?;
    asm.test(eax, eax)?;
    asm.jne(again)?;
    asm.inc(qword_ptr(rdi))?;
    asm.mov(dword_ptr(rsi), 0)
}

/// A lock by bts with a bit offset in a register.
fn behind_bit(asm: &mut CodeAssembler) -> Built {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(eax, 7)?;
    asm.lock().bts(qword_ptr(rsi), rax)?;
    asm.jb(again)?;
    asm.inc(qword_ptr(rdi))?;
    asm.lock().btr(qword_ptr(rsi), rax)
}

/// Every vCPU adds one this many times.
fn count(ring: u8, times: i32, at: u64, lock: u64, add: Add, without: Option<Guarantee>) -> Ran {
    let mut vm = Vm::new()
        .without(without)
        .ring(ring)
        // Two pages that lie apart, and two that lie together.
        .map(0, (FREE + 0x10_0000) | ENTRY)
        .map(1, (FREE + 0x20_0000) | ENTRY)
        .map(2, (FREE + 0x30_0000) | ENTRY)
        .map(3, (FREE + 0x30_1000) | ENTRY);
    for _ in 0..CPUS {
        vm = vm.cpu(move |asm| {
            asm.mov(rdi, at)?;
            asm.mov(rsi, lock)?;
            asm.mov(r15d, times)?;
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            asm.nop()?;
            add(asm)?;
            asm.dec(r15d)?;
            asm.jne(again)
        });
    }
    vm.run()
}

const ADDS: [(&str, Add); 7] = [
    ("lock inc", increment),
    ("lock xadd", exchange_add),
    ("lock cmpxchg", compare_exchange),
    ("lock cmpxchg8b", compare_exchange_8),
    ("lock cmpxchg16b", compare_exchange_16),
    ("xchg", behind_exchange),
    ("lock bts", behind_bit),
];

const EXPECTED: u64 = CPUS as u64 * TIMES as u64;
/// A lock across two cache lines stops the whole host for a while.
const ACROSS: i32 = TIMES / 50;
const EXPECTED_ACROSS: u64 = CPUS as u64 * ACROSS as u64;
/// In the page of the first program, far from its code, and in the line of its code.
const BESIDE_CODE: u64 = 0x800;
const AMID_CODE: u64 = 0x78;

#[test]
fn counters_in_ordinary_memory_lose_nothing() {
    for (name, add) in ADDS {
        let ran = count(0, TIMES, FREE, FREE + 0x40, add, None);
        assert_eq!(ran.word(FREE), EXPECTED, "{name}");
    }
}

#[test]
fn counters_beside_code_lose_nothing() {
    for (name, add) in ADDS {
        let at = program_at(0) + BESIDE_CODE;
        let ran = count(0, TIMES, at, at + 0x40, add, None);
        assert_eq!(ran.word(at), EXPECTED, "{name}");
    }
}

#[test]
fn counters_in_a_line_with_code_lose_nothing() {
    // Each write is told to all: fewer forms, since it takes its time.
    let at = program_at(0) + AMID_CODE;
    let ran = count(0, TIMES, at, at + 0x10, increment, None);
    assert_eq!(ran.word(at), EXPECTED);
}

/// The word across the pages of the window from `page` on, whose halves lie at these addresses.
fn across(ran: &Ran, low: u64, high: u64) -> u64 {
    (ran.word(low + 0xff8) >> 32) | ran.word(high) << 32
}

#[test]
fn counters_across_pages_lose_nothing() {
    for (name, add) in ADDS {
        if name == "lock cmpxchg16b" {
            // Faults unless it is aligned.
            continue;
        }
        let ran = count(0, ACROSS, WINDOW + 0xffc, FREE, add, None);
        let sum = across(&ran, FREE + 0x10_0000, FREE + 0x20_0000);
        assert_eq!(sum, EXPECTED_ACROSS, "{name}, apart");
        let ran = count(0, ACROSS, WINDOW + 0x2ffc, FREE, add, None);
        let sum = across(&ran, FREE + 0x30_0000, FREE + 0x30_1000);
        assert_eq!(sum, EXPECTED_ACROSS, "{name}, together");
    }
}

#[test]
fn counters_of_ring_3_lose_nothing() {
    let beside = program_at(0) + BESIDE_CODE;
    for at in [FREE, beside] {
        let ran = count(3, TIMES, at, at + 0x40, increment, None);
        assert_eq!(ran.word(at), EXPECTED, "{at:#x}");
    }
    let ran = count(3, ACROSS, WINDOW + 0xffc, FREE, increment, None);
    let sum = across(&ran, FREE + 0x10_0000, FREE + 0x20_0000);
    assert_eq!(sum, EXPECTED_ACROSS);
}

#[test]
fn a_lock_across_pages_keeps_others_out() {
    // The lock itself lies across, what it guards doesn't.
    for add in [behind_exchange as Add, behind_bit] {
        let ran = count(0, ACROSS, FREE, WINDOW + 0xffc, add, None);
        assert_eq!(ran.word(FREE), EXPECTED_ACROSS);
    }
}

#[test]
fn without_atomicity_slow_paths_lose_increments() {
    let beside = program_at(0) + BESIDE_CODE;
    let lost = happens(|| {
        let ran = count(
            0,
            TIMES,
            beside,
            FREE,
            increment,
            Some(Guarantee::Atomicity),
        );
        ran.word(beside) < EXPECTED
    });
    assert!(lost, "beside code");
    let lost = happens(|| {
        let ran = count(
            0,
            ACROSS,
            WINDOW + 0xffc,
            FREE,
            increment,
            Some(Guarantee::Atomicity),
        );
        across(&ran, FREE + 0x10_0000, FREE + 0x20_0000) < EXPECTED_ACROSS
    });
    assert!(lost, "across pages");
}

/// One vCPU writes all zeros and all ones by turns, another counts what it sees of anything else.
fn torn(at: u64, write: Add) -> u64 {
    let mixed = FREE + 0x8000;
    let done = FREE + 0x8040;
    Vm::new()
        .cpu(move |asm| {
            let mut again = asm.create_label();
            asm.mov(rdi, at)?;
            asm.xor(eax, eax)?;
            asm.mov(r15d, 8 * TIMES)?;
            asm.set_label(&mut again)?;
            asm.not(rax)?;
            write(asm)?;
            asm.dec(r15d)?;
            asm.jne(again)?;
            asm.mov(qword_ptr(done), 1)
        })
        .cpu(move |asm| {
            let mut again = asm.create_label();
            let mut good = asm.create_label();
            asm.mov(rsi, at)?;
            asm.xor(ebx, ebx)?;
            asm.set_label(&mut again)?;
            asm.mov(rax, qword_ptr(rsi))?;
            asm.inc(rax)?;
            asm.cmp(rax, 1)?;
            asm.jbe(good)?;
            asm.inc(rbx)?;
            asm.set_label(&mut good)?;
            asm.cmp(qword_ptr(done), 0)?;
            asm.je(again)?;
            asm.mov(qword_ptr(mixed), rbx)
        })
        .run()
        .word(mixed)
}

fn store(asm: &mut CodeAssembler) -> Built {
    asm.mov(qword_ptr(rdi), rax)
}

fn push(asm: &mut CodeAssembler) -> Built {
    asm.mov(rbp, rsp)?;
    asm.lea(rsp, ptr(rdi + 8))?;
    asm.push(rax)?;
    asm.mov(rsp, rbp)
}

fn string(asm: &mut CodeAssembler) -> Built {
    asm.mov(rdx, rdi)?;
    asm.stosq()?;
    asm.mov(rdi, rdx)
}

fn repeated(asm: &mut CodeAssembler) -> Built {
    asm.mov(rdx, rdi)?;
    asm.mov(ecx, 3)?;
    asm.rep().stosq()?;
    asm.mov(rdi, rdx)
}

fn copy(asm: &mut CodeAssembler) -> Built {
    asm.mov(rdx, rdi)?;
    asm.mov(rsi, FREE + 0x9000)?;
    asm.mov(qword_ptr(rsi), rax)?;
    asm.mov(qword_ptr(rsi + 8), rax)?;
    asm.mov(ecx, 2)?;
    asm.rep().movsq()?;
    asm.mov(rdi, rdx)
}

fn halves(asm: &mut CodeAssembler) -> Built {
    asm.mov(dword_ptr(rdi), eax)?;
    asm.mov(dword_ptr(rdi + 4), eax)
}

#[test]
fn aligned_words_arrive_whole() {
    let beside = program_at(0) + BESIDE_CODE;
    let forms: [(&str, Add); 5] = [
        ("mov", store),
        ("push", push),
        ("stosq", string),
        ("rep stosq", repeated),
        ("rep movsq", copy),
    ];
    for at in [FREE, beside] {
        for (name, write) in forms {
            assert_eq!(torn(at, write), 0, "{name} at {at:#x}");
        }
    }
}

#[test]
fn two_halves_are_seen_apart() {
    assert!(happens(|| torn(FREE, halves) > 0));
}
