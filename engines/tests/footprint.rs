//! Memory of a VMM that translates, beyond guest memory and code cache.
//!
//! Read from proc_pid_smaps(5) after workloads of every kind, mapping by mapping: guest memory and
//! code cache are known by their memfds' names, and everything else is the VMM's own, the binary
//! and the C library included.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

/// Most that a VMM of mode full may take.
const MOST_KIB: u64 = 16 << 10;
/// Less than this, and what was read is not a VMM.
const LEAST_KIB: u64 = 1 << 10;

const GUEST: &str = "trapline-guest-ram";
const CODE: &str = "trapline-code";

/// Ends with its value.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Resident KiB: of guest memory, of the code cache, of everything else.
fn resident(process: u32) -> [u64; 3] {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let mut sums = [0; 3];
    let mut which = 2;
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            let size = size.trim().trim_end_matches(" kB");
            sums[which] += size.parse::<u64>().unwrap();
        } else if line
            .split_whitespace()
            .next()
            .is_some_and(|range| range.contains('-'))
        {
            which = [GUEST, CODE]
                .iter()
                .position(|name| line.contains(name))
                .unwrap_or(2);
        }
    }
    sums
}

#[test]
fn a_translating_vmm_needs_little_beside_guest_memory_and_code_cache() {
    let mut vmm = Vmm(Command::new(env!("CARGO_BIN_EXE_trapline"))
        .args(["run", "--mode", "full", "--memory", "256"])
        .args(["--image", "builtin:unaware", "--timeout", "60"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap());
    let mut orders = vmm.0.stdin.take().unwrap();
    let mut answers = BufReader::new(vmm.0.stdout.take().unwrap()).lines();
    for workload in programs::CATALOGUE {
        let Ok(expected) = programs::oracle(workload, 0, 10) else {
            continue;
        };
        writeln!(orders, "run {} 0 10", workload.name).unwrap();
        let answer = answers
            .by_ref()
            .map(Result::unwrap)
            .find(|line| {
                ["done ", "unsupported ", "failed "]
                    .iter()
                    .any(|word| line.starts_with(word))
            })
            .expect("the guest lives");
        if let Some(done) = answer.strip_prefix("done ") {
            assert!(
                done.starts_with(&format!("{expected:016x}")),
                "{}: {answer}",
                workload.name
            );
        }
    }
    let [guest, code, own] = resident(vmm.0.id());
    println!("guest memory {guest} KiB, code cache {code} KiB, the VMM's own {own} KiB");
    // Every page of code is mapped twice; what is known of it counts with it.
    assert!(guest > 0 && code > 0);
    assert!((LEAST_KIB..MOST_KIB).contains(&own), "{own} KiB");
}
