//! The network device (5.1), on any [`NetBackend`]: one pair of queues, no offloads.
//!
//! Frames that arrive while the driver has no buffer wait in a short queue, and are dropped when it
//! is full, as in a card's own memory. So the host's descriptor never stays readable, and whoever
//! watches it need not know whether the driver keeps up.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use super::chain::length;
use super::{Broken, Ring, VirtioDevice, copy_config};
use crate::buffer::{scatter, window};
use crate::devices::Action;
use crate::net::{FrameCounts, LONGEST, MacAddress, NetBackend, Received};

/// Device type.
pub const ID: u32 = 1;
/// VIRTIO_NET_F_MAC.
pub const MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_STATUS.
pub const STATUS: u64 = 1 << 16;
/// Status: the link is up.
pub const LINK_UP: u16 = 1;

/// Queue of buffers for frames that come in.
pub const RECEIVE: usize = 0;
/// Queue of frames that go out.
pub const TRANSMIT: usize = 1;

/// Bytes of struct virtio_net_hdr (5.1.6) with VERSION_1.
pub const HEADER: usize = 12;
/// Offset of num_buffers in it.
const NUM_BUFFERS: usize = 10;

/// Frames that wait for the driver.
const WAITING: usize = 256;
/// Frames taken from the host before the guest goes on.
const BURST: usize = 256;

/// A network card.
pub struct Net {
    backend: Box<dyn NetBackend>,
    mac: MacAddress,
    /// Link status as the driver was told.
    link_up: bool,
    changed: bool,
    waiting: VecDeque<Vec<u8>>,
    /// Header and frame on their way to the driver.
    frame: Box<[u8; HEADER + LONGEST + 1]>,
    /// Frames dropped on their way between backend and driver.
    dropped: FrameCounts,
}

impl Net {
    /// A card with this address.
    pub fn new(backend: Box<dyn NetBackend>, mac: MacAddress) -> Self {
        let mut frame = Box::new([0; HEADER + LONGEST + 1]);
        // One buffer holds each frame: mergeable buffers are not offered.
        frame[NUM_BUFFERS] = 1;
        Net {
            backend,
            mac,
            link_up: true,
            changed: false,
            waiting: VecDeque::new(),
            frame,
            dropped: FrameCounts::default(),
        }
    }

    /// What became of frames, the backend's and the card's together.
    pub fn counts(&self) -> FrameCounts {
        let mut counts = self.backend.counts();
        counts.send_dropped += self.dropped.send_dropped;
        counts.receive_dropped += self.dropped.receive_dropped;
        counts
    }

    /// Puts the next frame behind the header. None if there is none.
    fn next_frame(&mut self) -> Option<usize> {
        if let Some(frame) = self.waiting.pop_front() {
            self.frame[HEADER..HEADER + frame.len()].copy_from_slice(&frame);
            return Some(frame.len());
        }
        match self.backend.receive(&mut self.frame[HEADER..]) {
            Received::Frame(count) => Some(count),
            Received::Nothing | Received::Gone => None,
        }
    }

    fn check_link(&mut self) {
        if self.link_up && self.backend.gone() {
            self.link_up = false;
            self.changed = true;
        }
    }

    /// Gives frames to the driver as long as there are frames and buffers.
    fn deliver(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        for _ in 0..BURST {
            if ring.next()?.is_none() && (!ring.ask_for_notification()? || ring.next()?.is_none()) {
                return Ok(());
            }
            let Some(count) = self.next_frame() else {
                ring.put_back();
                return Ok(());
            };
            let whole = HEADER + count;
            let chain = ring.last();
            if length(chain.writable()) < whole {
                // Drivers must give room for the longest frame (5.1.6.3.1).
                self.dropped.receive_dropped += 1;
                ring.put_back();
                continue;
            }
            scatter(chain.writable(), 0, &self.frame[..whole]);
            ring.complete(whole)?;
        }
        Ok(())
    }

    /// Takes frames from the host for which the driver has no buffer.
    fn keep(&mut self) {
        for _ in 0..BURST {
            let Received::Frame(count) = self.backend.receive(&mut self.frame[HEADER..]) else {
                return;
            };
            if self.waiting.len() < WAITING {
                let frame = &self.frame[HEADER..HEADER + count];
                self.waiting.push_back(frame.to_vec());
            } else {
                self.dropped.receive_dropped += 1;
            }
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn features(&self) -> u64 {
        MAC | STATUS
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.link_up { LINK_UP } else { 0 };
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        config[6..].copy_from_slice(&status.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.waiting.clear();
    }

    fn notified(&mut self, index: usize, rings: &mut [Ring]) -> Result<(), Broken> {
        if index == RECEIVE {
            return self.deliver(&mut rings[RECEIVE]);
        }
        let (backend, dropped) = (&mut self.backend, &mut self.dropped);
        rings[TRANSMIT].serve_all(|chain| {
            let total = length(chain.readable());
            match total.checked_sub(HEADER) {
                Some(count @ 1..=LONGEST) => {
                    backend.send(&window(chain.readable(), HEADER, count));
                }
                Some(_) | None => dropped.send_dropped += 1,
            }
            Ok(0)
        })?;
        self.check_link();
        Ok(())
    }

    fn host_ready(&mut self, rings: Option<&mut [Ring]>) -> Result<(), Broken> {
        let done = match rings {
            Some(rings) => self.deliver(&mut rings[RECEIVE]),
            None => Ok(()),
        };
        self.keep();
        self.check_link();
        done
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (!self.backend.gone()).then(|| self.backend.descriptor())
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The descriptor of an interface that is gone stays ready for ever: nobody is to wait for it.
    fn action(&self) -> Action {
        if self.backend.gone() {
            Action::Hold
        } else {
            Action::None
        }
    }
}
