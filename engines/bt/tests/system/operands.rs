//! Device memory where an operating system does not put it: under two pages at once, at either end of a
//! port string, and as the operand of instructions that load system registers.

use iced_x86::code_asm::*;

use crate::rig::{CODE, CS_64, DATA, DEVICE, End, FREE, GDT, HANDLERS, Rig, TABLES, TSS_SELECTOR};

const GP: u8 = 13;
/// Two pages here are one page of the device.
const TWICE: u64 = 0x2000_0000;
const TABLE: u64 = 0x5_0000;

/// A rig with a page of device memory that begins with `contents`, mapped at [`DEVICE`] and twice at
/// [`TWICE`].
fn rig(contents: &[u8]) -> Rig {
    let mut rig = Rig::long();
    rig.devices.device_memory = contents.to_vec();
    rig.devices.device_memory.resize(0x1000, 0);
    rig.word(TABLES + 0x2000 + 8 * (TWICE >> 21), TABLE | 3);
    for page in 0..2 {
        rig.word(TABLE + 8 * page, DEVICE | 3);
    }
    rig
}

#[track_caller]
fn halts(rig: &mut Rig) {
    assert_eq!(rig.run(), End::Halt);
}

/// A general register after the run.
fn gpr(rig: &Rig, number: usize) -> u64 {
    rig.after().gpr[number]
}

#[test]
fn an_access_across_two_pages_of_one_device_page_has_both_its_ends() {
    let mut rig = rig(&[]);
    rig.code(|asm| {
        asm.mov(rbx, TWICE + 0xfff)?;
        asm.mov(byte_ptr(rbx), 0x99)?;
        asm.mov(byte_ptr(rbx + 1), 0x77)?;
        asm.movzx(edi, word_ptr(rbx))?;
        asm.mov(word_ptr(rbx), 0x88aa)?;
        asm.mov(rsi, qword_ptr(rbx - 3))
    });
    halts(&mut rig);
    assert_eq!(gpr(&rig, 7), 0x7799);
    assert_eq!(gpr(&rig, 6), 0x88_aa00_0000);
    assert_eq!(
        (rig.device_memory[0xfff], rig.device_memory[0]),
        (0xaa, 0x88)
    );
}

#[test]
fn port_strings_reach_devices_at_both_ends() {
    let mut rig = rig(b"abcdefgh");
    rig.devices.device = 0x5a;
    rig.code(|asm| {
        asm.mov(edx, 0xe0)?;
        asm.mov(rdi, TWICE + 0xfc0)?;
        asm.mov(ecx, 1024)?;
        asm.rep().insb()?;
        asm.mov(rbx, rcx)
    });
    halts(&mut rig);
    assert_eq!((gpr(&rig, 3), gpr(&rig, 7)), (0, TWICE + 0xfc0 + 1024));
    assert!(rig.device_memory[..0x3c0].iter().all(|byte| *byte == 0x5a));
    assert!(rig.device_memory[0xfc0..].iter().all(|byte| *byte == 0x5a));
    assert_eq!(rig.device_memory[0x3c0..0x3c8], [0; 8]);
    for (down, order) in [(false, *b"abcd"), (true, *b"dcba")] {
        rig.devices.device_memory[..4].copy_from_slice(b"abcd");
        rig.code(|asm| {
            if down {
                asm.std()?;
            }
            asm.mov(edx, 0xe0)?;
            asm.mov(rsi, DEVICE + if down { 3 } else { 0 })?;
            asm.mov(ecx, 4)?;
            asm.rep().outsb()?;
            asm.cld()
        });
        halts(&mut rig);
        let written: Vec<u8> = rig.written.iter().map(|(_, value)| *value as u8).collect();
        assert_eq!(written, order);
    }
}

#[test]
fn system_registers_are_loaded_from_device_memory() {
    let mut rig = rig(&[]);
    rig.devices.device_memory[..2].copy_from_slice(&TSS_SELECTOR.to_le_bytes());
    // The TSS is available again.
    let descriptor = GDT + u64::from(TSS_SELECTOR);
    let entry = rig.read(descriptor);
    rig.word(descriptor, entry & !(2 << 40));
    rig.code(|asm| {
        asm.mov(rbx, DEVICE)?;
        asm.ltr(word_ptr(rbx))?;
        asm.str(edi)
    });
    halts(&mut rig);
    assert_eq!(gpr(&rig, 7), u64::from(TSS_SELECTOR));
    assert_eq!(rig.read(descriptor), entry, "busy again");

    // smsw writes two bytes of eight; lmsw sets TS and can't clear PE.
    rig.devices.device_memory[..8].copy_from_slice(&0x1234_5678_9abc_def0u64.to_le_bytes());
    rig.devices.device_memory[8..10].copy_from_slice(&0x3au16.to_le_bytes());
    rig.code(|asm| {
        asm.mov(rbx, DEVICE)?;
        asm.smsw(word_ptr(rbx))?;
        asm.mov(rdi, cr0)?;
        asm.lmsw(word_ptr(rbx + 8))?;
        asm.mov(rsi, cr0)
    });
    halts(&mut rig);
    let expected = 0x1234_5678_9abc_0000 | gpr(&rig, 7) & 0xffff;
    assert_eq!(rig.device_memory[..8], expected.to_le_bytes());
    assert_eq!(gpr(&rig, 6) & 0xf, 0xb);
}

#[test]
fn segments_and_jump_targets_are_loaded_from_device_memory() {
    let mut rig = rig(&[]);
    rig.devices.device_memory[2] = 3;
    // A null selector is a stack segment of ring 0, but only with RPL 0.
    rig.code(|asm| {
        asm.mov(rbx, DEVICE)?;
        asm.mov(ss, word_ptr(rbx))?;
        asm.mov(edi, ss)?;
        asm.mov(ss, word_ptr(rbx + 2))
    });
    assert_eq!(rig.run(), End::Vector(GP));
    assert_eq!(gpr(&rig, 7), 0);
    // A jump to nowhere faults where it stands.
    rig.devices.device_memory[..8].copy_from_slice(&[0x11; 8]);
    rig.code(|asm| {
        asm.mov(rbx, DEVICE)?;
        asm.jmp(qword_ptr(rbx))
    });
    assert_eq!(rig.run(), End::Vector(GP));
    assert_eq!(rig.read(gpr(&rig, 4) + 8), CODE + 10);
    // A far one of 64 bits loads both.
    let mut pointer = (HANDLERS + 0x80).to_le_bytes().to_vec();
    pointer.extend(CS_64.to_le_bytes());
    rig.devices.device_memory[..10].copy_from_slice(&pointer);
    rig.code(|asm| {
        asm.mov(rbx, DEVICE)?;
        asm.db(&[0x48, 0xff, 0x2b])
    });
    assert_eq!(rig.run(), End::Vector(8), "the handler is where it leads");
}

#[test]
fn a_segment_that_iret_takes_away_keeps_its_base() {
    // GS is of ring 0; its base has been given by MSR.
    let mut rig = Rig::long();
    rig.state.segments[5].base = FREE;
    rig.state.segments[5].selector = DATA;
    rig.word(FREE + 0x40, 0xdead_beef);
    for page in 0..512 {
        let at = TABLES + 0x2000 + 8 * page;
        let entry = rig.read(at);
        rig.word(at, entry | 4);
    }
    rig.code(|asm| {
        let mut user = asm.create_label();
        asm.push(0x2b)?;
        asm.push(0x3_4000)?;
        asm.push(2)?;
        asm.push(0x33)?;
        asm.lea(rax, ptr(user))?;
        asm.push(rax)?;
        asm.iretq()?;
        asm.set_label(&mut user)?;
        asm.mov(esi, gs)?;
        asm.mov(ecx, 0x40)?;
        asm.mov(rdi, qword_ptr(rcx).gs())
    });
    // The code's own hlt is privileged there.
    assert_eq!(rig.run(), End::Vector(GP));
    assert_eq!((gpr(&rig, 6), gpr(&rig, 7)), (0, 0xdead_beef));
}
