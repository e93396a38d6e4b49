//! The console: a 16550A UART, registers by vm-superio.
//!
//! Transmission is always ready, so a guest that reads the line status over and over waits for
//! input; each such read is answered with [`Action::Poll`], and the run loop decides when to sleep.
//!
//! Its interrupt is a pulse for each event that the guest has enabled (received data, transmitter
//! empty): vm-superio tells of edges only, and the ISA bus triggers on them.

use std::sync::Arc;

use vm_superio::serial::{Error, NoEvents};
use vm_superio::{Serial as Uart, Trigger};

use super::{Action, Device};
use crate::host::console::Output;
use crate::host::input::Input;
use crate::interrupt::Line;

/// Interrupt of the first serial port.
pub const IRQ: u8 = 4;
/// Number of registers.
pub const REGISTERS: u64 = 8;
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const LINE_CONTROL: u64 = 3;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;
const RECEIVED_DATA: u8 = 1;
const DIVISOR_LATCH: u8 = 0x80;

/// The UART's interrupt request.
struct Request(Line);

impl Trigger for Request {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse();
        Ok(())
    }
}

/// UART at [`abi::port::COM1`].
pub struct Serial {
    uart: Uart<Request, NoEvents, Output>,
    input: Arc<Input>,
    /// Tells the pump that there is room again.
    resume: Box<dyn Fn() + Send>,
}

impl Serial {
    /// A UART between `input` and `output` that interrupts through `line`; `resume` is called when
    /// a full input queue has room again.
    pub fn new(
        output: Output,
        input: Arc<Input>,
        line: Line,
        resume: Box<dyn Fn() + Send>,
    ) -> Self {
        Serial {
            uart: Uart::new(Request(line), output),
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

    /// True when input that may still come would interrupt the guest.
    pub fn may_interrupt(&mut self) -> bool {
        self.interrupts_for_input() && !self.input_exhausted()
    }

    fn interrupts_for_input(&mut self) -> bool {
        self.uart.read(LINE_CONTROL as u8) & DIVISOR_LATCH == 0
            && self.uart.read(INTERRUPT_ENABLE as u8) & RECEIVED_DATA != 0
    }

    /// Input has come: takes it if the guest wants to be interrupted for it. Otherwise it stays
    /// where another console may yet claim it, until the guest looks.
    pub fn input_came(&mut self) {
        if self.interrupts_for_input() {
            self.refill();
        }
    }

    /// Reads one register.
    #[inline]
    pub(crate) fn read_register(&mut self, at: u64, byte: &mut u8) -> Action {
        if at == DATA || at == LINE_STATUS {
            self.refill();
        }
        *byte = self.uart.read(at as u8);
        if at == LINE_STATUS && *byte & DATA_READY == 0 {
            Action::Poll
        } else {
            Action::None
        }
    }

    /// Writes one register.
    #[inline]
    pub(crate) fn write_register(&mut self, at: u64, byte: u8) -> Action {
        if at == INTERRUPT_ENABLE {
            return self.enable_interrupts(byte);
        }
        self.put(at, byte)
    }

    #[inline(always)]
    fn put(&mut self, at: u64, byte: u8) -> Action {
        match self.uart.write(at as u8, byte) {
            Ok(()) => Action::None,
            Err(error) => failed(error),
        }
    }

    #[inline(never)]
    fn enable_interrupts(&mut self, byte: u8) -> Action {
        let action = self.put(INTERRUPT_ENABLE, byte);
        self.input_came();
        action
    }

    /// A wider access, which the ISA bus splits into bytes; what the last of them that asks for
    /// something asks for.
    #[cold]
    fn read_registers(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let bytes = (offset..REGISTERS).zip(data);
        let actions = bytes.map(|(at, byte)| self.read_register(at, byte));
        last_of(actions)
    }

    #[cold]
    fn write_registers(&mut self, offset: u64, data: &[u8]) -> Action {
        let bytes = (offset..REGISTERS).zip(data);
        let actions = bytes.map(|(at, &byte)| self.write_register(at, byte));
        last_of(actions)
    }

    /// Moves waiting input into the receive FIFO.
    fn refill(&mut self) {
        if self.input.is_empty() || self.input.claimed() {
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

    #[inline]
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        match data {
            [byte] => self.read_register(offset, byte),
            _ => self.read_registers(offset, data),
        }
    }

    #[inline]
    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match data {
            &[byte] => self.write_register(offset, byte),
            _ => self.write_registers(offset, data),
        }
    }
}

#[cold]
#[inline(never)]
fn failed(error: Error<std::convert::Infallible>) -> Action {
    match error {
        Error::IOError(_) => Action::ConsoleClosed,
        // Neither can happen: the trigger is infallible and a write never fills the FIFO.
        Error::Trigger(_) | Error::FullFifo => Action::None,
    }
}

fn last_of(actions: impl Iterator<Item = Action>) -> Action {
    let asking = actions.filter(|&action| action != Action::None);
    asking.last().unwrap_or(Action::None)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::host::console::Sink;
    use crate::host::events::Events;
    use crate::interrupt::Interrupts;

    fn serial_on(input: &[u8], line: Line) -> Serial {
        let events = Arc::new(Events::new().unwrap());
        let output = Output::new(Sink::Memory(Vec::new()), events);
        let input = Arc::new(Input::closed(input));
        Serial::new(output, input, line, Box::new(|| ()))
    }

    fn serial(input: &[u8]) -> Serial {
        serial_on(input, Line::disconnected())
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

    #[derive(Default)]
    struct Rises(AtomicU32);

    impl Interrupts for Rises {
        fn set_line(&self, number: u8, level: bool) {
            assert_eq!(number, 4);
            self.0.fetch_add(level.into(), Ordering::Relaxed);
        }
    }

    #[test]
    fn enabled_events_interrupt_and_identify_themselves() {
        const IDENTIFICATION: u64 = 2;
        let rises = Arc::new(Rises::default());
        let seen = Arc::clone(&rises);
        let count = || seen.0.swap(0, Ordering::Relaxed);
        let mut serial = serial_on(b"ab", Line::new(rises, 4));
        serial.write(DATA, b"x");
        serial.input_came();
        assert_eq!(count(), 0, "nothing is enabled");
        assert!(!serial.input.is_empty(), "another console may claim it");
        // Received data waits already.
        serial.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(count(), 1);
        assert_eq!(read(&mut serial, IDENTIFICATION).0 & 0xf, 4);
        for byte in b"ab" {
            assert_eq!(read(&mut serial, DATA).0, *byte);
        }
        assert!(!serial.may_interrupt(), "no input is left");
        serial.write(INTERRUPT_ENABLE, &[2]);
        assert_eq!(count(), 1);
        assert_eq!(read(&mut serial, IDENTIFICATION).0 & 0xf, 2);
        assert_eq!(read(&mut serial, IDENTIFICATION).0 & 0xf, 1);
        serial.write(DATA, b"y");
        assert_eq!(count(), 1);
    }
}
