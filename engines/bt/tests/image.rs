//! The whole guest image under translation: every workload's checksum agrees with its oracle.

use std::time::Duration;

use bt::{BtVcpu, Options};
use engine_core::{Limits, Machine, MachineOptions, Outcome, Vcpu, drive};
use programs::{CATALOGUE, Group};

fn run(command_line: &str, options: Options) -> (Outcome, String, BtVcpu) {
    let ram = engine_core::memory::create(128).expect("128 MiB");
    let entry = engine_core::loader::load(&ram, images::unaware(), command_line).expect("loads");
    let mut vcpu = BtVcpu::new(ram, options).expect("a vCPU");
    vcpu.set_state(&entry).expect("a state");
    let mut machine = Machine::new(MachineOptions::default()).expect("a machine");
    let limits = Limits {
        timeout: Some(Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = drive(&mut vcpu, &mut machine, &limits);
    let console = String::from_utf8_lossy(machine.console()).into_owned();
    (outcome, console, vcpu)
}

#[test]
fn every_workload_agrees_with_its_oracle() {
    for workload in CATALOGUE {
        let (size, iterations) = (workload.size, workload.iterations.min(100));
        let command = format!("run {} {size} {iterations}", workload.name);
        let (outcome, console, vcpu) = run(&command, Options::default());
        println!(
            "{}: {:?}\n{console}{:?}",
            workload.name,
            outcome,
            vcpu.counts()
        );
        if workload.name == "hypercall" {
            assert!(
                console.contains("unsupported an unaware guest knows of no host to call"),
                "{console}"
            );
            continue;
        }
        // This machine is a bare one.
        if workload.group == Group::Io && console.contains("unsupported ") {
            continue;
        }
        assert!(
            matches!(outcome, Outcome::Success),
            "{}: {outcome:?}\n{console}",
            workload.name
        );
        let expected = programs::oracle(workload, size, iterations).expect("an oracle");
        assert!(
            console.contains(&format!("done {expected:016x} ")),
            "{}: expected {expected:016x}\n{console}",
            workload.name
        );
    }
}
