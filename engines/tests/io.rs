//! Disk, network and console workloads in every mode that this host can run: what the guest's own
//! drivers moved is what the oracle says, and the counters show what a request costs.

mod support;

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use engine_core::peripherals::Family;
use engines::Mode;
use programs::io::block;
use programs::io::net::Peer;
use serde_json::Value;
use support::{Call, Ended, on_every_mode};

const LONG: &str = "25";
const SPAN: u64 = 64;
const REQUESTS: u64 = 32;

/// A disk as workloads expect it, as far as [`SPAN`] goes.
fn disk(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    for number in 0..SPAN {
        for word in block::whole(number) {
            file.write_all(&word.to_le_bytes()).unwrap();
        }
    }
    file.set_len(block::DISK_BLOCKS * block::BLOCK_BYTES)
        .unwrap();
}

/// Answers frames until the test ends.
fn peer(path: &Path) {
    let socket = UnixDatagram::bind(path).unwrap();
    std::thread::spawn(move || {
        let mut logic = Peer::default();
        let mut frame = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut frame) {
            if let Some(length) = logic.answer(&mut frame, length) {
                let _ = socket.send_to_addr(&frame[..length], &from);
            }
        }
    });
}

/// Checksum, or the reason why there is none; the end; the windows.
type Run = (Result<u64, String>, Ended, Vec<Value>);

/// Runs one workload; its checksum, or the reason why it has no meaning there.
fn run(mode: &str, name: &str, size: u64, options: &[&str]) -> Run {
    run_on("", mode, name, size, options)
}

/// As [`run`], with options of the disk.
fn run_on(disk_options: &str, mode: &str, name: &str, size: u64, options: &[&str]) -> Run {
    let call = Call::with_memory(mode, "64");
    let (image, socket) = (call.path("disk.img"), call.path("peer"));
    disk(&image);
    peer(&socket);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let ended = call
        .stats(writer)
        .args(&["--disk", &format!("{}{disk_options}", image.display())])
        .args(&["--net", &format!("unix:{}", socket.display())])
        .args(&["--workload", name, "--timeout", LONG])
        .args(&["--size", &size.to_string()])
        .args(&["--iterations", &REQUESTS.to_string()])
        .args(options)
        .run();
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    let answer = text.lines().find_map(|line| {
        let (word, rest) = line.split_once(' ')?;
        match word {
            "done" => {
                let sum = rest.split(' ').next()?;
                Some(Ok(u64::from_str_radix(sum, 16).unwrap()))
            }
            "unsupported" => Some(Err(rest.to_owned())),
            _ => None,
        }
    });
    let mut stats = String::new();
    std::io::Read::read_to_string(&mut std::fs::File::from(reader), &mut stats).unwrap();
    let windows = stats
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|event| event["event"] == "window")
        .collect();
    let answer = answer.unwrap_or_else(|| panic!("{mode} {name}: {ended:?}"));
    (answer, ended, windows)
}

/// Exits to the VMM for each request of the last window.
fn exits(windows: &[Value]) -> f64 {
    let counts = windows.last().unwrap()["counts"].as_array().unwrap();
    let vmm = counts.iter().filter(|count| count["source"] == "vmm");
    let total: u64 = vmm.map(|count| count["count"].as_u64().unwrap()).sum();
    total as f64 / REQUESTS as f64
}

/// What a source has counted in the last window under reasons that begin with `reason`.
fn counted(windows: &[Value], source: &str, reason: &str) -> u64 {
    let counts = windows.last().unwrap()["counts"].as_array().unwrap();
    let these = counts.iter().filter(|count| {
        count["source"] == source && count["reason"].as_str().unwrap().starts_with(reason)
    });
    these.map(|count| count["count"].as_u64().unwrap()).sum()
}

#[test]
fn doorbells_by_eventfd_are_counted_and_are_no_exits() {
    let hybrid = engines::find("hybrid").unwrap();
    let probe = hybrid.eventfd_doorbells.unwrap();
    for (irqchip, name) in [
        (engine_core::Irqchip::User, "user"),
        (engine_core::Irqchip::Kernel, "kernel"),
    ] {
        if let Err(unavailable) = probe(irqchip) {
            eprintln!("skipped: {unavailable}");
            continue;
        }
        let options = ["--doorbell", "eventfd", "--irqchip", name];
        for (workload, size, rings) in [
            ("blk_seqread", SPAN, REQUESTS),
            ("blk_randwrite32", SPAN, 1),
            ("net_rr", 5, REQUESTS),
            ("net_stream", 186, 1),
        ] {
            let (answer, ended, windows) = run("hybrid", workload, size, &options);
            ended.check(0, "");
            let expected = programs::find(workload).unwrap();
            let expected = programs::oracle(expected, size, REQUESTS).unwrap();
            assert_eq!(answer, Ok(expected), "{name} {workload}");
            let seen = counted(&windows, "eventfd", "ioeventfd ");
            assert!(seen >= rings, "{name} {workload}: {seen} doorbells");
            let device = format!("KVM_EXIT_MMIO write virtio-{}", &workload[..3]);
            let exits = counted(&windows, "vmm", &device);
            // Interrupts are acknowledged by exits; notifications of a disk at depth 1 are all of
            // its writes else, and waiting for it is polling.
            assert!(
                exits < REQUESTS || workload.starts_with("net"),
                "{name} {workload}: {exits}"
            );
        }
    }
    for mode in ["full", "hardware", "hybrid-bt", "para"] {
        let call = Call::new(mode).args(&["--workload", "alu", "--doorbell", "eventfd"]);
        call.run().check(2, "leave out --doorbell");
    }
}

#[test]
fn a_disk_past_the_page_cache_has_the_same_content() {
    use std::os::unix::fs::OpenOptionsExt;
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut direct = std::fs::File::options();
    direct.read(true).custom_flags(libc::O_DIRECT);
    if let Err(error) = direct.open(file.path()) {
        eprintln!("skipped: no O_DIRECT here: {error}");
        return;
    }
    let modes = engines::MODES.iter().filter(|mode| (mode.probe)().is_ok());
    for mode in modes.map(|mode| mode.name).chain(["native"]) {
        for name in ["blk_seqread", "blk_randwrite"] {
            let (answer, ended, _) = run_on(",direct", mode, name, SPAN, &[]);
            ended.check(0, "");
            let workload = programs::find(name).unwrap();
            let expected = programs::oracle(workload, SPAN, REQUESTS).unwrap();
            assert_eq!(answer, Ok(expected), "{mode} {name}");
        }
    }
}

#[test]
fn io_workloads_agree_with_the_oracle_in_every_mode() {
    let processes = engines::MODES
        .iter()
        .filter(|mode| matches!(mode.runs, engines::Runs::Processes) && (mode.probe)().is_ok());
    processes.for_each(agrees);
    on_every_mode(agrees);
}

fn agrees(mode: &'static Mode) {
    for (name, size) in [
        ("console", 62),
        ("blk_seqread", SPAN),
        ("blk_seqwrite", SPAN),
        ("blk_randread", SPAN),
        ("blk_randwrite", SPAN),
        ("blk_seqread32", SPAN),
        ("blk_randwrite32", SPAN),
        ("net_rr", 5),
        ("net_stream", 186),
    ] {
        let (answer, ended, windows) = run(mode.name, name, size, &[]);
        let depth = name.ends_with("32");
        match answer {
            Ok(sum) => {
                ended.check(0, "");
                let workload = programs::find(name).unwrap();
                let expected = programs::oracle(workload, size, REQUESTS).unwrap();
                assert_eq!(sum, expected, "{} {name}", mode.name);
            }
            Err(reason) => {
                let expected = depth && mode.family() == Family::Emulated;
                assert!(expected, "{} {name}: {reason}", mode.name);
                continue;
            }
        }
        if mode.name == "hardware" && name.ends_with("write") {
            // 2048 words each, which would be as many exits.
            let exits = exits(&windows);
            assert!(exits <= 150.0, "{name}: {exits} exits");
        }
        if mode.family() == Family::Virtio && name.starts_with("blk") {
            let limit = if depth { 0.2 } else { 1.1 };
            let exits = exits(&windows);
            assert!(exits <= limit, "{} {name}: {exits} exits", mode.name);
        }
    }
}
