//! Borrowing guest registers as scratch, and where the flags are meanwhile.
//!
//! A borrowed register's value waits in `Context::spill` and comes back when the guest's code next
//! reads it; flags move to `Context::lazy_flags` by way of RAX. Invariant: `Lower::homes` says where
//! each of them is at the place being emitted.

use dynasmrt::{DynasmApi, dynasm};

use super::{Lower, RAX, RSP, contract, needs_flags};
use crate::decode::{Class, Insn};

/// True if the flags that a block is entered with have to be out of the way before anything reads them. They
/// are saved first thing then, and who comes with the flags saved goes in behind that.
pub(super) fn saves_first(insns: &[Insn]) -> bool {
    for insn in insns {
        let looks_up = match insn.class {
            Class::Memory
            | Class::BitString
            | Class::MaskedMove
            | Class::Push
            | Class::Pop
            | Class::Leave
            | Class::Call
            | Class::CallIndirect
            | Class::CallInline
            | Class::JumpIndirect
            | Class::Return => true,
            Class::Plain
            | Class::Nop
            | Class::Lea
            | Class::Cli
            | Class::Sti
            | Class::ReturnInline
            | Class::Jump
            | Class::Branch
            | Class::Loop
            | Class::Privileged
            | Class::System
            | Class::Fault(_) => false,
        };
        if insn.live_in == 0 || looks_up {
            return insn.live_in != 0;
        }
        if insn.flags.read | insn.flags.modified != 0 || insn.class.ends_block() {
            return false;
        }
    }
    false
}

impl Lower<'_> {
    /// Makes the host's flags true if the body of `insn` reads them, or leaves some of the live ones
    /// as they were.
    pub(super) fn flags_for(&mut self, insn: &Insn) {
        if self.homes.lazy && needs_flags(insn) {
            self.restore_flags(self.busy);
        }
    }

    /// Brings the registers in `mask` home.
    pub(super) fn need(&mut self, mask: u16) {
        let mut missing = self.homes.spilled & mask;
        self.homes.spilled &= !mask;
        while missing != 0 {
            let register = missing.trailing_zeros() as u8;
            missing &= missing - 1;
            dynasm!(self.asm ; .arch x64 ; mov Rq(register), [self.layout.spill(register)]);
        }
    }

    pub(super) fn spill(&mut self, register: u8) {
        if self.homes.spilled >> register & 1 == 0 {
            dynasm!(self.asm ; .arch x64 ; mov [self.layout.spill(register)], Rq(register));
            self.homes.spilled |= 1 << register;
        }
    }

    /// Borrows a register outside `avoid`: one that is borrowed already, else one whose value is
    /// wanted latest.
    pub(super) fn take(&mut self, avoid: u16, insn: &Insn) -> u8 {
        // The flags move through RAX; while they may move, nothing else lives there.
        let mut avoid = avoid | insn.used() | RSP | self.pinned;
        if insn.live_in != 0 {
            avoid |= RAX;
        }
        if insn.high_byte {
            avoid |= 0xff00;
        }
        let free = !avoid;
        let borrowed = free & self.homes.spilled;
        let idle = free & !self.upcoming[self.at];
        let choice = if borrowed & idle != 0 {
            borrowed & idle
        } else if idle != 0 {
            idle
        } else if borrowed != 0 {
            borrowed
        } else {
            free
        };
        assert!(choice != 0, "no register is left to borrow");
        // High numbers first: compilers hand out the low ones first.
        let register = 15 - choice.leading_zeros() as u8;
        self.spill(register);
        register
    }

    /// Moves live flags out of the way of a table lookup, by way of RAX, whose value waits in a
    /// borrowed register outside `busy`.
    pub(super) fn save_flags(&mut self, busy: u16) {
        debug_assert!(self.pinned & RAX == 0, "flags move through RAX");
        let keeper = self.keep_rax(busy);
        dynasm!(self.asm
            ; .arch x64
            ; lahf
            ; seto al
            ; mov [self.layout.lazy_flags()], rax
        );
        self.give_rax_back(keeper);
        self.homes.lazy = true;
    }

    pub(super) fn restore_flags(&mut self, busy: u16) {
        debug_assert!(self.pinned & RAX == 0, "flags move through RAX");
        let keeper = self.keep_rax(busy);
        // 1 + 127 overflows a signed byte and 0 + 127 doesn't.
        dynasm!(self.asm
            ; .arch x64
            ; mov eax, [self.layout.lazy_flags()]
            ; add al, 127
            ; sahf
        );
        self.give_rax_back(keeper);
        self.homes.lazy = false;
    }

    /// Makes RAX free for the flags. Without a borrowed register to keep it in it is borrowed
    /// itself, and comes back when needed.
    pub(super) fn keep_rax(&mut self, busy: u16) -> Option<u8> {
        if self.homes.spilled & RAX != 0 {
            return None;
        }
        let idle = self.homes.spilled & !busy & !self.pinned;
        if idle == 0 {
            self.spill(0);
            return None;
        }
        let keeper = 15 - idle.leading_zeros() as u8;
        dynasm!(self.asm ; .arch x64 ; mov Rq(keeper), rax);
        Some(keeper)
    }

    pub(super) fn give_rax_back(&mut self, keeper: Option<u8>) {
        if let Some(keeper) = keeper {
            dynasm!(self.asm ; .arch x64 ; mov rax, Rq(keeper));
        }
    }

    /// Everything where the next block expects it; flags only if somebody reads them.
    pub(super) fn leave(&mut self, flags_live: bool) {
        if self.homes.lazy && flags_live {
            self.restore_flags(0);
        }
        self.homes.lazy = false;
        self.settle_registers();
    }

    /// As `leave` for a direct branch, which says where the flags are: a block that doesn't read them is
    /// entered as if they were at home, and others fetch them themselves.
    pub(super) fn leave_lazily(&mut self, flags_live: bool) {
        self.homes.lazy &= flags_live;
        self.settle_registers();
        self.homes.carry &= flags_live;
        self.restore_carry();
    }

    pub(super) fn settle_registers(&mut self) {
        let contract = contract(self.mode);
        self.need(!contract);
        let mut missing = contract & !self.homes.spilled;
        while missing != 0 {
            self.spill(missing.trailing_zeros() as u8);
            missing &= missing - 1;
        }
    }

    pub(super) fn load_constant(&mut self, register: u8, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            dynasm!(self.asm ; .arch x64 ; mov Rd(register), value as i32);
        } else if value as i64 == i64::from(value as i32) {
            dynasm!(self.asm ; .arch x64 ; mov Rq(register), value as i32);
        } else {
            dynasm!(self.asm ; .arch x64 ; mov Rq(register), QWORD value as i64);
        }
    }
}
