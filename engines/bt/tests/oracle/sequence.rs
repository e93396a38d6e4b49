//! A sequence of instructions whose branches name other instructions, so that it can be placed
//! anywhere and instructions can be taken out of it.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, Instruction,
    InstructionBlock, Register,
};

use crate::layout::{PAGE, SLOT_BYTES, Start, slot};

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// As it is; RIP-relative operands keep their address.
    Plain(Instruction),
    /// Bytes that mean the same anywhere.
    Raw(Vec<u8>),
    /// A direct branch to another item, or to the end.
    Branch { code: Code, to: usize },
    /// `lea register, [item]`.
    Label { register: Register, to: usize },
}

/// Instructions with the registers they start from.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    pub(crate) items: Vec<Item>,
    pub(crate) start: Start,
    /// Offset in its slot.
    pub(crate) offset: usize,
    /// What follows in the slot: true for nothing, so that the end lies on an unmapped page.
    pub(crate) open_end: bool,
}

/// A sequence at its place.
pub(crate) struct Placed {
    pub(crate) code: Vec<Instruction>,
    /// Where each item is, and the end; None for a branch that became several instructions.
    pub(crate) at: Vec<Option<u64>>,
    /// The slot's bytes.
    pub(crate) bytes: Vec<u8>,
    pub(crate) start: Start,
}

impl Sequence {
    /// Encodes the sequence for slot `index`; None if it can't be encoded.
    pub(crate) fn place(&self, index: usize) -> Option<Placed> {
        // Items are known by made-up addresses, near enough to be reached from the slot.
        const FAKE: u64 = 0x0800_0000;
        let fake = |item: usize| FAKE + 16 * item as u64;
        let end = [Item::Plain(Instruction::with(Code::Ud2))];
        let mut instructions = Vec::with_capacity(self.items.len() + 1);
        let end = if self.open_end { &end[..0] } else { &end[..] };
        for (number, item) in self.items.iter().chain(end).enumerate() {
            let mut instr = match item {
                Item::Plain(instr) => *instr,
                Item::Raw(bytes) => Instruction::with_declare_byte(bytes).ok()?,
                Item::Branch { code, to } => Instruction::with_branch(*code, fake(*to)).ok()?,
                Item::Label { register, to } => {
                    let memory =
                        iced_x86::MemoryOperand::with_base_displ(Register::RIP, fake(*to) as i64);
                    Instruction::with2(Code::Lea_r64_m, *register, memory).ok()?
                }
            };
            instr.set_ip(fake(number));
            instructions.push(instr);
        }
        if self.open_end {
            // The end still needs an address for branches; its byte is the first unmapped one.
            let mut end = Instruction::with_declare_byte_1(0xcc);
            end.set_ip(fake(self.items.len()));
            instructions.push(end);
        }
        let base = slot(index);
        let encode = |at: u64| {
            let block = InstructionBlock::new(&instructions, at);
            let offsets = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
            let result = BlockEncoder::encode(64, block, offsets).ok()?;
            Some((result.code_buffer, result.new_instruction_offsets))
        };
        let mut at = base + self.offset as u64;
        let (mut code, mut offsets) = encode(at)?;
        if self.open_end {
            at = base + SLOT_BYTES as u64 - (code.len() as u64 - 1);
            (code, offsets) = encode(at)?;
            code.pop();
        }
        let offset = (at - base) as usize;
        if offset + code.len() > SLOT_BYTES {
            return None;
        }
        let mut bytes = vec![0xcc; SLOT_BYTES];
        bytes[offset..offset + code.len()].copy_from_slice(&code);
        let decoder = Decoder::with_ip(64, &code, at, DecoderOptions::NONE);
        let mut start = self.start.clone();
        start.rip = at;
        Some(Placed {
            code: decoder.into_iter().collect(),
            at: offsets
                .into_iter()
                .map(|offset| (offset != u32::MAX).then(|| at + u64::from(offset)))
                .collect(),
            bytes,
            start,
        })
    }

    /// Without item `at`; branches to it lead to the one after it.
    pub(crate) fn without(&self, at: usize) -> Sequence {
        let mut shorter = self.clone();
        shorter.items.remove(at);
        for item in &mut shorter.items {
            match item {
                Item::Branch { to, .. } | Item::Label { to, .. } => {
                    if *to > at {
                        *to -= 1;
                    }
                }
                Item::Plain(_) | Item::Raw(_) => {}
            }
        }
        shorter
    }
}

/// Offsets that put a sequence anywhere in its slot, often across the page boundary.
pub(crate) fn offset(random: &mut crate::random::Random) -> usize {
    if random.chance(30) {
        PAGE as usize - random.below(200) as usize
    } else {
        random.below(PAGE - 1) as usize
    }
}
