//! Gates of every kind, tasks, virtual-8086 mode, segments with limits.

use engine_core::testing::assemble;
use iced_x86::code_asm::*;

use crate::kernel::Built;
use crate::legacy::{
    IDT, LOADED, OTHER, REAL, TABLE, TSS, flat_result, gate, print, protected, system_descriptor,
    task, with_code, with_words, words, words_here,
};

#[test]
fn tasks_are_switched_by_calls_jumps_gates_and_returns() {
    const HANDLER: u32 = 0x31_0000;
    // 0x28: this task, 0x30: the other, 0x38: a gate to it, 0x40: a call gate.
    const CALLED: u32 = 0x31_1000;
    let extra = [
        system_descriptor(0x89, TSS, 0x67),
        system_descriptor(0x89, OTHER, 0x67),
        gate(0x85, 0x30, 0, 0),
        gate(0x8c, 8, CALLED, 2),
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.mov(ebx, 0x55)?;
        // call 0x30:0; the other task adds to its own counter and returns with iret.
        for selector in [0x30u16, 0x38] {
            let mut bytes = vec![0x9a, 0, 0, 0, 0];
            bytes.extend_from_slice(&selector.to_le_bytes());
            asm.db(&bytes)?;
        }
        flat_result(asm, 0, ebx)?;
        asm.mov(eax, cr0)?;
        asm.and(eax, 8)?;
        flat_result(asm, 1, eax)?;
        asm.clts()?;
        asm.pushfd()?;
        asm.pop(eax)?;
        asm.and(eax, 0x4000)?;
        flat_result(asm, 2, eax)?;
        asm.mov(eax, dword_ptr(OTHER + 0x28))?;
        flat_result(asm, 3, eax)?;
        asm.movzx(eax, word_ptr(OTHER))?;
        flat_result(asm, 4, eax)?;
        asm.mov(eax, dword_ptr(OTHER + 0x24))?;
        asm.and(eax, 0x4000)?;
        flat_result(asm, 5, eax)?;
        asm.movzx(eax, byte_ptr(TABLE + 0x2d))?;
        flat_result(asm, 6, eax)?;
        asm.movzx(eax, byte_ptr(TABLE + 0x35))?;
        flat_result(asm, 7, eax)?;
        // A call gate of the same privilege copies nothing.
        asm.db(&[0x9a, 0, 0, 0, 0, 0x40, 0])?;
        flat_result(asm, 8, ecx)?;
        // The same task by an exception: a divide error through a task gate.
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.xor(ecx, ecx)?;
        asm.mov(dword_ptr(OTHER + 0x20), HANDLER)?;
        asm.div(ecx)?;
        asm.inc(ebx)?;
        flat_result(asm, 9, ebx)
    });
    let guest = with_words(guest, TSS, &[(0x64, 0x68 << 16)]);
    let guest = with_words(guest, OTHER, &task(HANDLER, 2));
    let low = gate(0x85, 0x30, 0, 0);
    let guest = with_words(guest, IDT, &[(0, low as u32), (4, (low >> 32) as u32)]);
    let guest = with_code(guest, HANDLER, |asm| {
        asm.add(eax, 1)?;
        // Skip the divide, if that is where the caller stands.
        let mut not = asm.create_label();
        asm.mov(edx, dword_ptr(TSS + 0x20))?;
        asm.cmp(word_ptr(edx), 0xf1f7u32 as i32)?;
        asm.jne(not)?;
        asm.add(dword_ptr(TSS + 0x20), 2)?;
        asm.set_label(&mut not)?;
        asm.iretd()?;
        // Called again, the task goes on here.
        asm.mov(edx, HANDLER)?;
        asm.jmp(edx)
    });
    let guest = with_code(guest, CALLED, |asm| {
        asm.mov(ecx, dword_ptr(esp + 4))?;
        asm.retf()
    });
    let found = words(&guest);
    assert_eq!(found[..3], [0x55, 8, 0]);
    assert_eq!(found[3], 0x1113);
    assert_eq!((found[4], found[8], found[9]), (0x28, 8, 0x56));
}

#[test]
fn ring_3_calls_through_a_gate_onto_the_inner_stack_and_returns() {
    const USER: u32 = 0x31_0000;
    const INNER: u32 = 0x31_1000;
    // 0x28: TSS, 0x30: user code, 0x38: user data, 0x40: a call gate for ring 3.
    let extra = [
        system_descriptor(0x89, TSS, 0x67),
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        gate(0xec, 8, INNER, 2),
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.push(0x3b)?;
        asm.push(0x38_8000)?;
        asm.push(0x33)?;
        asm.push(USER as i32)?;
        asm.retf()
    });
    let guest = with_words(guest, TSS, &[(4, 0x37_0000), (8, 0x10), (0x64, 0x68 << 16)]);
    let guest = with_code(guest, USER, |asm| {
        asm.push(0x1111)?;
        asm.push(0x2222)?;
        asm.db(&[0x9a, 0, 0, 0, 0, 0x43, 0])?;
        // The inner code took the parameters off both stacks.
        asm.mov(edi, esp)?;
        asm.push(0x3333)?;
        asm.push(0)?;
        asm.db(&[0x9a, 0, 0, 0, 0, 0x43, 0])
    });
    let guest = with_code(guest, INNER, |asm| {
        let mut second = asm.create_label();
        // Ring 0 uses flat data.
        asm.mov(eax, 0x10)?;
        asm.mov(ds, eax)?;
        asm.mov(eax, dword_ptr(esp + 12))?;
        asm.cmp(eax, 0x3333)?;
        asm.je(second)?;
        flat_result(asm, 0, eax)?;
        asm.mov(eax, dword_ptr(esp + 8))?;
        flat_result(asm, 1, eax)?;
        asm.mov(eax, dword_ptr(esp + 4))?;
        flat_result(asm, 2, eax)?;
        asm.mov(eax, dword_ptr(esp + 16))?;
        flat_result(asm, 3, eax)?;
        asm.mov(eax, dword_ptr(esp + 20))?;
        flat_result(asm, 4, eax)?;
        flat_result(asm, 5, esp)?;
        asm.retf_1(8)?;
        asm.set_label(&mut second)?;
        flat_result(asm, 6, edi)?;
        asm.mov(eax, 0x10)?;
        asm.mov(es, eax)?;
        print(asm)
    });
    let found = words(&guest);
    assert_eq!(found[..5], [0x1111, 0x2222, 0x33, 0x38_7ff8, 0x3b]);
    assert_eq!(found[5], 0x37_0000 - 24);
    assert_eq!(found[6], 0x38_8000);
}

#[test]
fn virtual_8086_mode_runs_16_bit_code_and_faults_into_ring_0() {
    const HANDLER: u32 = 0x31_1000;
    let extra = [system_descriptor(0x89, TSS, 0x67)];
    let code = assemble(16, 0, |asm| {
        asm.mov(ax, 0x2000)?;
        asm.mov(ds, ax)?;
        asm.mov(eax, 0x1234_5678)?;
        asm.mov(dword_ptr(0), eax)?;
        asm.push(ax)?;
        asm.pop(bx)?;
        asm.mov(word_ptr(4), bx)?;
        asm.mov(word_ptr(8), cs)?;
        // Sensitive without IOPL 3.
        asm.cli()
    });
    let mut guest = protected(&extra, |asm| {
        asm.mov(eax, 0x28)?;
        asm.ltr(ax)?;
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.mov(esi, LOADED)?;
        asm.mov(edi, REAL)?;
        asm.mov(ecx, 0x100)?;
        asm.rep().movsb()?;
        for value in [0x4444, 0x3333, 0x2222, 0x1111, 0x1800, 0xfff0] {
            asm.push(value)?;
        }
        asm.push(0x2_0002)?;
        asm.push((REAL >> 4) as i32)?;
        asm.push(0)?;
        asm.iretd()
    });
    let size = code.len() as u64;
    guest.segments.push((LOADED.into(), code, size));
    let guest = with_words(guest, TSS, &[(4, 0x37_0000), (8, 0x10), (0x64, 0x68 << 16)]);
    let low = gate(0x8e, 8, HANDLER, 0);
    let at = 13 * 8;
    let guest = with_words(
        guest,
        IDT,
        &[(at, low as u32), (at + 4, (low >> 32) as u32)],
    );
    let guest = with_code(guest, HANDLER, |asm| {
        asm.mov(ebp, esp)?;
        asm.mov(ecx, ds)?;
        asm.mov(eax, 0x10)?;
        asm.mov(ds, eax)?;
        asm.mov(es, eax)?;
        flat_result(asm, 3, ecx)?;
        for slot in 0..10 {
            asm.mov(eax, dword_ptr(ebp + 4 * slot))?;
            if slot == 3 {
                // RF: a fault sets it, QEMU doesn't.
                asm.and(eax, !0x1_0000)?;
            }
            flat_result(asm, 4 + slot as u32, eax)?;
        }
        print(asm)
    });
    let found = words(&guest);
    assert_eq!((found[0], found[1] & 0xffff), (0x1234_5678, 0x5678));
    assert_eq!((found[2] & 0xffff, found[3]), (REAL >> 4, 0));
    // Error code, EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
    assert_eq!((found[4], found[6]), (0, REAL >> 4));
    assert_eq!(found[7] & 0x2_0000, 0x2_0000);
    assert_eq!(
        found[8..14],
        [0xfff0, 0x1800, 0x1111, 0x2000, 0x3333, 0x4444]
    );
}

#[test]
fn accesses_beyond_a_limit_fault() {
    const HANDLER: u32 = 0x31_1000;
    // 0x28: 4 KiB of data, 0x30: expand-down above 4 KiB, 0x38: read-only, 0x40: code alone.
    let extra = [
        0x0040_9300_0000_0fff,
        0x00c0_9700_0000_0000,
        0x00cf_9100_0000_ffff,
        0x00cf_9900_0000_ffff,
    ];
    let guest = protected(&extra, |asm| {
        asm.mov(word_ptr(TABLE + 0x900), 0x7ff)?;
        asm.mov(dword_ptr(TABLE + 0x902), IDT)?;
        asm.lidt(fword_ptr(TABLE + 0x900))?;
        asm.xor(esi, esi)?;
        // EBX counts faults, EDX sums their places; the handler goes on at EDI.
        asm.xor(ebx, ebx)?;
        asm.xor(edx, edx)?;
        let mut number = 1;
        let mut attempt = |asm: &mut CodeAssembler, bytes: &[u8]| -> Built {
            let mut here = asm.create_label();
            let mut after = asm.create_label();
            asm.call(here)?;
            asm.set_label(&mut here)?;
            asm.pop(edi)?;
            // Where this attempt ends: pop, add, the bytes.
            asm.add(edi, 1 + 3 + 5 + bytes.len() as i32)?;
            asm.mov(ecx, number)?;
            asm.db(bytes)?;
            asm.set_label(&mut after)?;
            number *= 2;
            asm.nop()
        };
        asm.mov(eax, 0x28)?;
        asm.mov(fs, eax)?;
        // mov eax, fs:[0xffc], then [0xffd], then a store to [0x1000].
        attempt(asm, &[0x64, 0xa1, 0xfc, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa1, 0xfd, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa2, 0x00, 0x10, 0, 0])?;
        asm.mov(eax, 0x30)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0xfc, 0x0f, 0, 0])?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        asm.mov(eax, 0x38)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        attempt(asm, &[0x64, 0xa2, 0x00, 0x10, 0x30, 0])?;
        // Execute-only code can't be loaded as data; a null selector can, but not used.
        asm.mov(eax, 0x40)?;
        attempt(asm, &[0x8e, 0xe0])?;
        asm.xor(eax, eax)?;
        asm.mov(fs, eax)?;
        attempt(asm, &[0x64, 0xa1, 0x00, 0x10, 0x30, 0])?;
        // Code is readable here and never writable.
        attempt(asm, &[0x2e, 0xa1, 0x00, 0x10, 0x30, 0])?;
        attempt(asm, &[0x2e, 0xa2, 0x00, 0x10, 0x30, 0])?;
        flat_result(asm, 0, ebx)?;
        flat_result(asm, 1, edx)
    });
    let low = gate(0x8e, 8, HANDLER, 0);
    let at = 13 * 8;
    let guest = with_words(
        guest,
        IDT,
        &[(at, low as u32), (at + 4, (low >> 32) as u32)],
    );
    let guest = with_code(guest, HANDLER, |asm| {
        asm.inc(ebx)?;
        asm.add(edx, ecx)?;
        asm.add(edx, dword_ptr(esp))?;
        asm.add(esp, 4)?;
        asm.mov(dword_ptr(esp), edi)?;
        asm.iretd()
    });
    // QEMU's own translator checks no limits.
    let found = words_here(&guest);
    // Attempts 1, 2, 3, 6, 7, 8, 10 fault; the load of 0x40 names its selector.
    assert_eq!(found[0], 7);
    assert_eq!(found[1], 2 + 4 + 8 + 64 + 128 + 256 + 1024 + 0x40);
}
