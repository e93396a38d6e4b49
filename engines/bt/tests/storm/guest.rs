//! The guest: a kernel that goes through its steps.
//!
//! R15 points to the next step, R14 is the sum, R13 points to where it is noted before each step; R12 and
//! RBP hold the stacks of ring 0 and ring 3. vCPUs take turns, so that all of it is in one order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bt::{BtVcpu, Guarantee, Options};
use engine_core::testing::assemble;
use engine_core::{CpuState, DescriptorTable, Exit, GuestRam, Segment, Vcpu};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::generate::{Life, Plan};
use crate::layout::*;
use crate::model::FACTOR;
use crate::step;

type Built = Result<(), IcedError>;

/// Offsets of the pieces of ring-3 code.
const USER_CALL: u64 = USER_CODE;
const USER_LOAD: u64 = USER_CODE + 0x40;
const USER_WRITE: u64 = USER_CODE + 0x80;

/// How a guest is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Plain,
    /// With the smallest code cache.
    Tight,
    /// With the window held open.
    Window,
    /// With interrupts and NMIs at any time.
    Interrupted,
    /// vCPUs aren't told that their code is overwritten: a control.
    Untold,
}

/// Runs a plan; the sums before each step of each vCPU.
pub(crate) fn run(plan: &Plan, way: Way) -> Result<Vec<Vec<u64>>, String> {
    let ram = engine_core::memory::create(RAM_MIB).expect("guest memory");
    put(&ram, 0, &plan.memory);
    kernel(&ram);
    for (cpu, life) in plan.lives.iter().enumerate() {
        assert!(life.steps.len() <= MOST_STEPS);
        let own = own(cpu);
        put(&ram, own.tss + 4, &own.stack.to_le_bytes());
        put(&ram, own.tss + 0x24, &own.nmi_stack.to_le_bytes());
        put(&ram, own.tss + 0x66, &0x68u16.to_le_bytes());
        for (number, step) in life.steps.iter().enumerate() {
            for (word, value) in step.words().into_iter().enumerate() {
                let at = own.steps + ((number * STEP_WORDS + word) * 8) as u64;
                put(&ram, at, &value.to_le_bytes());
            }
        }
    }
    let mut options = Options::default();
    if way == Way::Tight {
        options.code_cache = *Options::CODE_CACHE.start();
    }
    let count = plan.lives.len() as u8;
    let made = if way == Way::Untold {
        BtVcpu::several_without(Arc::clone(&ram), options, count, Guarantee::Invalidation)
    } else {
        BtVcpu::several(Arc::clone(&ram), options, count)
    };
    let mut vcpus = made.expect("vCPUs");
    let failed = AtomicBool::new(false);
    let kicks: Vec<_> = vcpus.iter().map(Vcpu::kick_handle).collect();
    let all = std::thread::scope(|scope| {
        let (ram, failed) = (&ram, &failed);
        let threads: Vec<_> = vcpus
            .iter_mut()
            .zip(&plan.lives)
            .enumerate()
            .map(|(cpu, (vcpu, life))| {
                scope.spawn(move || {
                    if way == Way::Window && vcpu.hold_window().is_none() {
                        return Err("no window".to_owned());
                    }
                    vcpu.set_state(&initial(cpu, life)).expect("a state");
                    let sums = live(cpu, vcpu, ram, failed);
                    failed.fetch_or(sums.is_err(), Ordering::Relaxed);
                    sums
                })
            })
            .collect();
        while way == Way::Interrupted && !threads.iter().all(|thread| thread.is_finished()) {
            kicks.iter().for_each(|kick| kick.kick());
            // Some hundred instructions, so that they hit everywhere.
            (0..200).for_each(|_| std::hint::spin_loop());
        }
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        ends.collect()
    });
    let interrupts: u64 = ram
        .read_obj(GuestAddress(INTERRUPTS))
        .expect("in guest memory");
    assert_eq!(
        interrupts > 0,
        way == Way::Interrupted,
        "{interrupts} interrupts"
    );
    all
}

/// One vCPU, to its end or until another has failed.
fn live(
    cpu: usize,
    vcpu: &mut BtVcpu,
    ram: &Arc<GuestRam>,
    failed: &AtomicBool,
) -> Result<Vec<u64>, String> {
    let mut kicks = 0u64;
    let ended = loop {
        match vcpu.run().map_err(|error| error.to_string())? {
            Exit::Hlt => break Ok(()),
            Exit::PioOut {
                port: WAIT_PORT, ..
            } if failed.load(Ordering::Relaxed) => {
                break Err("another vCPU failed".to_owned());
            }
            Exit::PioOut {
                port: WAIT_PORT, ..
            } => std::thread::yield_now(),
            Exit::PioOut {
                port: DEVICE_PORT, ..
            } => {
                let gpr = vcpu.state().map_err(|error| error.to_string())?.gpr;
                let (from, to) = (gpr[3], gpr[10]);
                let mut bytes = [0; PAGE as usize];
                ram.read_slice(&mut bytes, GuestAddress(from))
                    .expect("in guest memory");
                put(ram, to, &bytes);
                vcpu.memory_written(&[to / PAGE]);
            }
            Exit::Interrupted | Exit::InterruptWindow => {
                let now = vcpu.interruptible();
                if now {
                    vcpu.interrupt(INTERRUPT)
                        .map_err(|error| error.to_string())?;
                }
                vcpu.request_interrupt_window(!now);
                kicks += 1;
                if kicks.is_multiple_of(5) {
                    vcpu.nmi().map_err(|error| error.to_string())?;
                }
            }
            other => break Err(format!("{other:?}")),
        }
    };
    let state = vcpu.state().map_err(|error| error.to_string())?;
    let own = own(cpu);
    let done = (state.gpr[15] - own.steps) as usize / (STEP_WORDS * 8);
    let vector = state.rip.wrapping_sub(HANDLERS) / HANDLER_STRIDE;
    ended.map_err(|exit| {
        format!(
            "{exit} in step {} at {:#x}",
            done.wrapping_sub(1),
            state.rip
        )
    })?;
    if vector < 256 {
        return Err(format!("vector {vector} in step {}", done.wrapping_sub(1)));
    }
    let mut sums = vec![0; done];
    for (number, sum) in sums.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        let at = GuestAddress(own.trace + number as u64 * 8);
        ram.read_slice(&mut bytes, at).expect("in guest memory");
        *sum = u64::from_le_bytes(bytes);
    }
    Ok(sums)
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    ram.write_slice(bytes, GuestAddress(at))
        .expect("in guest memory");
}

fn initial(cpu: usize, life: &Life) -> CpuState {
    let own = own(cpu);
    let flat = Segment::flat;
    let data = flat(KERNEL_SS, 0xc093);
    let null = Segment::default();
    let mut state = CpuState {
        rip: CODE,
        rflags: 2,
        segments: [data, flat(KERNEL_CS, 0xa09b), data, data, null, null],
        ldtr: Segment::no_ldt(),
        tr: Segment::tss(TSS_SELECTOR, own.tss),
        gdtr: DescriptorTable {
            base: GDT,
            limit: 0x37,
        },
        idtr: DescriptorTable {
            base: IDT,
            limit: 0xfff,
        },
        cr0: life.registers.cr0,
        cr3: life.registers.cr3,
        cr4: life.registers.cr4,
        // SCE LME LMA NXE.
        efer: 0xd01,
        ..CpuState::default()
    };
    state.gpr[4] = own.stack;
    state.gpr[5] = own.user_stack;
    state.gpr[8] = own.descriptor;
    state.gpr[12] = own.stack;
    state.gpr[13] = own.trace;
    state.gpr[15] = own.steps;
    state
}

fn kernel(ram: &GuestRam) {
    let gdt: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        // Each vCPU has a TSS of its own in its task register.
        0,
        0,
    ];
    for (index, entry) in gdt.iter().enumerate() {
        put(ram, GDT + index as u64 * 8, &entry.to_le_bytes());
    }
    for vector in 0..256u64 {
        let handler = HANDLERS + vector * HANDLER_STRIDE;
        let stack = u64::from(vector == 2);
        let low = handler & 0xffff | u64::from(KERNEL_CS) << 16 | (0x8e00 | stack) << 32;
        let low = low | (handler >> 16 & 0xffff) << 48;
        put(ram, IDT + 16 * vector, &low.to_le_bytes());
        // lock inc qword [INTERRUPTS]; iretq
        let mut code = b"\xf0\x48\xff\x04\x25".to_vec();
        code.extend((INTERRUPTS as u32).to_le_bytes());
        code.extend(b"\x48\xcf");
        let harmless = vector == 2 || vector == u64::from(INTERRUPT);
        put(ram, handler, if harmless { &code } else { &[0xf4] });
    }
    for (at, body) in [
        (USER_CALL, user_call as fn(&mut CodeAssembler) -> Built),
        (USER_LOAD, user_load),
        (USER_WRITE, user_write),
    ] {
        put(ram, at, &assemble(64, at, body));
    }
    let mut asm = CodeAssembler::new(64).expect("64-bit code");
    let mut labels = Vec::new();
    body(&mut asm, &mut labels).expect("the kernel can be assembled");
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = asm
        .assemble_options(CODE, options)
        .expect("the kernel can be encoded");
    put(ram, CODE, &result.inner.code_buffer);
    assert_eq!(labels.len(), step::HANDLERS + 1);
    for (number, label) in labels.iter().enumerate() {
        let at = result.label_ip(label).expect("it is there");
        if number < step::HANDLERS {
            put(ram, DISPATCH + number as u64 * 8, &at.to_le_bytes());
        } else {
            // The page fault's.
            let jump = assemble(64, HANDLERS + 14 * HANDLER_STRIDE, |asm| asm.jmp(at));
            put(ram, HANDLERS + 14 * HANDLER_STRIDE, &jump);
        }
    }
}

fn user_call(asm: &mut CodeAssembler) -> Built {
    asm.call(rbx)?;
    asm.syscall()
}

fn user_load(asm: &mut CodeAssembler) -> Built {
    asm.mov(eax, dword_ptr(rbx))?;
    asm.syscall()
}

fn user_write(asm: &mut CodeAssembler) -> Built {
    asm.mov(dword_ptr(rbx), edx)?;
    asm.xor(eax, eax)?;
    asm.syscall()
}

/// The kernel. Answers where the handlers of the steps begin, and the page fault's behind them.
fn body(asm: &mut CodeAssembler, labels: &mut Vec<CodeLabel>) -> Built {
    let mut next = asm.create_label();
    let mut fold = asm.create_label();
    let mut user = asm.create_label();
    let mut entry = asm.create_label();
    // LSTAR and STAR.
    asm.lea(rax, ptr(entry))?;
    asm.mov(rdx, rax)?;
    asm.shr(rdx, 32)?;
    asm.mov(ecx, 0xc000_0082u32)?;
    asm.wrmsr()?;
    asm.xor(eax, eax)?;
    asm.mov(edx, u32::from(KERNEL_CS) | u32::from(KERNEL_SS | 3) << 16)?;
    asm.dec(ecx)?;
    asm.wrmsr()?;
    // FMASK: no interrupts while RSP is ring 3's.
    asm.xor(edx, edx)?;
    asm.mov(eax, 0x200)?;
    asm.mov(ecx, 0xc000_0084u32)?;
    asm.wrmsr()?;
    asm.xor(r14d, r14d)?;
    asm.jmp(next)?;

    // Takes RAX into the sum.
    asm.set_label(&mut fold)?;
    asm.imul_3(r14, r14, FACTOR)?;
    asm.xor(r14, rax)?;
    asm.set_label(&mut next)?;
    asm.sti()?;
    asm.mov(qword_ptr(r13), r14)?;
    asm.add(r13, 8)?;
    asm.mov(rax, qword_ptr(r15))?;
    asm.mov(rbx, qword_ptr(r15 + 8))?;
    asm.mov(rcx, qword_ptr(r15 + 16))?;
    asm.mov(rdx, qword_ptr(r15 + 24))?;
    asm.add(r15, STEP_WORDS as i32 * 8)?;
    asm.jmp(qword_ptr(rax * 8 + DISPATCH))?;

    let mut handler = |asm: &mut CodeAssembler| -> Built {
        let mut label = asm.create_label();
        asm.set_label(&mut label)?;
        labels.push(label);
        Ok(())
    };
    handler(asm)?;
    asm.hlt()?;
    handler(asm)?;
    asm.mov(qword_ptr(rbx), rcx)?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(dword_ptr(rbx), ecx)?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.invlpg(byte_ptr(rbx))?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(qword_ptr(r8), rcx)?;
    asm.mov(qword_ptr(r8 + 8), rdx)?;
    asm.invpcid(rbx, xmmword_ptr(r8))?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(cr0, rbx)?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(cr3, rbx)?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(cr4, rbx)?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(eax, r14d)?;
    asm.call(rbx)?;
    asm.jmp(fold)?;
    handler(asm)?;
    asm.mov(rcx, USER_CALL)?;
    asm.set_label(&mut user)?;
    asm.mov(eax, r14d)?;
    asm.push(i32::from(USER_SS))?;
    asm.push(rbp)?;
    asm.push(0x202)?;
    asm.push(i32::from(USER_CS))?;
    asm.push(rcx)?;
    asm.iretq()?;
    handler(asm)?;
    asm.mov(eax, r14d)?;
    asm.mov(rcx, USER_CALL)?;
    asm.mov(r11d, 0x202)?;
    asm.cli()?;
    asm.mov(rsp, rbp)?;
    asm.sysretq()?;
    handler(asm)?;
    asm.mov(eax, dword_ptr(rbx))?;
    asm.jmp(fold)?;
    handler(asm)?;
    asm.mov(rcx, USER_LOAD)?;
    asm.jmp(user)?;
    handler(asm)?;
    asm.mov(dword_ptr(rbx), edx)?;
    asm.xor(eax, eax)?;
    asm.jmp(fold)?;
    handler(asm)?;
    asm.mov(rcx, USER_WRITE)?;
    asm.jmp(user)?;
    handler(asm)?;
    asm.mov(rsi, rbx)?;
    asm.mov(rdi, rdx)?;
    asm.rep().movsb()?;
    asm.xor(eax, eax)?;
    asm.jmp(fold)?;
    handler(asm)?;
    asm.mov(r10, rdx)?;
    asm.out(i32::from(DEVICE_PORT), al)?;
    asm.jmp(next)?;
    handler(asm)?;
    let mut mine = asm.create_label();
    let mut wait = asm.create_label();
    asm.mov(r10, rdx)?;
    asm.set_label(&mut wait)?;
    asm.cmp(qword_ptr(TICKET), r10)?;
    asm.je(mine)?;
    asm.out(i32::from(WAIT_PORT), al)?;
    asm.jmp(wait)?;
    asm.set_label(&mut mine)?;
    asm.cpuid()?;
    asm.jmp(next)?;
    handler(asm)?;
    asm.mov(qword_ptr(TICKET), rdx)?;
    asm.jmp(next)?;
    // Page fault: error code and address go into the sum.
    handler(asm)?;
    asm.pop(rax)?;
    asm.imul_3(r14, r14, FACTOR)?;
    asm.xor(r14, rax)?;
    asm.mov(rax, cr2)?;
    asm.mov(rsp, r12)?;
    asm.jmp(fold)?;

    asm.set_label(&mut entry)?;
    asm.mov(rsp, r12)?;
    asm.jmp(fold)
}
