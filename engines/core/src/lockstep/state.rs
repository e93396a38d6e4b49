//! What of two states is compared, and what of an instruction can't be.

use vm_memory::{Bytes, GuestAddress};

use super::UNCOMPARED_FLAGS;
use crate::{CpuState, GuestRam};

/// rdtsc, rdtscp, cpuid, rdrand, rdseed, rdpid, with or without a prefix.
pub(super) fn has_own_result(code: &[u8; 4]) -> bool {
    let code = match code[0] {
        0x40..=0x4f | 0x66 | 0xf3 => &code[1..],
        _ => &code[..3],
    };
    match code {
        [0x0f, 0x31 | 0xa2, ..] | [0x0f, 0x01, 0xf9] => true,
        [0x0f, 0xc7, modrm] => modrm >> 6 == 3 && modrm >> 3 & 7 >= 6,
        _ => false,
    }
}

/// Physical address of a linear one in long mode's or no paging; enough for looking at code.
pub(super) fn linear(ram: &GuestRam, state: &CpuState, at: u64) -> Option<u64> {
    const PAGING: u64 = 1 << 31;
    const LONG_ACTIVE: u64 = 1 << 10;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    if state.cr0 & PAGING == 0 {
        return Some(at & 0xffff_ffff);
    }
    if state.efer & LONG_ACTIVE == 0 {
        return None;
    }
    let mut table = state.cr3 & FRAME;
    for shift in [39, 30, 21, 12] {
        let entry: u64 = ram
            .read_obj(GuestAddress(table + (at >> shift & 0x1ff) * 8))
            .ok()?;
        if entry & 1 == 0 {
            return None;
        }
        if shift == 12 || entry >> 7 & 1 == 1 {
            let offset = (1u64 << shift) - 1;
            return Some(entry & FRAME & !offset | at & offset);
        }
        table = entry & FRAME;
    }
    None
}

/// What is compared, as (name, reference, subject).
fn pairs(reference: &CpuState, subject: &CpuState) -> Vec<(&'static str, u64, u64)> {
    const GPR: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    const BASES: [&str; 6] = ["es", "cs", "ss", "ds", "fs base", "gs base"];
    let mut pairs = vec![
        ("rip", reference.rip, subject.rip),
        (
            "rflags",
            reference.rflags & !UNCOMPARED_FLAGS,
            subject.rflags & !UNCOMPARED_FLAGS,
        ),
        ("cr0", reference.cr0, subject.cr0),
        ("cr2", reference.cr2, subject.cr2),
        ("cr3", reference.cr3, subject.cr3),
        ("cr4", reference.cr4, subject.cr4),
        ("efer", reference.efer, subject.efer),
    ];
    for (index, name) in GPR.iter().enumerate() {
        pairs.push((name, reference.gpr[index], subject.gpr[index]));
    }
    for (index, name) in BASES.iter().enumerate() {
        let value = |state: &CpuState| match index {
            CpuState::FS | CpuState::GS => state.segments[index].base,
            _ => state.segments[index].selector.into(),
        };
        pairs.push((name, value(reference), value(subject)));
    }
    pairs
}

pub(super) fn same(reference: &CpuState, subject: &CpuState) -> bool {
    reference.rip == subject.rip && pairs(reference, subject).iter().all(|(_, a, b)| a == b)
}

pub(super) fn difference(reference: &CpuState, subject: &CpuState) -> String {
    let pairs = pairs(reference, subject);
    let different: Vec<String> = pairs
        .iter()
        .filter(|(_, a, b)| a != b)
        .map(|(name, a, b)| format!("{name} {b:#x}, the reference has {a:#x}"))
        .collect();
    different.join("; ")
}
