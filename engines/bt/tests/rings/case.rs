//! One case: registers and system registers to start with, and what differs from the usual sandbox.

use crate::layout::*;

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) header: Vec<u32>,
    /// Offset in the sandbox, and bytes.
    pub(crate) patches: Vec<(u32, Vec<u8>)>,
}

impl Case {
    /// 32-bit protected mode without paging, or 64-bit mode, in ring 0, with nothing to run.
    pub(crate) fn new(long: bool) -> Case {
        let mut case = Case {
            header: vec![0; header::SIZE as usize / 4],
            patches: Vec::new(),
        };
        let base = SANDBOX + at::GDT;
        let idt = SANDBOX + at::IDT;
        let idt_limit = crate::sandbox::IDT_ENTRIES * if long { 16 } else { 8 } - 1;
        for (field, value) in [
            (header::LONG, long.into()),
            (header::CR0, if long { 0x8001_0033 } else { 0x33 }),
            (header::CR3, SANDBOX + at::TABLES),
            (header::CR4, if long { 0x620 } else { 0x600 }),
            (header::EFER, if long { 0xd01 } else { 0x800 }),
            (header::GDTR, 0x3ff | base << 16),
            (header::GDTR + 4, base >> 16),
            (header::IDTR, idt_limit | idt << 16),
            (header::IDTR + 4, idt >> 16),
            (header::TR, crate::sandbox::select::TSS.into()),
            (header::LDTR, crate::sandbox::select::LDT.into()),
            (header::BY_IRET, long.into()),
            (header::FLAGS, 2),
        ] {
            case.set(field, value);
        }
        case
    }

    pub(crate) fn set(&mut self, field: u32, value: u32) {
        self.header[field as usize / 4] = value;
    }

    pub(crate) fn get(&self, field: u32) -> u32 {
        self.header[field as usize / 4]
    }

    pub(crate) fn set_gpr(&mut self, number: u32, value: u64) {
        self.set(header::GPR + 8 * number, value as u32);
        self.set(header::GPR + 8 * number + 4, (value >> 32) as u32);
    }

    pub(crate) fn patch(&mut self, at: u32, bytes: &[u8]) {
        self.patches.push((at, bytes.to_vec()));
    }

    pub(crate) fn qword(&mut self, at: u32, value: u64) {
        self.patch(at, &value.to_le_bytes());
    }

    /// As the executive reads it.
    pub(crate) fn record(&self) -> Vec<u8> {
        let mut record: Vec<u8> = self
            .header
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let count = (self.patches.len() as u32).to_le_bytes();
        record[header::PATCHES as usize..][..4].copy_from_slice(&count);
        for (at, bytes) in &self.patches {
            record.extend(at.to_le_bytes());
            record.extend((bytes.len() as u32).to_le_bytes());
            record.extend(bytes);
        }
        record
    }
}
