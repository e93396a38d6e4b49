//! The whole guest image under translation: every workload's checksum agrees with its oracle.

use std::time::Duration;

use bt::{BtVcpu, Options};
use engine_core::{ExitReason, Limits, Machine, MachineOptions, Outcome, Vcpu, drive};
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
    agree(Options::default(), 100, |_, _| ());
}

#[test]
fn a_code_cache_that_keeps_filling_up_is_emptied_and_nothing_else() {
    let mut emptied = 0;
    let options = Options {
        code_cache: *Options::CODE_CACHE.start(),
        ..Options::default()
    };
    assert_eq!(options.code_cache, 64 << 10);
    agree(options, 10, |name, vcpu| {
        let flushes = vcpu.counts().get(ExitReason::CacheFlush);
        assert_eq!(flushes, vcpu.cache_flushes());
        // The kernel's own boot does not fit.
        assert!(flushes > 0, "{name}");
        emptied += flushes;
    });
    println!("emptied {emptied} times");
}

#[test]
fn code_that_counts_its_paths_does_the_same() {
    let options = Options {
        count_paths: true,
        ..Options::default()
    };
    agree(options, 20, |name, vcpu| {
        let counts = vcpu.counts();
        let stats = vcpu.host_stats();
        let of = |name: &str| {
            let stat = stats.iter().find(|stat| stat.name == name);
            stat.map_or(0, |stat| stat.value)
        };
        // Whatever took the long way has gone a way of this kind first.
        assert!(of("direct-branch") >= counts.get(ExitReason::DirectMiss));
        assert!(of("indirect-branch") >= counts.get(ExitReason::IndirectMiss));
        let accesses = of("software-access") + of("shared-access") + of("window-access");
        match name {
            // One call and one return for each number above 1, as many as fib(20) counts.
            "fib" => {
                let calls = fib_calls(20) * 20;
                let returns = of("indirect-branch");
                assert!(
                    (calls..calls + calls / 50).contains(&returns),
                    "{returns} of {calls}"
                );
                assert!(accesses > 2 * calls, "{accesses}");
            }
            // 4096 pages or so are touched before; none of them is the loop's.
            "alu" => assert!(accesses < of("direct-branch"), "{accesses}"),
            _ => {}
        }
    });
}

/// Calls that it takes to compute the number.
fn fib_calls(number: u64) -> u64 {
    if number < 2 {
        1
    } else {
        1 + fib_calls(number - 1) + fib_calls(number - 2)
    }
}

fn agree(options: Options, most: u64, mut check: impl FnMut(&str, &mut BtVcpu)) {
    for workload in CATALOGUE {
        let (size, iterations) = (workload.size, workload.iterations.min(most));
        let command = format!("run {} {size} {iterations}", workload.name);
        let (outcome, console, mut vcpu) = run(&command, options);
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
        check(workload.name, &mut vcpu);
    }
}
