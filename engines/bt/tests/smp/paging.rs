//! Page-table entries that change under another vCPU's walk.

use bt::Guarantee;
use iced_x86::code_asm::*;

use crate::vm::{ENTRY, FREE, TABLE, Vm, WINDOW, happens};

const ROUNDS: i32 = 50_000;
const DIRTY_ACCESSED: i32 = 0x60;

/// One vCPU moves a page to and fro, the other makes walks that set its bits. Answers how many moves
/// were undone.
fn undone(without: Option<Guarantee>) -> u64 {
    let (result, done) = (FREE, FREE + 0x40);
    let frames = [(FREE + 0x10_0000) | ENTRY, (FREE + 0x20_0000) | ENTRY];
    Vm::new()
        .without(without)
        .map(0, frames[0])
        .cpu(move |asm| {
            let mut again = asm.create_label();
            let mut kept = asm.create_label();
            asm.mov(r8, frames[0])?;
            asm.mov(r9, frames[1])?;
            asm.xor(ebx, ebx)?;
            asm.mov(r15d, ROUNDS)?;
            asm.set_label(&mut again)?;
            asm.xchg(r8, r9)?;
            asm.mov(rax, r8)?;
            asm.xchg(qword_ptr(TABLE), rax)?;
            for _ in 0..20 {
                asm.pause()?;
            }
            asm.mov(rax, qword_ptr(TABLE))?;
            asm.and(rax, !DIRTY_ACCESSED)?;
            asm.cmp(rax, r8)?;
            asm.je(kept)?;
            asm.inc(rbx)?;
            asm.set_label(&mut kept)?;
            asm.dec(r15d)?;
            asm.jne(again)?;
            asm.mov(qword_ptr(result), rbx)?;
            asm.mov(qword_ptr(done), 1)
        })
        .cpu(move |asm| {
            let mut again = asm.create_label();
            asm.mov(rsi, WINDOW)?;
            asm.set_label(&mut again)?;
            asm.invlpg(byte_ptr(rsi))?;
            asm.mov(rax, qword_ptr(rsi))?;
            asm.mov(qword_ptr(rsi + 8), rax)?;
            asm.cmp(qword_ptr(done), 0)?;
            asm.je(again)
        })
        .run()
        .word(result)
}

#[test]
fn setting_accessed_and_dirty_undoes_no_change() {
    assert_eq!(undone(None), 0);
}

#[test]
fn setting_them_by_a_plain_store_does() {
    assert!(happens(|| undone(Some(Guarantee::EntryBits)) > 0));
}
