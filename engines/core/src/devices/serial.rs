//! The console: a 16550A UART, registers by vm-superio.
//!
//! It has no interrupt line: guests poll it. Transmission is always ready, so a guest that reads
//! the line status over and over waits for input; each such read is answered with
//! [`Action::Poll`], and the run loop decides when to sleep.

use std::sync::Arc;

use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial as Uart, Trigger};

use super::{Action, Device};
use crate::host::console::Output;
use crate::host::input::Input;

/// Number of registers.
pub const REGISTERS: u64 = 8;
const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;

/// No interrupt line is connected.
#[derive(Debug)]
struct Unconnected;

impl Trigger for Unconnected {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

/// UART at [`abi::port::COM1`].
pub struct Serial {
    uart: Uart<Unconnected, NoEvents, Output>,
    input: Arc<Input>,
    /// Tells the pump that there is room again.
    resume: Box<dyn Fn()>,
}

impl Serial {
    /// A UART between `input` and `output`; `resume` is called when a full input queue has room again.
    pub fn new(output: Output, input: Arc<Input>, resume: Box<dyn Fn()>) -> Self {
        Serial {
            uart: Uart::new(Unconnected, output),
            input,
            resume,
        }
    }

    /// The output end.
    pub fn output(&self) -> &Output {
        self.uart.writer()
    }

    /// The output end.
    pub fn output_mut(&mut self) -> &mut Output {
        self.uart.writer_mut()
    }

    /// True when the guest has taken all input and none will come.
    pub fn input_exhausted(&mut self) -> bool {
        self.input.exhausted() && self.uart.read(LINE_STATUS as u8) & DATA_READY == 0
    }

    /// Moves waiting input into the receive FIFO.
    fn refill(&mut self) {
        if self.input.is_empty() {
            return;
        }
        let room = self.uart.fifo_capacity();
        let mut bytes = [0; 64];
        let (count, starved) = self.input.take(&mut bytes[..room.min(64)]);
        // `count` fits into the FIFO; in loopback mode the bytes are lost, as on a real line.
        let _ = self.uart.enqueue_raw_bytes(&bytes[..count]);
        if starved {
            (self.resume)();
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &'static str {
        "serial"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let mut action = Action::None;
        for (at, byte) in registers(offset).zip(data) {
            if at == DATA || at == LINE_STATUS {
                self.refill();
            }
            *byte = self.uart.read(at as u8);
            if at == LINE_STATUS && *byte & DATA_READY == 0 {
                action = Action::Poll;
            }
        }
        action
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut action = Action::None;
        for (at, &byte) in registers(offset).zip(data) {
            match self.uart.write(at as u8, byte) {
                Ok(()) => {}
                Err(Error::IOError(_)) => action = Action::ConsoleClosed,
                // Neither can happen: the trigger is infallible and a write never fills the FIFO.
                Err(Error::Trigger(_) | Error::FullFifo) => {}
            }
        }
        action
    }
}

/// The registers that a wider access reaches: the ISA bus splits it into bytes.
fn registers(offset: u64) -> std::ops::Range<u64> {
    offset..REGISTERS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::console::Sink;
    use crate::host::events::Events;

    const LINE_CONTROL: u64 = 3;
    const DIVISOR_LATCH: u8 = 0x80;

    fn serial(input: &[u8]) -> Serial {
        let events = Arc::new(Events::new().unwrap());
        let output = Output::new(Sink::Memory(Vec::new()), events);
        Serial::new(output, Arc::new(Input::closed(input)), Box::new(|| ()))
    }

    fn read(serial: &mut Serial, offset: u64) -> (u8, Action) {
        let mut data = [0xff];
        let action = serial.read(offset, &mut data);
        (data[0], action)
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let text: Vec<u8> = (0..200).collect();
        let mut serial = serial(&text);
        for &byte in &text {
            assert_eq!(read(&mut serial, LINE_STATUS), (0x61, Action::None));
            assert_eq!(read(&mut serial, DATA), (byte, Action::None));
        }
        assert_eq!(read(&mut serial, LINE_STATUS), (0x60, Action::Poll));
        assert!(serial.input_exhausted());
    }

    #[test]
    fn output_goes_to_the_sink_and_the_divisor_does_not() {
        let mut serial = serial(b"");
        serial.write(LINE_CONTROL, &[DIVISOR_LATCH | 3]);
        serial.write(DATA, &[1]);
        serial.write(LINE_CONTROL, &[3]);
        for byte in b"hi\n" {
            assert_eq!(serial.write(DATA, &[*byte]), Action::None);
        }
        assert_eq!(serial.output().kept(), b"hi\n");
    }
}
