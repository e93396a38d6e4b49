//! 32-bit protected mode without paging: where PVH images start.

use std::time::Duration;

use bt::Options;
use engine_core::testing::Guest;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::Built;
use crate::run::boot;

const RESULTS: u64 = 0x50_0000;

/// Runs 32-bit code until it writes to the exit port; the words at RESULTS.
fn results(body: impl FnOnce(&mut CodeAssembler) -> Built) -> Vec<u32> {
    let guest = Guest::protected(|asm| {
        asm.mov(esp, 0x30_0000)?;
        body(asm)?;
        asm.xor(eax, eax)?;
        asm.out(0xf4, al)
    });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    let kick = vcpu.kick_handle();
    let watchdog = std::thread::spawn(move || {
        std::thread::park_timeout(Duration::from_secs(20));
        kick.kick();
    });
    let exit = vcpu.run().expect("it runs");
    assert!(matches!(exit, Exit::PioOut { port: 0xf4, .. }), "{exit:?}");
    watchdog.thread().unpark();
    watchdog.join().expect("the watchdog");
    let mut bytes = [0; 64];
    ram.read_slice(&mut bytes, GuestAddress(RESULTS))
        .expect("guest memory");
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")))
        .collect()
}

fn result(asm: &mut CodeAssembler, number: u64, value: AsmRegister32) -> Built {
    asm.mov(dword_ptr((RESULTS + number * 4) as u32), value)
}

#[test]
fn calls_pushes_and_one_byte_increments_are_32_bits_wide() {
    let found = results(|asm| {
        let mut function = asm.create_label();
        let mut over = asm.create_label();
        asm.jmp(over)?;
        asm.set_label(&mut function)?;
        asm.mov(eax, dword_ptr(esp + 4))?;
        asm.db(&[0x40, 0x40, 0x49])?; // inc eax; inc eax; dec ecx
        asm.ret_1(4)?;
        asm.set_label(&mut over)?;
        asm.mov(ecx, 0)?;
        asm.push(0x1234)?;
        asm.call(function)?;
        result(asm, 0, eax)?;
        result(asm, 1, ecx)?;
        result(asm, 2, esp)?;
        // Addresses wrap at 32 bits.
        asm.mov(ebx, 0xffff_fff0u32)?;
        asm.mov(esi, (RESULTS + 0x30) as u32)?;
        asm.mov(dword_ptr(ebx + esi + 0x10), 0x55)?;
        // leave and enter.
        asm.mov(ebp, 0x7777)?;
        asm.enter(16, 0)?;
        asm.mov(edx, esp)?;
        asm.leave()?;
        result(asm, 3, edx)?;
        result(asm, 4, ebp)?;
        result(asm, 5, esp)
    });
    assert_eq!(found[..3], [0x1236, u32::MAX, 0x30_0000]);
    assert_eq!(found[3..6], [0x30_0000 - 20, 0x7777, 0x30_0000]);
    assert_eq!(found[12], 0x55);
}

#[test]
fn segments_with_a_base_shift_their_accesses() {
    // A data segment of base 0x400000 as selector 8, code at 0x10 and flat data at 0x18.
    let found = results(|asm| {
        let table: [u64; 4] = [
            0,
            0x00cf_9340_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
        ];
        for (index, entry) in table.into_iter().enumerate() {
            let at = 0x60_0000 + index as u32 * 8;
            asm.mov(dword_ptr(at), entry as u32)?;
            asm.mov(dword_ptr(at + 4), (entry >> 32) as u32)?;
        }
        asm.mov(word_ptr(0x60_0100u32), 31)?;
        asm.mov(dword_ptr(0x60_0102u32), 0x60_0000)?;
        asm.lgdt(fword_ptr(0x60_0100u32))?;
        asm.mov(dword_ptr(RESULTS as u32 + 0x20), 0x1111)?;
        asm.mov(eax, 8)?;
        asm.mov(es, eax)?;
        asm.mov(fs, eax)?;
        let near = (RESULTS - 0x40_0000) as u32;
        asm.mov(ebx, near)?;
        asm.mov(eax, dword_ptr(ebx + 0x20).es())?;
        asm.add(dword_ptr(ebx + 0x20).fs(), eax)?;
        // Strings write through ES.
        asm.mov(edi, near + 0x24)?;
        asm.mov(eax, 0x3333)?;
        asm.stosd()?;
        // The stack, too; calls and returns through the jump cache must not mix bases up.
        asm.mov(ecx, esp)?;
        asm.mov(eax, 8)?;
        asm.mov(ss, eax)?;
        asm.mov(esp, near + 0x40)?;
        asm.push(0x4444)?;
        let mut function = asm.create_label();
        let mut over = asm.create_label();
        asm.call(function)?;
        asm.jmp(over)?;
        asm.set_label(&mut function)?;
        asm.mov(edx, dword_ptr(esp + 4))?;
        asm.ret()?;
        asm.set_label(&mut over)?;
        asm.mov(eax, 0x18)?;
        asm.mov(ss, eax)?;
        asm.mov(esp, ecx)?;
        result(asm, 0, edx)
    });
    assert_eq!(found[0], 0x4444);
    assert_eq!(found[8], 0x2222);
    assert_eq!(found[9], 0x3333);
    assert_eq!(found[15], 0x4444);
}
