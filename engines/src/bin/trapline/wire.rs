//! Counters on the wire: one JSON object a line on the descriptor named by `--stats-fd`.
//!
//! A caller that stops reading must not hold up the guest, nor the end of a run: a line that can't
//! be written within [`PATIENCE`] ends the reporting, and the run goes on without it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

use anyhow::{Context, bail};
use engine_core::tally::Count;
use serde::Serialize;

/// How long a full pipe is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// PIPE_BUF: what a pipe that polls as writable takes at once.
const CHUNK: usize = 4096;

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(crate) enum Event<'a> {
    /// The guest is about to start.
    Start {
        mode: &'a str,
        engine: &'a str,
        backend: Option<&'a str>,
        /// Whose interrupt controllers the guest has, where it has any.
        irqchip: Option<&'a str>,
        /// How virtio devices are notified, where there are any.
        doorbell: Option<&'a str>,
        cpus: u8,
        memory_mib: u64,
    },
    /// A measured window has closed.
    Window { seq: u64, counts: Vec<Counter<'a>> },
    /// The guest has ended.
    End {
        outcome: &'a str,
        message: &'a str,
        counts: Vec<Counter<'a>>,
    },
}

/// One counter.
#[derive(Debug, Serialize)]
pub(crate) struct Counter<'a> {
    source: &'a str,
    kind: &'a str,
    reason: &'a str,
    count: u64,
}

impl<'a> From<&'a Count> for Counter<'a> {
    fn from(count: &'a Count) -> Self {
        Counter {
            source: count.source,
            kind: count.kind.name(),
            reason: &count.reason,
            count: count.count,
        }
    }
}

/// Where events go; nowhere without `--stats-fd`.
#[derive(Debug, Default)]
pub(crate) struct Stats(Option<File>);

impl Stats {
    /// Takes over the descriptor that the caller has opened for us.
    pub(crate) fn open(fd: Option<i32>) -> anyhow::Result<Self> {
        let Some(fd) = fd else {
            return Ok(Stats(None));
        };
        if fd < 3 {
            bail!("--stats-fd {fd}: descriptors 0 to 2 are the console and the messages");
        }
        // SAFETY: fcntl with F_SETFD takes plain numbers; a descriptor that is not open is EBADF.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error()).context(format!("--stats-fd {fd}"));
        }
        // SAFETY: the descriptor is open, was passed to this process for this use, and is taken
        // over here once, before anything else that could own it was opened.
        Ok(Stats(Some(unsafe { File::from_raw_fd(fd) })))
    }

    /// Writes one line.
    pub(crate) fn write(&mut self, event: &Event<'_>) {
        let Some(file) = &mut self.0 else { return };
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        if line.chunks(CHUNK).any(|chunk| write(file, chunk).is_err()) {
            self.0 = None;
        }
    }
}

fn write(file: &mut File, chunk: &[u8]) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    let patience = PATIENCE.as_millis() as libc::c_int;
    // SAFETY: one valid pollfd, borrowed for the call.
    match unsafe { libc::poll(&mut poll, 1, patience) } {
        1 => file.write_all(chunk),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_agreed_shape() {
        let count = Count {
            source: "vmm",
            kind: engine_core::ExitKind::Pio,
            reason: "KVM_EXIT_IO out 0x3f8".into(),
            count: 123,
        };
        let event = Event::Window {
            seq: 1,
            counts: vec![Counter::from(&count)],
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"window","seq":1,"counts":[{"source":"vmm","kind":"pio","reason":"KVM_EXIT_IO out 0x3f8","count":123}]}"#
        );
        let start = Event::Start {
            mode: "full",
            engine: "bt",
            backend: None,
            irqchip: Some("user"),
            doorbell: None,
            cpus: 4,
            memory_mib: 256,
        };
        assert_eq!(
            serde_json::to_string(&start).unwrap(),
            r#"{"event":"start","mode":"full","engine":"bt","backend":null,"irqchip":"user","doorbell":null,"cpus":4,"memory_mib":256}"#
        );
    }
}
