//! movs and stos, repeated or not, in 64-bit code: what memcpy and memset come down to.
//!
//! Both operands are looked up once; what lies in the two pages is then one host instruction:
//!
//! ```text
//! retry:  look up [rdi]                   ; write table; offset in its page, then host address
//!         look up [rsi]                   ; read table
//!         count = min(rcx, room in either page)
//!         rep movs
//!         rsi, rdi, rcx as the guest has them
//!         jnz  more                       ; ring the doorbell, then retry
//! ```
//!
//! Everything else is the runtime's: an element across two pages, a page that the tables don't hold
//! (devices and translated code never are in them), a direction of down. It leaves with RSI, RDI and
//! RCX as after the elements that are done, as the instruction may be interrupted there (SDM 2B, REP).
//!
//! Invariant: between `retry` and the copy nothing of the guest changes but for its registers' homes.

use std::mem::offset_of;

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, OpKind, Register};

use super::{Cold, Lower, Path};
use crate::{
    context::Context,
    decode::Insn,
    site::{Homes, Ip},
    tlb::TLB_ENTRIES,
};

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;
const STRING: u16 = 1 << RCX | 1 << RSI | 1 << RDI;

/// The way back to `retry`.
pub(super) struct More {
    patch: usize,
    retry: usize,
    before: Homes,
    after: Homes,
    ip: u64,
    copies: bool,
}

/// Log2 of the element's size, and whether it is copied.
fn form(instr: &Instruction) -> Option<(u8, bool)> {
    Some(match instr.code() {
        Code::Movsb_m8_m8 => (0, true),
        Code::Movsw_m16_m16 => (1, true),
        Code::Movsd_m32_m32 => (2, true),
        Code::Movsq_m64_m64 => (3, true),
        Code::Stosb_m8_AL => (0, false),
        Code::Stosw_m16_AX => (1, false),
        Code::Stosd_m32_EAX => (2, false),
        Code::Stosq_m64_RAX => (3, false),
        _ => return None,
    })
}

/// True for a movs or stos of flat segments with 64-bit addresses.
pub(super) fn inline(instr: &Instruction) -> bool {
    let Some((_, copies)) = form(instr) else {
        return false;
    };
    let flat = !matches!(instr.memory_segment(), Register::FS | Register::GS);
    let wide = |kind| matches!(kind, OpKind::MemorySegRSI | OpKind::MemoryESRDI);
    // An operand of stos is a register.
    wide(instr.op0_kind()) && (!copies || flat && wide(instr.op1_kind()))
}

impl Lower<'_> {
    pub(super) fn string(&mut self, insn: &Insn) -> Result<(), String> {
        const NE: u8 = 5;
        let (log, copies) = form(&insn.instr).ok_or("no such string")?;
        let repeats = insn.instr.has_rep_prefix() || insn.instr.has_repne_prefix();
        self.free_flags(insn, 0);
        self.need(insn.reads | STRING);
        let table = self.take(STRING, insn);
        let count = self.take(STRING | 1 << table, insn);
        if copies {
            self.spill(RSI);
        }
        self.spill(RDI);
        let retry = self.position();
        let homes = self.homes;
        let last = 4096 - (1 << log);
        self.find_element(insn, RDI, table, last, true);
        if repeats {
            dynasm!(self.asm
                ; .arch x64
                ; mov Rd(count), 4096
                ; sub Rd(count), edi
            );
        }
        let host = self.tlb(true) + 8;
        dynasm!(self.asm ; .arch x64 ; add rdi, [Rq(table) + host]);
        if copies {
            self.find_element(insn, RSI, table, last, false);
            let host = self.tlb(false) + 8;
            if repeats {
                dynasm!(self.asm
                    ; .arch x64
                    ; mov Rq(table), [Rq(table) + host]
                    ; add Rq(table), rsi
                    ; sub esi, 4096
                    ; neg esi
                    ; cmp esi, Rd(count)
                    ; cmovb Rd(count), esi
                    ; mov rsi, Rq(table)
                );
            } else {
                dynasm!(self.asm ; .arch x64 ; add rsi, [Rq(table) + host]);
            }
        }
        if !repeats {
            // What the host's instruction moves by is what the guest's does.
            dynasm!(self.asm ; .arch x64 ; mov Rq(table), rdi);
            self.element(log, copies, false);
            dynasm!(self.asm ; .arch x64 ; sub rdi, Rq(table) ; mov Rq(table), rdi);
            self.move_pointers(table, copies);
            return Ok(());
        }
        let direction = self.layout.slot(offset_of!(Context, direction));
        if log != 0 {
            dynasm!(self.asm ; .arch x64 ; shr Rd(count), log as i8);
        }
        dynasm!(self.asm
            ; .arch x64
            ; cmp rcx, Rq(count)
            ; cmovb Rq(count), rcx
            ; cmp DWORD [direction], 0
        );
        self.unless(insn, NE);
        dynasm!(self.asm
            ; .arch x64
            ; xchg rcx, Rq(count)
            ; sub Rq(count), rcx
            ; mov Rq(table), rcx
        );
        if log != 0 {
            dynasm!(self.asm ; .arch x64 ; shl Rq(table), log as i8);
        }
        self.element(log, copies, true);
        dynasm!(self.asm ; .arch x64 ; mov rcx, Rq(count));
        self.move_pointers(table, copies);
        self.asm.extend([0x48, 0x85, 0xc9, 0x0f, 0x80 | NE]); // test rcx, rcx; jnz
        let patch = self.position();
        self.asm.push_i32(0);
        let ip = insn.instr.ip();
        self.cold.push(Cold::String(More {
            patch,
            retry,
            before: homes,
            after: self.homes,
            ip,
            copies,
        }));
        Ok(())
    }

    /// Turns `pointer` into an offset in its page, and `table` into the place of its entry.
    fn find_element(&mut self, insn: &Insn, pointer: u8, table: u8, last: i32, write: bool) {
        const A: u8 = 7;
        self.count(Path::Lookup);
        let disp = self.tlb(write);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(table), Rq(pointer)
            ; shr Rq(table), 8
            ; and Rd(table), (TLB_ENTRIES as i32 - 1) << 4
            ; sub Rq(pointer), [Rq(table) + disp]
            ; cmp Rq(pointer), last
        );
        self.unless(insn, A);
    }

    fn element(&mut self, log: u8, copies: bool, repeats: bool) {
        if repeats {
            self.asm.push(0xf3);
        }
        match log {
            1 => self.asm.push(0x66),
            3 => self.asm.push(0x48),
            _ => {}
        }
        let opcode = if copies { 0xa4 } else { 0xaa };
        self.asm.push(opcode | u8::from(log != 0));
    }

    /// RSI and RDI as the guest had them, moved by what is in `by`.
    fn move_pointers(&mut self, by: u8, copies: bool) {
        for pointer in [RSI, RDI] {
            if pointer == RDI || copies {
                self.need(1 << pointer);
                dynasm!(self.asm ; .arch x64 ; add Rq(pointer), Rq(by));
            }
        }
    }

    /// More is to be done than one page held.
    pub(super) fn cold_string(&mut self, cold: More) {
        let More {
            patch,
            retry,
            before,
            after,
            ip,
            copies,
        } = cold;
        self.bind(patch, self.position());
        self.homes = after;
        self.doorbell(Ip::At(ip));
        if copies {
            self.spill(RSI);
        }
        self.spill(RDI);
        debug_assert_eq!(self.homes, before, "retry finds things where they were");
        self.jump_to(0xe9, self.address(retry));
    }
}
