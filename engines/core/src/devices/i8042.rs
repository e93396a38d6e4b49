//! The keyboard controller (Intel 8042, IBM PC/AT technical reference), as far as a machine without
//! keyboard needs one: self tests, its command byte, the output port, and the reset line.
//!
//! Whatever is sent to the keyboard is acknowledged, so drivers find one that never types. There is
//! no mouse.

use std::collections::VecDeque;

use super::{Action, Device};
use crate::interrupt::Line;

/// Interrupt of the keyboard.
pub(super) const IRQ: u8 = 1;
const DATA: u64 = 0;
const COMMAND: u64 = 1;

const OUTPUT_FULL: u8 = 1;
/// System flag (self test passed), keyboard not inhibited.
const STATUS: u8 = 0x14;
const LAST_WAS_COMMAND: u8 = 0x08;

const INTERRUPTS: u8 = 1;
/// Translation, keyboard enabled, system flag, interrupt.
const COMMAND_BYTE: u8 = 0x45;
const ACKNOWLEDGE: u8 = 0xfa;
/// Output port: reset line high, A20 open.
const OUTPUT_PORT: u8 = 0x03;
const RESET_HIGH: u8 = 0x01;
/// More than any exchange leaves unread.
const QUEUE: usize = 16;

/// What the next byte at the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Keyboard,
    CommandByte,
    OutputPort,
    /// A parameter without effect.
    Ignored,
}

/// The keyboard controller.
#[derive(Debug)]
pub struct Keyboard {
    line: Line,
    command_byte: u8,
    output_port: u8,
    answers: VecDeque<u8>,
    expected: Expected,
    last_was_command: bool,
}

impl Keyboard {
    /// A controller after its self test, that interrupts through `line`.
    pub fn new(line: Line) -> Self {
        Keyboard {
            line,
            command_byte: COMMAND_BYTE & !INTERRUPTS,
            output_port: OUTPUT_PORT,
            answers: VecDeque::new(),
            expected: Expected::Keyboard,
            last_was_command: false,
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        self.answers.extend(bytes);
        self.answers.truncate(QUEUE);
        self.request();
    }

    fn request(&mut self) {
        let wanted = !self.answers.is_empty() && self.command_byte & INTERRUPTS != 0;
        self.line.set(wanted);
    }

    fn command(&mut self, command: u8) -> Action {
        self.expected = Expected::Keyboard;
        match command {
            0x20 => self.answer(&[self.command_byte]),
            0x60 => self.expected = Expected::CommandByte,
            // The mouse's interface: absent. Its test fails with "clock line stuck high".
            0xa9 => self.answer(&[2]),
            0xaa => {
                self.command_byte |= 4;
                self.answer(&[0x55]);
            }
            0xab => self.answer(&[0]),
            0xad => self.command_byte |= 0x10,
            0xae => self.command_byte &= !0x10,
            0xd0 => self.answer(&[self.output_port]),
            0xd1 => self.expected = Expected::OutputPort,
            0xd2..=0xd4 => self.expected = Expected::Ignored,
            // Pulses the output port's low bits that are clear; bit 0 is the reset line.
            0xf0..=0xff if command & RESET_HIGH == 0 => return Action::Reset,
            _ => {}
        }
        Action::None
    }

    fn data(&mut self, value: u8) -> Action {
        match std::mem::replace(&mut self.expected, Expected::Keyboard) {
            Expected::Keyboard => match value {
                // Reset: acknowledged, then the keyboard's own test passes.
                0xff => self.answer(&[ACKNOWLEDGE, 0xaa]),
                // Identify: an MF2 keyboard.
                0xf2 => self.answer(&[ACKNOWLEDGE, 0xab, 0x83]),
                0xee => self.answer(&[0xee]),
                _ => self.answer(&[ACKNOWLEDGE]),
            },
            Expected::CommandByte => {
                self.command_byte = value;
                self.request();
            }
            Expected::OutputPort => {
                self.output_port = value;
                if value & RESET_HIGH == 0 {
                    self.output_port |= RESET_HIGH;
                    return Action::Reset;
                }
            }
            Expected::Ignored => {}
        }
        Action::None
    }
}

impl Device for Keyboard {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let Some(byte) = data.first_mut() else {
            return Action::None;
        };
        if offset == DATA {
            *byte = self.answers.pop_front().unwrap_or(0);
            // The line falls with each byte, so that the next is an edge.
            self.line.set(false);
            self.request();
        } else {
            *byte = STATUS
                | if self.answers.is_empty() {
                    0
                } else {
                    OUTPUT_FULL
                }
                | if self.last_was_command {
                    LAST_WAS_COMMAND
                } else {
                    0
                };
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let Some(&value) = data.first() else {
            return Action::None;
        };
        self.last_was_command = offset == COMMAND;
        if offset == COMMAND {
            self.command(value)
        } else {
            self.data(value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyboard() -> (Keyboard, Line) {
        let line = Line::disconnected();
        (Keyboard::new(line.clone()), line)
    }

    fn get(keyboard: &mut Keyboard, offset: u64) -> u8 {
        let mut data = [0xff];
        keyboard.read(offset, &mut data);
        data[0]
    }

    fn answers(keyboard: &mut Keyboard) -> Vec<u8> {
        std::iter::from_fn(|| {
            (get(keyboard, COMMAND) & OUTPUT_FULL != 0).then(|| get(keyboard, DATA))
        })
        .collect()
    }

    #[test]
    fn every_way_to_the_reset_line_resets_and_no_other_does() {
        let (mut keyboard, _) = keyboard();
        assert_eq!(keyboard.write(COMMAND, &[0xfe]), Action::Reset);
        assert_eq!(keyboard.write(COMMAND, &[0xf0]), Action::Reset);
        assert_eq!(keyboard.write(COMMAND, &[0xff]), Action::None);
        assert_eq!(keyboard.write(DATA, &[0xfe]), Action::None);
        keyboard.write(COMMAND, &[0xd1]);
        assert_eq!(keyboard.write(DATA, &[0x03]), Action::None);
        keyboard.write(COMMAND, &[0xd1]);
        assert_eq!(keyboard.write(DATA, &[0x02]), Action::Reset);
    }

    #[test]
    fn self_tests_pass_and_drivers_find_a_keyboard() {
        let (mut keyboard, _) = keyboard();
        assert_eq!(get(&mut keyboard, COMMAND), STATUS);
        for (command, expected) in [(0xaa, 0x55), (0xab, 0), (0xa9, 2)] {
            keyboard.write(COMMAND, &[command]);
            assert_eq!(answers(&mut keyboard), [expected], "{command:#x}");
        }
        keyboard.write(DATA, &[0xff]);
        assert_eq!(answers(&mut keyboard), [0xfa, 0xaa]);
        keyboard.write(DATA, &[0xf2]);
        assert_eq!(answers(&mut keyboard), [0xfa, 0xab, 0x83]);
    }

    #[test]
    fn answers_interrupt_if_the_command_byte_says_so() {
        let (mut keyboard, line) = keyboard();
        keyboard.write(DATA, &[0xff]);
        assert!(!line.level());
        keyboard.write(COMMAND, &[0x60]);
        keyboard.write(DATA, &[COMMAND_BYTE]);
        assert!(line.level());
        get(&mut keyboard, DATA);
        assert!(line.level(), "one more");
        get(&mut keyboard, DATA);
        assert!(!line.level());
        keyboard.write(COMMAND, &[0x20]);
        assert_eq!(answers(&mut keyboard), [COMMAND_BYTE]);
    }

    #[test]
    fn a_guest_that_never_reads_fills_nothing() {
        let (mut keyboard, _) = keyboard();
        for _ in 0..10_000 {
            keyboard.write(DATA, &[0xff]);
        }
        assert_eq!(answers(&mut keyboard).len(), QUEUE);
    }
}
