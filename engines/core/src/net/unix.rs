//! A peer on this host: one Ethernet frame per datagram over AF_UNIX, as QEMU's `-netdev dgram`.
//!
//! Our socket is bound to a name that the kernel chooses (unix(7), autobind), so that the peer can
//! answer the sender of a frame, and connected to the peer's path, so that nobody else's frames
//! come in. A peer that goes away makes sending fail (ECONNREFUSED); each later frame tries to
//! connect again, so a peer that comes back at the same path is found.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use super::{FrameCounts, LONGEST, NetBackend, Patience, Received, send_with};
use crate::buffer::{self, Buffer};

/// A peer can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// Nothing is bound to the path, or nothing reads there.
    #[error("socket {}: {source}; start the peer first: it binds a datagram socket there", path.display())]
    Peer {
        /// The peer's path.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// What is bound there is no datagram socket.
    #[error("socket {} is not a datagram socket", path.display())]
    Kind {
        /// The peer's path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("socket for {}: {source}", path.display())]
    Host {
        /// The peer's path.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

/// A socket whose other end is a peer process.
#[derive(Debug)]
pub struct UnixSocket {
    socket: UnixDatagram,
    peer: PathBuf,
    connected: bool,
    patience: Patience,
    counts: FrameCounts,
}

impl UnixSocket {
    /// Connects to the socket that a peer has bound to `path`.
    ///
    /// # Errors
    /// [`UnixError`].
    pub fn connect(path: &Path) -> Result<UnixSocket, UnixError> {
        let host = |source| UnixError::Host {
            path: path.to_owned(),
            source,
        };
        let socket = unnamed().map_err(host)?;
        socket.set_nonblocking(true).map_err(host)?;
        socket
            .connect(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EPROTOTYPE) => UnixError::Kind {
                    path: path.to_owned(),
                },
                Some(libc::ENOENT | libc::ECONNREFUSED | libc::EACCES) => UnixError::Peer {
                    path: path.to_owned(),
                    source,
                },
                _ => host(source),
            })?;
        Ok(UnixSocket {
            socket,
            peer: path.to_owned(),
            connected: true,
            patience: Patience::default(),
            counts: FrameCounts::default(),
        })
    }

    /// The socket alone, for another process, as one that waits.
    ///
    /// # Errors
    /// The host's.
    pub fn into_blocking(self) -> io::Result<UnixDatagram> {
        self.socket.set_nonblocking(false)?;
        Ok(self.socket)
    }

    fn try_send(&mut self, frame: &[Buffer<'_>]) -> io::Result<()> {
        if !self.connected {
            self.socket.connect(&self.peer)?;
            self.connected = true;
        }
        let fd = self.socket.as_raw_fd();
        // SAFETY: msghdr is integers and pointers that may be null.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = Buffer::vectors(frame).cast_mut();
        message.msg_iovlen = frame.len().min(buffer::MOST) as _;
        send_with(&self.socket, &mut self.patience, || {
            // SAFETY: the message names readable buffers, at most IOV_MAX of them.
            unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) }
        })
    }

    /// The peer is gone, and may come back.
    fn lost_peer(error: &io::Error) -> bool {
        matches!(
            error.raw_os_error(),
            Some(libc::ECONNREFUSED | libc::ECONNRESET | libc::ENOTCONN | libc::ENOENT)
        )
    }
}

/// A datagram socket bound to an abstract name of the kernel's choice.
fn unnamed() -> io::Result<UnixDatagram> {
    // Names can be taken by others; the process id and a count make ours our own.
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("trapline-{}-{number}", std::process::id());
        match UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            done => return done,
        }
    }
}

impl NetBackend for UnixSocket {
    fn send(&mut self, frame: &[Buffer<'_>]) {
        let mut done = self.try_send(frame);
        if self.connected && done.as_ref().is_err_and(Self::lost_peer) {
            // A new peer may be there already.
            self.connected = false;
            done = self.try_send(frame);
        }
        match done {
            Ok(()) => self.counts.sent += 1,
            Err(_) => self.counts.send_dropped += 1,
        }
    }

    fn receive(&mut self, into: &mut [u8]) -> Received {
        loop {
            match self.socket.recv(into) {
                Ok(count @ 1..=LONGEST) => {
                    self.counts.received += 1;
                    return Received::Frame(count);
                }
                Ok(_) => self.counts.receive_dropped += 1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Nothing;
                }
                // ECONNRESET is reported once, when the peer is closed with our frames unread.
                Err(error) if Self::lost_peer(&error) && self.connected => self.connected = false,
                Err(_) => return Received::Nothing,
            }
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn gone(&self) -> bool {
        false
    }

    fn counts(&self) -> FrameCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(socket: &mut UnixSocket, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        let (left, right) = bytes.split_at_mut(2);
        socket.send(&[Buffer::new(left), Buffer::new(right)]);
    }

    #[test]
    fn frames_go_both_ways_and_only_the_peer_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let peer = UnixDatagram::bind(&path).unwrap();
        let mut socket = UnixSocket::connect(&path).unwrap();
        send(&mut socket, "ping");
        let mut room = [0; 2048];
        let (count, from) = peer.recv_from(&mut room).unwrap();
        assert_eq!(&room[..count], b"ping");
        assert_eq!(socket.receive(&mut room), Received::Nothing);
        peer.send_to_addr(b"pong", &from).unwrap();
        let stranger = UnixDatagram::unbound().unwrap();
        assert!(stranger.send_to_addr(b"spam", &from).is_err());
        assert_eq!(socket.receive(&mut room), Received::Frame(4));
        assert_eq!(&room[..4], b"pong");
        peer.send_to_addr(&[0; LONGEST + 1], &from).unwrap();
        assert_eq!(socket.receive(&mut room), Received::Nothing);
        let counts = FrameCounts {
            sent: 1,
            send_dropped: 0,
            received: 1,
            receive_dropped: 1,
        };
        assert_eq!(socket.counts(), counts);
    }

    #[test]
    fn a_peer_may_go_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let peer = UnixDatagram::bind(&path).unwrap();
        let mut socket = UnixSocket::connect(&path).unwrap();
        drop(peer);
        let mut room = [0; 2048];
        for _ in 0..3 {
            send(&mut socket, "lost");
            assert_eq!(socket.receive(&mut room), Received::Nothing);
        }
        assert_eq!(socket.counts().send_dropped, 3);
        std::fs::remove_file(&path).unwrap();
        let peer = UnixDatagram::bind(&path).unwrap();
        send(&mut socket, "here");
        assert_eq!(peer.recv(&mut room).unwrap(), 4);
        assert_eq!(socket.counts().sent, 1);
    }

    #[test]
    fn a_stuck_peer_costs_one_wait_and_then_drops() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let peer = UnixDatagram::bind(&path).unwrap();
        let mut socket = UnixSocket::connect(&path).unwrap();
        // More than any queue holds; each wait in vain would take 20 ms.
        while socket.counts().send_dropped == 0 {
            send(&mut socket, "frame");
        }
        let start = std::time::Instant::now();
        for _ in 0..1000 {
            send(&mut socket, "frame");
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(5));
        assert_eq!(socket.counts().send_dropped, 1001);
        let mut room = [0; 64];
        peer.recv(&mut room).unwrap();
        send(&mut socket, "again");
        assert_eq!(socket.counts().send_dropped, 1001);
    }

    #[test]
    fn a_missing_or_wrong_socket_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        let message = UnixSocket::connect(&path).unwrap_err().to_string();
        assert!(message.contains("start the peer first"), "{message}");
        let stream = dir.path().join("stream");
        let _listener = std::os::unix::net::UnixListener::bind(&stream).unwrap();
        let message = UnixSocket::connect(&stream).unwrap_err().to_string();
        assert!(message.contains("not a datagram socket"), "{message}");
    }
}
