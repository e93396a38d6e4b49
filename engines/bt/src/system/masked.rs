//! AVX instructions that touch memory element by element: gathers and masked moves.
//!
//! An element whose mask bit is clear is not accessed at all, so it can't fault, vmaskmovdqu's bytes
//! aside; a gather that faults in the middle has done the elements before, and says so in its mask
//! (SDM 2, VGATHERDPS, VPGATHERDD, VMASKMOV, VPMASKMOV).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::{
    core::Core,
    cpu::{Bits, canonical},
    fault::Fault,
};

/// A YMM register as elements.
#[derive(Clone, Copy)]
struct Lanes([u8; 32]);

impl Lanes {
    fn new(words: [u64; 4]) -> Lanes {
        let mut bytes = [0; 32];
        for (at, word) in bytes.chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        Lanes(bytes)
    }

    fn words(self) -> [u64; 4] {
        std::array::from_fn(|word| {
            u64::from_le_bytes(std::array::from_fn(|byte| self.0[8 * word + byte]))
        })
    }

    /// Element `index` of `size` bytes.
    fn get(&self, index: usize, size: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&self.0[index * size..(index + 1) * size]);
        u64::from_le_bytes(bytes)
    }

    fn set(&mut self, index: usize, size: usize, value: u64) {
        self.0[index * size..(index + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    /// The element's most significant bit.
    fn chosen(&self, index: usize, size: usize) -> bool {
        self.0[(index + 1) * size - 1] >> 7 == 1
    }

    /// Without what lies beyond `size` bytes.
    fn cut(mut self, size: usize) -> Lanes {
        self.0[size..].fill(0);
        self
    }
}

impl Core {
    fn lanes(&self, register: Register) -> Lanes {
        Lanes::new(self.ymm(register.full_register().number()))
    }

    fn set_lanes(&mut self, register: Register, lanes: Lanes) {
        self.set_ymm(register.full_register().number(), lanes.words());
    }

    pub(super) fn gather(&mut self, instr: &Instruction) -> Result<(), Fault> {
        use Mnemonic::*;
        let (index_size, size) = match instr.mnemonic() {
            Vgatherdps | Vpgatherdd => (4, 4),
            Vgatherdpd | Vpgatherdq => (4, 8),
            Vgatherqps | Vpgatherqd => (8, 4),
            _ => (8, 8),
        };
        let (target, by, mask) = (
            instr.op0_register(),
            instr.memory_index(),
            instr.op2_register(),
        );
        let count = (target.size() / size).min(by.size() / index_size);
        let indices = self.lanes(by);
        // Where a fault comes in, registers are as processors leave them: the mask holds signs as
        // far as the vector length reaches and zeros beyond, and so does the target once an element
        // has got there.
        let length = target.size().max(by.size());
        let mut values = self.lanes(target);
        let mut left = self.lanes(mask).cut(length);
        for element in 0..length / size {
            let all = if left.chosen(element, size) {
                u64::MAX
            } else {
                0
            };
            left.set(element, size, all);
        }
        for element in 0..count {
            if !left.chosen(element, size) {
                continue;
            }
            let index = indices.get(element, index_size);
            let index = if index_size == 4 {
                index as i32 as i64 as u64
            } else {
                index
            };
            let loaded = self
                .element_address(instr, index, size as u32)
                .and_then(|address| self.load(address, size as u32));
            match loaded {
                Ok(value) => {
                    values.set(element, size, value);
                    values = values.cut(length);
                }
                Err(fault) => {
                    self.set_lanes(target, values);
                    self.set_lanes(mask, left);
                    return Err(self.on_operand(instr, fault));
                }
            }
            left.set(element, size, 0);
        }
        self.set_lanes(target, values.cut(count * size));
        self.set_lanes(mask, Lanes([0; 32]));
        Ok(())
    }

    /// Address of the element that `index` names, with the operand's base and scale.
    fn element_address(&self, instr: &Instruction, index: u64, size: u32) -> Result<u64, Fault> {
        let base = match instr.memory_base() {
            Register::None => 0,
            register => self.gpr(register.full_register().number()),
        };
        let offset = base
            .wrapping_add(index.wrapping_mul(instr.memory_index_scale().into()))
            .wrapping_add(instr.memory_displacement64());
        let narrow = self.cpu.bits() != Bits::Bits64
            || instr.memory_base().size() == 4 && instr.memory_base() != Register::None
            || instr.memory_base() == Register::None && instr.memory_displ_size() == 4;
        let offset = if narrow { offset & 0xffff_ffff } else { offset };
        self.data(offset, instr.memory_segment(), size, false)
    }

    /// vmaskmovps, vmaskmovpd, vpmaskmovd, vpmaskmovq.
    pub(super) fn masked_elements(&mut self, instr: &Instruction) -> Result<(), Fault> {
        use Mnemonic::*;
        let size = match instr.mnemonic() {
            Vmaskmovps | Vpmaskmovd => 4,
            _ => 8,
        };
        let stores = instr.op0_kind() == OpKind::Memory;
        let mask = self.lanes(instr.op1_register());
        let width = instr.op1_register().size();
        let user = self.user();
        let chosen = (0..width / size).filter(|&element| mask.chosen(element, size));
        // Where no element is accessed, not even the segment matters.
        let at = match chosen.clone().next() {
            Some(_) => self.operand(instr, width as u32, stores)?,
            None => 0,
        };
        let place = |element: usize| at.wrapping_add((element * size) as u64);
        // An address that isn't canonical comes before any page fault.
        let nowhere = |&element: &usize| {
            let first = place(element);
            let last = first.wrapping_add(size as u64 - 1);
            self.cpu.long() && !(canonical(first) && canonical(last))
        };
        if chosen.clone().any(|element| nowhere(&element)) {
            return Err(self.on_operand(instr, Fault::gp()));
        }
        if stores {
            let values = self.lanes(instr.op2_register());
            // All or nothing: a fault in any element comes before the first store.
            for element in chosen.clone() {
                self.probe_write(place(element), size as u32, user)
                    .map_err(|fault| self.on_operand(instr, fault))?;
            }
            for element in chosen {
                let bytes = values.get(element, size).to_le_bytes();
                self.write(place(element), &bytes[..size], user)
                    .map_err(|fault| self.on_operand(instr, fault))?;
            }
        } else {
            let mut values = Lanes([0; 32]);
            for element in chosen {
                let value = self
                    .load(place(element), size as u32)
                    .map_err(|fault| self.on_operand(instr, fault))?;
                values.set(element, size, value);
            }
            self.set_lanes(instr.op0_register(), values);
        }
        Ok(())
    }

    /// vmaskmovdqu: bytes through RDI. Faults are those of all 16 bytes, whatever the mask, as on the
    /// processors that run maskmovdqu for the guest (SDM 2, MASKMOVDQU, leaves the choice).
    pub(super) fn masked_bytes(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let values = self.lanes(instr.op1_register());
        let mask = self.lanes(instr.op2_register());
        let narrow = instr.op0_kind() == OpKind::MemorySegEDI || self.cpu.bits() != Bits::Bits64;
        let rdi = self.gpr(7);
        let rdi = if narrow { rdi & 0xffff_ffff } else { rdi };
        let at = self.data(rdi, instr.memory_segment(), 16, true)?;
        let user = self.user();
        for byte in 0..16 {
            self.probe_write(at.wrapping_add(byte), 1, user)?;
        }
        for byte in (0..16).filter(|&byte| mask.chosen(byte, 1)) {
            let place = at.wrapping_add(byte as u64);
            self.write(place, &values.0[byte..=byte], user)?;
        }
        Ok(())
    }
}
