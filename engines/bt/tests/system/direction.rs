//! The direction flag across everything that changes or carries it: it is kept in two places, the host's
//! flags and a slot, and each look asks both.

use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use bt::Options;

use crate::kernel::{Asm, Built, IDT, KERNEL_CS, Kernel, RESULTS, SCRATCH, Steps, page, window};
use crate::msr::{FMASK, LSTAR, STAR};
use crate::run::{boot, report_as_qemu, report_of_all};

const DF: i32 = 1 << 10;
/// Often enough for everything to be linked and remembered.
const WARM: i32 = 5;

/// Three bits of [`look`]: up, and down.
const UP: u64 = 0;
const DOWN: u64 = 7;

/// Appends to R14 what pushed flags say, where a string instruction goes, and where a repeated one
/// does. Clobbers RAX, RBX, RCX, RDI and arithmetic flags.
fn look(asm: &mut Asm) -> Built {
    asm.pushfq()?;
    asm.pop(rax)?;
    asm.shr(eax, 10)?;
    asm.and(eax, 1)?;
    asm.lea(r14, ptr(r14 * 2 + rax))?;
    for repeats in [false, true] {
        asm.mov(rdi, SCRATCH + 0x800)?;
        asm.mov(rbx, rdi)?;
        asm.mov(ecx, 2)?;
        if repeats {
            asm.rep().stosb()?;
        } else {
            asm.stosb()?;
        }
        asm.cmp(rdi, rbx)?;
        asm.setb(al)?;
        asm.movzx(eax, al)?;
        asm.lea(r14, ptr(r14 * 2 + rax))?;
    }
    Ok(())
}

/// Inverts DF by popfq.
fn flip(asm: &mut Asm) -> Built {
    asm.pushfq()?;
    asm.xor(dword_ptr(rsp), DF)?;
    asm.popfq()
}

/// Runs `body` several times, with R14 clear before each.
fn repeat(asm: &mut Asm, body: impl FnOnce(&mut Asm) -> Built) -> Built {
    let mut head = asm.create_label();
    asm.xor(r15d, r15d)?;
    asm.set_label(&mut head)?;
    asm.xor(r14d, r14d)?;
    body(asm)?;
    asm.inc(r15d)?;
    asm.cmp(r15d, WARM)?;
    asm.jb(head)
}

fn looks(looks: &[u64]) -> u64 {
    looks.iter().fold(0, |word, look| word << 3 | look)
}

/// Points `vector` at `handler`. Clobbers RAX.
fn gate(asm: &mut Asm, vector: u64, handler: u64) -> Built {
    let low = handler & 0xffff | KERNEL_CS << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
    asm.mov(rax, low)?;
    asm.mov(qword_ptr(IDT + vector * 16), rax)
}

/// Looks, inverts DF, looks again; goes on behind an instruction of `skip` bytes.
fn handler(skip: i32, error: bool) -> impl FnOnce(&mut Asm) -> Built {
    move |asm: &mut Asm| {
        if error {
            asm.add(rsp, 8)?;
        }
        look(asm)?;
        flip(asm)?;
        look(asm)?;
        if skip != 0 {
            asm.add(qword_ptr(rsp), skip)?;
        }
        asm.iretq()
    }
}

/// `body` with DF set and with it clear, each followed by a look.
fn both(asm: &mut Asm, body: impl Fn(&mut Asm) -> Built) -> Built {
    asm.std()?;
    body(asm)?;
    look(asm)?;
    asm.cld()?;
    body(asm)?;
    look(asm)
}

/// What [`both`] sees if a [`handler`] runs in `body`.
const HANDLED: [u64; 6] = [DOWN, UP, DOWN, UP, DOWN, UP];

#[test]
fn std_cld_and_popf_set_and_clear_it() {
    let report = report_as_qemu(Kernel::new(), |asm| {
        repeat(asm, |asm| {
            asm.std()?;
            look(asm)?;
            asm.cld()?;
            look(asm)?;
            for flags in [0x402, 0x402, 2, 2, 0xcd7, 0x8d7] {
                asm.push(flags)?;
                asm.popfq()?;
                look(asm)?;
            }
            Ok(())
        })?;
        asm.result(0, r14)
    });
    assert_eq!(
        report.results[0],
        looks(&[DOWN, UP, DOWN, DOWN, UP, UP, DOWN, UP])
    );
}

#[test]
fn every_flag_comes_through_pushes_and_pops() {
    // Whatever the image says, popf and pushf give it back, with bit 1 set; and so they do after an
    // instruction that leaves some of the flags alone.
    let images: Vec<i32> = (0..64)
        .map(|number| {
            let bits = [0, 2, 4, 6, 7, 11];
            (0..6).fold(2, |image, at| image | (number >> at & 1) << bits[at])
        })
        .collect();
    let report = report_as_qemu(Kernel::new(), |asm| {
        repeat(asm, |asm| {
            for (number, &image) in (0..).zip(&images) {
                asm.push(image | if number % 3 == 0 { DF } else { 0 })?;
                asm.popfq()?;
                asm.pushfq()?;
                asm.pop(rax)?;
                asm.imul_3(r14, r14, 31)?;
                asm.add(r14, rax)?;
                asm.push(image)?;
                asm.popfq()?;
                asm.inc(rcx)?;
                asm.mov(rcx, 5u64)?;
                asm.dec(rcx)?;
                asm.pushfq()?;
                asm.pop(rax)?;
                asm.imul_3(r14, r14, 31)?;
                asm.add(r14, rax)?;
            }
            asm.push(2)?;
            asm.popfq()
        })?;
        asm.result(0, r14)
    });
    let mut expected = 0u64;
    for (number, &image) in (0..).zip(&images) {
        let direction = if number % 3 == 0 { DF } else { 0 };
        for value in [image | direction, image & 1 | 2] {
            expected = expected.wrapping_mul(31).wrapping_add(value as u64);
        }
    }
    assert_eq!(report.results[0], expected);
}

#[test]
fn exceptions_carry_it_and_returns_bring_it_back() {
    let kernel = Kernel::new()
        .map(3, 0)
        .code(page(8), page(8), handler(0, false))
        .code(page(9), page(9), handler(2, false))
        .code(page(10), page(10), handler(3, true));
    let report = report_as_qemu(kernel, |asm| {
        gate(asm, 3, page(8))?;
        gate(asm, 0, page(9))?;
        gate(asm, 14, page(10))?;
        repeat(asm, |asm| both(asm, |asm| asm.int3()))?;
        asm.result(0, r14)?;
        // By zero, which code looks for, and too large a quotient, which the host finds.
        for (number, divisor) in [(1, 0), (2, 1)] {
            repeat(asm, |asm| {
                both(asm, |asm| {
                    asm.mov(ecx, divisor)?;
                    asm.mov(edx, 5)?;
                    asm.div(ecx)
                })
            })?;
            asm.result(number, r14)?;
        }
        repeat(asm, |asm| {
            both(asm, |asm| {
                asm.mov(edx, window(3) as i32)?;
                asm.mov(rax, qword_ptr(rdx))
            })
        })?;
        asm.result(3, r14)
    });
    assert_eq!(report.results[..4], [looks(&HANDLED); 4]);
}

#[test]
fn ring_3_has_its_own_from_system_calls_and_exceptions() {
    for masked in [false, true] {
        let kernel = Kernel::new()
            .map(3, 0)
            .code(page(8), page(8), handler(0, false))
            .code(page(9), page(9), handler(2, false))
            .code(page(10), page(10), handler(3, true))
            .code(page(0), page(0), move |asm| {
                repeat(asm, |asm| both(asm, |asm| asm.syscall()))?;
                asm.mov(qword_ptr(RESULTS), r14)?;
                repeat(asm, |asm| both(asm, |asm| asm.int3()))?;
                asm.mov(qword_ptr(RESULTS + 8), r14)?;
                repeat(asm, |asm| {
                    both(asm, |asm| {
                        asm.mov(ecx, 1)?;
                        asm.mov(edx, 5)?;
                        asm.div(ecx)
                    })
                })?;
                asm.mov(qword_ptr(RESULTS + 16), r14)?;
                repeat(asm, |asm| {
                    both(asm, |asm| {
                        asm.mov(edx, window(3) as i32)?;
                        asm.mov(rax, qword_ptr(rdx))
                    })
                })?;
                asm.mov(qword_ptr(RESULTS + 24), r14)?;
                asm.hlt()
            })
            // On the caller's stack; R11 has the caller's flags.
            .code(page(1), page(1), |asm| {
                asm.mov(r12, rcx)?;
                look(asm)?;
                flip(asm)?;
                look(asm)?;
                asm.mov(rcx, r12)?;
                asm.sysretq()
            });
        let report = report_of_all(kernel, |asm| {
            for (msr, value) in [
                (STAR, (0x10 << 48) | (KERNEL_CS << 32)),
                (LSTAR, page(1)),
                (FMASK, if masked { DF as u64 } else { 0 }),
            ] {
                asm.mov(ecx, msr)?;
                asm.mov(eax, value as u32)?;
                asm.mov(edx, (value >> 32) as u32)?;
                asm.wrmsr()?;
            }
            gate(asm, 3, page(8))?;
            gate(asm, 0, page(9))?;
            gate(asm, 14, page(10))?;
            asm.in_ring_3(page(0), 0x202)
        });
        let called = if masked {
            [UP, DOWN, DOWN, UP, DOWN, UP]
        } else {
            HANDLED
        };
        assert_eq!(report.results[0], looks(&called), "masked: {masked}");
        assert_eq!(report.results[1..4], [looks(&HANDLED); 3]);
        assert_eq!(report.faults(), [(13, 0, 0)]);
    }
}

#[test]
fn exits_leave_it_alone() {
    let report = report_as_qemu(Kernel::new().map(3, 0), |asm| {
        repeat(asm, |asm| {
            both(asm, |asm| {
                asm.out(0x80, al)?;
                asm.mov(edx, 0x3ff)?;
                asm.in_(al, dx)?;
                // The runtime's instructions.
                asm.mov(ecx, 0xc000_0102u32)?;
                asm.rdmsr()?;
                // A lookup that misses, in mid-instruction.
                asm.invlpg(ptr(SCRATCH))?;
                asm.inc(qword_ptr(SCRATCH))
            })
        })?;
        asm.result(0, r14)
    });
    assert_eq!(report.results[0], looks(&[DOWN, UP]));
}

#[test]
fn a_state_that_is_set_has_it_in_both_places() {
    let guest = Kernel::new().guest(|asm| {
        repeat(asm, |asm| {
            asm.out(0x80, al)?;
            look(asm)?;
            asm.out(0x80, al)?;
            look(asm)
        })?;
        asm.cld()?;
        asm.result(0, r14)
    });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    loop {
        match vcpu.run().expect("it runs") {
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { port: 0x80, .. } => {
                let mut state = vcpu.state().expect("a state");
                state.rflags ^= DF as u64;
                vcpu.set_state(&state).expect("it takes it");
            }
            Exit::PioOut { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let mut result = [0; 8];
    let at = vm_memory::GuestAddress(RESULTS);
    vm_memory::Bytes::read_slice(&*ram, &mut result, at).expect("guest memory");
    assert_eq!(u64::from_le_bytes(result), looks(&[DOWN, UP]));
}
