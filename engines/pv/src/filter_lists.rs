//! The jails' lists as the documentation has them, held against the filters themselves.
//!
//! A test, so that neither drifts: every system call that a filter allows with any arguments at all is
//! found by following both ways of each test of an argument, and the names must be those that the head
//! of filter.rs and ARCHITECTURE.md give.

use std::collections::BTreeSet;

use crate::filter;
use crate::wire::Filter;

/// Host system calls that appear in any list, by number (x86-64).
const NAMES: &[(libc::c_long, &str)] = &[
    (libc::SYS_read, "read"),
    (libc::SYS_write, "write"),
    (libc::SYS_close, "close"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_munmap, "munmap"),
    (libc::SYS_rt_sigreturn, "rt_sigreturn"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_sched_yield, "sched_yield"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_timerfd_settime, "timerfd_settime"),
    (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
];

/// Offset of the call's number in `struct seccomp_data`.
const NUMBER: u32 = 0;

/// Whether any arguments, instruction pointer and architecture let `number` through from instruction
/// `at` on. The accumulator is known only while it holds the number.
fn allows(program: &[u64], number: u32, at: usize, accumulator: Option<u32>) -> bool {
    let instruction = program[at];
    let operand = (instruction >> 32) as u32;
    let yes = at + 1 + (instruction >> 16 & 0xff) as usize;
    let no = at + 1 + (instruction >> 24 & 0xff) as usize;
    let code = (instruction & 0xffff) as u32;
    match code & 7 {
        libc::BPF_RET => operand == libc::SECCOMP_RET_ALLOW,
        libc::BPF_LD => {
            let known = (operand == NUMBER).then_some(number);
            allows(program, number, at + 1, known)
        }
        libc::BPF_JMP => {
            let taken = accumulator.map(|value| match code & 0xf0 {
                libc::BPF_JEQ => value == operand,
                libc::BPF_JGE => value >= operand,
                libc::BPF_JSET => value & operand != 0,
                other => panic!("jump {other:#x}"),
            });
            match taken {
                Some(true) => allows(program, number, yes, accumulator),
                Some(false) => allows(program, number, no, accumulator),
                None => allows(program, number, yes, None) || allows(program, number, no, None),
            }
        }
        // Arithmetic makes the accumulator unknown.
        _ => allows(program, number, at + 1, None),
    }
}

/// Names of the host's calls that a jail lets through.
fn allowed(jail: &Filter) -> BTreeSet<&'static str> {
    let program = &jail.program[..jail.length as usize];
    // Beyond the host's table, and below the numbers of the protocol.
    (0..0x1000)
        .filter(|number| allows(program, *number, 0, None))
        .map(|number| {
            let known = NAMES.iter().find(|(known, _)| *known == i64::from(number));
            known.map_or_else(|| panic!("call {number} is in no list"), |(_, name)| *name)
        })
        .collect()
}

/// The count and the names of the list that `text` begins with `intro`, in backticks up to the end of
/// its sentence. Breaks of lines and comment signs are of no account.
fn listed(text: &str, intro: &str) -> (usize, BTreeSet<String>) {
    let flat = text
        .lines()
        .map(|line| line.trim_start_matches("//!").trim())
        .collect::<Vec<_>>()
        .join(" ");
    let (_, list) = flat
        .split_once(intro)
        .unwrap_or_else(|| panic!("no {intro}"));
    let (list, _) = list.split_once(". ").expect("a sentence");
    let count = list.split_whitespace().next().expect("a count");
    let names = list.split('`').skip(1).step_by(2);
    let host = |name: &&str| NAMES.iter().any(|(_, known)| known == name);
    (
        count.parse().expect("a number"),
        names.filter(host).map(str::to_owned).collect(),
    )
}

#[test]
fn documented_lists_are_the_filters_own() {
    let source = include_str!("filter.rs");
    let architecture = include_str!("../../../ARCHITECTURE.md");
    for (jail, intro) in [
        (filter::kernel_jail(), "K's jail, "),
        (filter::user_jail(true).0, "U's jail, "),
    ] {
        let allowed = allowed(&jail);
        for text in [source, architecture] {
            let (count, names) = listed(text, intro);
            assert_eq!(count, names.len(), "{intro}");
            assert!(names.iter().eq(allowed.iter()), "{names:?} {allowed:?}");
        }
    }
}

#[test]
fn a_filter_without_tests_allows_every_call() {
    let answer = u64::from(libc::BPF_RET) | u64::from(libc::SECCOMP_RET_ALLOW) << 32;
    assert!((0..1000).all(|number| allows(&[answer], number, 0, None)));
}
