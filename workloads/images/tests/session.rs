//! The image under QEMU and the native process, driven over the console as a harness drives them:
//! one body of checks for both.

mod support;

use programs::{CATALOGUE, Group, find, oracle};
use std::{io::Write, os::unix::net::UnixStream, path::PathBuf};
use support::{Guest, MICROVM, native, qemu, qemu_image, qemu_status, qemu_with};

/// Operations of a kernel that take no privilege.
const UNPRIVILEGED: [&str; 4] = ["callret", "pushf_popf", "rep_movsb", "rep_stosq"];

/// Every workload with few iterations, twice: a run leaves nothing behind that changes the next.
fn check_workloads(guest: &mut Guest, ring_0: bool) {
    for round in 0..2 {
        for workload in CATALOGUE {
            for iterations in [1, 2, 7 + round] {
                let answer = guest.run(workload.name, 0, iterations);
                if workload.name == "hypercall" && ring_0 {
                    let refusal = "unsupported an unaware guest knows of no host to call";
                    assert_eq!(answer, refusal);
                    continue;
                }
                if workload.group == Group::Micro && !ring_0 {
                    let refusal =
                        "unsupported a process has no address spaces of its own to manage";
                    assert_eq!(answer, refusal);
                    continue;
                }
                // With devices they are tested elsewhere.
                if workload.group == Group::Io && answer.starts_with("unsupported ") {
                    continue;
                }
                if workload.group == Group::Nano
                    && !ring_0
                    && !UNPRIVILEGED.contains(&workload.name)
                {
                    assert_eq!(answer, "unsupported ring-0 operation has no native figure");
                    continue;
                }
                let sum = oracle(workload, 0, iterations).unwrap();
                assert_eq!(
                    answer,
                    format!("done {sum:016x}"),
                    "{} {iterations}",
                    workload.name
                );
            }
        }
    }
    // More than one page, one large page, one stack page: sizes that are not the defaults.
    for (name, size) in [("sort", 100_000), ("chase", 1), ("sieve", 3), ("fib", 24)] {
        let sum = oracle(find(name).unwrap(), size, 1).unwrap();
        assert_eq!(guest.run(name, size, 1), format!("done {sum:016x}"));
    }
}

/// Lines that are not well-formed or can't be obeyed, and that the guest lives on after.
fn check_protocol(guest: &mut Guest) {
    let mut names: Vec<String> = CATALOGUE
        .iter()
        .map(|workload| format!("workload {}", workload.name))
        .collect();
    names.push("listed".into());
    guest.check(
        "list",
        &names.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    guest.check("", &[]);
    guest.check("run nothing 0 0", &["unknown nothing"]);
    guest.check(
        "run alu zero 0",
        &["failed SIZE and ITERATIONS are decimal numbers below 2^64"],
    );
    guest.check(
        "run sort 8388609 1",
        &["failed size 8388609 needs 8388609 words of memory, there are 8388608"],
    );
    guest.check(
        &"x".repeat(1000),
        &["failed a line is longer than 256 bytes"],
    );
    guest.check(
        "\u{0}\u{1}ü",
        &["failed no such command; there are run, list and quit"],
    );
    guest.send("run empty 0 0");
    assert_eq!(guest.line(), "begin");
    assert_eq!(guest.line(), "end");
    assert!(guest.line().starts_with("done 656d707479000000 "));
}

#[test]
fn the_image_agrees_with_the_oracle() {
    let Some(mut guest) = qemu(256, "") else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    check_workloads(&mut guest, true);
    guest.send("quit 0");
    assert_eq!(guest.wait().code(), qemu_status(0));
}

#[test]
fn the_hybrid_image_agrees_with_the_oracle() {
    // Over its virtio console, and over the UART where there is none.
    let uart: Vec<&str> = MICROVM[..4]
        .iter()
        .chain(&["-serial", "stdio"])
        .copied()
        .collect();
    for options in [MICROVM, &uart] {
        let image = ("hybrid.elf", images::hybrid());
        let Some(mut guest) = qemu_image(image, 128, "", options) else {
            return;
        };
        assert_eq!(guest.line(), "ready 1 hybrid");
        check_workloads(&mut guest, true);
        check_protocol(&mut guest);
        guest.send("quit 0");
        assert_eq!(guest.wait().code(), qemu_status(0));
    }
}

#[test]
fn the_image_survives_bad_lines() {
    let Some(mut guest) = qemu(256, "quiet") else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    check_protocol(&mut guest);
    guest.send("quit 7");
    assert_eq!(guest.wait().code(), qemu_status(7));
}

#[test]
fn the_image_runs_in_64_mib_and_says_so_in_less() {
    let Some(mut guest) = qemu(64, "") else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    let sum = oracle(find("chase").unwrap(), 0, 1).unwrap();
    assert_eq!(guest.run("chase", 0, 1), format!("done {sum:016x}"));
    for memory_mib in [8, 32] {
        let mut guest = qemu(memory_mib, "").unwrap();
        assert_eq!(guest.line(), "failed less than 64 MiB of memory");
        assert_eq!(guest.wait().code(), qemu_status(1));
    }
}

#[test]
fn the_image_obeys_its_command_line() {
    let sum = oracle(find("alu").unwrap(), 100, 3).unwrap();
    for (command_line, last, code) in [
        ("quiet run alu 100 3", format!("done {sum:016x}"), 0),
        ("run nothing 0 0", "unknown nothing".into(), 1),
        (
            "run alu",
            "failed usage on the command line: run WORKLOAD SIZE ITERATIONS".into(),
            1,
        ),
    ] {
        let Some(mut guest) = qemu(256, command_line) else {
            return;
        };
        let status = guest.wait();
        let lines: Vec<String> = guest.lines.iter().collect();
        assert_eq!(lines[0], "ready 1 unaware");
        assert!(lines.last().unwrap().starts_with(&last), "{lines:?}");
        assert_eq!(status.code(), qemu_status(code), "{command_line}");
    }
}

#[test]
fn the_image_survives_a_fault_of_ring_3() {
    // A processor without syscall: the trial of the workload takes an invalid opcode in ring 3.
    let Some(mut guest) = qemu_with(256, "", &["-cpu", "qemu64,-syscall"]) else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    for _ in 0..3 {
        let answer = guest.run("syscall", 0, 5);
        assert!(
            answer.starts_with("failed fault in ring 3: vector 6 error 0x0 rip 0x10"),
            "{answer}"
        );
        let sum = oracle(find("divzero").unwrap(), 0, 5).unwrap();
        assert_eq!(guest.run("divzero", 0, 5), format!("done {sum:016x}"));
    }
}

#[test]
fn the_image_ends_with_one_line_when_the_kernel_faults() {
    // An NMI, which nobody asks for, injected through QEMU's monitor.
    let socket = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("monitor");
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let Some(mut guest) = qemu_with(256, "", &["-monitor", &monitor]) else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    let mut monitor = UnixStream::connect(socket).unwrap();
    monitor.write_all(b"nmi\n").unwrap();
    let line = guest.line();
    assert!(
        line.starts_with("failed kernel fault: vector 0x2 error 0x0 rip 0x10"),
        "{line}"
    );
    assert!(line.contains(" cs 0x8 "), "{line}");
    assert_eq!(guest.wait().code(), qemu_status(1));
}

#[test]
fn the_native_process_agrees_with_the_oracle() {
    let mut guest = native::<&str>([]);
    assert_eq!(guest.line(), "ready 1 native");
    check_workloads(&mut guest, false);
    guest.send("quit 0");
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn the_native_process_survives_bad_lines() {
    let mut guest = native::<&str>([]);
    assert_eq!(guest.line(), "ready 1 native");
    check_protocol(&mut guest);
    guest.send("quit 7");
    assert_eq!(guest.wait().code(), Some(7));
}

#[test]
fn the_native_process_ends_with_its_input() {
    let mut guest = native::<&str>([]);
    assert_eq!(guest.line(), "ready 1 native");
    guest.input = None;
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn the_native_process_obeys_its_arguments() {
    for (arguments, code) in [("run fib 5 2", 0), ("run nothing 0 0", 1)] {
        let mut guest = native(arguments.split(' '));
        assert_eq!(guest.wait().code(), Some(code));
    }
}
