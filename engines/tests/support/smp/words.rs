//! What the steps are made of: the local APIC's registers in either form, counting, waiting.

use super::*;

impl Kernel {
    /// Data segments, and registers that hold the controllers' addresses for good.
    pub(super) fn settle_in(&self, asm: &mut CodeAssembler) -> Asm {
        asm.mov(eax, DATA_SEGMENT)?;
        asm.mov(ds, eax)?;
        asm.mov(es, eax)?;
        asm.mov(ss, eax)?;
        asm.mov(r15d, LAPIC)?;
        asm.mov(r14d, IOAPIC)
    }

    /// Writes a register of the local APIC. Clobbers eax, ecx, edx.
    pub(super) fn set(&self, asm: &mut CodeAssembler, offset: u32, value: u32) -> Asm {
        if !self.x2apic {
            return asm.mov(dword_ptr(r15 + offset), value);
        }
        asm.mov(ecx, 0x800 + (offset >> 4))?;
        asm.mov(eax, value)?;
        asm.xor(edx, edx)?;
        asm.wrmsr()
    }

    pub(super) fn switch_on(&self, asm: &mut CodeAssembler) -> Asm {
        if self.x2apic {
            asm.mov(ecx, 0x1b)?;
            asm.rdmsr()?;
            asm.or(eax, 0xc00)?;
            asm.wrmsr()?;
        }
        self.set(asm, 0xf0, 0x1ff)
    }

    /// The id of this processor's local APIC, to eax.
    pub(super) fn id(&self, asm: &mut CodeAssembler) -> Asm {
        if self.x2apic {
            asm.mov(ecx, 0x802)?;
            return asm.rdmsr();
        }
        asm.mov(eax, dword_ptr(r15 + 0x20))?;
        asm.shr(eax, 24)
    }

    /// Checks the id in its two forms, notes it, and counts the processor.
    pub(super) fn count_in(&self, asm: &mut CodeAssembler, labels: &Labels) -> Asm {
        self.id(asm)?;
        asm.mov(esi, eax)?;
        asm.mov(eax, 1)?;
        asm.cpuid()?;
        asm.shr(ebx, 24)?;
        asm.mov(edx, 1)?;
        asm.cmp(ebx, esi)?;
        asm.jne(labels.fail)?;
        if !self.x2apic {
            // Its logical id.
            asm.mov(ecx, esi)?;
            asm.mov(eax, 1 << 24)?;
            asm.shl(eax, cl)?;
            asm.mov(dword_ptr(r15 + 0xd0), eax)?;
        }
        asm.lock().bts(at(IDS), esi)?;
        asm.lock().inc(at(ONLINE))
    }

    pub(super) fn share(&self, asm: &mut CodeAssembler) -> Asm {
        let mut again = asm.create_label();
        asm.mov(ecx, INCREMENTS)?;
        asm.set_label(&mut again)?;
        asm.lock().inc(at(COUNTER))?;
        asm.dec(ecx)?;
        asm.jnz(again)?;
        asm.lock().inc(at(DONE))
    }

    /// Counts an interrupt of `vector`.
    pub(super) fn count(&self, asm: &mut CodeAssembler, vector: u32) -> Asm {
        self.id(asm)?;
        asm.lock().inc(dword_ptr(rax * 4 + count(vector, 0)))?;
        asm.lock().inc(at(total(vector)))
    }

    /// Sends `low` to the processor with this id.
    pub(super) fn command(&self, asm: &mut CodeAssembler, id: u32, low: u32) -> Asm {
        let high = if self.x2apic { id } else { id << 24 };
        self.command_to(asm, high, low)
    }

    pub(super) fn command_to(&self, asm: &mut CodeAssembler, high: u32, low: u32) -> Asm {
        if !self.x2apic {
            asm.mov(dword_ptr(r15 + 0x310), high)?;
            return asm.mov(dword_ptr(r15 + 0x300), low);
        }
        asm.mov(ecx, 0x830)?;
        asm.mov(eax, low)?;
        asm.mov(edx, high)?;
        asm.wrmsr()
    }
}

/// Where the vector's interrupts of one processor are counted.
pub(super) fn count(vector: u32, cpu: u32) -> u32 {
    COUNTS + (vector - FIRST) * 64 + cpu * 4
}

/// Where all of the vector's are counted.
pub(super) fn total(vector: u32) -> u32 {
    TOTALS + (vector - FIRST) * 4
}

/// Makes `handler` that of `vector`: an interrupt gate.
pub(super) fn gate(asm: &mut CodeAssembler, vector: u32, handler: u32) -> Asm {
    asm.mov(
        at(IDT + 16 * vector),
        u32::from(CODE_64) << 16 | handler & 0xffff,
    )?;
    asm.mov(at(IDT + 16 * vector + 4), handler & 0xffff_0000 | 0x8e00)
}

/// Waits until `address` holds eax.
pub(super) fn until(asm: &mut CodeAssembler, address: u32) -> Asm {
    let mut again = asm.create_label();
    let mut done = asm.create_label();
    asm.set_label(&mut again)?;
    asm.cmp(at(address), eax)?;
    asm.je(done)?;
    asm.pause()?;
    asm.jmp(again)?;
    asm.set_label(&mut done)?;
    asm.nop()
}

/// Waits in hlt until `address` is not 0.
pub(super) fn wait_halted(asm: &mut CodeAssembler, address: u32) -> Asm {
    let mut again = asm.create_label();
    let mut done = asm.create_label();
    asm.set_label(&mut again)?;
    asm.cli()?;
    asm.cmp(at(address), 0)?;
    asm.jne(done)?;
    asm.sti()?;
    asm.hlt()?;
    asm.jmp(again)?;
    asm.set_label(&mut done)?;
    asm.sti()
}

/// Fails with `number` unless `address` holds eax.
pub(super) fn expect(asm: &mut CodeAssembler, fail: CodeLabel, address: u32, number: u32) -> Asm {
    asm.mov(edx, number)?;
    asm.cmp(at(address), eax)?;
    asm.jne(fail)
}

/// Some time for the others.
pub(super) fn pause(asm: &mut CodeAssembler) -> Asm {
    let mut again = asm.create_label();
    asm.mov(ecx, 64)?;
    asm.set_label(&mut again)?;
    asm.out(0x80, al)?;
    asm.dec(ecx)?;
    asm.jnz(again)
}

pub(super) fn end(asm: &mut CodeAssembler, code: u32) -> Asm {
    asm.mov(eax, code)?;
    asm.out(0xf4, eax)
}

pub(super) fn save(asm: &mut CodeAssembler) -> Asm {
    asm.push(rax)?;
    asm.push(rcx)?;
    asm.push(rdx)
}

pub(super) fn restore(asm: &mut CodeAssembler) -> Asm {
    asm.pop(rdx)?;
    asm.pop(rcx)?;
    asm.pop(rax)?;
    asm.iretq()
}
