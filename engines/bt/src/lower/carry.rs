//! Loops that count down while CF waits: inc and dec leave it alone, and so it lives through them.
//!
//! Of a loop that ends `dec rcx; jne head` nothing is known of who reads CF behind it, so CF lives all
//! around, though nothing in the loop reads or writes it. Where lookups ruin the flags it waits in
//! `Context::lazy_flags`; to bring all flags home for the dec, and put them away at the head again, would
//! make each turn wait for the one before. So the dec runs with CF left where it is ([`Homes::carry`]), the
//! branch goes back to where blocks are entered whose flags wait, and only the way out brings CF home.
//!
//! Invariant: `Homes::carry` is set between such an instruction and the branch behind it, and at the branch's
//! way out.
//!
//! [`Homes::carry`]: crate::site::Homes

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::RflagsBits;

use super::Lower;
use crate::{
    decode::{Class, Insn},
    site::Ip,
};

const CARRY: u32 = RflagsBits::CF;

/// True if `insn`, one of `insns`, branches back to the first of them without a look at CF, and nobody
/// there wants another flag. The branch is then the last of its block, since blocks without a window end with
/// one.
pub(super) fn goes_around(insns: &[Insn], insn: &Insn) -> bool {
    insn.class == Class::Branch
        && insn.instr.near_branch_target() == insns[0].instr.ip()
        && u32::from(insn.flags.read) & CARRY == 0
        && insns[0].live_in & !CARRY == 0
}

impl Lower<'_> {
    /// True if `insn` runs with CF left in the slot.
    pub(super) fn keeps_carry(&self, insn: &Insn) -> bool {
        self.goes_around.is_some()
            && self.homes.lazy
            && insn.flags.modified != 0
            && u32::from(insn.flags.read) & CARRY == 0
            && insn.live_out & !insn.kills() == CARRY
    }

    /// The branch behind it.
    pub(super) fn branch_around(&mut self, insn: &Insn) -> Result<(), String> {
        self.settle_registers();
        if !std::mem::take(&mut self.rung) {
            self.doorbell(Ip::At(insn.instr.ip()));
        }
        // Where CF lives at the head its other flags are dead, and what waits in the slot is as good as all.
        let waits = self.goes_around.unwrap_or_default();
        self.jump_if(insn, waits)
    }

    /// Brings CF home from the slot, with the other flags in the host's, where every register is where
    /// blocks meet.
    pub(super) fn restore_carry(&mut self) {
        if !std::mem::take(&mut self.homes.carry) {
            return;
        }
        const CF: i32 = 1 << 8;
        const R12: u8 = 12;
        let keeper = self.keep_rax(1 << R12);
        self.spill(R12);
        dynasm!(self.asm
            ; .arch x64
            ; lahf
            ; seto al
            ; mov r12d, [self.layout.lazy_flags()]
            ; and eax, !CF
            ; and r12d, CF
            ; or eax, r12d
            ; add al, 127
            ; sahf
        );
        self.give_rax_back(keeper);
        self.settle_registers();
    }
}
