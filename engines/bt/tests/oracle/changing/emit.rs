//! Machine code with labels. Registers are those that 32-bit code has, and what is encoded with them means
//! the same in both modes, but for addresses and what the stack holds, which are as wide as the mode's.

use super::Mode;

pub(super) const EAX: u8 = 0;
pub(super) const ECX: u8 = 1;
pub(super) const EDX: u8 = 2;
pub(super) const EBX: u8 = 3;
pub(super) const ESP: u8 = 4;
pub(super) const EBP: u8 = 5;
pub(super) const ESI: u8 = 6;
pub(super) const EDI: u8 = 7;

/// A place in the code.
pub(super) type Label = usize;

/// Four bytes that wait for a label's address.
#[derive(Clone, Copy)]
enum Field {
    /// The distance from their end.
    Relative,
    Absolute,
}

pub(super) struct Emitter {
    pub(super) mode: Mode,
    base: u64,
    pub(super) code: Vec<u8>,
    labels: Vec<Option<usize>>,
    fields: Vec<(usize, Field, Label)>,
}

impl Emitter {
    pub(super) fn new(mode: Mode, base: u64) -> Emitter {
        Emitter {
            mode,
            base,
            code: Vec::new(),
            labels: Vec::new(),
            fields: Vec::new(),
        }
    }

    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        self.labels.len() - 1
    }

    pub(super) fn bind(&mut self, label: Label) {
        assert!(self.labels[label].is_none(), "bound twice");
        self.labels[label] = Some(self.code.len());
    }

    pub(super) fn is_bound(&self, label: Label) -> bool {
        self.labels[label].is_some()
    }

    pub(super) fn here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// An opcode, and a label's distance behind it.
    pub(super) fn branch(&mut self, opcode: &[u8], to: Label) {
        self.bytes(opcode);
        self.fields.push((self.code.len(), Field::Relative, to));
        self.bytes(&[0; 4]);
    }

    /// An opcode, and a label's address behind it.
    pub(super) fn address(&mut self, opcode: &[u8], of: Label) {
        self.bytes(opcode);
        self.fields.push((self.code.len(), Field::Absolute, of));
        self.bytes(&[0; 4]);
    }

    /// An opcode, and a number behind it.
    pub(super) fn number(&mut self, opcode: &[u8], value: u32) {
        self.bytes(opcode);
        self.bytes(&value.to_le_bytes());
    }

    /// An opcode with a register, and a memory operand: register and displacement.
    pub(super) fn memory(&mut self, opcode: &[u8], register: u8, base: u8, displacement: i8) {
        assert!(base != ESP, "that takes a SIB byte");
        self.bytes(opcode);
        self.bytes(&[0x40 | register << 3 | base, displacement as u8]);
    }

    /// Likewise, with an absolute operand.
    pub(super) fn absolute(&mut self, opcode: &[u8], register: u8, address: u32) {
        self.bytes(opcode);
        self.number(&[4 | register << 3, 0x25], address);
    }

    /// The prefix of operations on a whole register or address.
    pub(super) fn wide(&mut self) {
        if self.mode == Mode::Long {
            self.bytes(&[0x48]);
        }
    }

    /// The address of a label.
    pub(super) fn place(&self, label: Label) -> u64 {
        self.base + self.labels[label].expect("bound") as u64
    }

    /// The code, with all addresses in it.
    pub(super) fn finish(mut self) -> Vec<u8> {
        for (at, field, label) in std::mem::take(&mut self.fields) {
            let to = self.place(label);
            let value = match field {
                Field::Relative => to.wrapping_sub(self.base + at as u64 + 4),
                Field::Absolute => to,
            };
            self.code[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        self.code
    }
}
