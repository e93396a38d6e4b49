//! Accesses to devices that are at hand while the code runs: nothing is different but that translated
//! code goes on.

use bt::Extended;
use engine_core::{After, CpuState, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{Asm, Built};
use crate::rig::{CODE, DEVICE, End, FREE, Rig};

const WAYS: [Option<After>; 3] = [None, Some(After::Enter), Some(After::Return)];
const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const DF: u64 = 1 << 10;
const OF: u64 = 1 << 11;
const IOPL: u64 = 3 << 12;
/// Entry of the page directory that [`DEVICE`] is behind, of a page for everybody.
const DIRECTORY: u64 = crate::rig::TABLES + 0x2000 + 8 * (DEVICE >> 21);

/// What a run leaves.
#[derive(Debug, PartialEq)]
struct Left {
    end: End,
    state: CpuState,
    extended: Extended,
    memory: [u64; 4],
    written: Vec<(u16, u32)>,
    accesses: Vec<(bool, u64, usize)>,
    device_memory: Vec<u8>,
}

fn rig(user: bool) -> Rig {
    let mut rig = Rig::long();
    if user {
        rig = rig.in_ring_3();
    }
    rig.word(DIRECTORY, DEVICE | 0x87);
    rig.state.gpr = std::array::from_fn(|register| 0x1111_1111_1111_1111 * register as u64);
    rig.state.gpr[2] = 0x3f8;
    rig.state.gpr[3] = DEVICE;
    rig.state.gpr[4] = crate::rig::STACK;
    rig.state.gpr[6] = FREE;
    rig.device = 0xa5;
    rig
}

/// Runs the code twice, so that all of it is known, and says what the second run has left.
fn left(rig: &mut Rig, at_hand: Option<After>) -> (Left, u64) {
    rig.at_hand = at_hand;
    let mut run = || {
        for at in 0..4 {
            rig.word(FREE + 8 * at, 0);
        }
        rig.device_memory = (0..64).collect();
        let before = rig.vcpu.entries();
        let left = Left {
            end: rig.run(),
            state: rig.after(),
            extended: rig.vcpu.extended(),
            memory: std::array::from_fn(|at| rig.read(FREE + 8 * at as u64)),
            written: rig.written.clone(),
            accesses: rig.accesses.clone(),
            device_memory: rig.device_memory.clone(),
        };
        (left, rig.vcpu.entries() - before)
    };
    run();
    run()
}

/// Holds the three ways against each other; how often code was entered in each.
#[track_caller]
fn same(rig: &mut Rig, body: impl FnOnce(&mut Asm) -> Built) -> ([u64; 3], Left) {
    rig.code(body);
    let (expected, first) = left(rig, None);
    let [_, enter, back] = WAYS.map(|way| {
        let (found, entries) = left(rig, way);
        assert_eq!(found, expected, "{way:?}");
        entries
    });
    ([first, enter, back], expected)
}

/// Ports of every width, with every register and flag in use.
fn ports(a: &mut Asm) -> Built {
    a.out(dx, eax)?;
    a.mov(rax, 0x8877_6655_4433_2211u64)?;
    a.out(dx, ax)?;
    a.out(0x80, al)?;
    a.in_(al, dx)?;
    a.mov(qword_ptr(rsi), rax)?;
    a.in_(ax, 0x81)?;
    a.mov(qword_ptr(rsi + 8), rax)?;
    // Read behind a port that lies between: neither flags nor registers have changed.
    a.cmp(r12, r13)?;
    a.in_(eax, dx)?;
    a.mov(qword_ptr(rsi + 16), rax)?;
    a.out(dx, al)?;
    a.adc(r12, 5)?;
    a.mov(qword_ptr(rsi + 24), r12)?;
    a.sub(r13, r14)?;
    a.out(dx, al)?;
    Ok(())
}

#[test]
fn ports_are_the_same_with_devices_at_hand() {
    for (user, flags) in [(false, 0), (true, IOPL)] {
        for set in [0, CF | OF, ZF, CF | ZF | OF] {
            let mut rig = rig(user);
            rig.state.rflags |= flags | set;
            let (entries, left) = same(&mut rig, ports);
            // In ring 3 a hlt is not allowed.
            assert_eq!(left.end, if user { End::Vector(13) } else { End::Halt });
            let low = 0x8877_6655_4433_2211u64;
            let expected = [low & !0xff | 0xa5, low & !0xffff | 0xa5a5, 0xa5a5_a5a5];
            assert_eq!(left.memory[..3], expected);
            let values: Vec<u32> = left.written.iter().map(|entry| entry.1).collect();
            assert_eq!(values, [0, 0x2211, 0x11, 0xa5, 0xa5]);
            let [none, enter, back] = entries;
            assert!(enter + 8 <= none, "code leaves for ports: {entries:?}");
            assert_eq!(none, back);
        }
    }
}

#[test]
fn what_a_call_would_spoil_is_kept() {
    let mut rig = rig(false);
    rig.state.rflags |= DF;
    let (_, left) = same(&mut rig, |a| {
        a.movq(xmm3, rbx)?;
        a.out(dx, al)?;
        a.in_(al, dx)?;
        a.paddq(xmm3, xmm3)?;
        a.out(dx, al)?;
        a.movq(rcx, xmm3)?;
        a.cld()?;
        a.out(dx, al)?;
        a.std()?;
        Ok(())
    });
    assert_eq!(left.state.gpr[1], 2 * DEVICE);
    assert_ne!(left.state.rflags & DF, 0);
}

#[test]
fn ports_that_are_forbidden_fault_as_ever() {
    // Without a bit in the TSS's map that allows it.
    let mut rig = rig(true);
    rig.state.rflags |= CF | OF;
    let (_, left) = same(&mut rig, |a| {
        a.out(dx, al)?;
        // Flags that nobody reads may be anything in a frame.
        a.adc(rax, 1)?;
        a.seto(cl)
    });
    assert_eq!(left.end, End::Vector(13));
    assert_eq!(left.written, []);
}

#[test]
fn device_memory_is_the_same_with_devices_at_hand() {
    for user in [false, true] {
        let mut rig = rig(user);
        let (entries, left) = same(&mut rig, |a| {
            a.mov(qword_ptr(rbx + 4), r15)?;
            a.mov(ecx, dword_ptr(rbx + 1))?;
            a.add(byte_ptr(rbx + 9), 0x7f)?;
            a.adc(word_ptr(rbx + 20), cx)?;
            a.movups(xmm5, xmmword_ptr(rbx + 24))?;
            a.movups(xmmword_ptr(rbx + 33), xmm5)?;
            a.xchg(qword_ptr(rbx + 50), r8)?;
            a.mov(dword_ptr(rbx + 60), 7)?;
            Ok(())
        });
        assert_eq!(left.device_memory[60..], [7, 0, 0, 0]);
        assert_eq!(left.accesses.len(), 13);
        let [none, enter, back] = entries;
        assert_eq!((none, none), (enter, back));
    }
}

#[test]
fn a_loop_of_ports_stays_translated() {
    const TIMES: u32 = 1000;
    let mut rig = rig(false);
    let (entries, left) = same(&mut rig, |a| {
        let mut top = a.create_label();
        a.mov(ecx, TIMES)?;
        a.set_label(&mut top)?;
        a.mov(eax, ecx)?;
        a.out(dx, eax)?;
        a.dec(ecx)?;
        a.jnz(top)?;
        Ok(())
    });
    let values: Vec<u32> = left.written.iter().map(|entry| entry.1).collect();
    assert!(values.into_iter().eq((1..=TIMES).rev()));
    let [none, enter, back] = entries;
    assert!(enter < 10, "{enter} entries");
    assert_eq!(none, back);
    assert!(none > u64::from(TIMES));
}

#[test]
fn devices_need_to_tell_of_writes_to_code_alone() {
    let mut rig = Rig::long();
    let kept = rig.vcpu.kept_code().expect("it keeps code");
    assert!(!kept.holds(CODE));
    assert_eq!(rig.try_code(|a| a.mov(eax, 1)), End::Halt);
    assert!(kept.holds(CODE));
    assert!(!kept.holds(FREE) && !kept.holds(DEVICE));
    // What is told of is gone, and what comes then is looked at anew.
    assert_eq!(rig.try_code(|a| a.mov(eax, 2)), End::Halt);
    assert_eq!(rig.after().gpr[0], 2);
    assert!(kept.holds(CODE));
}
