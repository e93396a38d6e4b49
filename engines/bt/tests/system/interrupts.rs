//! Interrupts from outside: the local APIC's timer, windows and shadows, kicks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bt::Options;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{
    ALL, Asm, Built, IDT, KERNEL_CS, Kernel, RESULTS, SCRATCH, Steps, page, window,
};
use crate::run::{boot, report, run};

/// Window page through which the tests reach the local APIC.
const APIC_PAGE: u64 = 511;
const VECTOR: u64 = 0x50;
const LVT_PERIODIC: i32 = 1 << 17;

fn apic(register: u64) -> u64 {
    window(APIC_PAGE) + register
}

/// A kernel whose vector counts itself at SCRATCH and ends the interrupt; `body` is the rest of
/// the handler.
fn kernel(body: impl FnOnce(&mut Asm) -> Built) -> Kernel {
    Kernel::new()
        .map(APIC_PAGE, 0xfee0_0000 | ALL | 1 << 4)
        .code(page(8), page(8), |asm| {
            asm.inc(qword_ptr(SCRATCH))?;
            asm.push(rax)?;
            body(asm)?;
            asm.xor(eax, eax)?;
            asm.mov(dword_ptr(apic(0xb0)), eax)?;
            asm.pop(rax)?;
            asm.iretq()
        })
}

/// Points the vector at the handler and turns the APIC on. Clobbers RAX.
fn prepare(asm: &mut Asm) -> Built {
    let handler = page(8);
    let low = handler & 0xffff | KERNEL_CS << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    asm.mov(rax, low)?;
    asm.mov(qword_ptr(IDT + VECTOR * 16), rax)?;
    asm.mov(dword_ptr(apic(0xf0)), 0x1ff)?;
    asm.mov(dword_ptr(apic(0x3e0)), 0xb)
}

/// Starts the timer; it counts nanoseconds.
fn start_timer(asm: &mut Asm, bits: i32, count: i32) -> Built {
    asm.mov(dword_ptr(apic(0x320)), VECTOR as i32 | bits)?;
    asm.mov(dword_ptr(apic(0x380)), count)
}

/// Reports how many interrupts have come as result `number`. Clobbers RAX.
fn count(asm: &mut Asm, number: u64) -> Built {
    asm.mov(rax, qword_ptr(SCRATCH))?;
    asm.result(number, rax)
}

fn self_ipi(asm: &mut Asm) -> Built {
    asm.mov(dword_ptr(apic(0x300)), VECTOR as i32 | 1 << 18)
}

#[test]
fn a_one_shot_timer_wakes_a_halted_guest() {
    let report = report(kernel(|_| Ok(())), |asm| {
        prepare(asm)?;
        start_timer(asm, 0, 2_000_000)?;
        let mut wait = asm.create_label();
        asm.set_label(&mut wait)?;
        asm.sti()?;
        asm.hlt()?;
        asm.cli()?;
        asm.cmp(qword_ptr(SCRATCH), 0)?;
        asm.je(wait)?;
        count(asm, 0)
    });
    assert_eq!(report.results[0], 1);
}

#[test]
fn a_periodic_timer_interrupts_loops_without_exits() {
    // Three kinds of loop; none leaves translated code by itself.
    let report = report(kernel(|_| Ok(())), |asm| {
        prepare(asm)?;
        start_timer(asm, LVT_PERIODIC, 1_000_000)?;
        asm.sti()?;
        let mut jump = asm.create_label();
        asm.set_label(&mut jump)?;
        asm.cmp(qword_ptr(SCRATCH), 3)?;
        asm.jb(jump)?;
        let mut call = asm.create_label();
        let mut function = asm.create_label();
        let mut after = asm.create_label();
        asm.set_label(&mut call)?;
        asm.call(function)?;
        asm.cmp(qword_ptr(SCRATCH), 6)?;
        asm.jae(after)?;
        asm.jmp(call)?;
        asm.set_label(&mut function)?;
        asm.ret()?;
        asm.set_label(&mut after)?;
        // Forward branches and an indirect jump back.
        let mut head = asm.create_label();
        let mut done = asm.create_label();
        asm.lea(rbx, ptr(head))?;
        asm.set_label(&mut head)?;
        asm.cmp(qword_ptr(SCRATCH), 9)?;
        asm.jae(done)?;
        asm.jmp(rbx)?;
        asm.set_label(&mut done)?;
        asm.cli()?;
        count(asm, 0)
    });
    assert!(report.results[0] >= 9, "{}", report.results[0]);
}

#[test]
fn registers_and_flags_survive_interrupts_anywhere() {
    // A loop that keeps registers and the flags busy, under a storm of interrupts whose handler
    // ruins what it may.
    const ROUND: i32 = 100_000;
    let sum = ROUND as u64 * (ROUND as u64 + 1) / 2;
    let report = report(
        kernel(|asm| {
            asm.push(rcx)?;
            asm.xor(ecx, ecx)?;
            asm.add(ecx, -1)?;
            asm.pop(rcx)
        }),
        |asm| {
            prepare(asm)?;
            start_timer(asm, LVT_PERIODIC, 20_000)?;
            asm.sti()?;
            asm.mov(rbx, SCRATCH + 64)?;
            asm.xor(r14d, r14d)?;
            asm.xor(r15d, r15d)?;
            // Rounds until there were interrupts enough.
            let mut round = asm.create_label();
            let mut bad = asm.create_label();
            let mut next = asm.create_label();
            asm.set_label(&mut round)?;
            asm.inc(r14)?;
            asm.xor(eax, eax)?;
            asm.xor(edx, edx)?;
            asm.mov(qword_ptr(rbx), 0)?;
            asm.mov(ecx, ROUND)?;
            let mut head = asm.create_label();
            asm.set_label(&mut head)?;
            // A wide sum through the carry, with memory accesses between the halves.
            asm.add(rax, rcx)?;
            asm.mov(rsi, qword_ptr(rbx))?;
            asm.adc(rdx, 0)?;
            asm.lea(rsi, ptr(rsi + rcx))?;
            asm.mov(qword_ptr(rbx), rsi)?;
            asm.dec(rcx)?;
            asm.jne(head)?;
            asm.mov(r8, sum)?;
            asm.cmp(rax, r8)?;
            asm.jne(bad)?;
            asm.cmp(qword_ptr(rbx), r8)?;
            asm.jne(bad)?;
            asm.test(rdx, rdx)?;
            asm.je(next)?;
            asm.set_label(&mut bad)?;
            asm.inc(r15)?;
            asm.set_label(&mut next)?;
            asm.cmp(qword_ptr(SCRATCH), 50)?;
            asm.jb(round)?;
            asm.cli()?;
            asm.result(0, r14)?;
            asm.result(1, r15)
        },
    );
    assert!(report.results[0] > 0);
    assert_eq!(report.results[1], 0, "of {} rounds", report.results[0]);
}

#[test]
fn interrupts_wait_one_instruction_after_sti_and_mov_ss() {
    let report = report(
        kernel(|asm| {
            // The interrupted address, above RAX.
            asm.mov(rax, qword_ptr(rsp + 8))?;
            asm.mov(qword_ptr(SCRATCH + 8), rax)
        }),
        |asm| {
            prepare(asm)?;
            self_ipi(asm)?;
            // sti; cli: no gap.
            asm.sti()?;
            asm.cli()?;
            asm.nop()?;
            count(asm, 0)?;
            // sti; nop; here.
            let mut here = asm.create_label();
            asm.sti()?;
            asm.nop()?;
            asm.set_label(&mut here)?;
            asm.nop()?;
            asm.cli()?;
            asm.lea(rbx, ptr(here))?;
            asm.mov(rax, qword_ptr(SCRATCH + 8))?;
            asm.sub(rax, rbx)?;
            asm.result(1, rax)?;
            count(asm, 2)?;
            // mov ss shields the next instruction as well, here with interrupts on already: the
            // IPI is requested under its own shadow.
            asm.mov(ecx, ss)?;
            let mut there = asm.create_label();
            asm.sti()?;
            asm.nop()?;
            asm.mov(ss, ecx)?;
            self_ipi(asm)?;
            asm.set_label(&mut there)?;
            asm.nop()?;
            asm.cli()?;
            asm.lea(rbx, ptr(there))?;
            asm.mov(rax, qword_ptr(SCRATCH + 8))?;
            asm.sub(rax, rbx)?;
            asm.result(3, rax)?;
            count(asm, 4)
        },
    );
    assert_eq!(report.results[..5], [0, 0, 1, 0, 2]);
}

#[test]
fn an_indirect_branch_in_a_shadow_does_not_lose_the_interrupt() {
    // sti; ret leads into a loop without exits that only the interrupt ends. The way there has been
    // taken before, so nothing has to be looked up or translated.
    let report = report(kernel(|_| Ok(())), |asm| {
        prepare(asm)?;
        let mut again = asm.create_label();
        let mut wait = asm.create_label();
        let mut last = asm.create_label();
        let mut out = asm.create_label();
        asm.lea(rbx, ptr(wait))?;
        asm.mov(r13d, 3)?;
        asm.set_label(&mut again)?;
        asm.push(rbx)?;
        asm.mov(r12, 10u64)?;
        asm.dec(r13d)?;
        asm.je(last)?;
        asm.ret()?;
        asm.set_label(&mut last)?;
        asm.mov(r12, u64::MAX)?;
        self_ipi(asm)?;
        asm.sti()?;
        asm.ret()?;
        asm.ud2()?;
        asm.set_label(&mut wait)?;
        asm.cmp(qword_ptr(SCRATCH), 0)?;
        asm.jne(out)?;
        asm.dec(r12)?;
        asm.jne(wait)?;
        asm.set_label(&mut out)?;
        asm.test(r13d, r13d)?;
        asm.jne(again)?;
        asm.cli()?;
        count(asm, 0)
    });
    assert_eq!(report.results[0], 1);
}

#[test]
fn popf_iret_and_task_priority_let_interrupts_in() {
    let report = report(kernel(|_| Ok(())), |asm| {
        prepare(asm)?;
        self_ipi(asm)?;
        count(asm, 0)?;
        asm.push(0x202)?;
        asm.popfq()?;
        asm.nop()?;
        count(asm, 1)?;
        // Held back by CR8, let in as soon as it falls.
        asm.mov(eax, 15)?;
        asm.mov(cr8, rax)?;
        self_ipi(asm)?;
        asm.nop()?;
        count(asm, 2)?;
        asm.xor(eax, eax)?;
        asm.mov(cr8, rax)?;
        asm.nop()?;
        count(asm, 3)?;
        // The same through the APIC's register, whose write is an exit in mid-instruction: nothing
        // else of the CPU may change by it.
        asm.mov(rbx, 0x1234_5678_9abc_def0u64)?;
        asm.mov(r8, rbx)?;
        asm.mov(r15, rbx)?;
        asm.mov(ecx, 0xc000_0082u32)?;
        asm.mov(eax, 0x1000)?;
        asm.xor(edx, edx)?;
        asm.wrmsr()?;
        asm.stc()?;
        asm.mov(dword_ptr(apic(0x80)), 0xf0)?;
        asm.setb(al)?;
        asm.movzx(eax, al)?;
        asm.result(4, rax)?;
        asm.mov(rax, cr8)?;
        asm.result(5, rax)?;
        asm.result(6, rbx)?;
        asm.result(7, r8)?;
        asm.result(8, r15)?;
        asm.rdmsr()?;
        asm.result(9, rax)?;
        self_ipi(asm)?;
        count(asm, 10)?;
        asm.mov(dword_ptr(apic(0x80)), 0)?;
        asm.nop()?;
        count(asm, 11)?;
        asm.cli()
    });
    let value = 0x1234_5678_9abc_def0;
    assert_eq!(
        report.results[..12],
        [0, 1, 1, 2, 1, 15, value, value, value, 0x1000, 2, 3]
    );
}

#[test]
fn an_interrupt_without_a_stack_is_a_guest_crash() {
    let guest = kernel(|_| Ok(())).guest(|asm| {
        prepare(asm)?;
        self_ipi(asm)?;
        asm.mov(rsp, window(3))?;
        asm.sti()?;
        asm.nop()?;
        asm.nop()
    });
    match run(&guest).outcome {
        engine_core::Outcome::Crashed { message, .. } => assert_eq!(message, "triple fault"),
        other => panic!("{other:?}"),
    }
}

/// Runs `body`, an endless loop, and kicks it: `run` has to return with RIP in the loop.
fn kicked(body: impl FnOnce(&mut Asm) -> Built) {
    let guest = Kernel::new().guest(body);
    let (mut vcpu, _ram) = boot(&guest, Options::default());
    let handle = vcpu.kick_handle();
    let over = Arc::new(AtomicBool::new(false));
    let watched = Arc::clone(&over);
    let thread = std::thread::spawn(move || {
        while !watched.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_micros(300));
            handle.kick();
        }
    });
    let begun = Instant::now();
    let mut kicks = 0;
    while kicks < 200 {
        match vcpu.run().expect("it runs") {
            Exit::Interrupted => kicks += 1,
            // The kernel quiets the PICs.
            Exit::PioOut { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    over.store(true, Ordering::Relaxed);
    thread.join().expect("the kicker");
    assert!(begun.elapsed() < Duration::from_secs(20));
    // The loop counts in RBX: it went on between the kicks.
    let state = vcpu.state().expect("a state");
    assert!(state.gpr[3] > 1000, "{state}");
}

#[test]
fn kicks_stop_every_kind_of_loop() {
    // Backward conditional branch.
    kicked(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.inc(rbx)?;
        asm.jne(head)?;
        asm.ud2()
    });
    // A jump to itself can't count.
    kicked(|asm| {
        asm.mov(ebx, 2000)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.jmp(head)
    });
    // Returns alone.
    kicked(|asm| {
        let mut head = asm.create_label();
        asm.lea(rax, ptr(head))?;
        asm.set_label(&mut head)?;
        asm.inc(rbx)?;
        asm.push(rax)?;
        asm.ret()
    });
    // Calls and returns.
    kicked(|asm| {
        let mut head = asm.create_label();
        let mut function = asm.create_label();
        let mut over = asm.create_label();
        asm.jmp(over)?;
        asm.set_label(&mut function)?;
        asm.inc(rbx)?;
        asm.ret()?;
        asm.set_label(&mut over)?;
        asm.zero_bytes()?;
        asm.set_label(&mut head)?;
        asm.call(function)?;
        asm.jmp(head)
    });
    // loop, and a function that calls itself until the stack wraps around.
    kicked(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.inc(rbx)?;
        asm.xor(ecx, ecx)?;
        asm.loop_(head)?;
        asm.jmp(head)
    });
    kicked(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.inc(rbx)?;
        asm.mov(rsp, 0x30_0000u64)?;
        asm.call(head)
    });
    // An instruction that never ends by itself.
    kicked(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(rsi, RESULTS)?;
        asm.mov(rcx, u64::MAX >> 8)?;
        asm.inc(rbx)?;
        asm.cmp(rbx, 2000)?;
        asm.jb(head)?;
        asm.xor(edi, edi)?;
        asm.xor(esi, esi)?;
        asm.std()?;
        asm.mov(edi, 0x30_0000)?;
        asm.mov(esi, 0x30_0000)?;
        asm.mov(ecx, 0x10_0000)?;
        asm.rep().movsb()?;
        asm.cld()?;
        asm.jmp(head)
    });
}

#[test]
fn a_kick_before_run_ends_it_at_once() {
    let guest = Kernel::new().guest(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.jmp(head)
    });
    let (mut vcpu, _ram) = boot(&guest, Options::default());
    let before = vcpu.state().expect("a state");
    vcpu.kick_handle().kick();
    assert!(matches!(vcpu.run().expect("it runs"), Exit::Interrupted));
    assert_eq!(vcpu.state().expect("a state"), before);
}

/// An interrupt that waits is taken directly behind `enable`, which runs for the fourth time.
fn is_taken_behind(enable: impl Fn(&mut Asm) -> Built) {
    let report = report(
        kernel(|asm| {
            // The interrupted address, above RAX.
            asm.mov(rax, qword_ptr(rsp + 8))?;
            asm.mov(qword_ptr(SCRATCH + 8), rax)
        }),
        |asm| {
            prepare(asm)?;
            let mut again = asm.create_label();
            let mut here = asm.create_label();
            let mut quiet = asm.create_label();
            asm.xor(r15d, r15d)?;
            asm.set_label(&mut again)?;
            asm.cli()?;
            asm.cmp(r15d, 3)?;
            asm.jne(quiet)?;
            self_ipi(asm)?;
            asm.set_label(&mut quiet)?;
            asm.lea(r14, ptr(here))?;
            enable(asm)?;
            asm.set_label(&mut here)?;
            asm.nop()?;
            asm.inc(r15d)?;
            asm.cmp(r15d, 4)?;
            asm.jne(again)?;
            asm.cli()?;
            asm.mov(rax, qword_ptr(SCRATCH + 8))?;
            asm.sub(rax, r14)?;
            asm.result(0, rax)?;
            count(asm, 1)
        },
    );
    assert_eq!(report.results[..2], [0, 1]);
}

#[test]
fn an_interrupt_that_waits_is_taken_behind_popf() {
    is_taken_behind(|asm| {
        asm.push(0x202)?;
        asm.popfq()
    });
}

#[test]
fn an_interrupt_that_waits_is_taken_behind_iret() {
    let frame = |asm: &mut Asm, flags: i32| {
        asm.mov(rbx, rsp)?;
        asm.push(crate::kernel::KERNEL_SS as i32)?;
        asm.push(rbx)?;
        asm.push(flags)?;
        asm.push(KERNEL_CS as i32)?;
        asm.push(r14)?;
        Ok(())
    };
    is_taken_behind(|asm| {
        frame(asm, 0x202)?;
        asm.iretq()
    });
    // In the shadow of an sti, whose flag the frame has too, or as it stands before.
    is_taken_behind(|asm| {
        frame(asm, 0x202)?;
        asm.sti()?;
        asm.iretq()
    });
    is_taken_behind(|asm| {
        asm.sti()?;
        asm.nop()
    });
}
