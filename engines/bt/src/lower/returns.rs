//! Returns: compared with where they went before.
//!
//! Most returns lead to one or two places. A return therefore compares the address that it pops with
//! [`GUESSES`] addresses that are part of the code, each followed by a linked branch, before it looks
//! into a table as other indirect branches do:
//!
//! ```text
//!         mov   [doorbell], eax
//!         cmp   qword gs:[rsp], first     ; through the window; else the value is in a register
//!         lea   rsp, [rsp+8]
//!         je    block of first
//!         cmp   qword gs:[rsp-8], second
//!         je    block of second
//!         ...
//! gate:   jmp   exit                      ; nop when every guess has been made
//!         table
//! ```
//!
//! A guess starts out empty: its branch leads to what comes next. The runtime fills one each time that the
//! gate is reached, if that block may be linked to. Guesses are links ([`crate::cache`]): what undoes
//! a link of a direct branch empties a guess as well, and closes the gate.
//!
//! # Flags
//!
//! The comparisons ruin the flags, and who reads them is known only once the target is. Where they are in
//! `Context::lazy_flags` already, or have to be moved there, guesses lead to entries that fetch
//! them. Where the instruction that made them can be repeated ([`Recipe`]), nothing is saved: guesses lead
//! to blocks that read none, and who goes on behind the comparisons repeats it.
//!
//! The second comparison reads the stack again. Should another processor have changed it, that is as if
//! it had done so before the return.
//!
//! Invariant: a guess that is taken leads to a block of the same mode at the address that was popped.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;

use super::{Cold, Lower, Path, RSP, contract};
use crate::{
    checks::step,
    context::Context,
    cpu::Bits,
    decode::{ALL_FLAGS, Class, Insn},
    site::{GUESSES, Gate, Guess, Ip, Kind},
    tlb::JUMP_ENTRIES,
};

const RAX: u8 = 0;
const RCX: u8 = 1;

/// How to make the flags again that a return may ruin.
#[derive(Clone, Copy)]
pub(super) struct Recipe {
    /// Sets all flags, from operands that are still there.
    instr: Instruction,
    /// RSP before `instr` and behind it, if that is what it changes, relative to where it is at the return.
    rsp: Option<(i32, i32)>,
}

/// The recipe for the flags behind `insns`.
pub(super) fn recipe(insns: &[Insn]) -> Option<Recipe> {
    // The return itself moves RSP.
    let mut modified = RSP;
    let mut moved = Some(0i64);
    for insn in insns.iter().rev() {
        let instr = &insn.instr;
        if instr.rflags_modified() & ALL_FLAGS == 0 {
            modified |= insn.modifies;
            moved = moved.and_then(|moved| Some(moved + step(insn, 4)?));
            continue;
        }
        if insn.class != Class::Plain || insn.kills() != ALL_FLAGS {
            return None;
        }
        let same =
            instr.op1_kind() == OpKind::Register && instr.op0_register() == instr.op1_register();
        let again = match instr.mnemonic() {
            Mnemonic::Cmp | Mnemonic::Test => (insn.reads | insn.modifies) & modified == 0,
            Mnemonic::Xor | Mnemonic::Sub if same => {
                instr.op0_register().size() >= 4 && insn.modifies & modified == 0
            }
            Mnemonic::Add | Mnemonic::Sub if instr.op0_register() == Register::RSP => {
                let behind = -moved?;
                let before = behind - step(insn, 4)?;
                let rsp = Some((before.try_into().ok()?, behind.try_into().ok()?));
                return Some(Recipe { instr: *instr, rsp });
            }
            _ => false,
        };
        let simple = instr.op_count() == 2 && instr.op0_kind() == OpKind::Register;
        return (again && simple).then_some(Recipe {
            instr: *instr,
            rsp: None,
        });
    }
    None
}

impl Lower<'_> {
    /// Pops the return address, and `extra` bytes more, and goes there.
    pub(super) fn return_in_window(&mut self, insn: &Insn, extra: i32) -> Result<(), String> {
        let by = self.return_size() + extra;
        self.count(Path::Indirect);
        let recipe = self.recipe.take().filter(|_| !self.homes.lazy);
        if !self.homes.lazy && recipe.is_none() {
            // RAX waits there meanwhile, and hardly any code passes something in it.
            self.spill(11);
            self.save_flags(0);
        }
        self.settle_registers();
        self.doorbell(Ip::At(insn.instr.ip()));
        let first = self.sites.len();
        for guess in 0..GUESSES {
            let displacement = if guess == 0 { 0 } else { -by };
            self.compare_return(insn, displacement)?;
            let compared = self.position() - 4;
            if guess == 0 {
                let waiting = std::mem::take(&mut self.homes.rsp);
                self.move_rsp(i32::from(waiting) + by);
            }
            self.guess(insn, compared);
        }
        if let Some(recipe) = recipe {
            self.repeat(recipe, by)?;
        }
        self.spill(RCX);
        let operand = self.stack_operand(-by);
        self.load_in_window(insn, RCX, operand, self.return_size())?;
        dynasm!(self.asm ; .arch x64 ; mov [self.layout.target()], rcx);
        self.gate(insn, first, by);
        if self.homes.lazy {
            self.beside_window(insn, by);
        } else {
            dynasm!(self.asm ; .arch x64 ; movzx ecx, cx);
            self.through_table(insn, by);
        }
        Ok(())
    }

    /// Makes guesses of `Context::target`, which register `target` holds as well, with RSP moved by `rsp`
    /// already, where there is no window. Every register is where blocks meet then; answers where the
    /// target still is.
    pub(super) fn compare_popped(&mut self, insn: &Insn, target: u8, rsp: i32) -> Option<u8> {
        if !self.homes.lazy {
            self.save_flags(1 << target);
        }
        self.settle_registers();
        let key = (contract(self.mode) >> target & 1 == 1).then_some(target);
        self.doorbell(Ip::Target);
        let first = self.sites.len();
        for _ in 0..GUESSES {
            match key {
                Some(key) => dynasm!(self.asm ; .arch x64 ; cmp Rq(key), i32::MAX),
                None => dynasm!(self.asm ; .arch x64 ; cmp QWORD [self.layout.target()], i32::MAX),
            }
            self.guess(insn, self.position() - 4);
        }
        self.gate(insn, first, rsp);
        key
    }

    /// Compares the return address on the stack with a guess.
    fn compare_return(&mut self, insn: &Insn, displacement: i32) -> Result<(), String> {
        let code = match self.mode.bits {
            Bits::Bits64 => Code::Cmp_rm64_imm32,
            Bits::Bits32 | Bits::Bits16 => Code::Cmp_rm32_imm32,
        };
        let operand = self.stack_operand(displacement);
        if displacement == 0 {
            self.mark(Ip::At(insn.instr.ip()));
        }
        self.encode_made(Instruction::with2(code, operand, i32::MAX))
    }

    /// The branch behind a comparison whose constant, to be filled in, is at `compared`.
    fn guess(&mut self, insn: &Insn, compared: usize) {
        let compared = self.address(compared);
        self.asm.extend([0x0f, 0x84]);
        let patch = self.address(self.position());
        self.asm.push_i32(0);
        let kind = Kind::Guess(Guess {
            made: false,
            compared,
            patch,
            lazy: self.homes.lazy,
            gate: 0,
        });
        self.add_site(insn.instr.ip(), kind);
    }

    /// Where none of the guesses from site `first` on was right: leaves for the runtime until all of them
    /// have been made. RSP has moved by `rsp`.
    fn gate(&mut self, insn: &Insn, first: usize, rsp: i32) {
        self.asm.push(0xe9);
        let patch = self.position();
        self.asm.push_i32(0);
        let gate = Gate {
            at: self.address(patch - 1),
            stub: 0,
            first: (self.first_site + first) as u32,
        };
        let gate = Some(gate);
        let site = self.add_site(insn.instr.ip(), Kind::Indirect { rsp, gate });
        let number = (self.first_site + site) as u32;
        for guess in &mut self.sites[first..first + GUESSES] {
            if let Kind::Guess(guess) = &mut guess.kind {
                guess.gate = number;
            }
        }
        self.cold.push(Cold::Exit { site, patch });
    }

    /// Makes the flags again, with RSP moved by `by` since.
    fn repeat(&mut self, recipe: Recipe, by: i32) -> Result<(), String> {
        let Recipe { instr, rsp } = recipe;
        let Some((before, behind)) = rsp else {
            return self.encode(&instr);
        };
        let (back, forth) = (before - by, by - behind);
        dynasm!(self.asm ; .arch x64 ; lea rsp, [rsp + back]);
        self.encode(&instr)?;
        dynasm!(self.asm ; .arch x64 ; lea rsp, [rsp + forth]);
        Ok(())
    }

    /// Goes to the target in `Context::target` and RCX, whose value waits in its slot, with the flags in
    /// theirs: as code without a window does.
    fn beside_window(&mut self, insn: &Insn, rsp: i32) {
        let table = self.layout.jump[self.mode.jumps()];
        let resume = self.layout.slot(offset_of!(Context, resume));
        self.spill(RAX);
        dynasm!(self.asm
            ; .arch x64
            ; mov eax, ecx
            ; and eax, JUMP_ENTRIES as i32 - 1
            ; shl eax, 4
            ; cmp rcx, [rax + table]
        );
        self.asm.extend([0x0f, 0x85]);
        let patch = self.position();
        self.asm.push_i32(0);
        let kind = Kind::Indirect { rsp, gate: None };
        let site = self.add_site(insn.instr.ip(), kind);
        self.cold.push(Cold::Exit { site, patch });
        dynasm!(self.asm
            ; .arch x64
            ; mov rcx, [rax + table + 8]
            ; mov [resume], rcx
        );
        self.settle_registers();
        dynasm!(self.asm ; .arch x64 ; jmp QWORD [resume]);
    }
}
