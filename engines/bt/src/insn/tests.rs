//! What a bench promises.

use super::*;

fn check(code: &[u8], map: &[(u64, u64)], end: UserStop) -> Outcome {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    let case = Case {
        code: code.to_vec(),
        load: 0x1_0000,
        map: map.to_vec(),
        mem: Vec::new(),
    };
    let outcome = bench.run(&case).expect("a case");
    assert_eq!(outcome.end, End::Stop(end));
    outcome
}

#[test]
fn a_snippet_ends_at_hlt_with_its_registers() {
    // mov eax, 5; add rax, rax; hlt
    let outcome = check(b"\xb8\x05\0\0\0\x48\x01\xc0\xf4", &[], UserStop::Halt);
    assert_eq!((outcome.gpr[0], outcome.rip), (10, 0x1_0008));
    assert_eq!(outcome.extended.ftw, 0xffff);
}

#[test]
fn a_page_fault_says_where_and_why() {
    // mov [rax], eax
    let fault = UserStop::Exception {
        vector: 14,
        error: Some(6),
        address: Some(0),
    };
    check(b"\x89\x00", &[], fault);
}

#[test]
fn flags_are_exact_at_a_fault_even_if_nobody_reads_them() {
    // sub eax, 1; mov rbx, [rcx]; xor edx, edx; hlt
    let fault = UserStop::Exception {
        vector: 14,
        error: Some(4),
        address: Some(0),
    };
    let outcome = check(b"\x83\xe8\x01\x48\x8b\x19\x31\xd2\xf4", &[], fault);
    assert_eq!(outcome.rflags & 0x8d5, 0x95);
}

#[test]
fn nothing_is_left_for_the_next_case() {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    // mov [0x20000], esp; inc eax; hlt
    let mut case = Case {
        code: b"\xff\x04\x25\0\0\x02\0\x8b\x04\x25\0\0\x02\0\xf4".to_vec(),
        load: 0x1_0000,
        map: vec![(0x2_0000, 4096), (0x10_0000_0000, 4 << 20)],
        mem: Vec::new(),
    };
    for _ in 0..2 {
        assert_eq!(bench.run(&case).expect("a case").gpr[0], 1);
    }
    case.mem = vec![(0x2_0000, vec![7])];
    assert_eq!(bench.run(&case).expect("a case").gpr[0], 8);
}

#[test]
fn a_loop_without_an_end_is_stopped() {
    let mut bench = Bench::new(Duration::from_millis(100)).expect("a bench");
    let case = Case {
        code: b"\xeb\xfe".to_vec(),
        load: 0x1_0000,
        ..Case::default()
    };
    assert_eq!(bench.run(&case).expect("a case").end, End::Limit);
    let short = Case {
        code: b"\xf4".to_vec(),
        ..case
    };
    let end = bench.run(&short).expect("a case").end;
    assert_eq!(end, End::Stop(UserStop::Halt));
}

#[test]
fn a_large_range_has_memory_where_it_is_touched() {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    // mov rdi, 0x500000000; mov ecx, 64; l: inc dword [rdi]; add rdi, 0x4000000; loop l; hlt
    let code =
        b"\x48\xbf\0\0\0\0\x05\0\0\0\xb9\x40\0\0\0\xff\x07\x48\x81\xc7\0\0\0\x04\xe2\xf5\xf4";
    let mut case = Case {
        code: code.to_vec(),
        load: 0x1_0000,
        map: vec![(0x5_0000_0000, 1 << 32)],
        mem: vec![(0x5_0000_0000, vec![0x41])],
    };
    let outcome = bench.run(&case).expect("a case");
    assert_eq!(outcome.end, End::Stop(UserStop::Halt));
    let mut byte = [0];
    bench.read(0x5_0000_0000, &mut byte).expect("mapped");
    assert_eq!(byte, [0x42]);
    assert_eq!(bench.read(0x5_0000_1000, &mut byte), None, "never touched");
    // Behind its end it faults.
    case.map[0].1 = 1 << 31;
    let outcome = bench.run(&case).expect("a case");
    let fault = UserStop::Exception {
        vector: 14,
        error: Some(6),
        address: Some(0x5_8000_0000),
    };
    assert_eq!(outcome.end, End::Stop(fault));
    // More than there is memory for: stosb over all of it.
    case.code = b"\x48\xbf\0\0\0\0\x05\0\0\0\x48\xc7\xc1\xff\xff\xff\x7f\xf3\xaa\xf4".to_vec();
    let outcome = bench.run(&case);
    assert!(matches!(
        outcome,
        Err(CaseError::Memory { .. })
            | Ok(Outcome {
                end: End::Limit,
                ..
            })
    ));
}

#[test]
fn memory_that_can_not_be_is_refused() {
    let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
    for (address, bytes) in [
        (1 << 47, 1),
        (u64::MAX, 2),
        (0, u64::MAX),
        (0x7fff_ffff_f000, 1 << 40),
    ] {
        let case = Case {
            code: vec![0xf4],
            load: 0x1_0000,
            map: vec![(address, bytes)],
            mem: Vec::new(),
        };
        assert!(bench.run(&case).is_err(), "{address:#x} {bytes:#x}");
    }
}
