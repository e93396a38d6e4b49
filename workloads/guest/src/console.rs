//! The console: a 16550 UART, polled. No interrupts, no buffer but the UART's own FIFO.

use crate::cpu::{self, port_in, port_out};
use abi::port::COM1;
use programs::session::{Console, LINE};

/// The console of this flavour.
#[cfg(feature = "hybrid")]
pub(crate) use crate::virtio::Terminal;
#[cfg(not(feature = "hybrid"))]
pub(crate) type Terminal = Serial;

/// The flavour's name in the greeting.
pub(crate) const FLAVOUR: &str = if cfg!(feature = "hybrid") {
    "hybrid"
} else {
    "unaware"
};

/// Register offsets from the first port.
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const SCRATCH: u16 = 7;

/// Line status: a byte has arrived.
const DATA_READY: u8 = 1;
/// Line status: the transmit FIFO is empty.
const TRANSMIT_EMPTY: u8 = 0x20;
/// Bytes that the transmit FIFO takes once it is empty.
const FIFO: u8 = 16;

/// The scratch register's port: a byte that the UART keeps and does nothing with.
pub(crate) const SCRATCH_PORT: u16 = COM1 + SCRATCH;

/// The console.
#[derive(Debug)]
pub struct Serial {
    /// Bytes that can be sent before the line status has to be asked again.
    room: u8,
}

impl Serial {
    /// Sets the UART up: 115200 baud, 8N1, FIFOs on, no interrupts.
    pub(crate) fn set_up() -> Self {
        for (register, value) in [
            (INTERRUPT_ENABLE, 0),
            (LINE_CONTROL, 0x80),
            (DATA, 1),
            (INTERRUPT_ENABLE, 0),
            (LINE_CONTROL, 3),
            (FIFO_CONTROL, 1),
            (MODEM_CONTROL, 3),
        ] {
            port_out(COM1 + register, value);
        }
        Serial { room: 0 }
    }

    /// A console that is set up already.
    pub(crate) fn again() -> Self {
        Serial { room: 0 }
    }

    /// A console that is set up already, for last words.
    #[cfg(not(feature = "hybrid"))]
    pub(crate) fn last_words() -> Self {
        Self::again()
    }

    fn receive(&mut self) -> u8 {
        while port_in(COM1 + LINE_STATUS) & DATA_READY == 0 {
            cpu::pause();
        }
        port_in(COM1 + DATA)
    }

    /// Waits for a line; `None` if it is longer than the buffer.
    pub(crate) fn line<'a>(&mut self, buffer: &'a mut [u8; LINE]) -> Option<&'a [u8]> {
        let mut length = 0;
        loop {
            let byte = self.receive();
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

impl Console for Serial {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.room == 0 {
                self.flush();
            }
            self.room -= 1;
            port_out(COM1 + DATA, byte);
        }
    }

    fn flush(&mut self) {
        while port_in(COM1 + LINE_STATUS) & TRANSMIT_EMPTY == 0 {
            cpu::pause();
        }
        self.room = FIFO;
    }

    #[inline(always)]
    fn mark(&mut self, value: u8) {
        port_out(abi::port::MARK, value);
    }

    #[inline(always)]
    fn cycles(&mut self) -> u64 {
        cpu::time_stamp()
    }
}
