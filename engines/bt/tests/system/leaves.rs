//! Leaves that run in line with their callers: whatever becomes of them, of the stack or of the flags
//! meanwhile, it is as if they had been called.

use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::rig::{CODE, DEVICE, End, FREE, RSP0, Rig, STACK, TABLES};

const RET: u8 = 0xc3;
const HLT: u8 = 0xf4;
/// A large page of its own, and what it can be mapped to instead.
const PLACE: u64 = 2 << 21;
const OTHER: u64 = 3 << 21;

/// `mov eax, value; ret`.
fn leaf(value: u8) -> [u8; 6] {
    [0xb8, value, 0, 0, 0, RET]
}

/// True if the code where runs start goes through the code at `at` in line.
fn goes_through(rig: &Rig, at: u64) -> bool {
    rig.vcpu
        .listing(CODE..CODE + 0x400)
        .contains(&format!("{at:#12x}  "))
}

/// Calls `at`, and adds up what it answers, `times` times.
fn sum(asm: &mut Asm, at: u64, times: u32) -> Built {
    let mut again = asm.create_label();
    asm.xor(ebx, ebx)?;
    asm.mov(ecx, times)?;
    asm.set_label(&mut again)?;
    asm.call(at)?;
    asm.add(ebx, eax)?;
    asm.dec(ecx)?;
    asm.jne(again)
}

#[test]
fn a_leaf_runs_in_line() {
    let mut rig = Rig::long();
    // mov rax, rsp; lea rdx, [rax + 1]; ret
    rig.put(FREE, &[0x48, 0x89, 0xe0, 0x48, 0x8d, 0x50, 1, RET]);
    let end = rig.try_code(|asm| {
        asm.push(5)?;
        asm.call(FREE)?;
        asm.pop(rsi)?;
        asm.mov(rdi, rsp)
    });
    assert_eq!(end, End::Halt);
    assert!(goes_through(&rig, FREE));
    let gpr = rig.after().gpr;
    assert_eq!(
        [gpr[0], gpr[2], gpr[6], gpr[7]],
        [STACK - 16, STACK - 15, 5, STACK]
    );
    // What the call stored, below the stack.
    assert_eq!(rig.read(STACK - 16), CODE + 7);
}

#[test]
fn a_return_may_drop_arguments() {
    let mut rig = Rig::long();
    rig.put(FREE, &[0xc2, 0x18, 0]);
    let end = rig.try_code(|asm| {
        asm.push(1)?;
        asm.push(2)?;
        asm.push(3)?;
        asm.call(FREE)?;
        asm.mov(rdi, rsp)
    });
    assert_eq!((end, rig.after().gpr[7]), (End::Halt, STACK));
    assert!(goes_through(&rig, FREE));
}

#[test]
fn a_leaf_that_is_changed_from_outside_is_run_as_it_is() {
    for at in [FREE, CODE + 0x800] {
        let mut rig = Rig::long();
        rig.put(at, &leaf(3));
        rig.code(|asm| sum(asm, at, 50));
        for value in [3, 4, 5] {
            rig.put(at, &leaf(value));
            for _ in 0..2 {
                assert_eq!(rig.run(), End::Halt);
                assert_eq!(rig.after().gpr[3], 50 * u64::from(value));
                assert!(goes_through(&rig, at));
            }
        }
        // No leaf any more: push rdi; pop rax; ret.
        rig.put(at, &[0x57, 0x58, RET]);
        rig.state.gpr[7] = 9;
        assert_eq!(rig.run(), End::Halt);
        assert_eq!(rig.after().gpr[3], 450);
        assert!(!goes_through(&rig, at));
    }
}

#[test]
fn a_caller_may_change_its_leaf_on_the_way() {
    for at in [FREE, CODE + 0x800] {
        let mut rig = Rig::long();
        rig.put(at, &leaf(0));
        let end = rig.try_code(|asm| {
            let mut again = asm.create_label();
            asm.xor(ebx, ebx)?;
            asm.mov(ecx, 100)?;
            asm.set_label(&mut again)?;
            asm.mov(byte_ptr(at + 1), cl)?;
            asm.call(at)?;
            asm.add(ebx, eax)?;
            asm.dec(ecx)?;
            asm.jne(again)
        });
        assert_eq!(end, End::Halt);
        assert_eq!(rig.after().gpr[3], 5050);
    }
}

#[test]
fn the_return_address_may_overwrite_the_leaf() {
    let mut rig = Rig::long();
    // Two nops of four bytes, then another leaf, until the call stores its return address there.
    let mut bytes = [
        0x0f, 0x1f, 0x40, 0, 0x0f, 0x1f, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    bytes[8..14].copy_from_slice(&leaf(1));
    rig.put(FREE, &bytes);
    let call = |rig: &mut Rig, stack: u64| {
        rig.state.gpr[4] = stack;
        // The return address begins with the opcode of hlt.
        rig.state.rip = CODE + u64::from(HLT) - 5;
        rig.code(|asm| {
            asm.call(FREE)?;
            asm.mov(ebx, 7)
        });
        assert_eq!(rig.run(), End::Halt);
        rig.after()
    };
    let state = call(&mut rig, STACK);
    assert_eq!((state.gpr[0], state.gpr[3]), (1, 7));
    assert!(goes_through(&rig, FREE));
    let state = call(&mut rig, FREE + 16);
    assert_eq!((state.rip, state.gpr[3]), (FREE + 9, 0));
}

#[test]
fn a_stack_that_is_a_device_says_where_to_return() {
    for device_memory in [vec![0; 0x1000], Vec::new()] {
        let forgets = device_memory.is_empty();
        let mut rig = Rig::long();
        rig.put(FREE, &leaf(3));
        rig.put(0x0101_0101_0101_0101 & 0xff_ffff, &[HLT]);
        rig.devices.device_memory = device_memory;
        // What reads answer where there is no memory: not a canonical address.
        rig.devices.device = 1;
        rig.state.gpr[4] = DEVICE + 0x800;
        let end = rig.try_code(|asm| {
            asm.call(FREE)?;
            asm.mov(ebx, 7)
        });
        assert!(goes_through(&rig, FREE));
        let state = rig.after();
        if forgets {
            // #GP, whose frame goes nowhere.
            assert_ne!(end, End::Halt);
            assert_eq!(state.gpr[3], 0);
        } else {
            assert_eq!(end, End::Halt);
            assert_eq!((state.gpr[0], state.gpr[3]), (3, 7));
        }
        assert!(rig.accesses.contains(&(false, DEVICE + 0x7f8, 8)));
    }
}

#[test]
fn a_call_whose_stack_is_not_there_faults_before_its_leaf() {
    let mut rig = Rig::long();
    let table = rig.small_pages();
    rig.put(FREE, &leaf(3));
    rig.code(|asm| {
        asm.call(FREE)?;
        asm.mov(ebx, 7)
    });
    assert_eq!(rig.run(), End::Halt);
    assert!(goes_through(&rig, FREE));
    // The frame of the fault goes to another stack.
    rig.word(crate::rig::IDT + 16 * 14, {
        crate::rig::gate(0x8e, crate::rig::CS_64, crate::rig::HANDLERS + 16 * 14) | 1 << 32
    });
    rig.word(crate::rig::TSS + 0x24, RSP0);
    for (entry, error) in [(0, 2), ((STACK - 0x1000) | 1, 3)] {
        rig.word(table + 8 * ((STACK >> 12) - 1), entry);
        rig.state.gpr[0] = 1;
        assert_eq!(rig.run(), End::Vector(14));
        let state = rig.after();
        assert_eq!((state.gpr[0], state.cr2), (1, STACK - 8));
        assert_eq!(rig.error(), error);
        let frame = state.gpr[4];
        assert_eq!([rig.read(frame + 8), rig.read(frame + 32)], [CODE, STACK]);
    }
}

#[test]
fn a_fault_in_a_leaf_is_a_fault_in_the_callee() {
    let mut rig = Rig::long();
    // mov eax, 7; div ecx; ret
    rig.put(FREE, &[0xb8, 7, 0, 0, 0, 0xf7, 0xf1, RET]);
    rig.code(|asm| {
        asm.call(FREE)?;
        asm.mov(ebx, 7)
    });
    rig.state.gpr[1] = 2;
    assert_eq!(rig.run(), End::Halt);
    assert_eq!((rig.after().gpr[0], rig.after().gpr[3]), (3, 7));
    assert!(goes_through(&rig, FREE));
    rig.state.gpr[1] = 0;
    assert_eq!(rig.run(), End::Vector(0));
    let state = rig.after();
    assert_eq!((state.gpr[0], state.gpr[3]), (7, 0));
    let frame = state.gpr[4];
    assert_eq!(
        [rig.read(frame), rig.read(frame + 24), rig.read(STACK - 8)],
        [FREE + 5, STACK - 8, CODE + 5]
    );
}

/// A leaf at PLACE is called in two rounds, then what `change` does is done, then it is called again.
fn remapped(change: impl FnOnce(&mut Asm) -> Built) -> u64 {
    let mut rig = Rig::long();
    rig.put(PLACE, &leaf(1));
    rig.put(OTHER, &leaf(2));
    // Everything again, with PLACE elsewhere.
    rig.word(TABLES + 0x8000, (TABLES + 0x9000) | 7);
    rig.word(TABLES + 0x9000, (TABLES + 0xa000) | 7);
    for page in 0..8 {
        let at = if page << 21 == PLACE {
            OTHER
        } else {
            page << 21
        };
        rig.word(TABLES + 0xa000 + 8 * page, at | 0xe3);
    }
    let end = rig.try_code(|asm| {
        let mut again = asm.create_label();
        let mut over = asm.create_label();
        asm.xor(edi, edi)?;
        asm.xor(esi, esi)?;
        asm.set_label(&mut again)?;
        sum(asm, PLACE, 20)?;
        asm.imul_3(esi, esi, 100)?;
        asm.add(esi, ebx)?;
        asm.inc(edi)?;
        asm.cmp(edi, 2)?;
        asm.jne(over)?;
        change(asm)?;
        asm.set_label(&mut over)?;
        // Links within the page, taken before.
        asm.cmp(edi, 3)?;
        asm.jne(again)
    });
    assert_eq!(end, End::Halt);
    assert!(goes_through(&rig, PLACE));
    rig.after().gpr[6]
}

fn map_elsewhere(asm: &mut Asm) -> Built {
    asm.mov(rcx, TABLES + 0x2000 + 8 * (PLACE >> 21))?;
    asm.mov(rdx, OTHER | 0xe3)?;
    asm.mov(qword_ptr(rcx), rdx)
}

#[test]
fn a_leaf_that_is_mapped_elsewhere_is_found_there() {
    let invalidated = remapped(|asm| {
        map_elsewhere(asm)?;
        asm.mov(rcx, PLACE)?;
        asm.invlpg(ptr(rcx))
    });
    assert_eq!(invalidated, 20_2040);
    let reloaded = remapped(|asm| {
        map_elsewhere(asm)?;
        asm.mov(rcx, cr3)?;
        asm.mov(cr3, rcx)
    });
    assert_eq!(reloaded, 20_2040);
    let exchanged = remapped(|asm| {
        asm.mov(rcx, TABLES + 0x8000)?;
        asm.mov(cr3, rcx)
    });
    assert_eq!(exchanged, 20_2040);
}

#[test]
fn a_leaf_that_may_not_be_executed_any_more_is_not() {
    for (entry, error) in [(PLACE | 0xe3 | 1 << 63, 0x11), (PLACE | 0xe2, 0x10)] {
        let mut rig = Rig::long();
        rig.put(PLACE, &leaf(1));
        rig.code(|asm| {
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            sum(asm, PLACE, 20)?;
            asm.mov(rcx, TABLES + 0x2000 + 8 * (PLACE >> 21))?;
            asm.mov(rdx, entry)?;
            asm.mov(qword_ptr(rcx), rdx)?;
            asm.mov(rcx, PLACE)?;
            asm.invlpg(ptr(rcx))?;
            asm.jmp(again)
        });
        assert_eq!(rig.run(), End::Vector(14));
        assert_eq!(rig.error(), error);
        let state = rig.after();
        assert_eq!((state.cr2, rig.read(state.gpr[4] + 8)), (PLACE, PLACE));
        assert_eq!(state.gpr[3], 0);
    }
}

#[test]
fn an_indirect_branch_to_the_caller_finds_the_leaf_of_now() {
    let mut rig = Rig::long();
    rig.put(PLACE, &leaf(1));
    rig.put(OTHER, &leaf(2));
    // call PLACE; jmp rsi
    let call = PLACE.wrapping_sub(FREE + 5) as u32;
    let [a, b, c, d] = call.to_le_bytes();
    rig.put(FREE, &[0xe8, a, b, c, d, 0xff, 0xe6]);
    let end = rig.try_code(|asm| {
        let mut again = asm.create_label();
        let mut back = asm.create_label();
        let mut over = asm.create_label();
        asm.xor(ebx, ebx)?;
        asm.xor(ebp, ebp)?;
        asm.mov(rdi, FREE)?;
        asm.lea(rsi, qword_ptr(back))?;
        asm.set_label(&mut again)?;
        asm.jmp(rdi)?;
        asm.set_label(&mut back)?;
        asm.imul_3(ebx, ebx, 3)?;
        asm.add(ebx, eax)?;
        asm.inc(ebp)?;
        asm.cmp(ebp, 6)?;
        asm.je(over)?;
        asm.cmp(ebp, 3)?;
        asm.jne(again)?;
        map_elsewhere(asm)?;
        asm.mov(rcx, PLACE)?;
        asm.invlpg(ptr(rcx))?;
        asm.jmp(again)?;
        asm.set_label(&mut over)?;
        asm.nop()
    });
    assert_eq!(end, End::Halt);
    assert!(rig.vcpu.listing(FREE..FREE + 1).contains("jmp rsi"));
    let expected = [1, 1, 1, 2, 2, 2]
        .into_iter()
        .fold(0, |sum, value| sum * 3 + value);
    assert_eq!(rig.after().gpr[3], expected);
}

#[test]
fn a_function_that_changes_its_return_address_returns_there() {
    let mut rig = Rig::long();
    // add qword [rsp], 5; ret
    rig.put(FREE, &[0x48, 0x83, 0x04, 0x24, 5, RET]);
    // mov rsp, rdi; ret
    rig.put(FREE + 0x200, &[0x48, 0x89, 0xfc, RET]);
    // lea rsp, [rsp + 8]; ret
    rig.put(FREE + 0x300, &[0x48, 0x8d, 0x64, 0x24, 8, RET]);
    let end = rig.try_code(|asm| {
        let mut back = asm.create_label();
        asm.call(FREE)?;
        asm.mov(ebx, 1)?;
        asm.lea(rsi, qword_ptr(back))?;
        asm.lea(rdi, qword_ptr(rsp - 0x100))?;
        asm.mov(qword_ptr(rdi), rsi)?;
        asm.call(FREE + 0x200)?;
        asm.mov(ebx, 3)?;
        asm.set_label(&mut back)?;
        asm.nop()
    });
    assert_eq!((end, rig.after().gpr[3]), (End::Halt, 0));
    let end = rig.try_code(|asm| {
        let mut back = asm.create_label();
        asm.lea(rsi, qword_ptr(back))?;
        asm.push(rsi)?;
        asm.call(FREE + 0x300)?;
        asm.mov(ebx, 3)?;
        asm.set_label(&mut back)?;
        asm.nop()
    });
    assert_eq!((end, rig.after().gpr[3]), (End::Halt, 0));
}

#[test]
fn a_leaf_across_two_pages_is_called() {
    let mut rig = Rig::long();
    rig.put(FREE + 0xffb, &leaf(3));
    assert_eq!(rig.try_code(|asm| sum(asm, FREE + 0xffb, 20)), End::Halt);
    assert_eq!(rig.after().gpr[3], 60);
    assert!(!goes_through(&rig, FREE + 0xffb));
    // A call at the end of its page: nothing follows there.
    rig.put(FREE, &leaf(3));
    let at = CODE + 0x1000 - 5;
    rig.state.rip = at;
    let end = rig.try_code(|asm| {
        asm.call(FREE)?;
        asm.mov(ebx, 7)
    });
    assert_eq!((end, rig.after().gpr[3]), (End::Halt, 7));
    // What follows is cut off there.
    rig.state.rip = at - 2;
    let end = rig.try_code(|asm| {
        asm.call(FREE)?;
        asm.mov(ebx, 8)
    });
    assert_eq!((end, rig.after().gpr[3]), (End::Halt, 8));
}

#[test]
fn a_step_at_a_time_sees_every_instruction_of_a_leaf() {
    let mut rig = Rig::long();
    rig.put(FREE, &leaf(3));
    // The handler counts and goes on: inc r15; iretq.
    let handler = FREE + 0x1000;
    rig.put(handler, &[0x49, 0xff, 0xc7, 0x48, 0xcf]);
    let gate = crate::rig::gate(0x8e, crate::rig::CS_64, handler);
    rig.word(crate::rig::IDT + 16, gate);
    rig.code(|asm| {
        asm.pushfq()?;
        asm.or(dword_ptr(rsp), 0x100)?;
        asm.mov(ecx, 2)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.call(FREE)?;
        asm.dec(ecx)?;
        asm.jne(again)?;
        asm.mov(ecx, 1)?;
        asm.popfq()?;
        asm.call(FREE)?;
        asm.pushfq()?;
        asm.and(dword_ptr(rsp), !0x100)?;
        asm.popfq()
    });
    assert_eq!(rig.run(), End::Halt);
    // call, mov, ret, pushf, and, popf: the step in which TF goes still traps.
    assert_eq!(rig.after().gpr[15], 6);
}
