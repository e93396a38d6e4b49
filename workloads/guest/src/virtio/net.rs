//! virtio-net (virtio 1.2, 5.1): two queues, and a header of 12 bytes before each frame.
//!
//! A frame is two descriptors, so that it can lie in a slot of the arena from the slot's beginning on:
//! header, then slot. Frames that have been looked at go back to the device many at a time, so that
//! they cost few notifications.

use super::{
    bus::{self, Transport},
    feature,
    queue::{NEXT, Queue, WRITE},
};
use core::sync::atomic::AtomicU64;
use programs::{
    Refusal,
    io::{BLOCK_BYTES, SLOT_WORDS, net},
};

/// Device ID.
const ID: u32 = 1;
/// The device has an address of its own.
const ADDRESS: u64 = 1 << 5;

const RECEIVE: u32 = 0;
const SEND: u32 = 1;

/// Frames that can be on their way in; most.
const BUFFERS: u16 = 32;
/// Frames that go back to the device at once.
const BATCH: u16 = 16;
/// Bytes of a header.
const HEADER: u32 = 12;

#[repr(C, align(4096))]
struct Memory {
    queues: [[AtomicU64; 512]; 2],
    /// Of frames that arrive; what the device writes there is of no use here.
    received: [[AtomicU64; 2]; BUFFERS as usize],
    /// Of all frames that are sent: no checksum to fill in, no segments.
    sent: [AtomicU64; 2],
}

static MEMORY: Memory = Memory {
    queues: [const { [const { AtomicU64::new(0) }; 512] }; 2],
    received: [const { [const { AtomicU64::new(0) }; 2] }; BUFFERS as usize],
    sent: [const { AtomicU64::new(0) }; 2],
};

/// The card.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Card {
    /// Its address, first byte lowest.
    pub(crate) station: u64,
    transport: Transport,
    receive: Queue,
    send: Queue,
    buffers: u16,
    /// Buffers that have been offered again but not published.
    back: u16,
    /// The buffer that the last frame came in.
    looked_at: Option<u16>,
    patience: u64,
}

/// The slot of a buffer.
fn slot(buffer: u16) -> u64 {
    net::SENT + u64::from(buffer)
}

impl Card {
    /// Finds the card and starts it.
    pub(crate) fn open() -> Result<Self, Refusal> {
        const REFUSES: Refusal = Refusal::Broken("the virtio network card refuses its driver");
        let transport = Transport::find(ID).ok_or(Refusal::Unsupported(net::NO_CARD))?;
        let wanted = ADDRESS | feature::EVENT_INDEX | feature::VERSION_1;
        let features = transport.begin(wanted).ok_or(REFUSES)?;
        let station = if features & ADDRESS != 0 {
            let low = u64::from(transport.configuration(0));
            low | u64::from(transport.configuration(1) & 0xffff) << 32
        } else {
            u64::from_le_bytes([0x02, 0, 0, 0, 0, 0x02, 0, 0])
        };
        let queue = |index: u32| {
            let page = MEMORY.queues[index as usize].as_ptr() as u64;
            transport.queue(index, page, features).ok_or(REFUSES)
        };
        let (receive, send) = (queue(RECEIVE)?, queue(SEND)?);
        if receive.size() < 2 || send.size() < 2 {
            return Err(REFUSES);
        }
        bus::start_watch();
        let mut card = Card {
            station,
            transport,
            buffers: (receive.size() / 2).min(BUFFERS),
            receive,
            send,
            back: 0,
            looked_at: None,
            patience: bus::patience(),
        };
        for frame in 0..send.size() / 2 {
            let header = MEMORY.sent.as_ptr() as u64;
            let first = send.descriptor(2 * frame);
            first.set(header, HEADER, NEXT, 2 * frame + 1);
        }
        for buffer in 0..card.buffers {
            let header = MEMORY.received[usize::from(buffer)].as_ptr() as u64;
            let first = receive.descriptor(2 * buffer);
            first.set(header, HEADER, NEXT | WRITE, 2 * buffer + 1);
            let data = bus::arena_word(slot(buffer) * SLOT_WORDS);
            let second = receive.descriptor(2 * buffer + 1);
            second.set(data, BLOCK_BYTES as u32, WRITE, 0);
            card.receive.offer(2 * buffer);
        }
        if !transport.start() {
            bus::stop_watch();
            return Err(REFUSES);
        }
        card.receive.publish(transport, RECEIVE);
        Ok(card)
    }

    /// Stops the card.
    pub(crate) fn close(&self) {
        self.transport.stop();
        bus::stop_watch();
    }

    /// See [`programs::Platform::transmit`].
    #[inline(always)]
    pub(crate) fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        let most = self.send.size() / 2;
        let mut sent = 0;
        while sent < count {
            let batch = (count - sent).min(most.into()) as u16;
            for frame in 0..batch {
                let slot = slot + sent + u64::from(frame);
                let data = bus::arena_word(slot * SLOT_WORDS);
                let second = self.send.descriptor(2 * frame + 1);
                second.set(data, bytes as u32, 0, 0);
                self.send.offer(2 * frame);
            }
            self.send.publish(self.transport, SEND);
            if !self.send.wait(batch, Some(self.patience)) {
                return Err(Refusal::Broken("the virtio network card sends nothing"));
            }
            while self.send.take().is_some() {}
            sent += u64::from(batch);
        }
        Ok(())
    }

    /// See [`programs::Platform::receive`].
    #[inline(always)]
    pub(crate) fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        if let Some(head) = self.looked_at.take() {
            self.receive.offer(head);
            self.back += 1;
            if self.back >= BATCH.min(self.buffers / 2) {
                self.receive.publish(self.transport, RECEIVE);
                self.back = 0;
            }
        }
        if !self.receive.wait(1, Some(self.patience)) {
            return Err(Refusal::Broken(net::NO_ANSWER));
        }
        let Some((head, length)) = self.receive.take() else {
            return Err(Refusal::Broken(net::NO_ANSWER));
        };
        let buffer = head / 2;
        if head % 2 != 0 || buffer >= self.buffers || length <= HEADER {
            return Err(Refusal::Device {
                what: "the virtio network card returns a buffer that it was not given:",
                code: head.into(),
            });
        }
        self.looked_at = Some(head);
        Ok((slot(buffer), u64::from(length - HEADER)))
    }
}
