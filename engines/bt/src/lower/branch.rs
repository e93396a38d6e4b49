//! Branches: direct ones that are linked to their target, indirect ones that look it up.
//!
//! # Linking
//!
//! A direct branch starts as a jump to a stub that names its site. The runtime finds or makes the
//! target block and overwrites the rel32, so the next time one host branch leads to the other
//! block. An indirect branch looks its target up in the jump cache of its privilege.
//!
//! # The doorbell
//!
//! A guest that loops must still be stoppable, at no cost to the flags or a register. Every
//! backward branch and every indirect one stores a register to the doorbell page first, or compares
//! one with it where flags are free. A kick takes that page's permissions away; the access faults
//! between two instructions, and the signal handler turns that into an exit.

use super::{Cold, Lower, Path};
use crate::{
    checks::Levels,
    cpu::Bits,
    decode::{Class, Insn},
    site::{Ip, Kind},
    tlb::JUMP_ENTRIES,
};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic};

impl Lower<'_> {
    pub(super) fn jump(&mut self, insn: &Insn) {
        self.leave_lazily(insn.live_out != 0);
        let target = self.wrap(insn.instr.near_branch_target());
        if target <= insn.instr.ip() {
            self.ring(
                Ip::At(insn.instr.ip()),
                self.homes.lazy || insn.live_out == 0,
            );
        }
        self.count(Path::Direct);
        self.direct(insn.instr.ip(), target);
    }

    pub(super) fn branch(&mut self, insn: &Insn) -> Result<(), String> {
        if self.homes.carry {
            return self.branch_around(insn);
        }
        self.flags_for(insn);
        self.leave(insn.live_out != 0);
        let target = self.wrap(insn.instr.near_branch_target());
        if target <= insn.instr.ip() && !std::mem::take(&mut self.rung) {
            self.doorbell(Ip::At(insn.instr.ip()));
        }
        self.jump_if(insn, self.homes.lazy)
    }

    /// A conditional branch, with the flags in `Context::lazy_flags` where it leads if `lazy`.
    pub(super) fn jump_if(&mut self, insn: &Insn, lazy: bool) -> Result<(), String> {
        // Either way: exactly one of two ways is taken.
        self.count(Path::Direct);
        let condition = condition(&insn.instr).ok_or("no condition")?;
        let known = self.checks.taken(self.at);
        let target = self.wrap(insn.instr.near_branch_target());
        self.linked(
            &[0x0f, 0x80 | condition],
            insn.instr.ip(),
            target,
            known,
            lazy,
        );
        Ok(())
    }

    pub(super) fn loop_branch(&mut self, insn: &Insn) -> Result<(), String> {
        // These count without touching the flags, and so must whatever surrounds them.
        if self.homes.lazy {
            self.restore_flags(0);
        }
        self.leave(true);
        let target = self.wrap(insn.instr.near_branch_target());
        if target <= insn.instr.ip() {
            self.doorbell(Ip::At(insn.instr.ip()));
        }
        let narrow = match insn.instr.code() {
            Code::Loop_rel8_64_RCX
            | Code::Loope_rel8_64_RCX
            | Code::Loopne_rel8_64_RCX
            | Code::Jrcxz_rel8_64 => false,
            Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_ECX
            | Code::Loop_rel8_32_ECX
            | Code::Loope_rel8_32_ECX
            | Code::Loopne_rel8_32_ECX
            | Code::Loop_rel8_16_ECX
            | Code::Loope_rel8_16_ECX
            | Code::Loopne_rel8_16_ECX
            | Code::Jecxz_rel8_16
            | Code::Jecxz_rel8_32
            | Code::Jecxz_rel8_64 => true,
            _ => return Err("16-bit count".into()),
        };
        let opcode = match insn.instr.mnemonic() {
            Mnemonic::Loopne => 0xe0,
            Mnemonic::Loope => 0xe1,
            Mnemonic::Loop => 0xe2,
            _ => 0xe3,
        };
        self.count(Path::Direct);
        if narrow {
            self.asm.push(0x67);
        }
        // Taken: over the short jump that skips the linked one.
        self.asm.extend([opcode, 2, 0xeb, 5]);
        let known = self.checks.end;
        self.linked(&[0xe9], insn.instr.ip(), target, known, self.homes.lazy);
        self.direct(insn.instr.ip(), insn.instr.next_ip());
        Ok(())
    }

    pub(super) fn call(&mut self, insn: &Insn) -> Result<(), String> {
        self.push_return(insn)?;
        self.leave_lazily(insn.live_out != 0);
        let target = self.wrap(insn.instr.near_branch_target());
        if target <= insn.instr.ip() {
            self.ring(Ip::At(target), self.homes.lazy || insn.live_out == 0);
        }
        self.count(Path::Direct);
        self.direct(insn.instr.ip(), target);
        Ok(())
    }

    /// A call whose callee comes next in the block.
    pub(super) fn call_inline(&mut self, insn: &Insn) -> Result<(), String> {
        self.push_return(insn)?;
        self.count(Path::Direct);
        Ok(())
    }

    /// Its return: what it would load is what the call has stored ([`crate::decode::leaf`]).
    pub(super) fn return_inline(&mut self, insn: &Insn) {
        self.count(Path::Indirect);
        self.move_rsp(insn.instr.stack_pointer_increment());
    }

    pub(super) fn call_indirect(&mut self, insn: &Insn) -> Result<(), String> {
        let held = self.load_target(insn)?;
        self.push_return(insn)?;
        self.indirect(insn, held, -self.return_size());
        Ok(())
    }

    pub(super) fn jump_indirect(&mut self, insn: &Insn) -> Result<(), String> {
        let held = self.load_target(insn)?;
        self.indirect(insn, held, 0);
        Ok(())
    }

    pub(super) fn ret(&mut self, insn: &Insn) -> Result<(), String> {
        let extra = if insn.instr.op_count() == 0 {
            0
        } else {
            insn.instr.immediate16()
        };
        if self.windowed() {
            return self.return_in_window(insn, extra.into());
        }
        let target = self.pop_return(insn, extra.into())?;
        let rsp = self.return_size() + i32::from(extra);
        self.count(Path::Indirect);
        if self.mode.single {
            // Whoever asked for a single instruction wants to be asked again after it.
            self.exit(insn.instr.ip(), Kind::Indirect { rsp, gate: None });
        } else if self.mode.window {
            self.dispatch(insn, None, rsp);
        } else {
            let key = self.compare_popped(insn, target, rsp);
            self.through_jump_cache(insn, key, rsp);
        }
        Ok(())
    }

    /// Goes to `Context::target`, which register `held` holds as well, with RSP moved by `rsp` already.
    fn indirect(&mut self, insn: &Insn, held: Option<u8>, rsp: i32) {
        if self.mode.single {
            self.exit(insn.instr.ip(), Kind::Indirect { rsp, gate: None });
            return;
        }
        self.count(Path::Indirect);
        if self.mode.window {
            return self.dispatch(insn, held, rsp);
        }
        if !self.homes.lazy {
            self.save_flags(0);
        }
        self.settle_registers();
        self.doorbell(Ip::Target);
        self.through_jump_cache(insn, None, rsp);
    }

    /// Goes to `Context::target`, which `key` may hold as well, with every register where blocks meet.
    ///
    /// The lookup ruins the flags. They were saved before it and stay saved: a block that is entered
    /// through a jump cache brings them back itself if it reads them before it writes them, which
    /// the code after a call or at the start of a function hardly ever does.
    fn through_jump_cache(&mut self, insn: &Insn, key: Option<u8>, rsp: i32) {
        let slot = self.layout.target();
        let key = key.unwrap_or_else(|| {
            dynasm!(self.asm ; .arch x64 ; mov r13, [slot]);
            13
        });
        // The other one that blocks lend each other.
        let entry = 25 - key;
        let table = self.layout.jump[self.mode.jumps()];
        dynasm!(self.asm
            ; .arch x64
            ; mov Rd(entry), Rd(key)
            ; and Rd(entry), JUMP_ENTRIES as i32 - 1
            ; shl Rd(entry), 4
            ; cmp Rq(key), [Rq(entry) + table]
        );
        self.asm.extend([0x0f, 0x85]);
        let patch = self.position();
        self.asm.push_i32(0);
        let kind = Kind::Indirect { rsp, gate: None };
        let site = self.add_site(insn.instr.ip(), kind);
        self.cold.push(Cold::Exit { site, patch });
        dynasm!(self.asm ; .arch x64 ; jmp QWORD [Rq(entry) + table + 8]);
    }

    /// Rings before `insn` for a backward branch right behind it: processors fuse a comparison with the
    /// conditional jump that follows.
    pub(super) fn ring_early(&mut self, insn: &Insn, next: &Insn) {
        let plain = insn.class == Class::Plain && next.class == Class::Branch;
        if plain && self.wrap(next.instr.near_branch_target()) <= next.instr.ip() {
            let free = insn.live_in == 0 || self.homes.lazy;
            self.ring(Ip::At(insn.instr.ip()), free);
            self.rung = true;
        }
    }

    /// Rings the doorbell by reading it, where the host's flags are free: a store more would slow a loop
    /// that stores.
    fn ring(&mut self, ip: Ip, flags_free: bool) {
        if !flags_free {
            return self.doorbell(ip);
        }
        self.mark(ip);
        dynasm!(self.asm ; .arch x64 ; cmp eax, [self.layout.doorbell]);
    }

    pub(super) fn doorbell(&mut self, ip: Ip) {
        self.mark(ip);
        dynasm!(self.asm ; .arch x64 ; mov [self.layout.doorbell], eax);
    }

    /// Jumps to `target`, linked when it is known.
    pub(super) fn direct(&mut self, ip: u64, target: u64) {
        let target = self.wrap(target);
        let known = self.checks.end;
        self.linked(&[0xe9], ip, target, known, self.homes.lazy);
    }

    fn linked(&mut self, opcode: &[u8], ip: u64, target: u64, known: Levels, lazy: bool) {
        self.asm.extend(opcode);
        let patch = self.position();
        self.asm.push_i32(0);
        let kind = Kind::Direct {
            target,
            patch: self.address(patch),
            stub: 0,
            known,
            lazy,
        };
        let site = self.add_site(ip, kind);
        self.cold.push(Cold::Exit { site, patch });
    }

    fn wrap(&self, target: u64) -> u64 {
        match self.mode.bits {
            Bits::Bits64 => target,
            Bits::Bits32 | Bits::Bits16 => target & 0xffff_ffff,
        }
    }
}

/// Condition code of a jcc, as its opcode holds it.
fn condition(instr: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as Cc;
    Some(match instr.condition_code() {
        Cc::o => 0,
        Cc::no => 1,
        Cc::b => 2,
        Cc::ae => 3,
        Cc::e => 4,
        Cc::ne => 5,
        Cc::be => 6,
        Cc::a => 7,
        Cc::s => 8,
        Cc::ns => 9,
        Cc::p => 10,
        Cc::np => 11,
        Cc::l => 12,
        Cc::ge => 13,
        Cc::le => 14,
        Cc::g => 15,
        Cc::None => return None,
    })
}
