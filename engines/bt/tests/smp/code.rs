//! Code that another vCPU or a device changes: whoever learns of the change runs the new code.
//!
//! That is more than processors promise, which want a serializing instruction between the two (SDM
//! 3A 8.1.3); guests that have one are tested beside those that don't.

use std::sync::Arc;
use std::time::Duration;

use bt::Guarantee;
use engine_core::dma::DeviceMemory;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::vm::{Built, CALL, Called, ENTRY, End, FREE, Vm, WINDOW, function, happens};

/// The code that changes.
const CODE: u64 = FREE + 0x10_0000;
/// Which round it is, and from `DONE` on which round each caller is through with.
const ROUND: u64 = FREE;
const DONE: u64 = FREE + 0x40;
const ERRORS: u64 = FREE + 0x400;

/// Waits until the word at `at` is `r14` at least; now and then the host may do something else.
pub(crate) fn wait(asm: &mut CodeAssembler, at: u64) -> Built {
    let mut again = asm.create_label();
    let mut over = asm.create_label();
    let mut spin = asm.create_label();
    asm.set_label(&mut again)?;
    asm.mov(ecx, 200)?;
    asm.set_label(&mut spin)?;
    asm.cmp(qword_ptr(at), r14)?;
    asm.jae(over)?;
    asm.pause()?;
    asm.dec(ecx)?;
    asm.jne(spin)?;
    asm.mov(edx, i32::from(CALL))?;
    asm.out(dx, al)?;
    asm.jmp(again)?;
    asm.set_label(&mut over)?;
    asm.nop()
}

pub(crate) fn give_way(_: &Called) {
    std::thread::yield_now();
}

/// Goes through `rounds`, R14 counting them: `call` calls the code of the round and leaves in EDX what
/// it should have answered. Says at `done` which round it is through with, and at `errors` in the end
/// how often the answer in EAX was another one.
fn compare_each(
    asm: &mut CodeAssembler,
    rounds: i32,
    [done, errors]: [u64; 2],
    call: impl FnOnce(&mut CodeAssembler) -> Built,
) -> Built {
    let mut again = asm.create_label();
    let mut good = asm.create_label();
    asm.xor(r14d, r14d)?;
    asm.xor(r13d, r13d)?;
    asm.set_label(&mut again)?;
    asm.inc(r14)?;
    call(asm)?;
    asm.cmp(eax, edx)?;
    asm.je(good)?;
    asm.inc(r13)?;
    asm.set_label(&mut good)?;
    asm.mov(qword_ptr(done), r14)?;
    asm.cmp(r14, rounds)?;
    asm.jb(again)?;
    asm.mov(qword_ptr(errors), r13)
}

/// One vCPU that changes the code in each round and waits for the others, `callers` of them, which
/// call it and count what isn't of this round.
struct Rounds {
    ring: u8,
    rounds: i32,
    callers: u64,
    /// Writes the code of round R14, with RDI leading to it.
    write: fn(&mut CodeAssembler) -> Built,
    /// Calls it by this address.
    at: u64,
    /// With a call that names it, so that it may run in line.
    direct: bool,
    /// Before the call.
    prepare: fn(&mut CodeAssembler) -> Built,
    /// What it answers, from R14 to EDX.
    expected: fn(&mut CodeAssembler) -> Built,
}

impl Rounds {
    const PLAIN: Rounds = Rounds {
        ring: 0,
        rounds: 10_000,
        callers: 1,
        write: whole,
        at: CODE,
        direct: false,
        prepare: |_| Ok(()),
        expected: |asm| asm.mov(edx, r14d),
    };

    fn errors(&self, without: Option<Guarantee>) -> u64 {
        let &Rounds {
            ring,
            rounds,
            callers,
            write,
            at,
            direct,
            prepare,
            expected,
        } = self;
        let mut vm = Vm::new()
            .without(without)
            .ring(ring)
            .map(0, CODE | ENTRY)
            .put(CODE, &function(0).to_le_bytes())
            .cpu(move |asm| {
                let mut again = asm.create_label();
                asm.xor(r14d, r14d)?;
                asm.set_label(&mut again)?;
                asm.inc(r14)?;
                asm.mov(rdi, CODE)?;
                write(asm)?;
                asm.mov(qword_ptr(ROUND), r14)?;
                for caller in 0..callers {
                    wait(asm, DONE + 0x40 * caller)?;
                }
                asm.cmp(r14, rounds)?;
                asm.jb(again)
            })
            .answer(give_way);
        for caller in 0..callers {
            vm = vm
                .cpu(move |asm| {
                    let words = [DONE + 0x40 * caller, ERRORS + 8 * caller];
                    compare_each(asm, rounds, words, |asm| {
                        wait(asm, ROUND)?;
                        prepare(asm)?;
                        if direct {
                            asm.call(at)?;
                        } else {
                            asm.mov(rcx, at)?;
                            asm.call(rcx)?;
                        }
                        expected(asm)
                    })
                })
                .answer(give_way);
        }
        let ran = vm.run();
        (0..callers)
            .map(|caller| ran.word(ERRORS + 8 * caller))
            .sum()
    }
}

/// `mov eax, r14; ret`, in one store.
fn whole(asm: &mut CodeAssembler) -> Built {
    asm.mov(rax, function(0))?;
    asm.mov(rbx, r14)?;
    asm.shl(rbx, 8)?;
    asm.or(rax, rbx)?;
    asm.mov(qword_ptr(rdi), rax)
}

/// The immediate alone.
fn immediate(asm: &mut CodeAssembler) -> Built {
    asm.mov(dword_ptr(rdi + 1), r14d)
}

/// Once more before: nobody has code from there any more when the second store comes.
fn twice(asm: &mut CodeAssembler) -> Built {
    asm.mov(rax, function(0))?;
    asm.mov(qword_ptr(rdi), rax)?;
    whole(asm)
}

/// Byte by byte, and string by string.
fn anew(asm: &mut CodeAssembler) -> Built {
    asm.mov(rdx, rdi)?;
    asm.mov(al, 0x90)?;
    asm.mov(ecx, 200)?;
    asm.rep().stosb()?;
    asm.mov(rdi, rdx)?;
    whole(asm)
}

/// `jmp` to the even or the odd function of two.
fn jump(asm: &mut CodeAssembler) -> Built {
    asm.mov(rax, function(0))?;
    asm.mov(qword_ptr(rdi + 0x80), rax)?;
    asm.mov(rax, function(1))?;
    asm.mov(qword_ptr(rdi + 0x180), rax)?;
    asm.mov(rax, r14)?;
    asm.and(eax, 1)?;
    asm.shl(eax, 8)?;
    asm.add(eax, 0x80 - 5)?;
    asm.shl(rax, 8)?;
    asm.mov(al, 0xe9)?;
    asm.mov(qword_ptr(rdi), rax)
}

#[test]
fn changed_code_is_run_by_who_has_seen_the_change() {
    assert_eq!(Rounds::PLAIN.errors(None), 0);
}

#[test]
fn a_leaf_that_somebody_else_changes_is_run_as_it_is() {
    for (write, at) in [
        (whole as fn(&mut CodeAssembler) -> Built, CODE),
        (twice, CODE),
        (anew, WINDOW),
    ] {
        let errors = Rounds {
            write,
            at,
            direct: true,
            ..Rounds::PLAIN
        }
        .errors(None);
        assert_eq!(errors, 0, "at {at:#x}");
    }
}

#[test]
fn a_changed_immediate_is_loaded_after_a_serializing_instruction() {
    let errors = Rounds {
        write: immediate,
        prepare: |asm| {
            asm.xor(eax, eax)?;
            asm.cpuid()
        },
        ..Rounds::PLAIN
    }
    .errors(None);
    assert_eq!(errors, 0);
}

#[test]
fn a_changed_jump_leads_to_its_new_target() {
    let errors = Rounds {
        write: jump,
        expected: |asm| {
            asm.mov(edx, r14d)?;
            asm.and(edx, 1)
        },
        ..Rounds::PLAIN
    }
    .errors(None);
    assert_eq!(errors, 0);
}

#[test]
fn a_page_that_becomes_code_again_and_again_is_read_after_the_last_write() {
    for write in [twice, anew] {
        let errors = Rounds {
            write,
            ..Rounds::PLAIN
        }
        .errors(None);
        assert_eq!(errors, 0);
    }
}

#[test]
fn the_same_holds_in_ring_3() {
    for write in [whole, immediate, twice, anew] {
        for at in [CODE, WINDOW] {
            let errors = Rounds {
                ring: 3,
                rounds: 3000,
                write,
                at,
                ..Rounds::PLAIN
            }
            .errors(None);
            assert_eq!(errors, 0, "at {at:#x}");
        }
    }
}

#[test]
fn an_alias_is_the_same_code() {
    let errors = Rounds {
        write: twice,
        at: WINDOW,
        ..Rounds::PLAIN
    }
    .errors(None);
    assert_eq!(errors, 0);
}

#[test]
fn several_callers_all_see_the_change() {
    let errors = Rounds {
        rounds: 500,
        callers: 3,
        write: twice,
        ..Rounds::PLAIN
    }
    .errors(None);
    assert_eq!(errors, 0);
}

#[test]
fn without_acknowledgement_old_code_is_run() {
    for ring in [0, 3] {
        let errors = Rounds {
            ring,
            rounds: 1000,
            write: twice,
            ..Rounds::PLAIN
        }
        .errors(Some(Guarantee::Acknowledgement));
        assert!(errors > 0, "ring {ring}");
    }
}

#[test]
fn without_invalidation_old_code_is_run() {
    let rounds = Rounds {
        rounds: 100,
        ..Rounds::PLAIN
    };
    assert!(rounds.errors(Some(Guarantee::Invalidation)) > 0);
}

/// One vCPU calls until it is told to stop by the code itself, and never leaves translated code.
fn endless(without: Option<Guarantee>, patience: Duration) -> End {
    Vm::new()
        .without(without)
        .patience(patience)
        .put(CODE, &function(0).to_le_bytes())
        .cpu(|asm| {
            let mut again = asm.create_label();
            asm.mov(rbx, CODE)?;
            asm.set_label(&mut again)?;
            asm.inc(qword_ptr(ROUND))?;
            asm.call(rbx)?;
            asm.test(eax, eax)?;
            asm.je(again)
        })
        .cpu(|asm| {
            asm.mov(r14d, 1_000_000)?;
            wait(asm, ROUND)?;
            asm.mov(dword_ptr(CODE + 1), 1)
        })
        .answer(give_way)
        .run()
        .end
}

#[test]
fn a_loop_that_never_leaves_sees_its_code_change() {
    for _ in 0..20 {
        assert_eq!(endless(None, Duration::from_secs(60)), End::Done);
    }
    let broken = Some(Guarantee::Invalidation);
    assert_eq!(endless(broken, Duration::from_secs(2)), End::Stuck);
}

/// A device that writes code when one vCPU asks it to, for another to run.
fn device_errors(rounds: i32, without: Option<Guarantee>) -> u64 {
    let vm = Vm::new().without(without);
    let memory = DeviceMemory::new(&vm.ram, true).expect("an alias");
    let log = Arc::clone(memory.log().expect("a log"));
    let device = memory.ram().clone();
    let mut value = 0u32;
    vm.log(&log)
        .put(CODE, &function(0).to_le_bytes())
        .cpu(move |asm| {
            let mut again = asm.create_label();
            let mut spin = asm.create_label();
            asm.xor(r14d, r14d)?;
            asm.set_label(&mut again)?;
            asm.inc(r14)?;
            asm.mov(edx, i32::from(CALL))?;
            asm.out(dx, al)?;
            asm.mov(qword_ptr(ROUND), r14)?;
            asm.set_label(&mut spin)?;
            asm.pause()?;
            asm.cmp(qword_ptr(DONE), r14)?;
            asm.jb(spin)?;
            asm.cmp(r14, rounds)?;
            asm.jb(again)
        })
        .answer(move |_| {
            value += 1;
            device
                .write_obj(function(value), GuestAddress(CODE))
                .expect("guest memory");
        })
        .cpu(move |asm| {
            compare_each(asm, rounds, [DONE, ERRORS], |asm| {
                wait(asm, ROUND)?;
                asm.mov(rcx, CODE)?;
                asm.call(rcx)?;
                asm.mov(edx, r14d)
            })
        })
        .answer(give_way)
        .run()
        .word(ERRORS)
}

#[test]
fn code_that_a_device_writes_is_run_by_another_vcpu() {
    assert_eq!(device_errors(1000, None), 0);
    assert!(device_errors(100, Some(Guarantee::Invalidation)) > 0);
}

/// A block writes to a page before and after it asks a device, through one lookup; meanwhile another
/// vCPU wants the page's code.
fn mid_block_errors(without: Option<Guarantee>) -> u64 {
    const ROUNDS: i32 = 100;
    const EARLY: u64 = FREE + 0x200;
    let vm = Vm::new().without(without);
    let ram = Arc::clone(&vm.ram);
    let mut round = 0u64;
    vm.put(CODE, &function(0).to_le_bytes())
        .cpu(move |asm| {
            let mut again = asm.create_label();
            asm.mov(rsi, crate::vm::DEVICE)?;
            asm.xor(r14d, r14d)?;
            asm.set_label(&mut again)?;
            asm.inc(r14)?;
            asm.mov(rdi, CODE)?;
            // Nobody's code any more.
            asm.mov(rax, function(0))?;
            asm.mov(qword_ptr(rdi), rax)?;
            asm.mov(rbx, r14)?;
            asm.shl(rbx, 8)?;
            asm.or(rax, rbx)?;
            let mut block = asm.create_label();
            asm.jmp(block)?;
            asm.set_label(&mut block)?;
            asm.mov(qword_ptr(rdi + 8), rax)?;
            asm.mov(rdx, qword_ptr(rsi))?;
            asm.mov(qword_ptr(rdi), rax)?;
            asm.mov(qword_ptr(ROUND), r14)?;
            wait(asm, DONE)?;
            asm.cmp(r14, ROUNDS)?;
            asm.jb(again)
        })
        .answer(move |called| match called {
            Called::Read => {
                round += 1;
                ram.write_obj(round, GuestAddress(EARLY))
                    .expect("guest memory");
                std::thread::sleep(Duration::from_millis(2));
            }
            Called::Port | Called::Write => std::thread::yield_now(),
        })
        .cpu(move |asm| {
            compare_each(asm, ROUNDS, [DONE, ERRORS], |asm| {
                asm.mov(rbx, CODE)?;
                wait(asm, EARLY)?;
                asm.call(rbx)?;
                wait(asm, ROUND)?;
                asm.call(rbx)?;
                asm.mov(edx, r14d)
            })
        })
        .answer(give_way)
        .run()
        .word(ERRORS)
}

#[test]
fn a_block_that_waits_for_a_device_is_waited_for() {
    assert_eq!(mid_block_errors(None), 0);
    assert!(happens(|| mid_block_errors(Some(Guarantee::Pins)) > 0));
}
