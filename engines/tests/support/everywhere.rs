//! One small guest everywhere: in every mode of unaware guests, with the VMM's interrupt controllers
//! and with the kernel's, and under QEMU.
//!
//! A guest ends with 0 if all is well, with [`ABSENT`] if the machine says that it lacks what is
//! tried, and else with the number of the check that failed.

use engine_core::testing::Guest;

use super::{Call, on_every_mode};

/// The machine does not announce the feature.
pub(crate) const ABSENT: u32 = 77;

/// Runs a guest everywhere and expects it to end well.
pub(crate) fn succeeds(guest: &Guest, input: &[u8], output: &[u8]) {
    let image = guest.elf();
    succeeds_in_modes(&image, &["user", "kernel"], input, output);
    qemu(&image, input, output);
}

/// As `succeeds`, without QEMU and with some interrupt controllers.
pub(crate) fn succeeds_in_modes(image: &[u8], irqchips: &[&str], input: &[u8], output: &[u8]) {
    on_every_mode(|mode| {
        for &irqchip in irqchips {
            if irqchip == "kernel" {
                match mode.kernel_irqchip.map(|probe| probe()) {
                    Some(Ok(())) => {}
                    Some(Err(unavailable)) => {
                        eprintln!("skipped: mode {}: {unavailable}", mode.name);
                        continue;
                    }
                    None => continue,
                }
            }
            let call =
                Call::new(mode.name)
                    .image(image)
                    .args(&["--timeout", "10", "--irqchip", irqchip]);
            let ended = call.input(input).run();
            let label = format!("mode {}, irqchip {irqchip}: {ended:?}", mode.name);
            if ended.status.code() == Some(1) && ended.stderr.contains("code 77") {
                // Only KVM may lack what the pinned CPUID announces.
                assert_eq!(mode.engine, "kvm", "{label}");
                eprintln!("skipped: {label}");
                continue;
            }
            assert_eq!(ended.status.code(), Some(0), "{label}");
            assert_eq!(ended.stdout, output, "{label}");
        }
    });
}

/// Runs the image under QEMU's translator, where it is installed.
fn qemu(image: &[u8], input: &[u8], output: &[u8]) {
    let Some(ended) = super::qemu(image, &["-cpu", "max", "-nodefaults"], input) else {
        return;
    };
    // isa-debug-exit ends with 2 * code + 1.
    match ended.status.code() {
        Some(code) if code == (2 * ABSENT + 1) as i32 => eprintln!("skipped: QEMU lacks it"),
        code => {
            assert_eq!(code, Some(1), "QEMU: {ended:?}");
            assert_eq!(ended.stdout, output, "QEMU: {ended:?}");
        }
    }
}
