//! Devices of a process: files that it has inherited, named by [`abi::descriptor`], and its output.
//!
//! A request is one system call. Times are the host's monotonic clock, in nanoseconds. There is
//! nothing here for interrupts: a process takes none.

use programs::{
    Refusal,
    io::{BLOCK_BYTES, Block, Direction, Histogram, Io, SLOTS, block, net},
};
use std::{
    env,
    fs::File,
    io::{self, ErrorKind, Seek, SeekFrom},
    os::{
        fd::FromRawFd,
        unix::{fs::FileExt, net::UnixDatagram},
    },
    time::{Duration, Instant},
};

/// How long an answer of the peer may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// This process's address on the network: locally administered.
pub(crate) const STATION: u64 = u64::from_le_bytes([0x02, 0, 0, 0, 0, 0x01, 0, 0]);

/// What the process has.
pub(crate) struct Devices {
    disk: Option<File>,
    net: Option<UnixDatagram>,
    pub(crate) latencies: Histogram,
    start: Instant,
}

/// The descriptor that an environment variable names.
fn inherited(variable: &str) -> Option<i32> {
    env::var(variable).ok()?.parse().ok()
}

impl Devices {
    /// Takes what was inherited.
    pub(crate) fn inherit() -> Self {
        // SAFETY: whoever sets the variables hands these descriptors over for good.
        let (disk, net) = unsafe {
            (
                inherited(abi::descriptor::DISK).map(|fd| File::from_raw_fd(fd)),
                inherited(abi::descriptor::NET).map(|fd| UnixDatagram::from_raw_fd(fd)),
            )
        };
        Devices {
            disk,
            net,
            latencies: Histogram::new(),
            start: Instant::now(),
        }
    }

    /// Nanoseconds since the process began.
    pub(crate) fn nanoseconds(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// See [`programs::Platform::open`].
    pub(crate) fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        match io {
            Io::Console => Ok(()),
            Io::Block(block) => self.open_disk(block, size),
            Io::Echo | Io::Stream => {
                let net = self.net()?;
                let forget = |_: io::Error| Refusal::Broken("the network is no datagram socket");
                net.set_read_timeout(Some(Duration::from_millis(1)))
                    .map_err(forget)?;
                // What is left of an earlier run.
                while net.recv(&mut [0; 1]).is_ok() {}
                net.set_read_timeout(Some(PATIENCE)).map_err(forget)
            }
            Io::Timer(_) | Io::HaltWake | Io::SelfInterrupt => {
                Err(Refusal::Unsupported("a process takes no interrupts"))
            }
        }
    }

    fn open_disk(&mut self, block: Block, size: u64) -> Result<(), Refusal> {
        let mut disk = self.disk()?;
        if block.depth > 1 {
            return Err(Refusal::Unsupported(
                "pread and pwrite have one request in flight",
            ));
        }
        let bytes = disk.seek(SeekFrom::End(0)).map_err(failed("lseek: errno"))?;
        if bytes / BLOCK_BYTES < block.end(size) {
            return Err(Refusal::Broken(block::TOO_SMALL));
        }
        if block.direction == Direction::Write && disk.write_at(&[], 0).is_err() {
            return Err(Refusal::Unsupported(block::READ_ONLY));
        }
        Ok(())
    }

    fn disk(&self) -> Result<&File, Refusal> {
        self.disk.as_ref().ok_or(Refusal::Unsupported(block::NO_DISK))
    }

    fn net(&self) -> Result<&UnixDatagram, Refusal> {
        self.net.as_ref().ok_or(Refusal::Unsupported(net::NO_CARD))
    }

    /// See [`programs::Platform::transfer`]. `slots` is all of them.
    pub(crate) fn transfer(
        &mut self,
        direction: Direction,
        blocks: &[u64],
        slot: u64,
        slots: &mut [u8],
    ) -> Result<(), Refusal> {
        let disk = self.disk()?;
        for (slot, number) in (slot..).zip(blocks) {
            let first = (slot % SLOTS * BLOCK_BYTES) as usize;
            let bytes = &mut slots[first..first + BLOCK_BYTES as usize];
            let offset = number * BLOCK_BYTES;
            match direction {
                Direction::Read => disk
                    .read_exact_at(bytes, offset)
                    .map_err(failed("pread: errno"))?,
                Direction::Write => disk
                    .write_all_at(bytes, offset)
                    .map_err(failed("pwrite: errno"))?,
            }
        }
        Ok(())
    }

    /// See [`programs::Platform::flush_disk`].
    pub(crate) fn flush_disk(&mut self) -> Result<(), Refusal> {
        self.disk()?
            .sync_data()
            .map_err(failed("fdatasync: errno"))
    }

    /// See [`programs::Platform::transmit`]. `slots` is all of them.
    pub(crate) fn transmit(
        &mut self,
        slot: u64,
        count: u64,
        bytes: u64,
        slots: &[u8],
    ) -> Result<(), Refusal> {
        let net = self.net()?;
        for slot in slot..slot + count {
            let first = (slot % SLOTS * BLOCK_BYTES) as usize;
            net.send(&slots[first..first + bytes as usize])
                .map_err(failed("send: errno"))?;
        }
        Ok(())
    }

    /// See [`programs::Platform::receive`]. `slots` is all of them.
    pub(crate) fn receive(&mut self, slots: &mut [u8]) -> Result<(u64, u64), Refusal> {
        let net = self.net()?;
        let first = (net::SENT * BLOCK_BYTES) as usize;
        match net.recv(&mut slots[first..first + BLOCK_BYTES as usize]) {
            Ok(length) => Ok((net::SENT, length as u64)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                Err(Refusal::Broken(net::NO_ANSWER))
            }
            Err(error) => Err(failed("recv: errno")(error)),
        }
    }
}

/// A system call's error; code 0 is an end of file.
fn failed(what: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |error| Refusal::Device {
        what,
        code: error.raw_os_error().unwrap_or(0) as u64,
    }
}
