//! Every form of instruction with a memory operand, on RAM and on a device that behaves as memory, by an address
//! in a register and by one that the instruction holds: the same comes out, in registers, flags, extended state
//! and memory. Operands lie within a page or across two, of which one or both are the device's.
//!
//! Forms are found by decoding: every opcode of every map behind every prefix that may choose another
//! form.

use std::collections::HashSet;

use bt::Extended;
use engine_core::{CpuState, Vcpu};
use iced_x86::{Code, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::rig::{DEVICE, End, FREE, Rig, TABLES};

/// Two pages that are now RAM and now the device's.
const PLACE: u64 = 0x4000_0000;
const RAM: u64 = 0x60_0000;
const BYTES: usize = 0x2000;
const PAGE: usize = 0x1000;
const DIRECTORY: u64 = 0x5_1000;
const TABLE: u64 = 0x5_2000;
const CR4_OSXSAVE: u64 = 1 << 18;
/// Bytes of code before the form.
const PROLOGUE: u64 = 16 * 9 + 6;

/// All forms with a memory operand, most of them by [rbx], each once, with and without lock.
fn forms() -> Vec<(Vec<u8>, Instruction)> {
    let mut heads: Vec<(Vec<u8>, bool)> = Vec::new();
    for lock in [false, true] {
        for prefix in [None, Some(0x66u8), Some(0xf2), Some(0xf3)] {
            for rex in [None, Some(0x48u8)] {
                for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                    let mut head = Vec::new();
                    head.extend(lock.then_some(0xf0u8));
                    head.extend(prefix);
                    head.extend(rex);
                    head.extend(map);
                    heads.push((head, lock));
                }
            }
        }
    }
    for map in 1..=3u8 {
        for last in 0..16u8 {
            // W, vvvv = 5, L, pp.
            let third = last << 6 & 0x80 | 0b0101_0000 | last >> 1 & 4 | last & 3;
            heads.push((vec![0xc4, 0xe0 | map, third | (last & 4) << 5], false));
        }
    }
    let mut seen: HashSet<(Code, bool)> = HashSet::new();
    let mut forms = Vec::new();
    for (head, lock) in heads {
        for opcode in 0..=255u8 {
            for register in [2u8, 0, 1, 3, 4, 5, 6, 7] {
                let mut bytes = head.clone();
                // [rbx + 0] with a displacement, and an immediate behind it.
                bytes.extend([opcode, 0x43 | register << 3, 0, 0x11, 0, 0, 0, 0, 0, 0]);
                bytes.truncate(15);
                let instr = Decoder::new(64, &bytes, 0).decode();
                bytes.truncate(instr.len());
                if comparable(&instr) && seen.insert((instr.code(), lock)) {
                    forms.push((bytes, instr));
                }
            }
        }
    }
    forms
}

/// True for what accesses memory, and neither branches nor changes the tables that the rig stands on.
fn comparable(instr: &Instruction) -> bool {
    use Mnemonic::*;
    let accesses = instr.is_string_instruction()
        || (0..instr.op_count()).any(|operand| {
            matches!(
                instr.op_kind(operand),
                OpKind::Memory | OpKind::MemorySegRDI | OpKind::MemorySegEDI
            )
        });
    !instr.is_invalid()
        && accesses
        && instr.flow_control() == FlowControl::Next
        && !matches!(
            instr.mnemonic(),
            Lgdt | Lidt | Lldt | Ltr | Lmsw | Invlpg | Invpcid | Nop | Lea
        )
}

/// What a run leaves.
#[derive(Debug, PartialEq)]
struct Left {
    end: End,
    error: u32,
    state: CpuState,
    extended: Extended,
    memory: Vec<u8>,
}

fn contents() -> Vec<u8> {
    let mut word = 1u64;
    let mut bytes = Vec::new();
    while bytes.len() < BYTES {
        word = word
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        bytes.push((word >> 56) as u8);
    }
    bytes
}

/// A CPU whose tables lead to the two pages, with AVX, and what the pages and registers hold.
fn at_place() -> (Rig, Vec<u8>) {
    let mut rig = Rig::long();
    rig.word(TABLES + 0x1008, DIRECTORY | 3);
    rig.word(DIRECTORY, TABLE | 3);
    rig.vcpu.set_xcr0(7);
    rig.state.cr4 |= CR4_OSXSAVE;
    let contents = contents();
    rig.put(FREE, &contents[..512]);
    (rig, contents)
}

fn none(wrong: &[String]) {
    let shown = wrong.len().min(20);
    assert!(
        wrong.is_empty(),
        "{}\n{}",
        wrong.len(),
        wrong[..shown].join("\n")
    );
}

/// Runs a form with each of the two pages RAM or the device's.
fn run(rig: &mut Rig, form: &[u8], offset: u64, contents: &[u8], device: [bool; 2]) -> Left {
    rig.put(RAM, contents);
    rig.device_memory.clear();
    rig.device_memory.extend(contents);
    for (number, device) in (0u64..).zip(device) {
        let frame = if device { DEVICE } else { RAM };
        rig.word(TABLE + 8 * number, (frame + 0x1000 * number) | 3);
    }
    let target = PLACE + offset;
    rig.state.gpr = std::array::from_fn(|register| match register {
        0 => 0x1122_3344_5566_0008,
        1 => 3,
        3 | 6 | 7 => target,
        4 => crate::rig::STACK,
        _ => 0x0102_0304_0506_0708 * register as u64,
    });
    // vmovups ymm0 to ymm15 from FREE on; fninit; fld1; fldpi; the form; hlt
    let mut code = Vec::new();
    for register in 0..16u8 {
        let high = if register < 8 { 0x80 } else { 0 };
        code.extend([0xc5, 0x7c | high, 0x10, 0x04 | (register & 7) << 3, 0x25]);
        code.extend((FREE as u32 + 32 * u32::from(register)).to_le_bytes());
    }
    code.extend([0xdb, 0xe3, 0xd9, 0xe8, 0xd9, 0xeb]);
    assert_eq!(code.len() as u64, PROLOGUE);
    code.extend(form);
    code.push(0xf4);
    rig.bytes(&code);
    rig.vcpu.reset_extended();
    let end = rig.run();
    let mut memory = Vec::new();
    for (number, device) in device.into_iter().enumerate() {
        let from = number * PAGE;
        if device {
            memory.extend(&rig.device_memory[from..from + PAGE]);
        } else {
            for at in (from..from + PAGE).step_by(8) {
                memory.extend(rig.read(RAM + at as u64).to_le_bytes());
            }
        }
    }
    Left {
        end,
        error: if matches!(end, End::Vector(8 | 10..=14 | 17)) {
            rig.error()
        } else {
            0
        },
        state: rig.vcpu.state().expect("a state"),
        extended: rig.vcpu.extended(),
        memory,
    }
}

#[test]
fn device_memory_behaves_as_memory_for_every_form() {
    let (mut rig, contents) = at_place();
    let forms = forms();
    let (mut executed, mut wrong) = (0, Vec::new());
    for (bytes, instr) in &forms {
        for (offset, places) in [
            (0x100, &[[true, true]][..]),
            (0xffd, &[[true, true], [false, true], [true, false]]),
        ] {
            let expected = run(&mut rig, bytes, offset, &contents, [false; 2]);
            executed += usize::from(expected.end == End::Halt);
            for &device in places {
                let found = run(&mut rig, bytes, offset, &contents, device);
                if found != expected {
                    wrong.push(describe(instr, offset, device, &expected, &found));
                }
            }
        }
    }
    println!(
        "{} forms, {executed} of {} executed",
        forms.len(),
        2 * forms.len()
    );
    assert!(executed > forms.len());
    none(&wrong);
}

/// `form`, whose operand is [rbx + 0], with an operand that holds `target` itself, by itself or relative to RIP
/// in code whose form begins at `ip`.
fn holding(form: &[u8], target: u64, relative_to: Option<u64>) -> Option<Vec<u8>> {
    let mut decoder = Decoder::new(64, form, 0);
    let instr = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instr);
    if instr.memory_base() != Register::RBX || !offsets.has_displacement() {
        return None;
    }
    let (at, behind) = (
        offsets.displacement_offset(),
        &form[offsets.displacement_offset() + 1..],
    );
    let register = form[at - 1] & 0x38;
    let mut bytes = form[..at - 1].to_vec();
    match relative_to {
        None => {
            bytes.extend([register | 4, 0x25]);
            bytes.extend((target as u32).to_le_bytes());
        }
        Some(ip) => {
            let next = ip + (bytes.len() + 5 + behind.len()) as u64;
            bytes.push(register | 5);
            bytes.extend((target.wrapping_sub(next) as u32).to_le_bytes());
        }
    }
    bytes.extend(behind);
    (bytes.len() <= 15).then_some(bytes)
}

#[test]
fn an_address_in_the_instruction_is_one_in_a_register() {
    let (mut rig, contents) = at_place();
    let (mut executed, mut wrong) = (0, Vec::new());
    for (form, instr) in &forms() {
        for (offset, device) in [
            (0, [false; 2]),
            (0x40, [false; 2]),
            (0xe00, [false; 2]),
            (0x100, [true; 2]),
            (0xffd, [false; 2]),
            (0xffd, [false, true]),
        ] {
            let expected = run(&mut rig, form, offset, &contents, device);
            for relative_to in [None, Some(rig.state.rip + PROLOGUE)] {
                let Some(bytes) = holding(form, PLACE + offset, relative_to) else {
                    continue;
                };
                let mut found = run(&mut rig, &bytes, offset, &contents, device);
                executed += usize::from(found.end == End::Halt);
                if found.end == End::Halt && expected.end == End::Halt {
                    found.state.rip -= (bytes.len() - form.len()) as u64;
                }
                if found != expected {
                    wrong.push(describe(instr, offset, device, &expected, &found));
                }
            }
        }
    }
    println!("{executed} executed");
    assert!(executed > 10_000, "{executed}");
    none(&wrong);
}

fn describe(
    instr: &Instruction,
    offset: u64,
    device: [bool; 2],
    ram: &Left,
    found: &Left,
) -> String {
    let mut text = format!("{:?} `{instr}` at {offset:#x} {device:?}:", instr.code());
    if (ram.end, ram.error) != (found.end, found.error) {
        text += &format!(
            " {:?} {} not {:?} {}",
            found.end, found.error, ram.end, ram.error
        );
    }
    let registers = |state: &CpuState| (state.gpr, state.rip, state.rflags, state.cr2);
    let (left, right) = (registers(&ram.state), registers(&found.state));
    if left != right {
        text += &format!(" registers {right:x?} not {left:x?}");
    } else if ram.state != found.state {
        text += " system registers";
    }
    if ram.extended != found.extended {
        text += " extended state";
    }
    let pairs = ram.memory.iter().zip(&found.memory);
    if let Some(at) = pairs.clone().position(|(left, right)| left != right) {
        let count = pairs.filter(|(left, right)| left != right).count();
        text += &format!(" {count} bytes from {at:#x}");
    }
    text
}
