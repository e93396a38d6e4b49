//! Non-maskable interrupts: when they come, and when they have to wait.

use engine_core::Vcpu;
use iced_x86::code_asm::*;

use crate::rig::{End, FREE, GDT, HANDLERS, IDT, Rig, SPARE, TSS, TSS_2, gate, system_descriptor};

/// A handler that counts at FREE and goes back.
fn counting(rig: &mut Rig) {
    // inc qword [FREE]; iretq
    let mut handler = vec![0x48, 0xff, 0x04, 0x25];
    handler.extend((FREE as u32).to_le_bytes());
    handler.extend([0x48, 0xcf]);
    rig.put(HANDLERS + 0x800, &handler);
    rig.word(IDT + 32, gate(0x8e, crate::rig::CS_64, HANDLERS + 0x800));
}

#[test]
fn an_nmi_comes_before_the_next_instruction_whatever_if_says() {
    let mut rig = Rig::long();
    rig.code(|asm| asm.inc(eax));
    rig.vcpu.nmi().expect("it waits");
    assert_eq!(rig.run(), End::Vector(2));
    let state = rig.after();
    assert_eq!(state.gpr[0], 0);
    assert_eq!(rig.read(state.gpr[4]), crate::rig::CODE);
}

#[test]
fn the_next_one_waits_for_iret_and_several_are_one() {
    let mut rig = Rig::long();
    rig.code(|asm| asm.nop());
    rig.vcpu.nmi().expect("it waits");
    assert_eq!(rig.run(), End::Vector(2));
    // In the handler: two more, then code that counts on.
    rig.vcpu.nmi().expect("it waits");
    rig.vcpu.nmi().expect("it waits");
    counting(&mut rig);
    rig.put(
        HANDLERS + 0x21,
        // inc ecx; mov rbx, [FREE]; iretq
        &[0xff, 0xc1, 0x48, 0x8b, 0x1c, 0x25, 0, 0, 4, 0, 0x48, 0xcf],
    );
    assert_eq!(rig.go_on(), End::Halt);
    let state = rig.after();
    assert_eq!((state.gpr[1], state.gpr[3]), (1, 0));
    assert_eq!(rig.read(FREE), 1);
}

#[test]
fn two_that_come_before_the_first_is_delivered_are_two() {
    let mut rig = Rig::long();
    counting(&mut rig);
    rig.code(|asm| asm.nop());
    for _ in 0..3 {
        rig.vcpu.nmi().expect("it waits");
    }
    assert_eq!(rig.run(), End::Halt);
    assert_eq!(rig.read(FREE), 2);
}

#[test]
fn an_nmi_wakes_a_halted_cpu_and_waits_for_the_shadow_of_mov_ss() {
    let mut rig = Rig::long();
    counting(&mut rig);
    rig.code(|asm| {
        asm.hlt()?;
        asm.mov(rax, qword_ptr(FREE))
    });
    assert_eq!(rig.run(), End::Halt);
    rig.vcpu.nmi().expect("it waits");
    assert_eq!(rig.go_on(), End::Halt);
    assert_eq!((rig.read(FREE), rig.after().gpr[0]), (1, 1));
}

#[test]
fn an_nmi_that_a_device_access_raises_comes_right_after_it() {
    use engine_core::Exit;
    let mut rig = Rig::long();
    counting(&mut rig);
    rig.code(|asm| {
        asm.mov(ebx, 0x3000_0000)?;
        asm.mov(dword_ptr(rbx), eax)?;
        asm.mov(rcx, qword_ptr(FREE))
    });
    rig.vcpu.set_state(&rig.state.clone()).expect("a state");
    loop {
        match rig.vcpu.run().expect("it runs") {
            Exit::MmioWrite { .. } => break,
            Exit::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
    rig.vcpu.nmi().expect("it waits");
    assert_eq!(rig.go_on(), End::Halt);
    assert_eq!(rig.after().gpr[1], 1);
}

#[test]
fn an_nmi_goes_through_a_task_gate_and_iret_lets_the_next_one_in() {
    let mut rig = Rig::protected();
    rig.word(GDT + u64::from(SPARE), system_descriptor(0x89, TSS_2, 0x67));
    rig.word(IDT + 16, gate(0x85, SPARE, 0));
    let mut put = |at: u64, value: u32| rig.put(TSS_2 + at, &value.to_le_bytes());
    put(0x20, HANDLERS as u32 + 0x900);
    put(0x24, 2);
    put(0x38, 0x3_4000);
    put(0x4c, crate::rig::CS_32.into());
    for at in [0x48, 0x50, 0x54, 0x58, 0x5c] {
        put(at, crate::rig::DATA.into());
    }
    put(0x64, 0x68 << 16);
    // inc dword [FREE]; iretd; jmp -9
    rig.put(
        HANDLERS + 0x900,
        &[0xff, 0x05, 0, 0, 4, 0, 0xcf, 0xeb, 0xf7],
    );
    rig.code(|asm| {
        asm.hlt()?;
        asm.nop()
    });
    assert_eq!(rig.run(), End::Halt);
    for _ in 0..2 {
        rig.vcpu.nmi().expect("it waits");
    }
    assert_eq!(rig.go_on(), End::Halt);
    assert_eq!(rig.read_32(FREE), 2);
    assert_eq!(rig.read(TSS_2) as u16, crate::rig::TSS_SELECTOR);
    assert_eq!(rig.after().tr.base, TSS);
}
