//! Registers that were compared, or accessed memory, and are something else the next time round: in
//! loops and over links between blocks, where comparisons are made once.

use std::time::Duration;

use bt::UserStop;
use bt::insn::{Bench, Case, End};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::canaries::Canaries;
use crate::{GOOD, GUARD, Kind, LOAD, REACH, SIZE, expected};

/// Assembles a loop that writes RAX at `GOOD` first and then at the address given. RAX is 1, RCX and RSP
/// are `GOOD`.
type Form = fn(&mut CodeAssembler, u64) -> Result<(), IcedError>;

const HERE: Kind = Kind::Write(8);

/// What makes it another address, and what the processor says of it if nothing is there.
const FORMS: &[(&str, Kind, Form)] = &[
    ("added to the base", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdx, wild.wrapping_sub(GOOD))?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.add(rbx, rdx)?;
        asm.jmp(head)
    }),
    ("added to the base by lea", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdx, wild.wrapping_sub(GOOD))?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.lea(rbx, qword_ptr(rbx + rdx))?;
        asm.jmp(head)
    }),
    ("added to the index", HERE, |asm, wild| {
        asm.xor(ebx, ebx)?;
        asm.mov(rdx, eighth(wild))?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rcx + rbx * 8), rax)?;
        asm.add(rbx, rdx)?;
        asm.jmp(head)
    }),
    ("added to the index at scale 1", HERE, |asm, wild| {
        asm.xor(ebx, ebx)?;
        asm.mov(rdx, wild.wrapping_sub(GOOD))?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rcx + rbx), rax)?;
        asm.add(rbx, rdx)?;
        asm.jmp(head)
    }),
    ("added to the base beside an index", HERE, |asm, wild| {
        asm.xor(ebx, ebx)?;
        asm.mov(rdx, wild.wrapping_sub(GOOD))?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rcx + rbx), rax)?;
        asm.add(rcx, rdx)?;
        asm.jmp(head)
    }),
    ("loaded", Kind::Read(8), |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdx, wild)?;
        asm.mov(qword_ptr(rbx), rdx)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(rsi, qword_ptr(rbx))?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.mov(rbx, rsi)?;
        asm.jmp(head)
    }),
    ("popped", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdx, wild)?;
        asm.push(rdx)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.pop(rbx)?;
        asm.jmp(head)
    }),
    ("exchanged", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdi, wild)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.xchg(rbx, rdi)?;
        asm.jmp(head)
    }),
    ("moved on a condition", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdi, wild)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.cmp(rax, rax)?;
        asm.cmove(rbx, rdi)?;
        asm.jmp(head)
    }),
    ("below a bound that has moved", HERE, |asm, wild| {
        bounded(asm, wild, |asm, out| {
            asm.cmp(rbx, rdx)?;
            asm.jae(out)
        })
    }),
    ("compared with 32 bits", HERE, |asm, wild| {
        bounded(asm, wild, |asm, out| {
            asm.mov(edx, -1)?;
            asm.cmp(ebx, edx)?;
            asm.ja(out)
        })
    }),
    (
        "changed between comparison and branch",
        HERE,
        |asm, wild| {
            bounded(asm, wild, |asm, out| {
                asm.cmp(eax, 2)?;
                asm.mov(rbx, rbx)?;
                asm.jae(out)
            })
        },
    ),
    ("above its bound", HERE, |asm, wild| {
        bounded(asm, wild, |asm, out| {
            asm.mov(edx, 0)?;
            asm.cmp(rbx, rdx)?;
            asm.jb(out)
        })
    }),
    ("below a bound with a sign", HERE, |asm, wild| {
        bounded(asm, wild, |asm, out| {
            asm.cmp(rbx, -1)?;
            asm.je(out)?;
            asm.cmp(rbx, -1)?;
            asm.jae(out)
        })
    }),
    ("by a link of somebody who knows less", HERE, |asm, wild| {
        asm.mov(rbx, GOOD)?;
        asm.mov(rdi, wild)?;
        let (mut other, mut next) = (asm.create_label(), asm.create_label());
        asm.mov(qword_ptr(rbx), rax)?;
        asm.jmp(other)?;
        asm.set_label(&mut next)?;
        asm.mov(rbx, rdi)?;
        asm.jmp(other)?;
        asm.set_label(&mut other)?;
        asm.mov(qword_ptr(rbx), rax)?;
        asm.jmp(next)
    }),
    (
        "behind a branch that isn't taken at first",
        HERE,
        |asm, wild| {
            asm.mov(rbx, GOOD)?;
            asm.mov(rdi, wild)?;
            let (mut head, mut out) = (asm.create_label(), asm.create_label());
            asm.set_label(&mut head)?;
            asm.mov(qword_ptr(rbx), rax)?;
            asm.test(rsi, rsi)?;
            asm.jne(out)?;
            asm.inc(rsi)?;
            asm.jmp(head)?;
            asm.set_label(&mut out)?;
            asm.mov(rbx, rdi)?;
            asm.jmp(head)
        },
    ),
];

/// The index that leads from `GOOD` to `wild` at scale 8.
fn eighth(wild: u64) -> u64 {
    (wild.wrapping_sub(GOOD) as i64 >> 3) as u64
}

/// A loop over RBX as index, guarded, which is wild the second time, and so is RDX, its bound.
fn bounded(
    asm: &mut CodeAssembler,
    wild: u64,
    guard: fn(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    asm.xor(ebx, ebx)?;
    asm.mov(edx, 16)?;
    asm.mov(rdi, eighth(wild))?;
    let (mut head, mut out) = (asm.create_label(), asm.create_label());
    asm.set_label(&mut head)?;
    guard(asm, out)?;
    asm.mov(qword_ptr(rcx + rbx * 8), rax)?;
    asm.mov(rbx, rdi)?;
    asm.mov(rdx, -1i64 as u64)?;
    asm.jmp(head)?;
    asm.set_label(&mut out)?;
    asm.hlt()
}

fn case(form: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Case {
    let assemble = || {
        let mut asm = CodeAssembler::new(64)?;
        asm.mov(eax, 1)?;
        asm.mov(ecx, GOOD as u32)?;
        asm.mov(esp, GOOD as u32 + 0x800)?;
        form(&mut asm)?;
        asm.hlt()?;
        asm.assemble(LOAD)
    };
    Case {
        code: assemble().expect("64-bit code"),
        load: LOAD,
        map: vec![(GOOD, 4096)],
        mem: Vec::new(),
    }
}

#[test]
fn what_was_compared_once_is_compared_again_when_it_has_changed() {
    let canaries = Canaries::new();
    let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        eprintln!("this host has no window");
        return;
    };
    let far = [1 << 46, 1 << 62, !0 << 47, SIZE, SIZE + REACH, SIZE + GUARD];
    let own = canaries.addresses().map(|own| own.wrapping_sub(base));
    for wild in own.into_iter().chain(far) {
        for &(name, kind, form) in FORMS {
            let outcome = bench.run(&case(|asm| form(asm, wild))).expect("a case");
            let End::Stop(UserStop::Exception {
                vector,
                error,
                address,
            }) = outcome.end
            else {
                // The index was no such number.
                assert!(wild >= 1 << 47, "{name} at {wild:#x}: {:?}", outcome.end);
                continue;
            };
            let met = Some((vector, error, address));
            assert_eq!(met, expected(kind, wild), "{name} at {wild:#x}");
            assert!(canaries.intact(), "{name} at {wild:#x}");
        }
    }
}

#[test]
fn without_comparisons_such_loops_would_write_anywhere() {
    let mut canaries = Canaries::new();
    // Most of them go on writing there.
    let mut bench = Bench::new(Duration::from_millis(100)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        return;
    };
    bench.vcpu_for_tests().remove_window_checks();
    let canary = canaries.addresses()[1];
    let wild = canary.wrapping_sub(base);
    for &(name, _, form) in FORMS {
        assert!(canaries.intact());
        let _ = bench.run(&case(|asm| form(asm, wild))).expect("a case");
        assert!(!canaries.intact(), "{name}");
        canaries.mend(canary);
    }
}

/// A prefetch doesn't fault, so it shows nothing of its address.
#[test]
fn prefetching_shows_nothing() {
    let mut bench = Bench::new(Duration::from_secs(10)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        return;
    };
    const STRIDE: u64 = 1 << 24;
    // Some memory of this process's above the window, in steps from inside.
    let steps = (SIZE + GUARD) / STRIDE + 2;
    let at = base + GOOD + steps * STRIDE;
    // SAFETY: a fresh mapping where there is none.
    let above = unsafe {
        libc::mmap(
            at as *mut _,
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    // Taken by something else of this process's, which is as good.
    let ours = above as u64 == at;
    let walk = |asm: &mut CodeAssembler| {
        asm.mov(rbx, GOOD)?;
        asm.mov(r15, steps)?;
        let mut head = asm.create_label();
        asm.set_label(&mut head)?;
        asm.prefetcht0(byte_ptr(rbx))?;
        asm.add(rbx, STRIDE as i32)?;
        asm.dec(r15)?;
        asm.jne(head)?;
        asm.mov(qword_ptr(rbx), rax)
    };
    let outcome = bench.run(&case(walk)).expect("a case");
    let wild = GOOD + steps * STRIDE;
    let (vector, error, address) = expected(HERE, wild).expect("an end");
    let fault = UserStop::Exception {
        vector,
        error,
        address,
    };
    assert_eq!(outcome.end, End::Stop(fault));
    if ours {
        // SAFETY: the mapping above is this test's own.
        unsafe {
            assert_eq!((at as *const u64).read_volatile(), 0);
            libc::munmap(above, 4096);
        }
    }
}

/// Steps of a multiplicative generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

const REGISTERS: [AsmRegister64; 8] = [rbx, rcx, rdx, rsi, rdi, r8, r9, r10];

/// A loop of arithmetic, comparisons and accesses through what comes out of them.
fn program(random: &mut Random, pool: &[u64]) -> Case {
    let assemble = |asm: &mut CodeAssembler| {
        for register in REGISTERS {
            asm.mov(register, random.of(pool))?;
        }
        asm.mov(r15d, 6)?;
        let (mut head, mut out) = (asm.create_label(), asm.create_label());
        asm.set_label(&mut head)?;
        for _ in 0..2 + random.below(10) {
            let (one, two, three) = (
                random.of(&REGISTERS),
                random.of(&REGISTERS),
                random.of(&REGISTERS),
            );
            let by = random.of(&[0, 8, -8, 64, 4096]);
            match random.below(20) {
                0..=2 => asm.mov(qword_ptr(one + by), rax)?,
                3..=5 => asm.mov(qword_ptr(one + two * 8 + by), rax)?,
                6 => asm.mov(qword_ptr(one + two * 4), rax)?,
                7..=8 => asm.mov(qword_ptr(one + two + by), rax)?,
                9 => asm.mov(one, qword_ptr(two))?,
                10 => asm.add(one, random.of(&[1, 8, -8, 64]))?,
                11 => asm.inc(one)?,
                12 => asm.mov(one, two)?,
                13 => asm.add(one, two)?,
                14 => asm.lea(one, qword_ptr(two + three * 8 + by))?,
                15 => asm.cmovb(one, two)?,
                16 => asm.and(one, random.of(&[7, 0xff, -8]))?,
                17 => asm.mov(one, random.of(pool))?,
                18 => {
                    asm.cmp(one, two)?;
                    match random.below(4) {
                        0 => asm.jae(out)?,
                        1 => asm.ja(out)?,
                        2 => asm.jb(head)?,
                        _ => asm.jbe(out)?,
                    }
                }
                _ => {
                    let mut over = asm.create_label();
                    asm.cmp(one, two)?;
                    asm.jae(over)?;
                    asm.mov(qword_ptr(three + one * 8), rax)?;
                    asm.set_label(&mut over)?;
                    asm.inc(two)?;
                }
            }
        }
        asm.dec(r15)?;
        asm.jne(head)?;
        asm.set_label(&mut out)?;
        asm.nop()
    };
    case(assemble)
}

#[test]
fn random_loops_write_nothing_of_the_vmm() {
    const PROGRAMS: usize = 6000;
    let canaries = Canaries::new();
    // Loops that never end are stopped soon.
    let mut bench = Bench::new(Duration::from_millis(20)).expect("a bench");
    let Some(base) = bench.vcpu_for_tests().hold_window() else {
        return;
    };
    let mut pool = vec![
        0,
        1,
        2,
        8,
        GOOD,
        GOOD,
        GOOD + 64,
        GOOD / 8,
        16,
        u64::MAX,
        8u64.wrapping_neg(),
        SIZE,
        1 << 36,
        1 << 63,
    ];
    for own in canaries.addresses() {
        let wild = own.wrapping_sub(base);
        pool.extend([
            wild,
            wild,
            wild.wrapping_sub(GOOD),
            eighth(wild),
            wild.wrapping_neg(),
        ]);
    }
    let mut random = Random(0x6c6f_6f70);
    let mut done = 0;
    for number in 0..PROGRAMS {
        let outcome = bench.run(&program(&mut random, &pool)).expect("a case");
        done += usize::from(outcome.end == End::Stop(UserStop::Halt));
        assert!(canaries.intact(), "program {number}");
    }
    // Not all of them failed at once.
    assert!(done > PROGRAMS / 20, "{done} programs came to their end");
}
