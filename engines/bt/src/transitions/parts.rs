//! What the stubs of privilege changes are made of: lookups, descriptors, segments, flags, and the
//! way to the target.
//!
//! A piece that may fail jumps to the stub's label `back`, or `slow` where nothing is borrowed yet.
//! Which piece comes when, and what must be compared before, is the stubs' affair.

use std::mem::offset_of;

use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm, x64::X64Relocation};
use engine_core::{DescriptorTable, Segment};

use super::BOUNDARY;
use crate::{
    context::Context,
    cpu::{Cpu, FLAG_IF, FLAG_RF},
    privileged::{Privileged, Shortcuts},
    tlb::{JUMP_ENTRIES, TLB_ENTRIES},
};

/// CF PF AF ZF SF.
const ARITHMETIC: i32 = 0xd5;
pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
pub(super) const RSI: u8 = 6;
pub(super) const RDI: u8 = 7;
/// What the longer stubs borrow besides R12 and R13.
const BORROWED: [u8; 6] = [RAX, RCX, RDX, RBX, RSI, RDI];

/// The stubs of a bank under way, and the addresses that they name.
pub(super) struct Emit {
    pub ops: VecAssembler<X64Relocation>,
    /// The `Context`.
    pub context: i32,
    /// [`Privileged`].
    pub privileged: i32,
    pub doorbell: i32,
    /// The supervisor's, for reads and for writes.
    pub tlb: [i32; 2],
    /// Jump caches of ring 0 and ring 3.
    pub jump: [i32; 2],
    /// The stub that leaves translated code.
    pub exit: u64,
    /// The stub that brings the vector registers in.
    pub load: u64,
}

impl Emit {
    pub(super) fn slot(&self, offset: usize) -> i32 {
        self.context + offset as i32
    }

    pub(super) fn cpu(&self, offset: usize) -> i32 {
        self.privileged + (offset_of!(Privileged, cpu) + offset) as i32
    }

    pub(super) fn shortcut(&self, offset: usize) -> i32 {
        self.privileged + (offset_of!(Privileged, shortcuts) + offset) as i32
    }

    pub(super) fn segment(&self, index: usize) -> i32 {
        self.cpu(offset_of!(Cpu, segments) + index * size_of::<Segment>())
    }

    /// Leaves through the site that is stored.
    pub(super) fn leave(&mut self) {
        let exit = self.exit as usize;
        dynasm!(self.ops ; .arch x64 ; jmp extern exit);
    }

    /// Jumps to the local label `slow` unless all of `bits` are enabled. Uses R13.
    pub(super) fn demand(&mut self, bits: u32) {
        let enabled = self.shortcut(offset_of!(Shortcuts, enabled));
        dynasm!(self.ops
            ; .arch x64
            ; mov r13d, [enabled]
            ; and r13d, bits as i32
            ; cmp r13d, bits as i32
            ; jne >slow
        );
    }

    pub(super) fn borrow_registers(&mut self) {
        let save = self.shortcut(offset_of!(Shortcuts, save));
        for (index, register) in (0..).zip(BORROWED) {
            dynasm!(self.ops ; .arch x64 ; mov [save + 8 * index], Rq(register));
        }
    }

    pub(super) fn return_registers(&mut self) {
        let save = self.shortcut(offset_of!(Shortcuts, save));
        for (index, register) in (0..).zip(BORROWED) {
            dynasm!(self.ops ; .arch x64 ; mov Rq(register), [save + 8 * index]);
        }
    }

    /// Turns the supervisor address in RAX into the host's, for `size` bytes, or jumps to `back`.
    /// Uses RCX.
    pub(super) fn look_up(&mut self, size: i32, write: bool) {
        let table = self.tlb[usize::from(write)];
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, rax
            ; shr rcx, 8
            ; and ecx, (TLB_ENTRIES as i32 - 1) << 4
            ; sub rax, [rcx + table]
            ; cmp rax, 4096 - size
            ; ja >back
            ; add rax, [rcx + table + 8]
        );
    }

    /// Reads the GDT's descriptor for the selector in EAX to RAX, or jumps to `back`. Uses RCX and
    /// R13.
    pub(super) fn descriptor(&mut self) {
        let gdtr = self.cpu(offset_of!(Cpu, gdtr));
        let limit = gdtr + offset_of!(DescriptorTable, limit) as i32;
        let base = gdtr + offset_of!(DescriptorTable, base) as i32;
        dynasm!(self.ops
            ; .arch x64
            ; and eax, 0xfff8
            ; movzx ecx, WORD [limit]
            ; lea r13d, [rax + 7]
            ; cmp r13d, ecx
            ; ja >back
            ; add rax, [base]
        );
        self.look_up(8, false);
        dynasm!(self.ops ; .arch x64 ; mov rax, [rax]);
    }

    /// Copies a segment from `[from + offset]` to where the CPU has it. `scratch` is used.
    pub(super) fn load_segment(&mut self, index: usize, from: u8, offset: i32, scratch: u8) {
        let to = self.segment(index);
        let base = self.slot(offset_of!(Context, segment_base)) + 8 * index as i32;
        dynasm!(self.ops
            ; .arch x64
            ; mov Rq(scratch), [Rq(from) + offset]
            ; mov [to], Rq(scratch)
            ; mov Rq(scratch), [Rq(from) + offset + 8]
            ; mov [to + 8], Rq(scratch)
            ; mov Rq(scratch), [Rq(from) + offset + offset_of!(Segment, base) as i32]
            ; mov [base], Rq(scratch)
        );
    }

    /// As `load_segment`, of a segment at a fixed address whose base is 0.
    pub(super) fn load_flat(&mut self, index: usize, from: i32, scratch: u8) {
        let to = self.segment(index);
        let base = self.slot(offset_of!(Context, segment_base)) + 8 * index as i32;
        dynasm!(self.ops
            ; .arch x64
            ; mov Rq(scratch), [from]
            ; mov [to], Rq(scratch)
            ; mov Rq(scratch), [from + 8]
            ; mov [to + 8], Rq(scratch)
            ; mov QWORD [base], 0
        );
    }

    /// The guest's RFLAGS to `to`, with `scratch`.
    pub(super) fn collect_flags(&mut self, to: u8, scratch: u8) {
        let direction = self.slot(offset_of!(Context, direction));
        let lazy = self.slot(offset_of!(Context, lazy_flags));
        let enabled = self.slot(offset_of!(Context, interrupt_flag));
        let system = self.cpu(offset_of!(Cpu, flags));
        dynasm!(self.ops
            ; .arch x64
            ; mov Rd(to), [direction]
            ; or Rd(to), [system]
            ; or Rd(to), [enabled]
            ; movzx Rd(scratch), BYTE [lazy + 1]
            ; and Rd(scratch), ARITHMETIC
            ; or Rd(to), Rd(scratch)
            ; mov Rd(scratch), [lazy]
            ; and Rd(scratch), 1
            ; shl Rd(scratch), 11
            ; lea Rd(to), [Rq(to) + Rq(scratch) + 2]
        );
    }

    /// Clears DF.
    pub(super) fn clear_direction(&mut self) {
        let direction = self.slot(offset_of!(Context, direction));
        dynasm!(self.ops ; .arch x64 ; cld ; mov DWORD [direction], 0);
    }

    /// Takes arithmetic flags and IF from the image in `from`, which is used up, with `scratch`.
    pub(super) fn spread_flags(&mut self, from: u8, scratch: u8) {
        let lazy = self.slot(offset_of!(Context, lazy_flags));
        let enabled = self.slot(offset_of!(Context, interrupt_flag));
        dynasm!(self.ops
            ; .arch x64
            ; mov Rd(scratch), Rd(from)
            ; and Rd(scratch), FLAG_IF as i32
            ; mov [enabled], Rq(scratch)
            ; mov Rd(scratch), Rd(from)
            ; and Rd(scratch), ARITHMETIC
            ; shl Rd(scratch), 8
            ; shr Rd(from), 11
            ; and Rd(from), 1
            ; or Rd(scratch), Rd(from)
            ; mov [lazy], Rq(scratch)
        );
    }

    /// Goes to the target in R12 at the given privilege. An interrupt that waits gets in where it
    /// may: interrupts may have been enabled here, or by an sti whose shadow this was.
    pub(super) fn go(&mut self, user: bool, returns: bool) {
        let target = self.slot(offset_of!(Context, target));
        let site = self.slot(offset_of!(Context, site));
        let enabled = self.slot(offset_of!(Context, interrupt_flag));
        let wanted = self.slot(offset_of!(Context, window_wanted));
        let flags = self.cpu(offset_of!(Cpu, flags));
        let table = self.jump[usize::from(user)];
        dynasm!(self.ops
            ; .arch x64
            ; mov [target], r12
            ; mov r13d, r12d
            ; and r13d, JUMP_ENTRIES as i32 - 1
            ; shl r13d, 4
            ; cmp r12, [r13 + table]
            ; jne >miss
            ; mov r13, [r13 + table + 8]
        );
        if user {
            let limit = self.slot(offset_of!(Context, stack_limit));
            dynasm!(self.ops ; .arch x64 ; cmp rsp, [limit] ; ja >miss);
        }
        if returns {
            dynasm!(self.ops ; .arch x64 ; mov [self.doorbell], eax);
        }
        dynasm!(self.ops
            ; .arch x64
            ; cmp DWORD [enabled], 0
            ; je >masked
            ; cmp DWORD [wanted], 0
            ; jne >miss
            ;masked:
        );
        if returns {
            // Nothing came in between: the next instruction runs, and RF has done its duty.
            dynasm!(self.ops ; .arch x64 ; and DWORD [flags], !(FLAG_RF as i32));
        }
        let due = self.shortcut(offset_of!(Shortcuts, due) + 4 * usize::from(user));
        let load = self.load as usize;
        dynasm!(self.ops
            ; .arch x64
            ; cmp DWORD [due], 0
            ; je >ready
            ; mov DWORD [due], 0
            ; lea r12, [>ready]
            ; jmp extern load
            ;ready:
        );
        if user {
            // Whether code of ring 3 expects R12 and R13 at home depends on its mode.
            let spill = self.slot(offset_of!(Context, spill));
            let resume = self.slot(offset_of!(Context, resume));
            dynasm!(self.ops
                ; .arch x64
                ; mov [resume], r13
                ; mov r12, [spill + 8 * 12]
                ; mov r13, [spill + 8 * 13]
                ; jmp QWORD [resume]
            );
        } else {
            dynasm!(self.ops ; .arch x64 ; jmp r13);
        }
        dynasm!(self.ops
            ; .arch x64
            ;miss:
            ; mov QWORD [site], BOUNDARY as i64 as i32
        );
        self.leave();
    }
}
