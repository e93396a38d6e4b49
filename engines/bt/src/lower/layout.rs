//! Addresses that lowered code refers to.

use std::mem::offset_of;

use crate::{
    arena::Arena,
    context::Context,
    stubs::Stubs,
    tlb::{BANKS, TLB_KINDS},
    transitions::Transitions,
};

/// Bytes of the code that leaves for the runtime.
pub(crate) const LEAVING: usize = 12 + 5;

/// Addresses that lowered code refers to, as displacements.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(super) context: i32,
    pub(super) doorbell: i32,
    pub(super) tlb: [i32; BANKS * TLB_KINDS],
    pub(super) jump: [i32; 2 * BANKS],
    pub(super) targets: [i32; BANKS],
    pub(super) exit: u64,
    pub(super) callout: u64,
    pub(super) miss: [u64; BANKS],
    pub(super) privileged: i32,
    pub(super) transitions: [Transitions; BANKS],
    /// The host has rorx.
    pub(super) rotates: bool,
    /// Code counts what it does.
    pub(super) counting: bool,
}

impl Layout {
    /// `miss` is where indirect branches of code that uses the window go without a target, `callout`
    /// where code goes that calls Rust.
    pub(crate) fn new(
        arena: &Arena,
        stubs: &Stubs,
        transitions: [Transitions; BANKS],
        miss: [u64; BANKS],
        callout: u64,
        counting: bool,
    ) -> Layout {
        Layout {
            context: arena.context_disp(),
            doorbell: arena.doorbell() as i32,
            tlb: std::array::from_fn(|index| arena.tlb(index) as i32),
            jump: std::array::from_fn(|index| arena.jump(index) as i32),
            targets: std::array::from_fn(|bank| arena.targets(bank) as i32),
            exit: stubs.exit,
            callout,
            miss,
            rotates: std::arch::is_x86_feature_detected!("bmi2"),
            counting,
            privileged: arena.privileged() as usize as i32,
            transitions,
        }
    }

    pub(super) fn slot(&self, offset: usize) -> i32 {
        self.context + offset as i32
    }

    pub(super) fn spill(&self, register: u8) -> i32 {
        self.slot(offset_of!(Context, spill)) + 8 * i32::from(register)
    }

    pub(super) fn lazy_flags(&self) -> i32 {
        self.slot(offset_of!(Context, lazy_flags))
    }

    pub(super) fn target(&self) -> i32 {
        self.slot(offset_of!(Context, target))
    }

    pub(super) fn site(&self) -> i32 {
        self.slot(offset_of!(Context, site))
    }

    /// `mov qword [site], number` and `jmp exit`, for the host address `at`.
    pub(crate) fn leaving(&self, number: i32, at: u64) -> [u8; LEAVING] {
        let mut code = [0; LEAVING];
        code[..4].copy_from_slice(&[0x48, 0xc7, 0x04, 0x25]);
        code[4..8].copy_from_slice(&self.site().to_le_bytes());
        code[8..12].copy_from_slice(&number.to_le_bytes());
        code[12] = 0xe9;
        let rel = self.exit.wrapping_sub(at + LEAVING as u64) as i32;
        code[13..].copy_from_slice(&rel.to_le_bytes());
        code
    }
}
