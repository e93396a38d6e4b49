//! Attacks on the isolation of the three parties. Each is refused; and each that a single defence
//! refuses goes through when that defence is removed, which shows that the attack is one.
//!
//! The attacks themselves are scenarios of the test guest: guest/attacks.rs.

mod support;

use engine_core::Outcome;
use pv::Defence;
use support::{Run, finish, run, run_with, run_without, start};

/// The attack is refused, and the guest lives on.
#[track_caller]
fn refused(scenario: &str) {
    let run = run(scenario);
    assert!(
        matches!(run.outcome, Outcome::Success) && run.console.ends_with("safe\n"),
        "{scenario}: {run:?}"
    );
}

/// The same attack goes through without a defence.
#[track_caller]
fn succeeds_without(scenario: &str, defence: Defence) {
    let run = run_without(scenario, defence);
    let won = ["reached\n", "stolen\n"]
        .iter()
        .any(|word| run.console.ends_with(word));
    assert!(won, "{scenario} without {defence:?}: {run:?}");
}

/// The attack ends the guest, which V says; V lives on, this being V.
#[track_caller]
fn ends_the_guest(scenario: &str, text: &str) -> Run {
    let run = run_with(scenario, Some(3.0), None);
    match &run.outcome {
        Outcome::Crashed { message, .. } => assert!(message.contains(text), "{scenario}: {run:?}"),
        other => panic!("{scenario}: {other:?} {}", run.console),
    }
    run
}

#[test]
fn user_code_reaches_no_memory_but_what_its_tables_map() {
    refused("attack-read");
    refused("attack-stub");
    succeeds_without("attack-stub", Defence::UnmappedStub);
    refused("attack-other-slot");
    succeeds_without("attack-other-slot", Defence::OneSlot);
    refused("attack-commands");
    succeeds_without("attack-commands", Defence::ReadOnlyCommands);
}

#[test]
fn user_code_makes_no_host_call() {
    refused("attack-host-calls");
    refused("attack-getppid");
    succeeds_without("attack-getppid", Defence::UserJail);
}

#[test]
fn user_code_gets_no_memory_through_the_gate() {
    refused("attack-steal-idle");
    succeeds_without("attack-steal-idle", Defence::Key);
    refused("attack-steal");
    succeeds_without("attack-steal", Defence::CheckedNotifications);
    refused("attack-find-key");
    succeeds_without("attack-find-key", Defence::HiddenKey);
    refused("attack-nested");
    succeeds_without("attack-nested", Defence::CheckedNotifications);
    refused("attack-trapping");
    refused("attack-gate-bytes");
}

#[test]
fn a_corrupt_signal_state_costs_its_owner_only() {
    refused("attack-altstack");
    refused("attack-forged-done");
    refused("attack-return");
    succeeds_without("attack-return", Defence::Key);
    refused("attack-blocked");
    let control = run_without("attack-blocked", Defence::CleanFrames);
    let Outcome::Crashed { message, .. } = &control.outcome else {
        panic!("{control:?}");
    };
    assert!(message.contains("user process in slot 0 ended by signal 11"));
}

#[test]
fn user_code_can_not_block_its_preemption() {
    refused("attack-preempt");
    let control = start("attack-preempt", Some(Defence::CleanFrames), &[]);
    let control = finish(control, Some(0.5), None);
    assert!(matches!(control.outcome, Outcome::Limit(_)), "{control:?}");
}

#[test]
fn user_code_never_runs_on_what_was_revoked() {
    refused("attack-revoked-blocked");
    succeeds_without("attack-revoked-blocked", Defence::CleanFrames);
    refused("attack-revoked-protect");
    succeeds_without("attack-revoked-protect", Defence::Key);
    refused("attack-revoked-nested");
    succeeds_without("attack-revoked-nested", Defence::CheckedNotifications);
}

#[test]
fn the_kernel_makes_no_host_call_outside_its_list() {
    refused("attack-kernel-calls");
    refused("attack-kernel-getppid");
    succeeds_without("attack-kernel-getppid", Defence::KernelJail);
    refused("attack-kernel-answer");
    refused("attack-kernel-vmm");
    refused("attack-kernel-kill");
}

#[test]
fn the_kernel_can_not_trick_its_hypercalls() {
    refused("attack-kernel-table");
    succeeds_without("attack-kernel-table", Defence::CheckedTables);
    refused("attack-kernel-pointer");
    succeeds_without("attack-kernel-pointer", Defence::CheckedPointers);
}

#[test]
fn a_kernel_that_destroys_what_it_shares_hurts_itself() {
    ends_the_guest("attack-kernel-ring", "console ring");
    // Its own counters and limits are there too.
    let run = run_with("attack-kernel-ledger", Some(3.0), None);
    assert!(
        !matches!(run.outcome, Outcome::EngineError { .. }),
        "{run:?}"
    );
    let run = run_with("attack-kernel-limit", Some(3.0), Some(500));
    assert!(
        matches!(run.outcome, Outcome::Limit(engine_core::Limit::Exits)),
        "{run:?}"
    );
    ends_the_guest("attack-kernel-stack", "");
}

/// What is mapped in the parties, as the host sees it.
#[test]
fn no_party_has_a_vdso_or_anything_that_is_not_its_own() {
    let mut guest = start("spin-user", None, &[]);
    let kernel = guest.processes()[0];
    let thread = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let read =
            |pid: i32, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let user = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .find_map(|entry| {
                let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
                let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
                let own = maps.contains("trapline-slots")
                    && pid != kernel
                    && maps.contains("700000011000");
                let parent = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                let ours = parent.rsplit(") ").next()?.split(' ').nth(1)?
                    == std::process::id().to_string();
                (own && ours).then_some(pid)
            });
        let user = user.expect("the user process runs");
        let descriptors = |pid: i32| {
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count()
        };
        (
            read(kernel, "maps"),
            read(user, "maps"),
            descriptors(kernel),
            descriptors(user),
            read(kernel, "status"),
            read(user, "status"),
        )
    });
    guest.run(&engine_core::Limits {
        timeout: Some(std::time::Duration::from_millis(900)),
        max_exits: None,
    });
    let (kernel, user, kernel_fds, user_fds, kernel_status, user_status) = thread.join().unwrap();
    for maps in [&kernel, &user] {
        for name in ["[vdso]", "[vvar", "[stack]", "[heap]"] {
            assert!(!maps.contains(name), "{name} in\n{maps}");
        }
    }
    for line in user.lines() {
        let gate = line.starts_with("700000000000-700000001000 r-xp");
        let slot = line.contains("trapline-slots");
        let memory = line.contains("trapline-guest-ram") && !line.starts_with('7');
        let vsyscall = line.contains("[vsyscall]");
        assert!(gate || slot || memory || vsyscall, "{line}");
    }
    assert!(
        !kernel.contains("rwxp") && !kernel.contains("rwxs"),
        "{kernel}"
    );
    // Memory, listener, wake, bell, timer, and the one user process.
    assert_eq!(kernel_fds, 6);
    assert_eq!(user_fds, 1);
    for status in [kernel_status, user_status] {
        assert!(
            status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
            "{status}"
        );
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    }
    let _ = finish;
}
