//! Several vCPUs: start-up, interprocessor interrupts, atomic memory, and how such guests end.

mod support;

use engines::Mode;
use support::{Call, on_every_mode, smp};

/// Calls `body` for every mode with several vCPUs that this host can run.
fn on_smp_modes(body: impl Fn(&'static Mode)) {
    on_every_mode(|mode| {
        if mode.cpus > 1 {
            body(mode);
        }
    });
}

fn kernel(mode: &Mode, image: &[u8], args: &[&str]) -> Call {
    let call = Call::new(mode.name);
    let path = call.path("kernel");
    std::fs::write(&path, image).unwrap();
    let path = path.to_str().unwrap().to_owned();
    call.args(&["--timeout", "20", "--kernel", &path])
        .args(args)
}

#[test]
fn four_processors_start_and_interrupt_each_other() {
    for x2apic in [false, true] {
        let image = smp::image(x2apic);
        on_smp_modes(|mode| {
            let ended = kernel(mode, &image, &["--smp", "4"]).run();
            ended.check(0, "");
            assert_eq!(ended.stdout, b"smp ok\n");
        });
    }
}
