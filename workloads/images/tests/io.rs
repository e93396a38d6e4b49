//! I/O workloads on real devices: a disk that is a file, a network that is a socket with a peer.

mod support;

use programs::{
    CATALOGUE, Group, find,
    io::{block, console::Received, net::Peer},
    oracle,
};
use rustix::io::{FdFlags, fcntl_setfd};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixDatagram,
    },
    process::Command,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};
use support::{Guest, MICROVM, file, qemu_image, qemu_status};

/// A disk with the content that reads are verified against.
fn disk() -> tempfile::NamedTempFile {
    let mut disk = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = Vec::new();
    for number in 0..block::MOST {
        bytes.extend(
            block::whole(number)
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
    }
    disk.write_all(&bytes).unwrap();
    disk.as_file()
        .set_len(block::DISK_BLOCKS * block::BLOCK_BYTES)
        .unwrap();
    disk
}

/// Answers frames for as long as the other end lives. Loses every `losing`-th data frame, if not 0.
fn serve_peer(socket: UnixDatagram, losing: u64) {
    let count = AtomicU64::new(0);
    thread::spawn(move || {
        let mut peer = Peer::default();
        let mut frame = [0; 2048];
        while let Ok(length @ 1..) = socket.recv(&mut frame) {
            let data = frame[14] == abi::net::kind::DATA;
            if data && losing != 0 && count.fetch_add(1, Relaxed) % losing == losing - 1 {
                continue;
            }
            if let Some(length) = peer.answer(&mut frame, length)
                && socket.send(&frame[..length]).is_err()
            {
                break;
            }
        }
    });
}

/// Runs every workload of the group, but those whose name starts with one of `refused`, which are
/// to be answered as said there.
fn check_io(guest: &mut Guest, refused: &[(&str, &str)]) {
    for round in 0..2 {
        for workload in CATALOGUE.iter().filter(|w| w.group == Group::Io) {
            for (size, iterations) in [(0, 1), (0, 70), (3, 300 + round)] {
                let size = if workload.name == "self_ipi" { 0 } else { size };
                let answer = guest.run(workload.name, size, iterations);
                let refusal = refused.iter().find(|(name, _)| {
                    workload.name.starts_with(name) || workload.name.ends_with(name)
                });
                let expected = match refusal {
                    Some((_, refusal)) => format!("unsupported {refusal}"),
                    None => format!("done {:016x}", oracle(workload, size, iterations).unwrap()),
                };
                assert_eq!(answer, expected, "{} {size} {iterations}", workload.name);
                if answer.starts_with("done ") {
                    check_said(workload.name, &guest.said, iterations, &answer);
                }
            }
        }
    }
}

/// Checks data lines against the checksum, and the histogram against the iterations.
fn check_said(name: &str, said: &[String], iterations: u64, answer: &str) {
    let mut received = Received::default();
    let mut lines = said.iter();
    let mut data = 0;
    for line in said.iter().filter(|line| line.starts_with(':')) {
        received.line(line.as_bytes());
        lines.next();
        data += 1;
    }
    if name == "console" {
        assert_eq!(answer, format!("done {:016x}", received.checksum()));
        assert_eq!(data, iterations);
    } else {
        assert_eq!(data, 0);
    }
    if name == "net_stream" {
        assert!(said.is_empty());
        return;
    }
    let numbers = |line: &String| -> Vec<u64> {
        line.split(' ')
            .skip(1)
            .map(|n| n.parse().unwrap())
            .collect()
    };
    let latency = numbers(lines.next().expect("a histogram"));
    let [count, least, most] = latency[..] else {
        panic!("{latency:?}");
    };
    assert!(least <= most);
    let (mut sum, mut end) = (0, None);
    for line in lines {
        assert!(line.starts_with("bucket "), "{line}");
        let [low, high, count] = numbers(line)[..] else {
            panic!("{line}");
        };
        assert!(end < Some(low) && low <= high && count > 0, "{line}");
        assert!(high >= least && low <= most, "{line}");
        end = Some(high);
        sum += count;
    }
    assert_eq!(sum, count, "{name}");
    if name.ends_with("32") {
        assert!(count < iterations || iterations == 1);
    } else {
        assert_eq!(count, iterations, "{name}");
    }
}

/// Lets a child have a descriptor; its number.
fn hand_over(descriptor: &OwnedFd) -> String {
    fcntl_setfd(descriptor, FdFlags::empty()).unwrap();
    descriptor.as_raw_fd().to_string()
}

fn native(disk: Option<&OwnedFd>, net: Option<&OwnedFd>) -> Guest {
    let mut command = Command::new(file("native-io.elf", images::native()));
    if let Some(disk) = disk {
        command.env(abi::descriptor::DISK, hand_over(disk));
    }
    if let Some(net) = net {
        command.env(abi::descriptor::NET, hand_over(net));
    }
    let guest = Guest::start(&mut command);
    assert_eq!(guest.line(), "ready 1 native");
    guest
}

#[test]
fn the_native_process_does_io() {
    let disk = disk();
    let disk: OwnedFd = disk.reopen_writable();
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    serve_peer(ours, 0);
    let mut guest = native(Some(&disk), Some(&theirs.into()));
    let no_interrupts = "a process takes no interrupts";
    let no_depth = "pread and pwrite have one request in flight";
    check_io(
        &mut guest,
        &[
            ("timer_", no_interrupts),
            ("hlt_wake", no_interrupts),
            ("self_ipi", no_interrupts),
            ("32", no_depth),
        ],
    );
}

trait Reopen {
    fn reopen_writable(&self) -> OwnedFd;
}

impl Reopen for tempfile::NamedTempFile {
    fn reopen_writable(&self) -> OwnedFd {
        let file = File::options().read(true).write(true).open(self.path());
        file.unwrap().into()
    }
}

/// QEMU's end of a network, and ours with its peer. A datagram socket has two names.
fn network() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let name = |end| dir.path().join(end).display().to_string();
    let socket = UnixDatagram::bind(name("peer")).unwrap();
    let qemu = name("qemu");
    let option = format!(
        "dgram,id=net,local.type=unix,local.path={qemu},remote.type=unix,remote.path={}",
        name("peer")
    );
    thread::spawn(move || {
        // QEMU's end is there when the first frame is.
        let mut peer = Peer::default();
        let mut frame = [0; 2048];
        while let Ok(length) = socket.recv(&mut frame) {
            if let Some(length) = peer.answer(&mut frame, length)
                && socket.send_to(&frame[..length], &qemu).is_err()
            {
                break;
            }
        }
    });
    (dir, option)
}

/// No host to ask, and in QEMU's translator no TSC deadline.
const NO_TIMERS: [(&str, &str); 2] = [
    ("timer_pv", "this guest knows of no host to ask for a timer"),
    ("timer_tscdl", "the processor has no TSC-deadline timer"),
];

#[test]
fn the_unaware_image_does_io() {
    let disk = disk();
    let (_dir, net) = network();
    let drive = format!("file={},format=raw,if=ide", disk.path().display());
    let options = [
        "-serial",
        "stdio",
        "-drive",
        &drive,
        "-netdev",
        &net,
        "-device",
        "ne2k_isa,netdev=net",
    ];
    let image = ("unaware-io.elf", images::unaware());
    let Some(mut guest) = qemu_image(image, 128, "", &options) else {
        return;
    };
    assert_eq!(guest.line(), "ready 1 unaware");
    let [host, deadline] = NO_TIMERS;
    let refused = [host, deadline, ("32", block::NO_DEPTH)];
    check_io(&mut guest, &refused);
    guest.send("quit 0");
    assert_eq!(guest.wait().code(), qemu_status(0));
}

/// A virtio disk, with these properties of the device.
fn hybrid(disk: &tempfile::NamedTempFile, properties: &str, net: &str) -> Option<Guest> {
    let drive = format!("file={},format=raw,if=none,id=disk", disk.path().display());
    let device = format!("virtio-blk-device,drive=disk{properties}");
    let mut options = MICROVM.to_vec();
    options.extend(["-drive", &drive, "-device", &device]);
    options.extend(["-netdev", net, "-device", "virtio-net-device,netdev=net"]);
    let image = ("hybrid-io.elf", images::hybrid());
    let guest = qemu_image(image, 128, "", &options)?;
    assert_eq!(guest.line(), "ready 1 hybrid");
    Some(guest)
}

#[test]
fn the_hybrid_image_does_io() {
    let disk = disk();
    let (_dir, net) = network();
    let Some(mut guest) = hybrid(&disk, "", &net) else {
        return;
    };
    check_io(&mut guest, &NO_TIMERS);
    guest.send("quit 0");
    assert_eq!(guest.wait().code(), qemu_status(0));
}

#[test]
fn the_hybrid_image_does_without_indirect_descriptors_and_event_indices() {
    for properties in [
        ",indirect_desc=off,event_idx=off",
        ",indirect_desc=off",
        ",event_idx=off",
    ] {
        let disk = disk();
        let (_dir, net) = network();
        let Some(mut guest) = hybrid(&disk, properties, &net) else {
            return;
        };
        for name in ["blk_randread", "blk_randwrite32", "blk_seqread32"] {
            let sum = oracle(find(name).unwrap(), 500, 300).unwrap();
            assert_eq!(
                guest.run(name, 500, 300),
                format!("done {sum:016x}"),
                "{properties}"
            );
        }
    }
}

#[test]
fn the_native_process_says_what_is_wrong_with_its_devices() {
    let mut guest = native(None, None);
    assert_eq!(
        guest.run("blk_seqread", 0, 1),
        "unsupported this machine has no disk"
    );
    assert_eq!(
        guest.run("net_rr", 0, 1),
        "unsupported this machine has no network card"
    );

    let empty = tempfile::tempfile().unwrap();
    empty.set_len(1 << 20).unwrap();
    let mut guest = native(Some(&empty.into()), None);
    assert_eq!(
        guest.run("blk_seqread", 0, 1),
        "failed the disk is smaller than the span"
    );
    assert_eq!(
        guest.run("blk_seqread", 9, 1),
        "failed the disk does not hold the content that reads are verified against"
    );

    let disk = disk();
    let read_only: OwnedFd = File::open(disk.path()).unwrap().into();
    let mut guest = native(Some(&read_only), None);
    assert_eq!(
        guest.run("blk_seqwrite", 9, 1),
        "unsupported the disk is read-only"
    );
    // The file shrinks under the guest: the second block is beyond its end.
    disk.as_file().set_len(block::BLOCK_BYTES).unwrap();
    assert_eq!(
        guest.run("blk_seqread", 9, 1),
        "failed the disk is smaller than the span"
    );
}

#[test]
fn lost_frames_are_counted_and_missing_answers_reported() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    serve_peer(ours, 10);
    let mut guest = native(None, Some(&theirs.into()));
    assert_eq!(
        guest.run("net_stream", 0, 100),
        "failed frames that the peer has not received: 0xa"
    );
    let sum = oracle(find("net_rr").unwrap(), 0, 100).unwrap();
    assert_eq!(guest.run("net_rr", 0, 100), format!("done {sum:016x}"));

    let (_silent, theirs) = UnixDatagram::pair().unwrap();
    let mut guest = native(None, Some(&theirs.into()));
    assert_eq!(
        guest.run("net_rr", 0, 1),
        "failed no frame arrives within two seconds"
    );
}

#[test]
fn a_run_that_went_wrong_leaves_no_times_to_the_next() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    // Answers while preparing and in the first rounds of the window, then no more.
    thread::spawn(move || {
        let mut peer = Peer::default();
        let mut frame = [0; 2048];
        for _ in 0..4 {
            let length = ours.recv(&mut frame).unwrap();
            let length = peer.answer(&mut frame, length).unwrap();
            ours.send(&frame[..length]).unwrap();
        }
        while let Ok(1..) = ours.recv(&mut frame) {}
    });
    let mut guest = native(None, Some(&theirs.into()));
    assert_eq!(
        guest.run("net_rr", 0, 100),
        "failed no frame arrives within two seconds"
    );
    assert!(guest.run("alu", 10, 1).starts_with("done "));
    assert!(guest.said.is_empty(), "{:?}", guest.said);
}
