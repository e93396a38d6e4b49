//! Runs hand-made guests: translated, and under QEMU where it is installed.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bt::{BtVcpu, Options};
use engine_core::testing::Guest;
use engine_core::{GuestRam, Limits, Machine, MachineOptions, Outcome, Vcpu, drive};

use crate::kernel::{Asm, Built, Kernel, Report};

const MEMORY_MIB: u64 = 16;

/// A guest that has ended.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) console: String,
    pub(crate) vcpu: BtVcpu,
}

impl Ended {
    /// What it printed, after a good end.
    pub(crate) fn report(&self) -> Report {
        assert!(
            matches!(self.outcome, Outcome::Success),
            "{:?}\n{}",
            self.outcome,
            self.console
        );
        Report::read(&self.console)
    }
}

/// Loads a guest into a vCPU of its own.
pub(crate) fn boot(guest: &Guest, options: Options) -> (BtVcpu, Arc<GuestRam>) {
    let ram = engine_core::memory::create(MEMORY_MIB).expect("guest memory");
    let entry = engine_core::loader::load(&ram, &guest.elf(), "").expect("it loads");
    let mut vcpu = BtVcpu::new(Arc::clone(&ram), options).expect("a vCPU");
    vcpu.set_state(&entry).expect("a state");
    (vcpu, ram)
}

/// Runs a guest to its end.
pub(crate) fn run_with(guest: &Guest, options: Options) -> Ended {
    let (mut vcpu, _ram) = boot(guest, options);
    let (outcome, console) = drive_to_end(&mut vcpu);
    Ended {
        outcome,
        console,
        vcpu,
    }
}

fn drive_to_end(vcpu: &mut BtVcpu) -> (Outcome, String) {
    let mut machine = Machine::new(MachineOptions::default()).expect("a machine");
    let limits = Limits {
        timeout: Some(Duration::from_secs(30)),
        max_exits: None,
    };
    let outcome = drive(vcpu, &mut machine, &limits);
    let console = String::from_utf8_lossy(machine.console()).into_owned();
    (outcome, console)
}

pub(crate) fn run(guest: &Guest) -> Ended {
    run_with(guest, Options::default())
}

/// Builds and runs a guest; what it reports.
pub(crate) fn report(kernel: Kernel, body: impl FnOnce(&mut Asm) -> Built) -> Report {
    run(&kernel.guest(body)).report()
}

/// Builds and runs a guest in every way that its code and memory may be kept in; what it reports,
/// which has to be the same each time.
pub(crate) fn report_of_all(kernel: Kernel, body: impl FnOnce(&mut Asm) -> Built) -> Report {
    let guest = kernel.guest(body);
    let ended = run(&guest);
    let small = Options {
        code_cache: *Options::CODE_CACHE.start(),
        ..Options::default()
    };
    assert_eq!(
        run_with(&guest, small).console,
        ended.console,
        "small cache"
    );
    let (mut vcpu, _ram) = boot(&guest, Options::default());
    if vcpu.hold_window().is_some() {
        let (outcome, console) = drive_to_end(&mut vcpu);
        assert!(matches!(outcome, Outcome::Success), "window: {outcome:?}");
        assert_eq!(console, ended.console, "window");
    }
    ended.report()
}

/// Runs a guest here and under QEMU, where it is installed, and makes sure that both consoles show
/// the same.
pub(crate) fn run_as_qemu(guest: &Guest) -> Ended {
    let ended = run(guest);
    if let Some(text) = qemu(guest) {
        let differences: Vec<_> = ended
            .console
            .lines()
            .zip(text.lines())
            .enumerate()
            .filter(|(_, (here, there))| here != there)
            .collect();
        assert!(
            ended.console == text,
            "lines that differ (translated, QEMU): {differences:?}"
        );
    }
    ended
}

/// As [`report`], after making sure that QEMU's console shows the same.
pub(crate) fn report_as_qemu(kernel: Kernel, body: impl FnOnce(&mut Asm) -> Built) -> Report {
    run_as_qemu(&kernel.guest(body)).report()
}

/// The guest's console under QEMU's own translator; None where QEMU isn't installed.
pub(crate) fn qemu(guest: &Guest) -> Option<String> {
    let file = std::env::temp_dir().join(format!(
        "trapline-system-{}-{:?}.elf",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&file, guest.elf()).expect("a temporary file");
    let spawned = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg",
            "-cpu",
            "qemu64,+smep,+smap,+umip,+pdpe1gb",
            "-m",
            "16",
            "-display",
            "none",
        ])
        .args(["-nodefaults", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x01"])
        .arg("-kernel")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let Ok(mut child) = spawned else {
        let _ = std::fs::remove_file(&file);
        return None;
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while child.try_wait().expect("our child").is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = child.wait().expect("our child");
    let _ = std::fs::remove_file(&file);
    let mut text = String::new();
    let mut output = child.stdout.take().expect("piped");
    output.read_to_string(&mut text).expect("text");
    // isa-debug-exit ends with 2 * code + 1.
    assert_eq!(status.code(), Some(1), "QEMU ended badly:\n{text}");
    Some(text)
}
