//! I/O of aware guests: a disk that is a file and a network that is a socket, behind rings.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use engine_core::devices::virtio::{Block, Net};
use engine_core::net::{DEFAULT_MAC, UnixSocket};
use engine_core::storage::{FileOptions, RawFile};
use engine_core::{Limits, Outcome, machine::Source};
use programs::{
    find,
    io::{block, net::Peer},
    oracle,
};
use pv::{Devices, Guest, Options};

/// A path in the test's own directory that nothing lies at.
fn path(name: &str) -> PathBuf {
    let path =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// A disk with the content that reads are verified against.
fn disk(name: &str, read_only: bool) -> RawFile {
    let path = path(name);
    let mut file = File::create(&path).unwrap();
    let mut bytes = Vec::new();
    for number in 0..block::MOST {
        bytes.extend(
            block::whole(number)
                .iter()
                .flat_map(|word| word.to_le_bytes()),
        );
    }
    file.write_all(&bytes).unwrap();
    file.set_len(block::DISK_BLOCKS * block::BLOCK_BYTES)
        .unwrap();
    let options = FileOptions {
        read_only,
        ..FileOptions::default()
    };
    let disk = RawFile::open(&path, options).unwrap();
    std::fs::remove_file(&path).unwrap();
    disk
}

/// The last lines of runs, without cycles.
fn run(devices: Devices, lines: &str) -> Vec<String> {
    let options = Options {
        input: Source::Bytes(format!("{lines}quit 0\n").into_bytes()),
        devices,
        ..Options::default()
    };
    let mut guest = Guest::start(images::aware(), 128, "", options).expect("starts");
    let limits = Limits {
        timeout: Some(Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = guest.run(&limits);
    let console = String::from_utf8_lossy(guest.console()).into_owned();
    assert!(
        matches!(outcome, Outcome::Success),
        "{outcome:?}\n{console}"
    );
    let last = |line: &&str| {
        ["done ", "failed ", "unsupported "]
            .iter()
            .any(|w| line.starts_with(w))
    };
    let cut = |line: &str| match line.strip_prefix("done ") {
        Some(rest) => format!("done {}", rest.split(' ').next().unwrap_or_default()),
        None => line.to_owned(),
    };
    console.lines().filter(last).map(cut).collect()
}

#[test]
fn disk_and_network_agree_with_the_oracle() {
    let socket = path("peer");
    let peer = UnixDatagram::bind(&socket).unwrap();
    let card = UnixSocket::connect(&socket).unwrap();
    std::thread::spawn(move || {
        let mut logic = Peer::default();
        let mut frame = [0; 2048];
        while let Ok((length, from)) = peer.recv_from(&mut frame) {
            if let Some(length) = logic.answer(&mut frame, length)
                && peer.send_to_addr(&frame[..length], &from).is_err()
            {
                break;
            }
        }
    });
    let (mut lines, mut expected) = (String::new(), Vec::new());
    for name in [
        "blk_seqread",
        "blk_randwrite",
        "blk_seqread32",
        "blk_randwrite32",
        "blk_randread",
        "net_rr",
        "net_stream",
        "blk_seqwrite32",
    ] {
        for (size, iterations) in [(0, 1), (5, 70), (100, 300)] {
            lines.push_str(&format!("run {name} {size} {iterations}\n"));
            let sum = oracle(find(name).unwrap(), size, iterations).unwrap();
            expected.push(format!("done {sum:016x}"));
        }
    }
    let devices = Devices(vec![
        Box::new(Block::new(Box::new(disk("rings", false)))),
        Box::new(Net::new(Box::new(card), DEFAULT_MAC)),
    ]);
    assert_eq!(run(devices, &lines), expected);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let devices = Devices(vec![Box::new(Block::new(Box::new(disk(
        "read-only",
        true,
    ))))]);
    let sum = oracle(find("blk_seqread").unwrap(), 9, 9).unwrap();
    assert_eq!(
        run(
            devices,
            "run blk_seqwrite 9 9\nrun blk_seqread 9 9\nrun net_rr 0 1\n"
        ),
        [
            "unsupported the disk is read-only".to_owned(),
            format!("done {sum:016x}"),
            "unsupported this machine has no network card".to_owned(),
        ]
    );
}
