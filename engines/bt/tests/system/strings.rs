//! movs and stos as translated code does them by itself: every size, both directions, counts that end
//! anywhere in a page or pages later, and how often they need the runtime.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bt::Options;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{ALL, Asm, Built, Kernel, SCRATCH, Steps, page, window};
use crate::run::{boot, report_as_qemu, run};

/// Two windows on three pages each, one after the other in memory.
fn kernel() -> Kernel {
    (0..6).fold(Kernel::new(), |kernel, number| {
        kernel.map(number, page(number) | ALL)
    })
}

/// Sums the six pages up, so that every byte and its place count.
fn sum(asm: &mut Asm) -> Built {
    let mut head = asm.create_label();
    asm.mov(rsi, window(0))?;
    asm.mov(ecx, 6 * 512)?;
    asm.xor(eax, eax)?;
    asm.set_label(&mut head)?;
    asm.rol(rax, 7)?;
    asm.add(rax, qword_ptr(rsi))?;
    asm.add(rsi, 8)?;
    asm.dec(ecx)?;
    asm.jne(head)?;
    asm.result(39, rax)
}

type String = fn(&mut Asm) -> Built;

const STRINGS: &[(u64, String)] = &[
    (1, |asm| asm.rep().movsb()),
    (2, |asm| asm.rep().movsw()),
    (4, |asm| asm.rep().movsd()),
    (8, |asm| asm.rep().movsq()),
    (1, |asm| asm.rep().stosb()),
    (2, |asm| asm.rep().stosw()),
    (4, |asm| asm.rep().stosd()),
    (8, |asm| asm.rep().stosq()),
    (1, |asm| asm.movsb()),
    (8, |asm| asm.movsq()),
    (2, |asm| asm.stosw()),
    (4, |asm| asm.stosd()),
];

/// Each string twice, so that the second finds the tables filled: it starts at these offsets into its
/// pages with this count.
fn all_of(offsets: [u64; 2], count: u64, down: bool) {
    let report = report_as_qemu(kernel(), |asm| {
        asm.mov(rdi, window(0))?;
        asm.mov(ecx, 6 * 512)?;
        let mut fill = asm.create_label();
        asm.set_label(&mut fill)?;
        asm.mov(qword_ptr(rdi), rdi)?;
        asm.xor(dword_ptr(rdi + 4), ecx)?;
        asm.add(rdi, 8)?;
        asm.dec(ecx)?;
        asm.jne(fill)?;
        if down {
            asm.std()?;
        }
        for (number, &(size, string)) in (0..).zip(STRINGS) {
            let count = (count / size).max(1);
            for _ in 0..2 {
                asm.mov(rsi, window(0) + offsets[0])?;
                asm.mov(rdi, window(3) + offsets[1])?;
                asm.mov(rcx, count)?;
                asm.mov(rax, 0x1122_3344_5566_7788u64 ^ size)?;
                // The carry has to come through.
                asm.stc()?;
                string(asm)?;
                asm.adc(rcx, 0)?;
            }
            asm.mov(qword_ptr(SCRATCH), rdi)?;
            asm.add(rsi, rcx)?;
            asm.result(2 * number, rsi)?;
            asm.mov(rdi, qword_ptr(SCRATCH))?;
            asm.result(2 * number + 1, rdi)?;
        }
        asm.cld()?;
        sum(asm)
    });
    assert_eq!(report.faults(), []);
}

#[test]
fn strings_of_every_size_do_what_a_processor_does() {
    all_of([0, 0], 4096, false);
    all_of([0x123, 0xffd], 6000, false);
    all_of([0xffc, 0x0], 24, false);
}

#[test]
fn strings_go_down_as_well() {
    all_of([0x1800, 0x1808], 3000, true);
    all_of([0x2ff8, 0x1004], 64, true);
}

#[test]
fn strings_within_known_pages_need_no_runtime() {
    let guest = |rounds: i32| {
        kernel().guest(|asm| {
            let mut head = asm.create_label();
            asm.mov(ebx, rounds)?;
            asm.set_label(&mut head)?;
            asm.mov(rsi, window(0) + 5)?;
            asm.mov(rdi, window(3) + 0x800)?;
            asm.mov(ecx, 8000)?;
            asm.rep().movsb()?;
            asm.mov(rdi, window(1))?;
            asm.mov(ecx, 512)?;
            asm.rep().stosq()?;
            asm.mov(rsi, window(0))?;
            asm.movsq()?;
            asm.dec(ebx)?;
            asm.jne(head)?;
            asm.result(0, rdi)
        })
    };
    let [few, many] = [10, 1010].map(|rounds| {
        let ended = run(&guest(rounds));
        assert_eq!(ended.report().results[0], window(1) + 4096 + 8);
        ended.vcpu.entries()
    });
    assert!(many - few < 50, "{} entries", many - few);
}

#[test]
fn a_long_string_is_interrupted() {
    // The kick comes while it runs, and its registers tell how far it was.
    const START: u64 = 0x60_0000;
    const LENGTH: u64 = 4 << 20;
    let guest = kernel().guest(|asm| {
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(rdi, START)?;
        asm.mov(rcx, LENGTH)?;
        asm.rep().stosb()?;
        asm.jmp(head)
    });
    let (mut vcpu, _ram) = boot(&guest, Options::default());
    let handle = vcpu.kick_handle();
    let done = Arc::new(AtomicBool::new(false));
    let kicker = {
        let done = Arc::clone(&done);
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                handle.kick();
                thread::yield_now();
            }
        })
    };
    let mut inside = 0;
    let mut kicks = 0;
    while kicks < 300 {
        match vcpu.run().expect("it runs") {
            Exit::Interrupted => kicks += 1,
            // The kernel quiets the PICs.
            Exit::PioOut { .. } => continue,
            other => panic!("{other:?}"),
        }
        let state = vcpu.state().expect("a state");
        let [left, at] = [1, 7].map(|index: usize| state.gpr[index]);
        if left != 0 && left != LENGTH && (START..START + LENGTH).contains(&at) {
            assert_eq!(at + left, START + LENGTH);
            inside += 1;
        }
    }
    done.store(true, Ordering::Relaxed);
    kicker.join().expect("the kicker");
    assert!(inside > 10, "{inside} kicks met the string");
}
