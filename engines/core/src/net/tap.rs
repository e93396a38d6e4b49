//! A TAP device of the host: frames through /dev/net/tun (Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{FrameCounts, LONGEST, NetBackend, Patience, Received, send_with};
use crate::buffer::{self, Buffer};

/// A TAP device can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// An interface's name has 1 to 15 bytes and no slash or space.
    #[error("'{0}' is no name of a network interface: 1 to 15 bytes, no '/' and no space")]
    Name(String),
    /// The host has no TAP devices.
    #[error("open /dev/net/tun: {0}; load the module: modprobe tun")]
    Missing(#[source] io::Error),
    /// The user may not.
    #[error(
        "TAP device {name}: {source}; have root make it for you: \
         ip tuntap add dev {name} mode tap user $USER && ip link set {name} up"
    )]
    Permission {
        /// The interface.
        name: String,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("TAP device {name}: {source}; another process uses it")]
    Busy {
        /// The interface.
        name: String,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The host refused otherwise.
    #[error("TAP device {name}: {source}")]
    Host {
        /// The interface.
        name: String,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

/// A TAP device.
#[derive(Debug)]
pub struct Tap {
    file: File,
    patience: Patience,
    counts: FrameCounts,
    gone: bool,
}

impl Tap {
    /// Attaches to the TAP device `name`. One that does not exist is made, if the user may; the
    /// host has to set it up all the same.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Tap, TapError> {
        let fits = (1..libc::IFNAMSIZ).contains(&name.len());
        if !fits || name.contains(['/', '\0']) || name.contains(char::is_whitespace) {
            return Err(TapError::Name(name.to_owned()));
        }
        let refused = |source: io::Error| {
            let name = name.to_owned();
            match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
                Some(libc::EBUSY) => TapError::Busy { name, source },
                _ => TapError::Host { name, source },
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => refused(source),
                _ => TapError::Missing(source),
            })?;
        // SAFETY: ifreq is integers and arrays, so zero is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads an ifreq.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request) } < 0 {
            return Err(refused(io::Error::last_os_error()));
        }
        Ok(Tap {
            file,
            patience: Patience::default(),
            counts: FrameCounts::default(),
            gone: false,
        })
    }

    /// EBADFD: the interface was deleted (drivers/net/tun.c). EIO on a write: it is down.
    fn check_gone(&mut self, error: &io::Error) {
        self.gone |= matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV));
    }
}

impl NetBackend for Tap {
    fn send(&mut self, frame: &[Buffer<'_>]) {
        let fd = self.file.as_raw_fd();
        let count = frame.len().min(buffer::MOST) as i32;
        let done = send_with(&self.file, &mut self.patience, || {
            // SAFETY: the buffers are readable memory, at most IOV_MAX of them.
            unsafe { libc::writev(fd, Buffer::vectors(frame), count) }
        });
        match done {
            Ok(()) => self.counts.sent += 1,
            Err(error) => {
                self.counts.send_dropped += 1;
                self.check_gone(&error);
            }
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Received {
        while !self.gone {
            match self.file.read(into) {
                Ok(count @ 1..=LONGEST) => {
                    self.counts.received += 1;
                    return Received::Frame(count);
                }
                // The kernel cuts a frame to the room there is; ours is more than a card takes.
                Ok(_) => self.counts.receive_dropped += 1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.check_gone(&error);
                    break;
                }
            }
        }
        if self.gone {
            Received::Gone
        } else {
            Received::Nothing
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn gone(&self) -> bool {
        self.gone
    }

    fn counts(&self) -> FrameCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "a/b", "a b", "sixteen-bytes-xx", "tab\t"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
        }
    }

    /// Deleting needs CAP_NET_ADMIN, as making does: without it there is nothing to test.
    #[test]
    fn a_deleted_interface_is_gone_and_sending_to_it_drops() {
        let name = format!("tl{}", std::process::id());
        let mut tap = match Tap::open(&name) {
            Ok(tap) => tap,
            Err(TapError::Missing(_) | TapError::Permission { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        assert!(matches!(Tap::open(&name), Err(TapError::Busy { .. })));
        let mut frame = [0xff; 64];
        let mut room = [0; 2048];
        // Down: frames are dropped, and it may come up again.
        tap.send(&[Buffer::new(&mut frame)]);
        assert_eq!(tap.counts().send_dropped, 1);
        assert_eq!(tap.receive(&mut room), Received::Nothing);
        assert!(!tap.gone());
        let deleted = std::process::Command::new("ip")
            .args(["link", "delete", &name])
            .status();
        if deleted.is_ok_and(|status| status.success()) {
            tap.send(&[Buffer::new(&mut frame)]);
            assert_eq!(tap.receive(&mut room), Received::Gone);
            assert!(tap.gone());
            assert_eq!(tap.counts().sent, 0);
        }
    }
}
