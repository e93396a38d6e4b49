//! What the engine shows of its state, and takes back.

use bt::Options;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{ALL, Kernel, Steps, window};
use crate::msr::{KERNEL_GS_BASE, LSTAR};
use crate::run::boot;

/// Where there is neither RAM nor a device of the machine.
const DEVICE: u64 = 0xd000_0000;

#[test]
fn a_device_access_shows_the_registers_before_its_instruction() {
    let guest = Kernel::new().map(0, DEVICE | ALL).guest(|asm| {
        let registers = [
            rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ];
        for (index, register) in registers.into_iter().enumerate() {
            asm.mov(register, 0x1111_1111_1111 * (index as u64 + 1))?;
        }
        asm.stc()?;
        asm.adc(dword_ptr(window(0)), eax)?;
        asm.setb(al)?;
        asm.ud2()
    });
    let (mut vcpu, _ram) = boot(&guest, Options::default());
    let mut seen = 0;
    loop {
        match vcpu.run().expect("it runs") {
            Exit::PioOut { .. } => {}
            Exit::MmioRead { data, .. } => {
                data.fill(0);
                seen += 1;
            }
            Exit::MmioWrite { data, .. } => {
                // stc, then 0x1111_1111 + 0 + 1.
                assert_eq!(data, 0x1111_1112u32.to_le_bytes());
                seen += 1;
            }
            Exit::PioIn { .. } => panic!("no port is read"),
            _ => break,
        }
        if seen == 0 {
            continue;
        }
        let state = vcpu.state().expect("a state");
        let expected: Vec<u64> = (1..=15).map(|index| 0x1111_1111_1111 * index).collect();
        let found: Vec<u64> = (0..16)
            .filter(|&number| number != 4)
            .map(|number| state.gpr[number])
            .collect();
        assert_eq!(found, expected);
        assert_eq!(state.rflags & 1, 1);
        if seen == 2 {
            return;
        }
    }
    panic!("the device was not asked");
}

#[test]
fn a_state_that_is_set_again_changes_nothing() {
    let guest = Kernel::new().guest(|asm| {
        for (msr, value) in [(LSTAR, 0x1234_5000), (KERNEL_GS_BASE, 0x7654_3000)] {
            asm.mov(ecx, msr)?;
            asm.mov(eax, value)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()?;
        }
        asm.mov(eax, 0x77)?;
        asm.movd(xmm7, eax)?;
        asm.fld1()?;
        asm.std()?;
        asm.mov(edx, 0x80)?;
        asm.out(dx, al)?;
        asm.pushfq()?;
        asm.pop(rbx)?;
        asm.cld()?;
        asm.result(0, rbx)?;
        for (number, msr) in [(1, LSTAR), (2, KERNEL_GS_BASE)] {
            asm.mov(ecx, msr)?;
            asm.rdmsr()?;
            asm.result(number, rax)?;
        }
        asm.xor(eax, eax)?;
        asm.movd(eax, xmm7)?;
        asm.result(3, rax)
    });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    loop {
        match vcpu.run().expect("it runs") {
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { .. } => {}
            other => panic!("{other:?}"),
        }
        let state = vcpu.state().expect("a state");
        vcpu.set_state(&state).expect("it takes it");
        assert_eq!(vcpu.state().expect("a state"), state);
    }
    let mut results = [0; 32];
    let at = vm_memory::GuestAddress(crate::kernel::RESULTS);
    vm_memory::Bytes::read_slice(&*ram, &mut results, at).expect("guest memory");
    let words: Vec<u64> = results
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
        .collect();
    assert_eq!(words[0] & 0x400, 0x400);
    assert_eq!(words[1..], [0x1234_5000, 0x7654_3000, 0x77]);
}
