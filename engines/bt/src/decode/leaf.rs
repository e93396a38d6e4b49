//! Calls of a leaf in line: the block goes on in the callee and, behind its return, in the caller.
//!
//! A leaf is a few instructions that touch registers alone, and a near return. Between the call's store
//! of the return address and the return's load of it this processor does nothing that anybody could
//! tell: the load may take its value from the store (SDM 3A 8.2.3.5, intra-processor forwarding), whoever
//! else writes there meanwhile. So the return goes where the call came from, and nothing is looked up or
//! compared. RSP moves as it does, since an instruction of the leaf may fault.
//!
//! What this does not do: leaves that touch memory, or branch; calls through a register or memory.
//!
//! Invariant: a block ends in line neither with the call nor with the return, and its leaf's bytes are
//! one range of one page, which the block depends on as it does on its own.

use iced_x86::{Code, Decoder, Instruction};

use super::{Class, Decoded, Forms, Insn, MAX_INSTRUCTIONS, Mode, OPTIONS};
use crate::cpu::Bits;

/// Bytes that a leaf may have.
pub(crate) const ROOM: usize = 32;
/// Instructions that it may have, but for the return.
const LONGEST: usize = 8;

/// Guest code that a block goes through besides its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    /// Guest-virtual address.
    pub virt: u64,
    pub phys: u64,
    pub bytes: [u8; ROOM],
    pub len: u32,
}

/// Code at a guest-virtual address: where it is, and as much of it as there is in its page.
pub(crate) type Reader<'a> = dyn Fn(u64) -> Option<(u64, [u8; ROOM], usize)> + 'a;

/// Code that no block looks for calls in: there are no others.
#[cfg(test)]
pub(crate) const NONE: &Reader<'static> = &|_| None;

/// True if blocks of `mode` may go on behind calls: where they go through the window, a call and a return
/// cost little as they are.
fn eligible(mode: Mode) -> bool {
    mode.bits == Bits::Bits64 && !mode.window && !mode.single && mode.flat && mode.limited == 0
}

/// What `call`, the last of `insns`, goes through and comes back from, if it is in line: `insns` then ends
/// with the return.
pub(super) fn inline(
    insns: &mut Vec<Insn>,
    mode: Mode,
    known: Option<Leaf>,
    read: &Reader<'_>,
    forms: &mut Forms,
) -> Option<Leaf> {
    if !eligible(mode) {
        return None;
    }
    let last = insns.len().checked_sub(1)?;
    // An sti's shadow and what runs by itself end where they say.
    let alone = |insn: &Insn| matches!(insn.class, Class::Sti | Class::Privileged);
    let code = insns[last].instr.code();
    if code != Code::Call_rel32_64 || insns.iter().any(alone) {
        return None;
    }
    let virt = insns[last].instr.near_branch_target();
    let leaf = match known {
        Some(known) if known.virt == virt => known,
        Some(_) => return None,
        None => {
            let (phys, bytes, len) = read(virt)?;
            Leaf {
                virt,
                phys,
                bytes,
                len: len as u32,
            }
        }
    };
    let mut decoder = Decoder::with_ip(64, &leaf.bytes[..leaf.len as usize], virt, OPTIONS);
    loop {
        if !decoder.can_decode() {
            break;
        }
        let mut insn = Insn::place();
        decoder.decode_out(&mut insn.instr);
        forms.complete(&mut insn, &mode);
        if returns(&insn.instr) {
            insn.class = Class::ReturnInline;
            insns.push(insn);
            insns[last].class = Class::CallInline;
            return Some(Leaf {
                len: decoder.position() as u32,
                ..leaf
            });
        }
        let registers = matches!(insn.class, Class::Plain | Class::Lea | Class::Nop);
        let stack = insn.modifies >> 4 & 1 == 1;
        // Somebody has to follow the return.
        let room = insns.len() - last < LONGEST + 1 && insns.len() + 2 < MAX_INSTRUCTIONS;
        if insn.instr.is_invalid() || !registers || stack || !room {
            break;
        }
        insns.push(insn);
    }
    insns.truncate(last + 1);
    None
}

/// Takes a call back out of line that nothing follows. Returns true if there was one.
pub(super) fn retract(insns: &mut Vec<Insn>) -> bool {
    if insns
        .last()
        .is_none_or(|last| last.class != Class::ReturnInline)
    {
        return false;
    }
    if let Some(call) = insns
        .iter()
        .rposition(|insn| insn.class == Class::CallInline)
    {
        insns.truncate(call + 1);
        insns[call].class = Class::Call;
    }
    true
}

fn returns(instr: &Instruction) -> bool {
    matches!(instr.code(), Code::Retnq | Code::Retnq_imm16)
}

impl Decoded {
    /// The bytes of one of its instructions, where its own begin with `bytes`, at `ip`.
    pub(crate) fn raw<'a>(&'a self, bytes: &'a [u8], ip: u64, insn: &Insn) -> &'a [u8] {
        let (at, length) = (insn.instr.ip(), insn.instr.len());
        let own = at.wrapping_sub(ip) as usize;
        match &self.leaf {
            Some(leaf) if own >= self.len as usize => {
                let inside = at.wrapping_sub(leaf.virt) as usize;
                &leaf.bytes[inside..inside + length]
            }
            Some(_) | None => &bytes[own..own + length],
        }
    }
}
