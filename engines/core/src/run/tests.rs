//! Several vCPUs without an engine.

use super::*;
use crate::MachineOptions;
use crate::testing::scripted::{Scripted, Seen, Step};

const SVR: u64 = 0xfee0_00f0;
const EOI: u64 = 0xfee0_00b0;
const ICR_LOW: u64 = 0xfee0_0300;
const ICR_HIGH: u64 = 0xfee0_0310;
const OTHERS: u32 = 3 << 18 | 1 << 14;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const NMI: u32 = 4 << 8;

const EXIT: u16 = abi::port::EXIT;

/// A failure of the run loop is a hang: this ends it.
const PATIENCE: Duration = Duration::from_secs(20);

fn run(vcpus: Vec<Box<dyn Vcpu>>, max_exits: Option<u64>) -> Ended {
    let cpus = vcpus.len() as u8;
    let crew = Crew::new(cpus).unwrap();
    let machine = Machine::new(MachineOptions {
        cpus,
        ..MachineOptions::default()
    })
    .unwrap();
    let limits = Limits {
        timeout: Some(PATIENCE),
        max_exits,
    };
    let ended = crew.drive(vcpus, machine, &limits);
    assert_eq!(ended.vcpus.len(), usize::from(cpus));
    ended
}

/// Goes through `steps`, then does `last` for good.
fn list(
    steps: impl IntoIterator<Item = Step>,
    last: Step,
) -> impl FnMut(&mut Seen) -> Step + Send + 'static {
    let mut steps: Vec<Step> = steps.into_iter().collect();
    steps.reverse();
    move |_| steps.pop().unwrap_or(last)
}

fn start_others() -> Vec<Step> {
    vec![
        Step::Write(SVR, 0x1ff),
        Step::Write(ICR_LOW, OTHERS | INIT),
        Step::Write(ICR_LOW, OTHERS | STARTUP | 0x9a),
        Step::Write(ICR_LOW, OTHERS | STARTUP | 0x9a),
    ]
}

#[test]
fn interrupts_go_there_and_back_between_running_and_halted_vcpus() {
    for last in [Step::Compute, Step::Halt] {
        let mut steps = start_others();
        steps.reverse();
        let first = move |seen: &mut Seen| {
            seen.interruptible = true;
            match seen.vectors[..] {
                _ if !steps.is_empty() => steps.pop().unwrap(),
                [] => last,
                [0x51] => Step::Out(EXIT, 0),
                _ => Step::Out(EXIT, 1),
            }
        };
        let mut steps = vec![
            Step::Write(ICR_LOW, 1 << 14 | 0x51),
            Step::Write(ICR_HIGH, 0),
            Step::Write(SVR, 0x1ff),
        ];
        let second = move |seen: &mut Seen| {
            assert_eq!(seen.state, CpuState::startup(0x9a));
            assert_eq!((seen.starts, seen.inits), (1, 1));
            steps.pop().unwrap_or(last)
        };
        let ended = run(vec![Scripted::boxed(first), Scripted::boxed(second)], None);
        assert!(matches!(ended.outcome, Outcome::Success), "{last:?}");
        assert_eq!(ended.cpu, 0);
    }
}

#[test]
fn whoever_ends_the_run_stops_the_others_wherever_they_are() {
    for last in [Step::Compute, Step::Halt] {
        let others = [Step::Compute, Step::Halt, Step::Out(EXIT, 3)];
        let mut vcpus = vec![Scripted::boxed(list(start_others(), last))];
        vcpus.extend(others.map(|step| Scripted::boxed(list([], step))));
        // One that is never started waits too.
        let ended = run(vcpus, None);
        assert!(matches!(ended.outcome, Outcome::Failure(3)));
        assert_eq!(ended.cpu, 3);
    }
}

#[test]
fn a_guest_of_which_nobody_can_be_woken_is_given_up() {
    let vcpus = |interruptible| -> Vec<Box<dyn Vcpu>> {
        let first = list(start_others(), Step::Halt);
        let second = move |seen: &mut Seen| {
            seen.interruptible = interruptible;
            Step::Halt
        };
        let mut vcpus = vec![Scripted::boxed(first), Scripted::boxed(second)];
        vcpus.push(Scripted::boxed(second));
        vcpus
    };
    for (interruptible, text) in [
        (false, "interrupts disabled"),
        (true, "no interrupt source"),
    ] {
        match run(vcpus(interruptible), None).outcome {
            Outcome::Crashed { message, .. } => assert!(message.contains(text), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_nmi_ends_a_halt_that_nothing_else_ends() {
    let mut steps = start_others();
    steps.push(Step::Write(ICR_LOW, OTHERS | NMI));
    let second = |seen: &mut Seen| match seen.nmis {
        0 => Step::Halt,
        _ => Step::Out(EXIT, 0),
    };
    let first = Scripted::boxed(list(steps, Step::Halt));
    let ended = run(vec![first, Scripted::boxed(second)], None);
    assert!(matches!(ended.outcome, Outcome::Success));
    assert_eq!(ended.cpu, 1);
}

#[test]
fn a_vcpu_that_is_stopped_starts_over() {
    for (cycle, last) in [(1, Step::Compute), (2, Step::Halt)] {
        let mut steps = start_others();
        steps.extend(start_others());
        let second = move |seen: &mut Seen| {
            if seen.inits == 2 && seen.starts == 2 {
                return Step::Out(EXIT, cycle);
            }
            last
        };
        // It has to be seen running first, or both starts may be one.
        let first = {
            let mut steps = steps.into_iter();
            move |seen: &mut Seen| {
                if seen.steps == 4 {
                    std::thread::sleep(Duration::from_millis(20));
                }
                steps.next().unwrap_or(Step::Compute)
            }
        };
        let ended = run(vec![Scripted::boxed(first), Scripted::boxed(second)], None);
        assert!(matches!(ended.outcome, Outcome::Failure(code) if code == cycle));
    }
    // For the boot processor there is nowhere to start.
    let mut steps = start_others();
    steps.push(Step::Write(ICR_HIGH, 0));
    steps.push(Step::Write(ICR_LOW, 1 << 14 | INIT));
    let first = Scripted::boxed(list(steps, Step::Compute));
    let second = Scripted::boxed(list([], Step::Compute));
    assert!(matches!(
        run(vec![first, second], None).outcome,
        Outcome::Reset
    ));
}

#[test]
fn limits_are_for_all_together_and_crashes_name_the_vcpu() {
    // One starts the others: if each did, the boot processor would be sent an INIT, which is a reset.
    let busy = |first| Scripted::boxed(list(first, Step::Read(EOI)));
    let vcpus = vec![busy(start_others()), busy(vec![]), busy(vec![])];
    let ended = run(vcpus, Some(1000));
    assert!(matches!(ended.outcome, Outcome::Limit(Limit::Exits)));
    // Each of the others may be one exit behind.
    let total = ended.machine.tally().total();
    assert!((1000..1003).contains(&total), "{total}");

    let first = Scripted::boxed(list(start_others(), Step::Compute));
    let second = Scripted::boxed(list([], Step::Shutdown));
    let ended = run(vec![first, second], None);
    match ended.outcome {
        Outcome::Crashed { state, message } => {
            assert_eq!(message, "triple fault");
            assert_eq!(*state.unwrap(), CpuState::startup(0x9a));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(ended.cpu, 1);
}

#[test]
fn a_thread_that_panics_ends_the_run() {
    let first = Scripted::boxed(list(start_others(), Step::Compute));
    let second = Scripted::boxed(|_: &mut Seen| panic!("on purpose"));
    let ended = run(vec![first, second], None);
    match ended.outcome {
        Outcome::EngineError { error, .. } => {
            assert_eq!(error.to_string(), "the thread of vCPU 1 panicked");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_single_vcpu_takes_nmis_of_its_own() {
    let first = |seen: &mut Seen| match (seen.steps, seen.nmis) {
        (0, _) => Step::Write(ICR_HIGH, 0),
        (1, _) => Step::Write(ICR_LOW, 1 << 14 | NMI),
        (_, nmis) => Step::Out(EXIT, nmis as u32),
    };
    let ended = run(vec![Scripted::boxed(first)], None);
    assert!(matches!(ended.outcome, Outcome::Failure(1)));
}

#[test]
fn a_register_page_moves_for_its_vcpu_alone() {
    const ELSEWHERE: u64 = 0x4200_0000;
    const VERSION: u64 = 0x30;
    // Wherever it is, the version is there and nothing at the other place.
    let step = |seen: &mut Seen, page: u64, other: u64| match seen.steps % 4 {
        0 => Step::Read(page + VERSION),
        1 if seen.read != 0x0005_0014 => Step::Out(EXIT, 1),
        1 | 3 => Step::Read(other + VERSION),
        _ if seen.read != u32::MAX => Step::Out(EXIT, 2),
        _ => Step::Read(page + VERSION),
    };
    let first = move |seen: &mut Seen| match seen.steps {
        100 => Step::Out(EXIT, 0),
        _ => step(seen, ELSEWHERE, 0xfee0_0000),
    };
    let mut machine = Machine::new(MachineOptions::default()).unwrap();
    assert!(machine.write_msr(0x1b, ELSEWHERE | 0x900, 0));
    let outcome = drive(&mut Scripted::new(first), &mut machine, &Limits::default());
    assert!(matches!(outcome, Outcome::Success), "{outcome:?}");
    // Another vCPU's is where it was.
    let mut machine = Machine::new(MachineOptions {
        cpus: 2,
        ..MachineOptions::default()
    })
    .unwrap();
    assert!(machine.write_msr(0x1b, ELSEWHERE | 0x900, 0));
    machine.irqchip.lapics.set_current(1);
    for (address, value) in [(0xfee0_0030, 0x0005_0014u32), (0x4200_0030, u32::MAX)] {
        let mut data = [0; 4];
        machine.memory_read(crate::GuestPhys(address), &mut data);
        assert_eq!(u32::from_le_bytes(data), value, "{address:#x}");
    }
}
