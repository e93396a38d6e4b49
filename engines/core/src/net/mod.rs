//! What stands behind a network card: Ethernet frames that go out and come in.
//!
//! A card never waits for its network: frames that can't be delivered are dropped and counted, as
//! on a wire. Whether the other end exists, goes away or comes back is no concern of the guest's.
//!
//! Invariant: a frame goes out whole or not at all, and comes in whole or not at all.

mod tap;
mod unix;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::buffer::Buffer;

pub use tap::{Tap, TapError};
pub use unix::{UnixError, UnixSocket};

/// Shortest frame without its checksum (IEEE 802.3 4.2.3.3); shorter ones are padded by cards.
pub const SHORTEST: usize = 60;
/// Longest frame without its checksum: 1500 bytes of payload and one VLAN tag.
pub const LONGEST: usize = 1518;

/// How long a sender waits for room at the other end before the frame is dropped. A peer that
/// reads at all makes room in this time; one that doesn't costs it once, see [`Patience`].
const ROOM: Duration = Duration::from_millis(20);

/// A card's address.
pub type MacAddress = [u8; 6];

/// The address of machines that aren't given one: locally administered, as QEMU's default.
pub const DEFAULT_MAC: MacAddress = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// What became of frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    /// Frames sent.
    pub sent: u64,
    /// Frames that could not be sent.
    pub send_dropped: u64,
    /// Frames received.
    pub received: u64,
    /// Frames received that no card could take: too long, or empty.
    pub receive_dropped: u64,
}

/// What came of a look for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame of this length.
    Frame(usize),
    /// Nothing now.
    Nothing,
    /// Nothing ever again: the interface is gone.
    Gone,
}

/// A way to a network.
pub trait NetBackend: Send {
    /// Sends one frame, or drops and counts it.
    fn send(&mut self, frame: &[Buffer<'_>]);

    /// Takes one frame into `into`, which has room for [`LONGEST`] bytes. Frames that don't fit are
    /// dropped and counted.
    fn receive(&mut self, into: &mut [u8]) -> Received;

    /// Readable when a frame may have come.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// True once the interface is gone for good.
    fn gone(&self) -> bool;

    /// What became of frames so far.
    fn counts(&self) -> FrameCounts;
}

/// Waiting for room at the other end: bounded, and not again while the other end is stuck.
#[derive(Debug, Default)]
struct Patience {
    /// The last wait was in vain, and no frame got through since.
    stuck: bool,
}

impl Patience {
    /// Waits until `fd` may be written to. False if the frame is to be dropped.
    fn wait(&mut self, fd: &impl AsFd) -> bool {
        if self.stuck {
            return false;
        }
        let end = Instant::now() + ROOM;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(fd, PollFlags::OUT)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    self.stuck = true;
                    return false;
                }
                Ok(_) => return true,
                Err(_) if left.is_zero() => return false,
                Err(_) => {}
            }
        }
    }

    fn sent(&mut self) {
        self.stuck = false;
    }
}

/// Sends with `call` until it is done, the other end has no room, or it fails.
fn send_with(
    fd: &impl AsFd,
    patience: &mut Patience,
    mut call: impl FnMut() -> isize,
) -> io::Result<()> {
    loop {
        if call() >= 0 {
            patience.sent();
            return Ok(());
        }
        let error = io::Error::last_os_error();
        let full = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS));
        if error.kind() != io::ErrorKind::Interrupted && !(full && patience.wait(fd)) {
            return Err(error);
        }
    }
}
