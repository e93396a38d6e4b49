//! The guest image in lockstep: blocks against the same instructions one by one, and the control that a
//! difference is seen.

use std::sync::Arc;
use std::time::Duration;

use bt::{BtVcpu, Options};
use engine_core::lockstep::{self, Lockstep};
use engine_core::{GuestRam, Limits, Machine, MachineOptions, Outcome, Vcpu, drive};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const MIB: u64 = 64;

/// Runs `command` in lockstep, with the reference's memory changed by `change`.
fn run(command: &str, change: impl FnOnce(&GuestRam)) -> (Outcome, String) {
    let ram = engine_core::memory::create(MIB).expect("memory");
    let entry = engine_core::loader::load(&ram, images::unaware(), command).expect("loads");
    let copy = engine_core::memory::create(MIB).expect("memory");
    lockstep::copy(&ram, &copy).expect("a copy");
    change(&copy);
    let vcpu = |ram: &Arc<GuestRam>| {
        let mut vcpu = BtVcpu::new(Arc::clone(ram), Options::default()).expect("a vCPU");
        vcpu.set_state(&entry).expect("a state");
        Box::new(vcpu) as Box<dyn Vcpu>
    };
    let (subject, reference) = (vcpu(&ram), vcpu(&copy));
    let mut pair = Lockstep::new(subject, ram, reference, copy).expect("a pair");
    let mut machine = Machine::new(MachineOptions::default()).expect("a machine");
    let limits = Limits {
        timeout: Some(Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = drive(&mut pair, &mut machine, &limits);
    let console = String::from_utf8_lossy(machine.console()).into_owned();
    (outcome, console)
}

#[test]
fn blocks_do_what_their_instructions_do() {
    for (name, size, iterations) in [
        ("fib", 8, 3),
        ("sort", 64, 2),
        ("sse_matmul", 6, 2),
        ("indirect", 200, 2),
        ("syscall", 0, 5),
        ("int3", 0, 5),
        ("pgfault", 0, 5),
        ("divzero", 0, 5),
        ("cr3_reload", 0, 5),
        ("cli_sti", 0, 5),
        ("rep_movsb", 0, 5),
        ("ctxsw2", 0, 5),
        ("pfstorm", 8, 2),
        ("aspace", 3, 2),
    ] {
        let workload = programs::find(name).expect("a workload");
        let (outcome, console) = run(&format!("run {name} {size} {iterations}"), |_| ());
        assert!(
            matches!(outcome, Outcome::Success),
            "{name}: {outcome:?}\n{console}"
        );
        let expected = programs::oracle(workload, size, iterations).expect("an oracle");
        assert!(
            console.contains(&format!("done {expected:016x} ")),
            "{name}: {console}"
        );
    }
}

/// Address in `ram` of `bytes`, which are there once.
fn find(ram: &GuestRam, bytes: &[u8]) -> GuestAddress {
    let mut all = vec![0; ram.last_addr().0 as usize + 1];
    ram.read_slice(&mut all, GuestAddress(0)).expect("readable");
    let mut found = (0..all.len() - bytes.len()).filter(|&at| all[at..].starts_with(bytes));
    let first = found.next().expect("it is there");
    assert_eq!(found.next(), None);
    GuestAddress(first as u64)
}

#[test]
fn a_difference_in_data_is_seen_where_it_is_read() {
    // The name that the workload is looked up by.
    let (outcome, console) = run("run alu 10 1", |copy| {
        let at = find(copy, b"run alu 10 1");
        copy.write_slice(b"run alu 11 1", at).expect("writable");
    });
    let Outcome::Crashed { message, .. } = outcome else {
        panic!("{outcome:?}\n{console}");
    };
    assert!(message.contains("lockstep: diverged after"), "{message}");
    assert!(message.contains("the reference"), "{message}");
}
