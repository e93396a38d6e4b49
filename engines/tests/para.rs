//! The command line around the engine of processes: bad aware images, ends, nothing left behind.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::Call;

const PARA: &str = "para";

fn refused(image: &[u8], text: &str) {
    Call::new(PARA).image(image).run().check(2, text);
}

/// The built-in image with the word of its Trapline note at `index` replaced.
fn with_note(index: usize, value: u32) -> Vec<u8> {
    let mut image = images::aware().to_vec();
    let name = b"Trapline\0\0\0\0";
    let at = image
        .windows(name.len())
        .position(|window| window == name)
        .expect("the image has the note");
    let at = at + name.len() + 4 * index;
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    image
}

#[test]
fn images_that_no_host_can_run_are_refused_with_the_reason() {
    refused(b"", "not a loadable ELF image");
    refused(&images::aware()[..100], "not a loadable ELF image");
    refused(images::unaware(), "has no Trapline note");
    refused(&with_note(0, 77), "wants hypercall ABI version 77");
    refused(&with_note(1, 0x8000_0000), "wants features 0x80000000");
    let mut entry = images::aware().to_vec();
    entry[24..32].copy_from_slice(&0x7777_0000u64.to_le_bytes());
    refused(
        &entry,
        "entry point 0x77770000 lies in no executable segment",
    );
    Call::with_memory(PARA, "1")
        .image(images::aware())
        .run()
        .check(2, "outside guest memory (1 MiB)");
}

#[test]
fn every_prefix_and_every_damaged_header_is_an_error_and_not_a_panic() {
    let whole = images::aware();
    for length in (0..whole.len()).step_by(997) {
        let _ = pv::check(&whole[..length]);
    }
    for at in 0..512 {
        for value in [0, 0x7f, 0xff] {
            let mut image = whole.to_vec();
            image[at] = value;
            let _ = pv::check(&image);
        }
    }
}

#[test]
fn a_workload_runs_and_ends_well() {
    Call::with_memory(PARA, "128")
        .args(&["--workload", "fib"])
        .run()
        .check(0, "");
}

#[test]
fn a_killed_vmm_leaves_no_party_behind() {
    let mut vmm = Command::new(env!("CARGO_BIN_EXE_trapline"))
        .args([
            "run",
            "--mode",
            PARA,
            "--image",
            "builtin:aware",
            "--timeout",
            "20",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    // Its greeting says that every party is up.
    std::io::Read::read_exact(vmm.stdout.as_mut().unwrap(), &mut byte).unwrap();
    let parties = children(vmm.id());
    assert!(
        parties.len() >= 3,
        "kernel, zygote and a user process: {parties:?}"
    );
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let start = Instant::now();
    while parties.iter().any(|pid| alive(*pid)) {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{parties:?} live on"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let list = std::fs::read_to_string(path).unwrap();
    list.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

/// A zombie that its new parent has not reaped yet runs no more.
fn alive(pid: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return Path::new(&format!("/proc/{pid}")).exists();
    };
    !status.contains(") Z ")
}
