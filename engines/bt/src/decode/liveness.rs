//! Which arithmetic flags somebody reads, so that the others need not be kept.

use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind};

use super::{ALL_FLAGS, Class, Code, Decoded, Forms, Insn, Short};

impl Decoded {
    /// An sti stays in line only if its shadow is in this block and goes on behind itself, or
    /// leaves for the runtime: elsewhere the runtime sees to the shadow.
    pub(super) fn settle_sti(&mut self) {
        let bad = (0..self.insns.len()).find(|&at| {
            matches!(self.insns[at].class, Class::Sti)
                && !self.insns.get(at + 1).is_some_and(|shadow| {
                    shadow.class == Class::System
                        || !shadow.class.ends_block() && shadow.class != Class::Sti
                })
        });
        if let Some(at) = bad {
            self.len -= self.insns[at + 1..]
                .iter()
                .map(|insn| insn.instr.len() as u32)
                .sum::<u32>();
            self.insns.truncate(at + 1);
            self.insns[at].class = Class::System;
        }
    }

    /// Fills in `live_in` and `live_out`. Nothing is known of a successor, so all flags live at the
    /// end, unless saving them would cost something: then the successors' first instructions decide.
    ///
    /// # Errors
    /// [`Short::More`] if those are where nothing has been read yet.
    pub(super) fn liveness(
        &mut self,
        code: Code<'_>,
        decoder: &mut Decoder<'_>,
        forms: &mut Forms,
    ) -> Result<(), Short> {
        self.backward(ALL_FLAGS);
        let costs = |insn: &Insn| {
            let saves = insn.class.ends_block() || insn.class == Class::Privileged;
            insn.live_in != 0 && (insn.memory.is_some() || saves)
        };
        if !self.insns.iter().any(costs) {
            return Ok(());
        }
        let Some(last) = self.insns.last() else {
            return Ok(());
        };
        let mut watched = self.len;
        let mut peek = |target: u64| {
            let offset = target.wrapping_sub(code.ip);
            let bytes = code.bytes.len() as u64;
            if offset >= bytes {
                let there = offset < bytes + code.more as u64;
                return if there {
                    Err(Short::More)
                } else {
                    Ok(ALL_FLAGS)
                };
            }
            if decoder.set_position(offset as usize).is_err() {
                return Ok(ALL_FLAGS);
            }
            decoder.set_ip(target);
            let live = live_at(decoder, forms);
            let seen = decoder.position();
            if seen == code.bytes.len() && live != 0 && code.more != 0 {
                return Err(Short::More);
            }
            watched = watched.max(seen as u32);
            Ok(live)
        };
        let live = match last.class {
            Class::Jump | Class::Call => peek(last.instr.near_branch_target())?,
            Class::Branch
            | Class::Plain
            | Class::Memory
            | Class::Nop
            | Class::Lea
            | Class::BitString
            | Class::MaskedMove
            | Class::Push
            | Class::Pop
            | Class::Leave
            | Class::Cli
            | Class::Sti
            | Class::CallInline
            | Class::ReturnInline
            | Class::Privileged => peek(last.instr.next_ip())?,
            Class::JumpIndirect
            | Class::Loop
            | Class::CallIndirect
            | Class::Return
            | Class::System
            | Class::Fault(_) => ALL_FLAGS,
        };
        let branches = self.insns.iter_mut();
        let mut around = false;
        for insn in branches.filter(|insn| matches!(insn.class, Class::Branch)) {
            let target = insn.instr.near_branch_target();
            if target == code.ip {
                around = true;
                insn.live_taken = 0;
            } else {
                insn.live_taken = peek(target)?;
            }
        }
        self.watched = watched;
        self.backward(live);
        // What comes out at the head lives where a branch leads back there. From none on: what a way
        // around adds is read by somebody.
        let mut before = 0;
        while around && self.insns[0].live_in != before {
            before = self.insns[0].live_in;
            let back = |insn: &&mut Insn| {
                insn.class == Class::Branch && insn.instr.near_branch_target() == code.ip
            };
            for insn in self.insns.iter_mut().filter(back) {
                insn.live_taken = before;
            }
            self.backward(live);
        }
        Ok(())
    }

    /// Flags count as read everywhere.
    pub(super) fn all_live(&mut self) {
        for insn in &mut self.insns {
            (insn.live_in, insn.live_out) = (ALL_FLAGS, ALL_FLAGS);
        }
    }

    /// From the end, where those flags live, to the head.
    fn backward(&mut self, live_at_end: u32) {
        let mut live = live_at_end;
        for insn in self.insns.iter_mut().rev() {
            if matches!(insn.class, Class::Branch) {
                live |= insn.live_taken;
            }
            insn.live_out = live;
            live &= !insn.kills();
            live |= u32::from(insn.flags.read);
            if insn.class.asks_runtime() {
                live = ALL_FLAGS;
            }
            insn.live_in = live;
        }
    }
}

/// Flags that the code at `decoder` reads before it writes them, as far as a short look tells.
fn live_at(decoder: &mut Decoder<'_>, forms: &mut Forms) -> u32 {
    let mut undecided = ALL_FLAGS;
    let mut live = 0;
    let mut instr = Instruction::default();
    for _ in 0..8 {
        if !decoder.can_decode() {
            break;
        }
        decoder.decode_out(&mut instr);
        if instr.is_invalid() {
            break;
        }
        let flags = forms.flags(&instr);
        live |= u32::from(flags.read) & undecided;
        undecided &= !u32::from(flags.killed);
        if undecided == 0 {
            break;
        }
        if instr.flow_control() != FlowControl::Next || instr.is_privileged() {
            break;
        }
    }
    live | undecided
}

/// Flags that `instr` leaves in a new state, whatever they were before.
pub(super) fn kills(instr: &Instruction) -> u32 {
    use Mnemonic::*;
    match instr.mnemonic() {
        // A count of zero leaves all flags alone (SDM 2B).
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let counted = (1..instr.op_count()).any(|operand| {
                instr.op_kind(operand) == OpKind::Immediate8 && instr.immediate(operand) & 0x1f != 0
            });
            if counted {
                instr.rflags_modified() & ALL_FLAGS
            } else {
                0
            }
        }
        // "Undefined" may mean unchanged here.
        Div | Idiv | Bsf | Bsr => instr.rflags_written() & ALL_FLAGS,
        // A string instruction with a count of zero changes nothing.
        _ if instr.is_string_instruction() => 0,
        _ => instr.rflags_modified() & ALL_FLAGS,
    }
}
