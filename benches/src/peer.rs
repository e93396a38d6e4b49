//! The other side of the network workloads: a datagram socket that answers frames.
//!
//! One thread per contender waits for frames and answers as [`programs::io::net::Peer`] does; its
//! wake-up is part of every round trip, the same for all. It measures nothing. Invariant: whatever
//! arrives, the thread neither dies nor waits on a guest that doesn't listen, and it ends with its
//! value.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use abi::net::{LEAST, MOST};
use programs::io::net::Peer as Logic;

/// How long an answer may wait for room in the guest's queue. A guest that is stopped has none.
const PATIENCE: Duration = Duration::from_millis(100);

/// A peer.
#[derive(Debug)]
pub struct Peer {
    path: PathBuf,
    socket: UnixDatagram,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// Binds a socket to `path` and answers what arrives there.
    ///
    /// # Errors
    /// The host refuses socket or thread.
    pub fn listen(path: &Path) -> io::Result<Peer> {
        let socket = UnixDatagram::bind(path)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let closing = Arc::new(AtomicBool::new(false));
        let (own, end) = (socket.try_clone()?, Arc::clone(&closing));
        let thread = thread::Builder::new()
            .name("peer".to_owned())
            .spawn(move || answer(&own, &end))?;
        Ok(Peer {
            path: path.to_owned(),
            socket,
            closing,
            thread: Some(thread),
        })
    }

    /// Where to send frames.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Release);
        // Wakes the thread out of its wait (unix(7): later receives return 0).
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn answer(socket: &UnixDatagram, closing: &AtomicBool) {
    let mut logic = Logic::default();
    // One byte more than the longest frame: a longer datagram shows as one that is too long.
    let mut frame = [0; MOST + 1];
    while !closing.load(Ordering::Acquire) {
        let (length, sender) = match socket.recv_from(&mut frame) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        // Shorter than any frame would leave bytes of the last one in it.
        if !(LEAST..=MOST).contains(&length) {
            continue;
        }
        if let Some(length) = logic.answer(&mut frame, length) {
            // Nobody may be there any more, or the sender has no name: frames get lost on networks.
            let _ = socket.send_to_addr(&frame[..length], &sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi::net::{ETHERTYPE, kind};

    fn echo(sequence: u64) -> [u8; LEAST] {
        let mut frame = [0; LEAST];
        frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
        frame[14] = kind::ECHO;
        frame[16..24].copy_from_slice(&sequence.to_le_bytes());
        frame
    }

    #[test]
    fn a_peer_answers_whoever_sends_and_survives_what_is_no_frame() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let place = dir.path().join("peer");
        let peer = Peer::listen(&place).expect("bound");
        for (round, name) in (0..).zip(["first", "second"]) {
            let guest = UnixDatagram::bind(dir.path().join(name)).expect("bound");
            guest.connect(peer.path()).expect("there");
            guest
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("a time");
            for strange in [&[][..], &[1], &[0xff; 4000]] {
                guest.send(strange).expect("sent");
            }
            guest.send(&echo(round)).expect("sent");
            let mut answer = [0; 2048];
            assert_eq!(guest.recv(&mut answer).expect("an answer"), LEAST);
            assert_eq!((answer[14], answer[16]), (kind::ECHOED, round as u8));
        }
        drop(peer);
        assert!(!place.exists());
    }

    #[test]
    fn a_guest_that_is_gone_or_does_not_listen_stops_nobody() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let peer = Peer::listen(&dir.path().join("peer")).expect("bound");
        let deaf = UnixDatagram::bind(dir.path().join("deaf")).expect("bound");
        deaf.set_nonblocking(true).expect("a flag");
        // More answers than its queue holds, or as many as the peer's takes at once.
        for sequence in 0..2000 {
            let _ = deaf.send_to(&echo(sequence), peer.path());
        }
        drop(deaf);
        drop(peer);
    }
}
