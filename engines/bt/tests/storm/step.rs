//! What a guest does, one after another.

use crate::layout::STEP_WORDS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The end.
    End,
    /// Stores 8 bytes at a physical address.
    Store {
        at: u64,
        value: u64,
    },
    /// Stores 4 bytes at a physical address.
    Patch {
        at: u64,
        value: u32,
    },
    Invlpg(u64),
    Invpcid {
        kind: u64,
        pcid: u64,
        at: u64,
    },
    Cr0(u64),
    Cr3(u64),
    Cr4(u64),
    /// Calls a function in ring 0.
    Call(u64),
    /// Calls a function in ring 3, by iretq.
    CallUser(u64),
    /// Calls a function in ring 3, by sysretq.
    CallSysret(u64),
    /// Loads 4 bytes in ring 0.
    Load(u64),
    LoadUser(u64),
    /// Stores 4 bytes in ring 0.
    Write {
        at: u64,
        value: u32,
    },
    WriteUser {
        at: u64,
        value: u32,
    },
    /// rep movsb in ring 0.
    Copy {
        from: u64,
        to: u64,
        bytes: u64,
    },
    /// A device copies a page between physical addresses.
    Device {
        from: u64,
        to: u64,
    },
    /// Waits for its turn, and serializes.
    Wait(u64),
    /// Now it's the turn of whoever waits for this.
    Pass(u64),
}

impl Step {
    /// As the guest reads it: number of the handler, and operands for RBX, RCX and RDX.
    pub(crate) fn words(self) -> [u64; STEP_WORDS] {
        match self {
            Step::End => [0; 4],
            Step::Store { at, value } => [1, at, value, 0],
            Step::Patch { at, value } => [2, at, value.into(), 0],
            Step::Invlpg(at) => [3, at, 0, 0],
            Step::Invpcid { kind, pcid, at } => [4, kind, pcid, at],
            Step::Cr0(value) => [5, value, 0, 0],
            Step::Cr3(value) => [6, value, 0, 0],
            Step::Cr4(value) => [7, value, 0, 0],
            Step::Call(at) => [8, at, 0, 0],
            Step::CallUser(at) => [9, at, 0, 0],
            Step::CallSysret(at) => [10, at, 0, 0],
            Step::Load(at) => [11, at, 0, 0],
            Step::LoadUser(at) => [12, at, 0, 0],
            Step::Write { at, value } => [13, at, 0, value.into()],
            Step::WriteUser { at, value } => [14, at, 0, value.into()],
            Step::Copy { from, to, bytes } => [15, from, bytes, to],
            Step::Device { from, to } => [16, from, 0, to],
            Step::Wait(ticket) => [17, 0, 0, ticket],
            Step::Pass(ticket) => [18, 0, 0, ticket],
        }
    }
}

pub(crate) const HANDLERS: usize = 19;
