//! What a guest may rely on, in every mode that this host can run: console, CPUID, marks and
//! counters, and the embedded workloads.

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;

use engine_core::cpuid::{Leaf, Place};
use engine_core::testing::{Guest, end};
use iced_x86::code_asm::*;
use serde_json::Value;
use support::{Call, on_every_mode};

const LONG: &str = "20";
const COM1: u32 = 0x3f8;
const MARK: u32 = abi::port::MARK as u32;

/// Runs a guest in every mode and expects it to end well.
fn succeeds(guest: &Guest, input: &[u8], output: &[u8]) {
    let image = guest.elf();
    on_every_mode(|mode| {
        let call = Call::new(mode.name)
            .image(&image)
            .args(&["--timeout", LONG]);
        let ended = call.input(input).run();
        ended.check(0, "");
        let text = String::from_utf8_lossy(&ended.stdout);
        assert_eq!(ended.stdout, output, "{text}");
    });
}

#[test]
fn input_of_many_fifos_comes_back_in_order() {
    let guest = Guest::protected(|asm| {
        let mut again = asm.create_label();
        let mut done = asm.create_label();
        asm.set_label(&mut again)?;
        asm.mov(dx, COM1 + 5)?;
        asm.in_(al, dx)?;
        asm.test(al, 1)?;
        asm.je(again)?;
        asm.mov(dx, COM1)?;
        asm.in_(al, dx)?;
        asm.out(dx, al)?;
        asm.cmp(al, i32::from(b'.'))?;
        asm.je(done)?;
        asm.jmp(again)?;
        asm.set_label(&mut done)?;
        end(asm, 0)
    });
    let mut text: Vec<u8> = (0..1000u32)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    text.push(b'.');
    succeeds(&guest, &text, &text);
}

#[test]
fn cpuid_is_the_pinned_one() {
    on_every_mode(|mode| {
        let backend = (mode.probe)().unwrap().backend;
        let leaves = engine_core::cpuid::leaves(Place::SOLE).filter(|Leaf { leaf, .. }| {
            // kvm_pvm takes these from the host, whatever KVM_SET_CPUID2 says.
            let honoured = !(matches!(*leaf, 1 | 7 | 0xd) && backend == Some("pvm"));
            if !honoured {
                eprintln!("skipped: leaf {leaf} is not pinned by the pvm backend");
            }
            honoured
        });
        let guest = Guest::long(|asm| {
            for Leaf {
                leaf,
                subleaf,
                registers,
            } in leaves
            {
                asm.mov(eax, leaf)?;
                asm.mov(ecx, subleaf.unwrap_or(0))?;
                asm.cpuid()?;
                // What KVM virtualizes itself is announced where it can.
                let open = match engine_core::cpuid::VIRTUALIZED
                    .iter()
                    .find(|(known, _)| *known == leaf && mode.engine == "kvm")
                {
                    Some((_, bits)) => *bits,
                    None => [0; 4],
                };
                let found = [eax, ebx, ecx, edx];
                for ((register, value), open) in found.into_iter().zip(registers).zip(open) {
                    let mut right = asm.create_label();
                    asm.and(register, !open as i32)?;
                    asm.cmp(register, (value & !open) as i32)?;
                    asm.je(right)?;
                    end(asm, 1 + (leaf & 0xff))?;
                    asm.set_label(&mut right)?;
                    asm.nop()?;
                }
            }
            end(asm, 0)
        });
        let call = Call::new(mode.name).image(&guest.elf());
        call.args(&["--timeout", LONG]).run().check(0, "");
    });
}

/// Runs a guest with a stats descriptor; answers with the lines for one mode.
fn stats(mode: &str, image: &[u8]) -> Vec<Value> {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let call = Call::new(mode).image(image).args(&["--timeout", LONG]);
    call.stats(OwnedFd::from(writer)).run().check(0, "");
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn marks_bracket_what_is_counted() {
    let guest = Guest::protected(|asm| {
        for outs in [3, 0] {
            asm.out(0x80, al)?;
            asm.mov(dx, MARK)?;
            asm.mov(al, u32::from(abi::mark::BEGIN))?;
            asm.out(dx, al)?;
            for _ in 0..outs {
                asm.out(0x80, al)?;
            }
            asm.mov(al, u32::from(abi::mark::END))?;
            asm.out(dx, al)?;
        }
        // Closing what is not open counts nothing.
        asm.out(dx, al)?;
        end(asm, 0)
    });
    on_every_mode(|mode| {
        let lines = stats(mode.name, &guest.elf());
        let event = |name: &str| -> Vec<&Value> {
            lines.iter().filter(|line| line["event"] == name).collect()
        };
        let vmm = |line: &Value| -> Vec<(String, u64)> {
            let counts = line["counts"].as_array().unwrap();
            counts
                .iter()
                .filter(|count| count["source"] == "vmm" && count["kind"] == "pio")
                .map(|count| {
                    let reason = count["reason"].as_str().unwrap().to_owned();
                    (reason, count["count"].as_u64().unwrap())
                })
                .collect()
        };
        let start = event("start");
        assert_eq!(start.len(), 1);
        assert_eq!(
            (&start[0]["mode"], &start[0]["engine"]),
            (&mode.name.into(), &mode.engine.into())
        );
        let windows = event("window");
        assert_eq!(windows.len(), 2, "{lines:?}");
        let counts = vmm(windows[0]);
        assert_eq!(counts.len(), 1, "{counts:?}");
        assert!(counts[0].0.ends_with("out 0x80"), "{counts:?}");
        assert_eq!(counts[0].1, 3);
        assert_eq!(vmm(windows[1]), [], "{lines:?}");
        assert_eq!(
            (&windows[0]["seq"], &windows[1]["seq"]),
            (&0.into(), &1.into())
        );
        let ends = event("end");
        assert_eq!(ends.len(), 1);
        assert_eq!(ends[0]["outcome"], "success");
        let total: u64 = vmm(ends[0]).iter().map(|count| count.1).sum();
        // 5 to 0x80, 5 marks, 1 to the exit port.
        assert_eq!(total, 11, "{lines:?}");
    });
}

#[test]
fn the_end_of_a_crash_is_reported_with_the_counts_so_far() {
    let guest = Guest::protected(|asm| {
        asm.out(0x80, al)?;
        asm.ud2()
    });
    on_every_mode(|mode| {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let call = Call::new(mode.name)
            .image(&guest.elf())
            .args(&["--timeout", LONG]);
        call.stats(OwnedFd::from(writer))
            .run()
            .check(4, "triple fault");
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(end["outcome"], "crashed");
        assert!(end["message"].as_str().unwrap().contains("triple fault"));
        assert!(text.contains("out 0x80"), "{text}");
    });
}

#[test]
fn an_embedded_workload_runs_from_the_command_line() {
    on_every_mode(|mode| {
        let workload = programs::find("fib").unwrap();
        let ended = Call::with_memory(mode.name, "256")
            .args(&[
                "--workload",
                "fib",
                "--size",
                "12",
                "--iterations",
                "2",
                "--timeout",
                LONG,
            ])
            .run();
        ended.check(0, "");
        let text = String::from_utf8(ended.stdout).unwrap();
        let expected = format!("done {:016x} ", programs::oracle(workload, 12, 2).unwrap());
        assert!(text.contains(&expected), "{text}");
    });
}

#[test]
fn the_embedded_image_obeys_the_console() {
    on_every_mode(|mode| {
        let ended = Call::with_memory(mode.name, "256")
            .args(&[
                "--image",
                &format!("builtin:{}", mode.flavour),
                "--timeout",
                LONG,
            ])
            .input(b"run empty 0 0\nquit 0\n")
            .run();
        ended.check(0, "");
        let text = String::from_utf8(ended.stdout).unwrap();
        assert!(text.starts_with("ready 1 "), "{text}");
        assert!(text.contains("begin\nend\ndone "), "{text}");
    });
}

#[test]
fn the_baseline_obeys_both_ways_and_its_time_limit() {
    let native = |args: &[&str], input: &[u8]| {
        let mut call = Call::new("native").args(args).input(input);
        call.command.args(["--timeout", "5"]);
        call.run()
    };
    let ended = native(
        &["--workload", "fib", "--size", "12", "--iterations", "2"],
        b"",
    );
    ended.check(0, "");
    let workload = programs::find("fib").unwrap();
    let expected = format!("done {:016x} ", programs::oracle(workload, 12, 2).unwrap());
    assert!(
        String::from_utf8_lossy(&ended.stdout).contains(&expected),
        "{ended:?}"
    );

    let ended = native(&["--image", "builtin:unaware"], b"run empty 0 0\nquit 0\n");
    ended.check(0, "");
    native(&["--image", "builtin:unaware"], b"quit 3\n").check(1, "failed with code 3");
    native(&["--workload", "in"], b"").check(1, "did not carry out the workload");
    native(&["--image", "/dev/null"], b"").check(2, "runs no image file");

    let mut call = Call::new("native").args(&["--workload", "alu", "--iterations", "1000000000"]);
    call.command.args(["--timeout", "0.3"]);
    call.run().check(5, "time limit reached");
}
