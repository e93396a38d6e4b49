//! What is tried: the boot processor's steps, and what the others and the handlers do meanwhile.

use super::words::*;
use super::*;

impl Kernel {
    pub(super) fn steps(&self, asm: &mut CodeAssembler, labels: &Labels) -> Asm {
        let fail = labels.fail;
        // 1: everybody starts.
        self.command(asm, 0, OTHERS | ASSERT | INIT)?;
        pause(asm)?;
        for _ in 0..2 {
            self.command(asm, 0, OTHERS | ASSERT | START_UP | START_PAGE)?;
            pause(asm)?;
        }
        asm.mov(eax, at(CPUS))?;
        until(asm, ONLINE)?;
        // 2: everybody has another id, from 0 on.
        asm.mov(ecx, at(CPUS))?;
        asm.mov(eax, 1)?;
        asm.shl(eax, cl)?;
        asm.dec(eax)?;
        expect(asm, fail, IDS, 2)?;
        // 3: no increment is lost.
        asm.mov(at(GO), 1)?;
        self.share(asm)?;
        asm.mov(eax, at(CPUS))?;
        until(asm, DONE)?;
        asm.imul_3(eax, eax, INCREMENTS as i32)?;
        expect(asm, fail, COUNTER, 3)?;
        // 4: an interrupt for each of the others alone.
        for other in 1..4 {
            self.command(asm, other, FIXED | ASSERT)?;
            asm.mov(eax, other)?;
            until(asm, total(FIXED))?;
            asm.mov(eax, 1)?;
            expect(asm, fail, count(FIXED, other), 4)?;
        }
        // 5: for everybody, the sender too.
        self.command(asm, 0, EVERYBODY | ASSERT | ALL)?;
        asm.sti()?;
        asm.mov(eax, at(CPUS))?;
        until(asm, total(ALL))?;
        // 6: for some by their logical ids: their bits, or in x2APIC mode the cluster's.
        let mask = if self.x2apic { 0b1100 } else { 0b1100 << 24 };
        self.command_to(asm, mask, BY_MASK | ASSERT | LOGICAL)?;
        asm.mov(eax, 2)?;
        until(asm, total(LOGICAL))?;
        for (cpu, times) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
            asm.mov(eax, times)?;
            expect(asm, fail, count(LOGICAL, cpu), 6)?;
        }
        // 7: for one of them.
        let mask = if self.x2apic { 0b1110 } else { 0b1110 << 24 };
        self.command_to(asm, mask, BY_MASK | LOWEST_PRIORITY | ASSERT | LOWEST)?;
        asm.mov(eax, 1)?;
        until(asm, total(LOWEST))?;
        // 8: there and back.
        self.command(asm, 1, ASSERT | PING)?;
        wait_halted(asm, total(PONG))?;
        asm.mov(eax, 1)?;
        expect(asm, fail, count(PONG, 0), 8)?;
        // 9: an NMI for all others, in and out of hlt.
        self.command(asm, 0, OTHERS | ASSERT | NMI)?;
        asm.mov(eax, at(CPUS))?;
        asm.dec(eax)?;
        until(asm, total(FIRST + NMI_ROW))?;
        asm.mov(eax, 0)?;
        expect(asm, fail, count(FIRST + NMI_ROW, 0), 9)?;
        // 10: everybody's own timer.
        self.command(asm, 0, EVERYBODY | ASSERT | START_TIMER)?;
        asm.mov(eax, at(CPUS))?;
        until(asm, total(TIMER))?;
        for cpu in 0..4 {
            asm.mov(eax, 1)?;
            expect(asm, fail, count(TIMER, cpu), 10)?;
        }
        // 11: a line, through the I/O APIC to processor 2. The 8254's counter 0 ends once.
        for (register, value) in [(0x15, 2 << 24), (0x14, LINE)] {
            asm.mov(dword_ptr(r14), register)?;
            asm.mov(dword_ptr(r14 + 0x10), value)?;
        }
        for (port, value) in [(0x43, 0x30), (0x40, 0x10), (0x40, 0x10)] {
            asm.mov(al, value)?;
            asm.out(port, al)?;
        }
        asm.mov(eax, 1)?;
        until(asm, total(LINE))?;
        expect(asm, fail, count(LINE, 2), 11)?;
        // 12: INIT stops one, which starts over.
        self.command(asm, 3, ASSERT | INIT)?;
        pause(asm)?;
        self.command(asm, 3, ASSERT | FIXED)?;
        self.command(asm, 3, ASSERT | START_UP | START_PAGE)?;
        asm.mov(eax, at(CPUS))?;
        asm.inc(eax)?;
        until(asm, ONLINE)?;
        asm.mov(eax, 1)?;
        expect(asm, fail, count(FIXED, 3), 12)
    }

    /// The other processors, from the trampoline on.
    pub(super) fn others(&self, asm: &mut CodeAssembler, labels: &mut Labels) -> Asm {
        let mut wait = asm.create_label();
        let mut rest = asm.create_label();
        asm.set_label(&mut labels.other)?;
        // No stack yet: the id as CPUID tells it.
        asm.mov(eax, 1)?;
        asm.cpuid()?;
        asm.shr(ebx, 24)?;
        asm.inc(ebx)?;
        asm.shl(ebx, 12)?;
        asm.lea(esp, dword_ptr(rbx + STACKS))?;
        asm.lidt(ptr(IDT_POINTER))?;
        self.switch_on(asm)?;
        self.count_in(asm, labels)?;
        asm.set_label(&mut wait)?;
        asm.pause()?;
        asm.cmp(at(GO), 0)?;
        asm.je(wait)?;
        self.share(asm)?;
        asm.set_label(&mut rest)?;
        asm.sti()?;
        asm.hlt()?;
        asm.jmp(rest)
    }

    pub(super) fn handlers(&self, asm: &mut CodeAssembler, labels: &mut Labels) -> Asm {
        for (index, vector) in (FIRST..=LAST).enumerate() {
            asm.set_label(&mut labels.handlers[index])?;
            save(asm)?;
            self.count(asm, vector)?;
            if vector == PING {
                self.command(asm, 0, ASSERT | PONG)?;
            }
            if vector == START_TIMER {
                self.set(asm, 0x320, TIMER)?;
                self.set(asm, 0x3e0, 0b1011)?;
                self.set(asm, 0x380, 100_000)?;
            }
            self.set(asm, 0xb0, 0)?;
            restore(asm)?;
        }
        asm.set_label(&mut labels.nmi)?;
        save(asm)?;
        self.count(asm, FIRST + NMI_ROW)?;
        restore(asm)?;
        asm.set_label(&mut labels.fault)?;
        asm.mov(edx, 0x55)?;
        asm.set_label(&mut labels.fail)?;
        asm.mov(eax, edx)?;
        asm.out(0xf4, eax)?;
        asm.cli()?;
        asm.hlt()
    }
}
