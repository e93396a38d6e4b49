//! No guest address, however wild, reaches memory of the VMM's through the window.
//!
//! Every form of access is tried at addresses all over the 64 bits, at every edge of the window and of
//! its guards, and at those where this process has its own memory, as they are and as the window would
//! have to be given them. Ring 0 and code without the window are tried in `system/limits.rs`.

mod canaries;
mod loops;

use std::time::Duration;

use bt::UserStop;
use bt::insn::{Bench, Case, End};
use canaries::{CANARY, Canaries};
use engine_core::{ExitReason, Vcpu};

const SIZE: u64 = 1 << 39;
const INDEX_LIMIT: u64 = 1 << 36;
const REACH: u64 = 12 << 34;
/// Of what is reserved on either side.
const GUARD: u64 = 9 * (REACH + (1 << 30)) + (1 << 31) + 4096;
/// Where the code is; nothing else is mapped.
const LOAD: u64 = 0x1_0000;
/// A mapped page, for forms that need a good access before the wild one.
const GOOD: u64 = 0x20_0000;
/// Where the bench keeps its descriptor tables, present but not for ring 3.
const KERNEL: u64 = 0xffff_fe00_0000_0000;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read(u64),
    Write(u64),
    /// As `Read` and `Write` of 8 bytes, relative to an RSP of that value: #SS for #GP.
    Pop,
    Push,
    /// Any exception will do.
    Any,
}

/// Code that accesses the address in RBX, and by how much it misses it.
const FORMS: &[(&str, &[u8], Kind, i64)] = &[
    ("mov rax, [rbx]", b"\x48\x8b\x03", Kind::Read(8), 0),
    ("mov [rbx], rax", b"\x48\x89\x03", Kind::Write(8), 0),
    ("mov al, [rbx]", b"\x8a\x03", Kind::Read(1), 0),
    (
        "lock inc qword [rbx]",
        b"\xf0\x48\xff\x03",
        Kind::Write(8),
        0,
    ),
    ("movups xmm0, [rbx]", b"\x0f\x10\x03", Kind::Read(16), 0),
    ("movups [rbx], xmm0", b"\x0f\x11\x03", Kind::Write(16), 0),
    ("fld qword [rbx]", b"\xdd\x03", Kind::Read(8), 0),
    (
        "mov [rbx+0x7fffff00], rax",
        b"\x48\x89\x83\x00\xff\xff\x7f",
        Kind::Write(8),
        0x7fff_ff00,
    ),
    (
        "mov [rbx-0x80000000], rax",
        b"\x48\x89\x83\x00\x00\x00\x80",
        Kind::Write(8),
        -0x8000_0000,
    ),
    // rcx is 0
    (
        "mov [rbx+rcx*8], rax",
        b"\x48\x89\x04\xcb",
        Kind::Write(8),
        0,
    ),
    ("mov [rcx+rbx], rax", b"\x48\x89\x04\x19", Kind::Write(8), 0),
    (
        "mov rsi, rbx; mov [rsi], rax",
        b"\x48\x89\xde\x48\x89\x06",
        Kind::Write(8),
        0,
    ),
    (
        "mov rsp, rbx; push rax",
        b"\x48\x89\xdc\x50",
        Kind::Push,
        -8,
    ),
    ("mov rsp, rbx; pop rax", b"\x48\x89\xdc\x58", Kind::Pop, 0),
    ("mov rsp, rbx; ret", b"\x48\x89\xdc\xc3", Kind::Pop, 0),
    (
        "mov rsp, rbx; call +0",
        b"\x48\x89\xdc\xe8\0\0\0\0",
        Kind::Push,
        -8,
    ),
    (
        "mov rsp, rbx; mov [rsp+8], rax",
        b"\x48\x89\xdc\x48\x89\x44\x24\x08",
        Kind::Push,
        8,
    ),
    ("mov rbp, rbx; leave", b"\x48\x89\xdd\xc9", Kind::Pop, 0),
    (
        "mov rsp, rbx; sub rsp, 32; jmp +0; push rax",
        b"\x48\x89\xdc\x48\x83\xec\x20\xeb\0\x50",
        Kind::Push,
        -40,
    ),
    (
        "mov rdi, rbx; stosq",
        b"\x48\x89\xdf\x48\xab",
        Kind::Write(8),
        0,
    ),
    (
        "mov rsi, rbx; lodsq",
        b"\x48\x89\xde\x48\xad",
        Kind::Read(8),
        0,
    ),
    ("bts [rbx], rcx", b"\x48\x0f\xab\x0b", Kind::Any, 0),
    ("fxsave [rbx]", b"\x0f\xae\x03", Kind::Any, 0),
    ("cmpxchg16b [rbx]", b"\x48\x0f\xc7\x0b", Kind::Any, 0),
    ("push qword [rbx]", b"\xff\x33", Kind::Any, 0),
    ("pop qword [rbx]", b"\x8f\x03", Kind::Any, 0),
    ("jmp [rbx]", b"\xff\x23", Kind::Any, 0),
    ("call [rbx]", b"\xff\x13", Kind::Any, 0),
    ("jmp rbx", b"\xff\xe3", Kind::Any, 0),
    (
        "mov rdi, rbx; maskmovdqu",
        b"\x48\x89\xdf\xf3\x0f\x6f\x05\0\0\0\0\x66\x0f\xf7\xc0",
        Kind::Any,
        0,
    ),
    // The same base, good at first, moved by a constant that the check doesn't cover any more.
    (
        "mov rbx, good; mov rax, [rbx]; add rbx, 0x7fffffff; mov [rbx+0x7fffffff], rax",
        b"\xbb\0\0\x20\0\x48\x8b\x03\x48\x81\xc3\xff\xff\xff\x7f\x48\x89\x83\xff\xff\xff\x7f",
        Kind::Any,
        0,
    ),
    // index * 8 for the address: rbx is as large as it comes
    ("mov [rcx+rbx*8], rax", b"\x48\x89\x04\xd9", Kind::Any, 0),
    (
        "mov [rbx+rbx*8+0x7fffffff], rax",
        b"\x48\x89\x84\xdb\xff\xff\xff\x7f",
        Kind::Any,
        0,
    ),
];

fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Vector, error code and address that an access to unmapped memory ends with.
fn expected(kind: Kind, address: u64) -> Option<(u8, Option<u32>, Option<u64>)> {
    let (size, write, stack) = match kind {
        Kind::Read(size) => (size, false, false),
        Kind::Write(size) => (size, true, false),
        Kind::Pop => (8, false, true),
        Kind::Push => (8, true, true),
        Kind::Any => return None,
    };
    let last = address.wrapping_add(size - 1);
    if !canonical(address) || !canonical(last) {
        return Some((if stack { 12 } else { 13 }, Some(0), None));
    }
    Some((14, Some(4 | u32::from(write) << 1), Some(address)))
}

fn case(address: u64, code: &[u8]) -> Case {
    let mut bytes = vec![0x48, 0xbb];
    bytes.extend(address.to_le_bytes());
    bytes.extend(code);
    bytes.extend(b"\xf4\xf4");
    Case {
        code: bytes,
        load: LOAD,
        map: vec![(GOOD, 4096)],
        mem: Vec::new(),
    }
}

fn check(bench: &mut Bench, address: u64, canaries: &Canaries) {
    for &(name, code, kind, by) in FORMS {
        let outcome = bench.run(&case(address, code)).expect("a case");
        let End::Stop(UserStop::Exception {
            vector,
            error,
            address: met,
        }) = outcome.end
        else {
            panic!("`{name}` at {address:#x}: {:?}", outcome.end);
        };
        assert!(
            matches!(vector, 12..=14),
            "`{name}` at {address:#x}: {vector}"
        );
        let end = (vector, error, met);
        if let Some(expected) = expected(kind, address.wrapping_add(by as u64)) {
            assert_eq!(end, expected, "`{name}` at {address:#x}");
        }
    }
    assert!(canaries.intact(), "at {address:#x}");
}

fn own_memory() -> Vec<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines()
        .flat_map(|line| {
            let range = line.split(' ').next().expect("a range");
            let (start, end) = range.split_once('-').expect("two ends");
            let number = |text| u64::from_str_radix(text, 16).expect("hexadecimal");
            [number(start), number(end) - 8, number(end)]
        })
        .collect()
}

/// True for addresses that no form turns into one that is mapped.
fn free(address: u64) -> bool {
    let far = |from: u64| {
        let near = |by: i64| address.wrapping_add(by as u64).wrapping_sub(from - 0x2000) < 0x4000;
        ![0, 0x7fff_ff00, -0x8000_0000].into_iter().any(near)
    };
    let times = |by: u64| address.wrapping_mul(by);
    far(LOAD)
        && far(GOOD)
        && far(KERNEL)
        && times(8) > 0x30_0000
        && times(9).wrapping_add(0x7fff_ffff) > 0x30_0000
}

#[test]
fn wild_addresses_reach_nothing_through_the_window() {
    let canaries = Canaries::new();
    let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        eprintln!("this host has no window");
        return;
    };
    let mut addresses: Vec<u64> = Vec::new();
    // Every region of the canonical halves, and many beyond.
    addresses.extend((0..128u64).flat_map(|region| {
        let start = region << 40;
        [start + 0x123_4560, !start]
    }));
    let mut random = 1u64;
    addresses.extend((0..2000).map(|_| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        random
    }));
    let edges = [
        0,
        SIZE,
        INDEX_LIMIT,
        SIZE + 8 * INDEX_LIMIT,
        SIZE + GUARD,
        REACH,
        REACH.wrapping_neg(),
        SIZE + REACH,
        8 * REACH,
        (8 * REACH).wrapping_neg(),
        1 << 40,
        GUARD.wrapping_neg(),
        GUARD,
        1 << 31,
        1 << 32,
        1 << 46,
        1 << 47,
        1 << 48,
        1 << 63,
        !0 << 47,
        (SIZE - 1) / 8,
        SIZE / 9,
        base,
        base.wrapping_neg(),
    ];
    for edge in edges {
        for by in [
            0i64,
            -1,
            -4,
            -8,
            -16,
            8,
            0x1000,
            -0x1000,
            1 << 24,
            -(1 << 24),
            1 << 31,
        ] {
            addresses.push(edge.wrapping_add(by as u64));
        }
    }
    for own in own_memory().into_iter().chain(canaries.addresses()) {
        addresses.extend([own, own.wrapping_sub(base)]);
        // As an index, and where a displacement leads there.
        addresses.push(own.wrapping_sub(base) / 8);
        addresses.push(own.wrapping_sub(base).wrapping_sub(0x7fff_ff00));
    }
    addresses.retain(|&address| free(address));
    assert!(addresses.len() > 1000);
    for address in addresses {
        check(&mut bench, address, &canaries);
    }
    // It was the window that they were kept from.
    let counts = bench.vcpu_for_tests().counts();
    assert!(counts.get(ExitReason::WindowMiss) > 10_000);
    assert!(counts.get(ExitReason::WindowFill) > 1000);
}

#[test]
fn without_its_checks_the_window_would_reach_anything() {
    let canaries = Canaries::new();
    let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        return;
    };
    bench.vcpu_for_tests().remove_window_checks();
    for canary in canaries.addresses() {
        assert!(canaries.intact());
        let address = canary.wrapping_sub(base);
        let store = b"\x48\x89\x03";
        let outcome = bench.run(&case(address, store)).expect("a case");
        assert_eq!(outcome.end, End::Stop(UserStop::Halt));
        assert!(!canaries.intact(), "the canary at {canary:#x}");
        // SAFETY: one of the words above.
        unsafe { (canary as *mut u64).write_volatile(CANARY) };
    }
}

#[test]
fn the_first_vector_instruction_relies_on_no_stack_that_was_left() {
    // It changes to other code in the middle of a block, after RSP has gone where VMM memory would be.
    let canaries = Canaries::new();
    for (name, access) in [("push", b"\x50"), ("pop", b"\x5a")] {
        for canary in canaries.addresses() {
            let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
            let Some(base) = bench.vcpu_for_tests().hold_window() else {
                return;
            };
            let by = if name == "push" { 8 } else { 0 };
            let address = canary.wrapping_sub(base).wrapping_add(by);
            // mov rsp, rbx; pxor xmm0, xmm0
            let code = [&b"\x48\x89\xdc\x66\x0f\xef\xc0"[..], access].concat();
            let outcome = bench.run(&case(address, &code)).expect("a case");
            let End::Stop(UserStop::Exception { vector, .. }) = outcome.end else {
                panic!("{name} at {address:#x}: {:?}", outcome.end);
            };
            assert!(
                vector == 12 || vector == 14,
                "{name} at {address:#x}: {vector}"
            );
            assert!(canaries.intact(), "{name} at {address:#x}");
        }
    }
}

#[test]
fn code_of_32_bits_stays_below_4_gib() {
    let canaries = Canaries::new();
    let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
    if bench.vcpu_for_tests().hold_window().is_none() {
        return;
    }
    // mov eax, 0x2b; mov ds, eax; mov es, eax; push 0x23; push 1f; retfq; 1: with EBX all ones but 7
    let enter = b"\xb8\x2b\0\0\0\x8e\xd8\x8e\xc0\x6a\x23\x68\x15\0\x01\0\x48\xcb";
    assert_eq!(enter.len(), 0x12);
    let forms: &[(&[u8], u64, bool)] = &[
        (b"\x89\x03", 0xffff_fff0, true),
        (b"\x8b\x03", 0xffff_fff0, false),
        // mov [ebx+ebx*8+0x7fffffff], eax
        (b"\x89\x84\xdb\xff\xff\xff\x7f", 0x7fff_ff6f, true),
        // mov eax, [0x7ffffff0]; mov eax, [0xfffffff0]
        (b"\xa1\xf0\xff\xff\x7f", 0x7fff_fff0, false),
        (b"\xa1\xf0\xff\xff\xff", 0xffff_fff0, false),
        // mov esp, ebx; push eax
        (b"\x89\xdc\x50", 0xffff_ffec, true),
        // mov esp, ebx; pop eax
        (b"\x89\xdc\x58", 0xffff_fff0, false),
        // mov ebp, ebx; leave
        (b"\x89\xdd\xc9", 0xffff_fff0, false),
    ];
    for &(form, at, write) in forms {
        let mut code = enter.to_vec();
        code.extend(b"\x90\x90\x90\xbb\xf0\xff\xff\xff");
        code.extend(form);
        code.push(0xf4);
        let case = Case {
            code,
            load: LOAD,
            map: vec![(GOOD, 4096)],
            mem: Vec::new(),
        };
        let mut case = case;
        // A stack for the way in: mov esp, GOOD + 0x800
        case.code.splice(0..0, *b"\xbc\x00\x08\x20\x00");
        // The way in is 5 bytes further.
        case.code[5 + 12] = 0x17;
        let outcome = bench.run(&case).expect("a case");
        let error = Some(4 | u32::from(write) << 1);
        let fault = UserStop::Exception {
            vector: 14,
            error,
            address: Some(at),
        };
        assert_eq!(outcome.end, End::Stop(fault), "{form:x?}");
    }
    assert!(canaries.intact());
}
