//! Tiny guests on the kvm engine: what is KVM's own. What every mode must do is tested in `engines`.
//!
//! Where /dev/kvm can't be used these tests say why and pass.

use std::sync::Arc;
use std::time::Duration;

use engine_core::testing::{Guest, end};
use engine_core::{CpuState, Exit, Limits, Machine, MachineOptions, Outcome, Vcpu, drive};
use iced_x86::code_asm::*;
use kvm::{KvmVcpu, Options};

struct Ran {
    outcome: Outcome,
    machine: Machine,
    vcpu: KvmVcpu,
}

/// Runs a guest, or says why it can't be.
fn run(guest: &Guest, limits: Limits) -> Option<Ran> {
    if let Err(unavailable) = kvm::probe() {
        eprintln!("skipped: {unavailable}");
        return None;
    }
    let ram = engine_core::memory::create(16).unwrap();
    let entry = engine_core::loader::load(&ram, &guest.elf(), "").unwrap();
    let mut vcpu = KvmVcpu::new(Arc::clone(&ram), Options::default()).unwrap();
    vcpu.set_state(&entry).unwrap();
    let mut machine = Machine::new(MachineOptions::default()).unwrap();
    let outcome = drive(&mut vcpu, &mut machine, &limits);
    Some(Ran {
        outcome,
        machine,
        vcpu,
    })
}

fn limited() -> Limits {
    Limits {
        timeout: Some(Duration::from_secs(5)),
        max_exits: Some(1_000_000),
    }
}

#[test]
fn a_32_bit_guest_ends_with_its_code() {
    let guest = Guest::protected(|asm| end(asm, 7));
    let Some(ran) = run(&guest, limited()) else {
        return;
    };
    assert!(
        matches!(ran.outcome, Outcome::Failure(7)),
        "{:?}",
        ran.outcome
    );
}

#[test]
fn a_64_bit_guest_prints_and_succeeds() {
    let guest = Guest::long(|asm| {
        asm.mov(dx, 0x3f8)?;
        for &byte in b"hello\n" {
            asm.mov(eax, u32::from(byte))?;
            asm.out(dx, al)?;
        }
        end(asm, 0)
    });
    let Some(ran) = run(&guest, limited()) else {
        return;
    };
    assert!(matches!(ran.outcome, Outcome::Success), "{:?}", ran.outcome);
    assert_eq!(ran.machine.console(), b"hello\n");
}

#[test]
fn state_goes_in_and_comes_out() {
    if let Err(unavailable) = kvm::probe() {
        eprintln!("skipped: {unavailable}");
        return;
    }
    let ram = engine_core::memory::create(1).unwrap();
    let mut vcpu = KvmVcpu::new(ram, Options::default()).unwrap();
    let mut state = CpuState::pvh_entry(0x1_0000, 0x6000);
    state.gpr[8] = 0x1234_5678_9abc_def0;
    state.cr8 = 3;
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.state().unwrap(), state);
    assert_eq!(vcpu.task_priority(), 3);
}

#[test]
fn exits_have_kvms_names_and_the_kernel_counts_too() {
    let guest = Guest::protected(|asm| {
        for _ in 0..10 {
            asm.out(0x80, al)?;
        }
        end(asm, 0)
    });
    let Some(mut ran) = run(&guest, limited()) else {
        return;
    };
    assert!(matches!(ran.outcome, Outcome::Success), "{:?}", ran.outcome);
    let counts = ran.machine.totals(&mut ran.vcpu);
    let count = |source: &str, reason: &str| {
        let found = counts
            .iter()
            .find(|count| (count.source, count.reason.as_str()) == (source, reason));
        found.map_or(0, |count| count.count)
    };
    assert_eq!(count("vmm", "KVM_EXIT_IO out 0x80"), 10);
    assert_eq!(count("vmm", "KVM_EXIT_IO out 0xf4"), 1);
    if kvm::probe().unwrap().statistics {
        // Each exit to the VMM was one of the kernel's too.
        assert!(count(kvm::stats::SOURCE, "exits") >= 11, "{counts:?}");
    }
}

#[test]
fn a_kick_before_the_run_is_not_lost() {
    if let Err(unavailable) = kvm::probe() {
        eprintln!("skipped: {unavailable}");
        return;
    }
    let spin = Guest::protected(|asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.jmp(again)
    });
    let ram = engine_core::memory::create(16).unwrap();
    let entry = engine_core::loader::load(&ram, &spin.elf(), "").unwrap();
    let mut vcpu = KvmVcpu::new(ram, Options::default()).unwrap();
    vcpu.set_state(&entry).unwrap();
    let kick = vcpu.kick_handle();
    kick.kick();
    assert!(matches!(vcpu.run().unwrap(), Exit::Interrupted));
    // From another thread, at a moment that differs each time: none may be lost, or this hangs.
    for round in 0..200u32 {
        let kick = vcpu.kick_handle();
        let kicker = std::thread::spawn(move || {
            for _ in 0..round * 50 {
                std::hint::spin_loop();
            }
            kick.kick();
        });
        assert!(matches!(vcpu.run().unwrap(), Exit::Interrupted));
        kicker.join().unwrap();
    }
}

#[test]
fn what_the_backend_cannot_run_is_said_with_its_name_and_the_instruction() {
    let Ok(host) = kvm::probe() else { return };
    // kvm_pvm emulates ring 0 and knows no xsave; hardware raises #UD, which ends in a triple fault.
    let guest = Guest::long(|asm| {
        asm.mov(rbx, 0x18_0000u64)?;
        asm.xsave(ptr(rbx))
    });
    let Some(ran) = run(&guest, limited()) else {
        return;
    };
    let Outcome::Crashed { message, state } = ran.outcome else {
        panic!("{:?}", ran.outcome);
    };
    if message != "triple fault" {
        assert!(message.starts_with("KVM_EXIT_INTERNAL_ERROR"), "{message}");
        assert!(
            message.contains(&format!("{} backend", host.backend)),
            "{message}"
        );
        assert!(message.contains("bytes 0f ae 23"), "{message}");
    }
    assert!(state.is_some());
}
