//! `--disk` and `--net`: from the command line to backends, and to a process for the baseline.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use anyhow::bail;
use engine_core::devices::virtio::{Block, Net as VirtioNet};
use engine_core::host::console::Sink;
use engine_core::net::{DEFAULT_MAC, NetBackend, Tap, UnixSocket};
use engine_core::peripherals::{Family, Peripherals};
use engine_core::storage::{FileOptions, RawFile};
use rustix::io::FdFlags;

use crate::cli;

/// A disk as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    path: PathBuf,
    options: FileOptions,
}

impl FromStr for Disk {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let mut path = text;
        let mut options = FileOptions::default();
        // A comma may be part of a file's name: only what is an option is taken for one.
        while let Some((front, option)) = path.rsplit_once(',') {
            match option {
                "readonly" => options.read_only = true,
                "direct" => options.direct = true,
                _ => break,
            }
            path = front;
        }
        Ok(Disk {
            path: path.into(),
            options,
        })
    }
}

/// A network as the command line names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Net {
    /// A TAP device.
    Tap(String),
    /// A peer's socket.
    Unix(PathBuf),
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("tap", name)) if !name.is_empty() => Ok(Net::Tap(name.to_owned())),
            Some(("unix", path)) if !path.is_empty() => Ok(Net::Unix(path.into())),
            _ => Err("a network is tap:NAME or unix:PATH".to_owned()),
        }
    }
}

/// Opens what the command line names.
pub(crate) fn open(arguments: &cli::Run, family: Family) -> anyhow::Result<Peripherals> {
    let mut peripherals = Peripherals {
        family,
        ..Peripherals::default()
    };
    if let Some(Disk { path, options }) = &arguments.disk {
        peripherals.disk = Some(Box::new(RawFile::open(path, *options)?));
    }
    peripherals.net = match &arguments.net {
        Some(Net::Tap(name)) => Some(Box::new(Tap::open(name)?) as Box<dyn NetBackend>),
        Some(Net::Unix(path)) => Some(Box::new(UnixSocket::connect(path)?)),
        None => None,
    };
    if family == Family::Virtio {
        let stdout = std::io::stdout().as_fd().try_clone_to_owned()?;
        peripherals.console = Some(Sink::Descriptor(stdout));
    }
    Ok(peripherals)
}

/// Opens what the command line names, for guests whose devices are rings in their memory.
pub(crate) fn open_rings(arguments: &cli::Run) -> anyhow::Result<pv::Devices> {
    // The console is no part of it, as in a PC.
    let peripherals = open(arguments, Family::Emulated)?;
    let mac = peripherals.mac.unwrap_or(DEFAULT_MAC);
    let disk = peripherals.disk.map(|disk| Box::new(Block::new(disk)) as _);
    let net = peripherals
        .net
        .map(|net| Box::new(VirtioNet::new(net, mac)) as _);
    Ok(pv::Devices(disk.into_iter().chain(net).collect()))
}

/// Lets the baseline's process have the descriptors, which must live until it was started.
pub(crate) fn hand_over(
    arguments: &cli::Run,
    command: &mut Command,
) -> anyhow::Result<Vec<OwnedFd>> {
    let mut inherited = Vec::new();
    let mut pass = |variable: &str, fd: OwnedFd| -> anyhow::Result<()> {
        rustix::io::fcntl_setfd(&fd, FdFlags::empty())?;
        command.env(variable, fd.as_raw_fd().to_string());
        inherited.push(fd);
        Ok(())
    };
    if let Some(Disk { path, options }) = &arguments.disk {
        // Past the page cache too: its data begins on a page, and is whole blocks.
        let file = RawFile::open(path, *options)?.into_file();
        pass(abi::descriptor::DISK, file.into())?;
    }
    match &arguments.net {
        Some(Net::Unix(path)) => {
            let socket = UnixSocket::connect(path)?.into_blocking()?;
            pass(abi::descriptor::NET, socket.into())?;
        }
        Some(Net::Tap(_)) => bail!(
            "mode {} takes frames from a socket: --net unix:PATH",
            cli::NATIVE
        ),
        None => {}
    }
    Ok(inherited)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_end_a_disk_and_commas_may_be_part_of_its_name() {
        let cases = [
            ("disk.img", "disk.img", false, false),
            ("disk.img,readonly", "disk.img", true, false),
            ("a,b.img,direct,readonly", "a,b.img", true, true),
            ("disk.img,fast", "disk.img,fast", false, false),
        ];
        for (text, path, read_only, direct) in cases {
            let options = FileOptions { direct, read_only };
            let path = path.into();
            assert_eq!(text.parse(), Ok(Disk { path, options }));
        }
    }

    #[test]
    fn a_network_is_a_tap_device_or_a_socket() {
        assert_eq!("tap:t0".parse(), Ok(Net::Tap("t0".to_owned())));
        assert_eq!("unix:/a:b".parse(), Ok(Net::Unix("/a:b".into())));
        for text in ["", "t0", "tap:", "unix:", "tcp:1"] {
            assert!(text.parse::<Net>().is_err(), "{text}");
        }
    }
}
