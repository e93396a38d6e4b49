//! Command lines: of `trapline` and of QEMU, with and without devices.
//!
//! Invariant: machines and devices are as alike as the two can make them.

use std::path::Path;

use reports_data::NATIVE;

use super::{MEMORY_MIB, QEMU};
use crate::choices::DiskCache;
use crate::devices::Devices;
use crate::process::{CommandLine, STATS_FD};
use crate::vm::Launch;

pub(super) fn trapline_run(trapline: &Path, mode: &str, flavour: &str, choices: &[&str]) -> Launch {
    let image = format!("builtin:{flavour}");
    let memory = MEMORY_MIB.to_string();
    let mut args = vec!["run", "--mode", mode, "--image", &image];
    let counts_windows = mode != NATIVE;
    if counts_windows {
        args.extend(["--memory", &memory, "--stats-fd", STATS_FD]);
    }
    args.extend(choices);
    Launch {
        command: CommandLine {
            program: trapline.display().to_string(),
            args: args.into_iter().map(str::to_owned).collect(),
        },
        counts_windows,
    }
}

pub(super) fn trapline_devices(devices: &Devices) -> Vec<String> {
    let mut disk = devices.disk().display().to_string();
    if devices.cache() == DiskCache::Direct {
        disk.push_str(",direct");
    }
    let net = format!("unix:{}", devices.peer().display());
    vec!["--disk".to_owned(), disk, "--net".to_owned(), net]
}

/// The disk goes through the page cache or past it as ours does, and honours flushes.
pub(super) fn qemu_devices(devices: &Devices, virtio: bool) -> Vec<String> {
    // In QEMU's options a comma that is doubled is none.
    let quoted = |path: &Path| path.display().to_string().replace(',', ",,");
    let drive = format!(
        "if=none,id=disk,format=raw,cache={},file={}",
        match devices.cache() {
            DiskCache::Host => "writeback",
            DiskCache::Direct => "none",
        },
        quoted(&devices.disk())
    );
    let net = format!(
        "dgram,id=net,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        quoted(&devices.station()),
        quoted(devices.peer())
    );
    let (disk, card) = match virtio {
        true => (
            "virtio-blk-device,drive=disk",
            "virtio-net-device,netdev=net",
        ),
        false => ("ide-hd,drive=disk,bus=ide.0", "ne2k_isa,netdev=net"),
    };
    [
        "-drive", &drive, "-device", disk, "-netdev", &net, "-device", card,
    ]
    .map(str::to_owned)
    .to_vec()
}

/// QEMU's PC, with the console on its UART.
pub(super) const PC: &[&str] = &["-M", "pc", "-serial", "stdio"];

/// QEMU's machine with virtio transports where hybrid images look for them; the console is a virtio
/// one, as in our own.
pub(super) const MICROVM: &[&str] = &[
    "-M",
    "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off",
    "-global",
    "virtio-mmio.force-legacy=false",
    "-chardev",
    "stdio,id=console",
    "-device",
    "virtio-serial-device",
    "-device",
    "virtconsole,chardev=console",
];

/// The image is entered through PVH; port 0xf4 ends the guest as in our own machine.
pub(super) fn qemu(image: &Path, accelerator: &str, machine: &[&str]) -> Launch {
    // `max` is everything that TCG implements.
    let cpu = if accelerator == "tcg" { "max" } else { "host" };
    let memory = MEMORY_MIB.to_string();
    let image = image.display().to_string();
    let common = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-m",
        &memory,
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x04",
        "-kernel",
        &image,
    ];
    let args = common.iter().chain(machine).copied();
    Launch {
        command: CommandLine {
            program: QEMU.to_owned(),
            args: args.map(str::to_owned).collect(),
        },
        counts_windows: false,
    }
}
