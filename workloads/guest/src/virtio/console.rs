//! virtio-console (virtio 1.2, 5.3), one port; or the UART, where there is no such device.
//!
//! Output leaves line by line: bytes collect until a newline, a full buffer or a flush. Waiting for
//! input halts, so an idle guest burns no processor time.

use super::{
    bus::Transport,
    feature,
    queue::{Queue, WRITE},
};
use crate::{console::Serial, cpu};
use core::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
};
use programs::session::{Console, LINE};

/// Device ID.
const ID: u32 = 3;

const RECEIVE: u32 = 0;
const SEND: u32 = 1;

/// Buffers for input, and the bytes of each.
const BUFFERS: u16 = 4;
const INPUT: usize = 64;
/// Bytes of the output buffer.
const OUTPUT: usize = 512;

#[repr(C, align(4096))]
struct Memory {
    queues: [[AtomicU64; 512]; 2],
    input: [[AtomicU8; INPUT]; BUFFERS as usize],
    output: [AtomicU8; OUTPUT],
}

static MEMORY: Memory = Memory {
    queues: [const { [const { AtomicU64::new(0) }; 512] }; 2],
    input: [const { [const { AtomicU8::new(0) }; INPUT] }; BUFFERS as usize],
    output: [const { AtomicU8::new(0) }; OUTPUT],
};

/// The device and its queues.
#[derive(Debug)]
struct Port {
    transport: Transport,
    receive: Queue,
    send: Queue,
    /// Bytes in the output buffer.
    filled: usize,
    /// Input: the buffer in hand, its length, and the place in it.
    head: u16,
    length: usize,
    place: usize,
}

/// The one port, for whoever holds a [`Terminal`].
struct Shared(UnsafeCell<Option<Port>>);

// SAFETY: there is one processor, interrupt handlers do not touch it, and no reference outlives a
// call of a method.
unsafe impl Sync for Shared {}

static PORT: Shared = Shared(UnsafeCell::new(None));

/// The console.
#[derive(Debug)]
pub(crate) enum Terminal {
    /// The virtio device.
    Virtio {
        /// Interrupts may be taken while waiting.
        interrupts: bool,
    },
    /// The UART.
    Serial(Serial),
}

#[allow(
    clippy::mut_from_ref,
    reason = "the one processor calls one method at a time"
)]
fn port() -> Option<&'static mut Port> {
    // SAFETY: see `Shared`.
    unsafe { (*PORT.0.get()).as_mut() }
}

impl Terminal {
    /// Finds the device and starts it, or sets the UART up.
    pub(crate) fn set_up() -> Self {
        let found = Transport::find(ID).and_then(Port::start);
        if found.is_none() {
            return Terminal::Serial(Serial::set_up());
        }
        // SAFETY: see `Shared`; nothing is there yet.
        unsafe { *PORT.0.get() = found };
        Terminal::Virtio { interrupts: true }
    }

    /// The console that is set up already.
    pub(crate) fn again() -> Self {
        match port() {
            Some(_) => Terminal::Virtio { interrupts: true },
            None => Terminal::Serial(Serial::again()),
        }
    }

    /// The console that is set up already, for last words: without interrupts.
    pub(crate) fn last_words() -> Self {
        match port() {
            Some(_) => Terminal::Virtio { interrupts: false },
            None => Terminal::Serial(Serial::again()),
        }
    }

    /// Waits for a line; `None` if it is longer than the buffer.
    pub(crate) fn line<'a>(&mut self, buffer: &'a mut [u8; LINE]) -> Option<&'a [u8]> {
        let port = match self {
            Terminal::Serial(serial) => return serial.line(buffer),
            Terminal::Virtio { .. } => port()?,
        };
        let mut length = 0usize;
        loop {
            let byte = port.receive();
            if byte == b'\n' {
                return buffer.get(..length);
            }
            if let Some(slot) = buffer.get_mut(length) {
                *slot = byte;
            }
            length = length.saturating_add(1);
        }
    }
}

impl Port {
    fn start(transport: Transport) -> Option<Self> {
        let features = transport.begin(feature::EVENT_INDEX | feature::VERSION_1)?;
        let queue = |index: u32| {
            let page = MEMORY.queues[index as usize].as_ptr() as u64;
            transport.queue(index, page, features)
        };
        let mut port = Port {
            transport,
            receive: queue(RECEIVE)?,
            send: queue(SEND)?,
            filled: 0,
            head: 0,
            length: 0,
            place: 0,
        };
        for buffer in 0..BUFFERS.min(port.receive.size()) {
            let address = MEMORY.input[usize::from(buffer)].as_ptr() as u64;
            let descriptor = port.receive.descriptor(buffer);
            descriptor.set(address, INPUT as u32, WRITE, 0);
            port.receive.offer(buffer);
        }
        transport.start();
        port.receive.publish(transport, RECEIVE);
        Some(port)
    }

    fn receive(&mut self) -> u8 {
        while self.place == self.length {
            if self.length != 0 {
                self.receive.offer(self.head);
                self.receive.publish(self.transport, RECEIVE);
                self.length = 0;
                self.place = 0;
            }
            self.receive.wait(1, None);
            if let Some((head, length)) = self.receive.take() {
                self.head = head & (BUFFERS - 1);
                self.length = (length as usize).min(INPUT);
                self.place = 0;
            }
        }
        let byte = &MEMORY.input[usize::from(self.head)][self.place];
        self.place += 1;
        byte.load(Relaxed)
    }

    /// Sends what is in the buffer, and waits until the device has it.
    fn send(&mut self, interrupts: bool) {
        if self.filled == 0 {
            return;
        }
        let address = MEMORY.output.as_ptr() as u64;
        let descriptor = self.send.descriptor(0);
        descriptor.set(address, self.filled as u32, 0, 0);
        self.send.offer(0);
        self.send.publish(self.transport, SEND);
        if interrupts {
            self.send.wait(1, None);
        } else {
            self.send.look(1);
        }
        self.send.take();
        self.filled = 0;
    }
}

impl Console for Terminal {
    fn write(&mut self, bytes: &[u8]) {
        let interrupts = match self {
            Terminal::Serial(serial) => return serial.write(bytes),
            Terminal::Virtio { interrupts } => *interrupts,
        };
        let Some(port) = port() else {
            return;
        };
        for &byte in bytes {
            if let Some(slot) = MEMORY.output.get(port.filled) {
                slot.store(byte, Relaxed);
                port.filled += 1;
            }
            if byte == b'\n' || port.filled == OUTPUT {
                port.send(interrupts);
            }
        }
    }

    fn flush(&mut self) {
        match self {
            Terminal::Serial(serial) => serial.flush(),
            Terminal::Virtio { interrupts } => {
                if let Some(port) = port() {
                    port.send(*interrupts);
                }
            }
        }
    }

    #[inline(always)]
    fn mark(&mut self, value: u8) {
        cpu::port_out(abi::port::MARK, value);
    }

    #[inline(always)]
    fn cycles(&mut self) -> u64 {
        cpu::time_stamp()
    }
}
