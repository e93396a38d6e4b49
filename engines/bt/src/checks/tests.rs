use super::*;
use crate::decode::decode_whole;

const MODE: Mode = Mode {
    user: true,
    window: true,
    stack: true,
    interrupts: false,
    ..Mode::LONG
};

/// Where comparisons at the head are said to be.
const HEAD: usize = 99;

/// (before, register, index, users)
fn check(bytes: &[u8], outside: Outside, routes: &[Route], expected: &[(usize, u8, bool, u64)]) {
    let decoded = decode_whole(bytes, MODE).expect("decodes");
    let checks = plan(&decoded.insns, MODE, outside);
    assert_eq!(checks.routes, routes);
    let found: Vec<_> = checks
        .before
        .iter()
        .enumerate()
        .flat_map(|(at, before)| before.iter().map(move |check| (at, check)))
        .chain(checks.head.iter().map(|check| (HEAD, check)))
        .map(|(at, check)| (at, check.register, check.index, check.users))
        .collect();
    assert_eq!(found, expected);
}

const NONE: Outside = Outside {
    head: 0,
    sum: 0,
    tlb: 0,
};
use Route::{Direct, Sum, Tlb};

#[test]
fn pushes_need_no_check_where_blocks_meet_with_rsp_inside() {
    // push rbp; push rbx; sub rsp, 24; mov [rsp+8], rax; test eax, eax; call +0
    check(
        b"\x55\x53\x48\x83\xec\x18\x48\x89\x44\x24\x08\x85\xc0\xe8\0\0\0\0",
        NONE,
        &[Direct, Direct, Tlb, Direct, Tlb, Direct],
        &[],
    );
}

#[test]
fn rsp_is_checked_if_nothing_shows_where_it_went() {
    // sub rsp, 24; xor eax, eax; jz +0
    check(
        b"\x48\x83\xec\x18\x31\xc0\x74\0",
        NONE,
        &[Tlb, Tlb, Tlb],
        &[(1, 4, false, 0)],
    );
    // mov rsp, rbp; pop rbp; xor eax, eax; jz +0
    check(
        b"\x48\x89\xec\x5d\x31\xc0\x74\0",
        NONE,
        &[Tlb, Direct, Tlb, Tlb],
        &[(1, 4, false, 0)],
    );
    // leave; ret
    check(b"\xc9\xc3", NONE, &[Direct, Direct], &[(0, 5, false, 0b1)]);
    // sub rsp, 24; mov [rsp], rax; add rsp, 24; pop rbx; ret
    check(
        b"\x48\x83\xec\x18\x48\x89\x04\x24\x48\x83\xc4\x18\x5b\xc3",
        NONE,
        &[Tlb, Direct, Tlb, Direct, Direct],
        &[],
    );
    // push [rax] goes another way, and shows nothing.
    check(
        b"\xff\x30\x31\xc0\x74\0",
        NONE,
        &[Tlb, Tlb, Tlb],
        &[(1, 4, false, 0)],
    );
}

#[test]
fn a_check_moves_before_whatever_sets_the_flags() {
    // cmp rax, rbx; lea rsi, [rsi+8]; mov rcx, [rsi]; jz +0
    check(
        b"\x48\x39\xd8\x48\x8d\x76\x08\x48\x8b\x0e\x74\0",
        NONE,
        &[Tlb, Tlb, Direct, Tlb],
        &[(HEAD, 6, false, 0b100)],
    );
}

#[test]
fn a_loaded_pointer_is_checked_again() {
    // xor eax, eax; mov rsi, [rsi]; mov rsi, [rsi]; xor eax, eax; ret
    check(
        b"\x31\xc0\x48\x8b\x36\x48\x8b\x36\x31\xc0\xc3",
        NONE,
        &[Tlb, Direct, Direct, Tlb, Direct],
        &[(2, 6, false, 0b100), (HEAD, 6, false, 0b10)],
    );
}

#[test]
fn a_32_bit_index_needs_no_check() {
    // and ecx, 7; mov rax, [rsi+rcx*8]; mov rax, [rsi+rdx*8]; xor eax, eax; jz +0
    check(
        b"\x83\xe1\x07\x48\x8b\x04\xce\x48\x8b\x04\xd6\x31\xc0\x74\0",
        NONE,
        &[Tlb, Direct, Direct, Tlb, Tlb],
        &[(HEAD, 2, true, 0b100), (HEAD, 6, false, 0b110)],
    );
}

#[test]
fn accesses_that_were_outside_go_another_way() {
    // mov rax, [rsi]; mov rax, [rsi+rdx*8]; xor eax, eax; jz +0
    let outside = Outside {
        sum: 2,
        tlb: 1,
        ..NONE
    };
    check(
        b"\x48\x8b\x06\x48\x8b\x04\xd6\x31\xc0\x74\0",
        outside,
        &[Tlb, Sum, Tlb, Tlb],
        &[],
    );
}

#[test]
fn far_constants_and_thread_segments_are_left_alone() {
    // mov rax, fs:[rbx]; mov eax, [0xffffffff80000000]; mov eax, [0x7fffffff]; xor eax,eax; jz +0
    check(
        b"\x64\x48\x8b\x03\x8b\x04\x25\0\0\0\x80\x8b\x04\x25\xff\xff\xff\x7f\x31\xc0\x74\0",
        NONE,
        &[Tlb, Tlb, Direct, Tlb, Tlb],
        &[],
    );
}

/// A block that is a loop, and what its branch back knows.
fn check_loop(bytes: &[u8], expected: &[(usize, u8, bool, u64)], goes_on: bool) {
    let decoded = decode_whole(bytes, MODE).expect("decodes");
    let direct = vec![Direct; decoded.insns.len()];
    let routes: Vec<Route> = decoded
        .insns
        .iter()
        .zip(direct)
        .map(|(insn, direct)| if insn.memory.is_some() { direct } else { Tlb })
        .collect();
    check(bytes, NONE, &routes, expected);
    let checks = plan(&decoded.insns, MODE, NONE);
    let at = decoded
        .insns
        .iter()
        .position(|insn| leads_back(insn, &decoded.insns))
        .expect("a loop");
    let known = match decoded.insns[at].class {
        Class::Branch => checks.taken[at],
        _ => checks.end,
    };
    assert!(checks.repeats);
    assert_eq!(known.cover(checks.needs), goes_on);
}

#[test]
fn a_loop_over_an_array_compares_once() {
    // 1: mov rax, [rdi+rcx*8]; mov [rsi], rax; add rsi, 8; inc rcx; cmp rcx, rdx; jb 1b
    check_loop(
        b"\x48\x8b\x04\xcf\x48\x89\x06\x48\x83\xc6\x08\x48\xff\xc1\x48\x39\xd1\x72\xed",
        &[
            (HEAD, 1, true, 0b1),
            (HEAD, 6, false, 0b10),
            (HEAD, 7, false, 0b1),
        ],
        true,
    );
    // Bytes, with the length compared by the guest: 1: mov al, [rdi+rcx]; inc rcx; dec rdx; jne 1b
    check_loop(
        b"\x8a\x04\x0f\x48\xff\xc1\x48\xff\xca\x75\xf5",
        &[(HEAD, 1, false, 0b1), (HEAD, 7, false, 0b1)],
        true,
    );
}

#[test]
fn a_bound_is_compared_for_what_is_below_it() {
    // 1: cmp rcx, rdx; jae out; mov rcx, [rdi+rcx*8]; jmp 1b
    check_loop(
        b"\x48\x39\xd1\x73\x10\x48\x8b\x0c\xcf\xeb\xf5",
        &[(HEAD, 2, true, 0b100), (HEAD, 7, false, 0b100)],
        true,
    );
}

#[test]
fn what_nobody_bounds_is_compared_each_time() {
    // 1: mov rsi, [rsi]; test rsi, rsi; jne 1b
    check_loop(
        b"\x48\x8b\x36\x48\x85\xf6\x75\xf8",
        &[(0, 6, false, 0b1)],
        true,
    );
    // 1: mov al, [rsi]; add rsi, rdx; dec rcx; jne 1b
    check_loop(
        b"\x8a\x06\x48\x01\xd6\x48\xff\xc9\x75\xf6",
        &[(0, 6, false, 0b1)],
        true,
    );
}

#[test]
fn accesses_that_were_outside_have_their_comparison_in_line() {
    let outside = Outside { head: 1, ..NONE };
    // 1: mov rax, [rdi]; dec rcx; jne 1b
    let bytes = b"\x48\x8b\x07\x48\xff\xc9\x75\xf8";
    check(bytes, outside, &[Direct, Tlb, Tlb], &[(0, 7, false, 1)]);
}

#[test]
fn a_prefetch_shows_nothing() {
    // 1: prefetcht0 [rsi]; add rsi, 64; dec rcx; jne 1b
    let bytes = b"\x0f\x18\x0e\x48\x83\xc6\x40\x48\xff\xc9\x75\xf4";
    let decoded = decode_whole(bytes, MODE).expect("decodes");
    let checks = plan(&decoded.insns, MODE, NONE);
    assert!(checks.routes[0] == Tlb || checks.head.is_empty());
}
