//! vCPUs that wait for each other, move between threads, and are stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bt::{BtVcpu, Guarantee, Options};
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use crate::code::{give_way, wait};
use crate::vm::{CALL, End, FREE, Vm, function, program_at, state};

const PAGES: u64 = 8;
const CODE: u64 = FREE + 0x10_0000;
const ERRORS: u64 = FREE;
const WRITTEN: u64 = FREE + 0x100;

/// Every vCPU writes a function of its own to each page in turn, and runs whatever it finds there.
fn everybody_translates(rounds: i32, without: Option<Guarantee>, patience: Duration) -> (End, u64) {
    const CPUS: u64 = 4;
    let mut vm = Vm::new().without(without).patience(patience);
    for page in 0..PAGES {
        vm = vm.put(CODE + 0x1000 * page, &function(0x100).to_le_bytes());
    }
    for cpu in 0..CPUS {
        vm = vm
            .cpu(move |asm| {
                let mut again = asm.create_label();
                let mut good = asm.create_label();
                asm.mov(r14d, rounds)?;
                asm.xor(r13d, r13d)?;
                asm.mov(r12, function(0x100 + cpu as u32))?;
                // Everybody begins elsewhere.
                asm.mov(ebx, 2 * cpu as i32)?;
                asm.set_label(&mut again)?;
                asm.inc(ebx)?;
                asm.and(ebx, PAGES as i32 - 1)?;
                asm.mov(edi, ebx)?;
                asm.shl(edi, 12)?;
                asm.add(rdi, CODE as i32)?;
                asm.mov(qword_ptr(rdi), r12)?;
                asm.mov(qword_ptr(rdi), r12)?;
                asm.call(rdi)?;
                asm.sub(eax, 0x100)?;
                asm.cmp(eax, CPUS as i32)?;
                asm.jb(good)?;
                asm.inc(r13)?;
                asm.set_label(&mut good)?;
                asm.dec(r14d)?;
                asm.jne(again)?;
                // When all have written their last, everybody runs what is there.
                asm.lock().inc(qword_ptr(WRITTEN))?;
                asm.mov(r14d, CPUS as i32)?;
                wait(asm, WRITTEN)?;
                for page in (0..PAGES).map(|page| CODE + 0x1000 * page) {
                    let mut same = asm.create_label();
                    asm.mov(rdi, page)?;
                    asm.call(rdi)?;
                    asm.cmp(eax, dword_ptr(page + 1))?;
                    asm.je(same)?;
                    asm.inc(r13)?;
                    asm.set_label(&mut same)?;
                    asm.nop()?;
                }
                asm.mov(qword_ptr(ERRORS + 8 * cpu), r13)
            })
            .answer(give_way);
    }
    let ran = vm.run();
    let errors = match ran.end {
        End::Done => (0..CPUS).map(|cpu| ran.word(ERRORS + 8 * cpu)).sum(),
        End::Stuck => 0,
    };
    (ran.end, errors)
}

#[test]
fn vcpus_that_want_each_others_pages_all_get_them() {
    let ended = everybody_translates(20_000, None, Duration::from_secs(60));
    assert_eq!(ended, (End::Done, 0));
}

#[test]
fn they_would_wait_forever_if_who_waits_did_not_answer() {
    let broken = Some(Guarantee::Parking);
    let (end, _) = everybody_translates(1_000_000, broken, Duration::from_secs(2));
    assert_eq!(end, End::Stuck);
}

/// vCPUs with the program of the first, which loads pi, calls, and stores what is there then.
fn with_pi(count: u8) -> Vec<BtVcpu> {
    let ram = Vm::new()
        .cpu(|asm| {
            asm.fldpi()?;
            asm.mov(edx, i32::from(CALL))?;
            asm.out(dx, al)?;
            asm.fstp(qword_ptr(FREE))?;
            asm.mov(rax, qword_ptr(FREE))
        })
        .load();
    let mut vcpus = BtVcpu::several(Arc::clone(&ram), Options::default(), count).expect("vCPUs");
    vcpus[0].set_state(&state(0, 0)).expect("a state");
    vcpus
}

fn to_call(vcpu: &mut BtVcpu) {
    let exit = vcpu.run().expect("it runs");
    assert!(matches!(exit, Exit::PioOut { port: CALL, .. }), "{exit:?}");
}

fn has_pi(vcpu: &mut BtVcpu) {
    assert!(matches!(vcpu.run(), Ok(Exit::PioOut { port: 0xf4, .. })));
    let state = vcpu.state().expect("a state");
    assert_eq!(f64::from_bits(state.gpr[0]), std::f64::consts::PI);
}

#[test]
fn x87_registers_follow_their_vcpu_to_another_thread() {
    // One of several moves while its last thread lives on.
    let mut several = with_pi(2);
    to_call(&mut several[0]);
    std::thread::scope(|scope| scope.spawn(|| has_pi(&mut several[0])).join()).expect("no panic");
    // The only one moves when its last thread has ended.
    let mut only = with_pi(1);
    std::thread::scope(|scope| scope.spawn(|| to_call(&mut only[0])).join()).expect("no panic");
    has_pi(&mut only[0]);
}

#[test]
fn an_only_vcpu_that_leaves_its_registers_behind_says_so() {
    let mut only = with_pi(1);
    to_call(&mut only[0]);
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let error = only[0].run().expect_err("its registers are elsewhere");
                assert!(error.to_string().contains("x87"), "{error}");
            })
            .join()
    })
    .expect("no panic");
    // Back, it finds them.
    has_pi(&mut only[0]);
}

#[test]
fn a_kick_stops_a_tight_loop_at_once() {
    let ram = Vm::new()
        .cpu(|asm| {
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            asm.jmp(again)
        })
        .load();
    let mut vcpus = BtVcpu::several(ram, Options::default(), 2).expect("vCPUs");
    let vcpu = &mut vcpus[0];
    vcpu.set_state(&state(0, 0)).expect("a state");
    let kick = vcpu.kick_handle();
    let mut delays: Vec<Duration> = (0..50)
        .map(|_| {
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    assert!(matches!(vcpu.run(), Ok(Exit::Interrupted)));
                    Instant::now()
                });
                std::thread::sleep(Duration::from_millis(2));
                let start = Instant::now();
                kick.kick();
                thread.join().expect("no panic") - start
            })
        })
        .collect();
    delays.sort();
    println!("median {:?}, longest {:?}", delays[25], delays[49]);
    // A busy host may be late; half of the time it isn't.
    assert!(delays[25] < Duration::from_millis(5), "{delays:?}");
    let rip = vcpus[0].state().expect("a state").rip;
    assert!((program_at(0)..program_at(1)).contains(&rip), "{rip:#x}");
}

#[test]
fn as_many_as_there_are_bits_and_no_more() {
    let ram = Vm::new().cpu(|_| Ok(())).load();
    let options = Options::default();
    assert_eq!(
        BtVcpu::several(Arc::clone(&ram), options, 16)
            .expect("16 vCPUs")
            .len(),
        16
    );
    for count in [0, 17] {
        assert!(BtVcpu::several(Arc::clone(&ram), options, count).is_err());
    }
}
