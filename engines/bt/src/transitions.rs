//! Changes of privilege without Rust: syscall, sysret, iret, and delivery through the IDT.
//!
//! Translated code jumps here with everything settled but R12, R13 and the flags, which are in their
//! slots ([`Homes::MEETING`](crate::site::Homes::MEETING)), and with a site stored. A stub that meets
//! anything but the common case of 64-bit code puts back what it has borrowed and leaves through
//! that site: the runtime then executes the instruction, whole, as if there were no stub. What the
//! runtime learns on the way (gates, descriptors of a return) waits in
//! [`Shortcuts`] for the next time.
//!
//! A stub that has done its work looks the target up in the jump cache of the new privilege and
//! goes there, or leaves with site [`BOUNDARY`] and the target in `Context::target`.
//!
//! Invariant: nothing that the guest could see is written before the last check.

mod parts;

use std::mem::offset_of;

use dynasmrt::{DynasmApi, DynasmLabelApi, VecAssembler, dynasm};
use engine_core::{DescriptorTable, Segment};

use crate::{
    arena::Arena,
    context::Context,
    cpu::{
        Cpu, FLAG_AC, FLAG_DF, FLAG_ID, FLAG_IOPL, FLAG_NT, FLAG_RF, FLAG_TF, FLAG_VM,
        SYSTEM_FLAGS, Seg,
    },
    privileged::{GATES, Gate, KERNEL, Return, SYSCALLS, Shortcuts, USER, count},
    stubs::Stubs,
    tlb::{jump_index, tlb_index, tlb_kind},
};
use parts::{Emit, RAX, RCX, RDI, RSI};

/// Value of `Context::site` after a stub whose target isn't in the jump cache.
pub(crate) const BOUNDARY: u64 = u64::MAX - 1;

/// Value of `Context::site` while the runtime has an exception delivered.
pub(crate) const RAISING: u64 = u64::MAX - 2;

/// Delivery by an instruction: the gate's DPL counts, and the frame's RF is clear.
pub(crate) const SOFTWARE: i32 = 1 << 8;
/// Delivery from ring 3.
pub(crate) const FROM_USER: i32 = 1 << 9;
/// There is an error code, in `Shortcuts::error`.
pub(crate) const HAS_ERROR: i32 = 1 << 10;

const DF: i32 = FLAG_DF as i32;

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transitions {
    /// From any ring, RIP of the next instruction in R12.
    pub syscall: u64,
    /// sysretq in ring 0.
    pub sysret: u64,
    /// iretq in ring 0.
    pub iret: u64,
    /// An exception or interrupt: RIP to be pushed in R12; vector, [`SOFTWARE`], [`FROM_USER`] and
    /// [`HAS_ERROR`] in R13.
    pub deliver: u64,
    /// Behind the last stub.
    pub end: u64,
}

/// Emits the stubs of a bank, to be placed at `base`, behind `stubs`.
pub(crate) fn emit(arena: &Arena, stubs: &Stubs, bank: usize, base: u64) -> (Transitions, Vec<u8>) {
    let mut emit = Emit {
        ops: VecAssembler::new(base as usize),
        context: arena.context_disp(),
        privileged: arena.privileged() as usize as i32,
        doorbell: arena.doorbell() as i32,
        tlb: [false, true].map(|write| arena.tlb(tlb_index(bank, tlb_kind(false, write))) as i32),
        jump: [false, true].map(|user| arena.jump(jump_index(bank, user)) as i32),
        exit: stubs.exit,
        load: stubs.load_vectors,
    };
    let place = |emit: &mut Emit, stub: fn(&mut Emit)| {
        emit.ops.align(16, 0xcc);
        let at = base + emit.ops.offset().0 as u64;
        stub(emit);
        at
    };
    let syscall = place(&mut emit, Emit::syscall);
    let sysret = place(&mut emit, Emit::sysret);
    let iret = place(&mut emit, Emit::iret);
    let deliver = place(&mut emit, Emit::deliver);
    let end = base + emit.ops.offset().0 as u64;
    let transitions = Transitions {
        syscall,
        sysret,
        iret,
        deliver,
        end,
    };
    let code = emit.ops.finalize().expect("every label is bound");
    (transitions, code)
}

impl Emit {
    /// SDM 2B, SYSCALL.
    fn syscall(&mut self) {
        let code = self.shortcut(offset_of!(Shortcuts, syscall));
        let mask = self.cpu(offset_of!(Cpu, fmask));
        let flags = self.cpu(offset_of!(Cpu, flags));
        let lstar = self.cpu(offset_of!(Cpu, lstar));
        self.demand(KERNEL | SYSCALLS);
        // Where AC falls, user pages have to leave ring 0's TLB.
        dynasm!(self.ops
            ; .arch x64
            ; test DWORD [flags], FLAG_AC as i32
            ; jnz >slow
            ; mov rcx, r12
        );
        self.collect_flags(11, 12);
        dynasm!(self.ops
            ; .arch x64
            ; mov r13d, [mask]
            ; not r13d
            ; and r13d, r11d
            ; mov r12d, r13d
            ; and r12d, SYSTEM_FLAGS as i32
            ; mov [flags], r12
            ; test r11d, DF
            ; jz >same
            ; test r13d, DF
            ; jnz >same
        );
        self.clear_direction();
        dynasm!(self.ops ; .arch x64 ;same:);
        self.spread_flags(13, 12);
        self.load_flat(Seg::CS, code, 12);
        self.load_flat(Seg::SS, code + size_of::<Segment>() as i32, 12);
        dynasm!(self.ops ; .arch x64 ; mov r12, [lstar]);
        self.go(false, false);
        dynasm!(self.ops ; .arch x64 ; slow:);
        self.leave();
    }

    /// SDM 2B, SYSRET, with a 64-bit operand.
    fn sysret(&mut self) {
        let code = self.shortcut(offset_of!(Shortcuts, sysret));
        let flags = self.cpu(offset_of!(Cpu, flags));
        let odd = (FLAG_TF | FLAG_IOPL | FLAG_NT | FLAG_AC) as i32 | DF;
        self.demand(USER | SYSCALLS);
        dynasm!(self.ops
            ; .arch x64
            ; mov r12, rcx
            ; shl r12, 16
            ; sar r12, 16
            ; cmp r12, rcx
            ; jne >slow
            ; test r11d, odd
            ; jnz >slow
            ; test DWORD [flags], FLAG_AC as i32
            ; jnz >slow
        );
        self.clear_direction();
        dynasm!(self.ops
            ; .arch x64
            ; mov r12d, r11d
            ; and r12d, FLAG_ID as i32
            ; mov [flags], r12
            ; mov r13d, r11d
        );
        self.spread_flags(13, 12);
        self.load_flat(Seg::CS, code, 12);
        self.load_flat(Seg::SS, code + size_of::<Segment>() as i32, 12);
        dynasm!(self.ops ; .arch x64 ; mov r12, rcx);
        self.go(true, true);
        dynasm!(self.ops ; .arch x64 ; slow:);
        self.leave();
    }

    /// SDM 2A, IRET, from 64-bit code in ring 0 to 64-bit code in ring 0 or 3.
    fn iret(&mut self) {
        let returns = self.shortcut(offset_of!(Shortcuts, returns));
        let flags = self.cpu(offset_of!(Cpu, flags));
        let drops = self.shortcut(offset_of!(Shortcuts, drops));
        let (cs_raw, ss_raw) = (offset_of!(Return, cs_raw), offset_of!(Return, ss_raw));
        let ss_selector = offset_of!(Return, ss_selector) as i32;
        let code = offset_of!(Return, cs) as i32;
        let stack = offset_of!(Return, ss) as i32;
        let enabled = self.shortcut(offset_of!(Shortcuts, enabled));
        self.borrow_registers();
        dynasm!(self.ops
            ; .arch x64
            ; test DWORD [flags], (FLAG_NT | FLAG_AC) as i32
            ; jnz >back
            ; mov rax, rsp
        );
        self.look_up(40, false);
        dynasm!(self.ops
            ; .arch x64
            ; mov rbx, rax
            // The frame's code segment says which return it may be.
            ; movzx edx, WORD [rbx + 8]
            ; mov esi, returns
            ; mov eax, KERNEL as i32
            ; test dl, 3
            ; jz >known
            ; add esi, size_of::<Return>() as i32
            ; mov eax, USER as i32
            ;known:
            ; test [enabled], eax
            ; jz >back
            ; cmp rdx, [rsi + offset_of!(Return, cs_selector) as i32]
            ; jne >back
            ; movzx edi, WORD [rbx + 32]
            ; cmp rdi, [rsi + ss_selector]
            ; jne >back
            ; mov eax, edx
        );
        self.descriptor();
        dynasm!(self.ops
            ; .arch x64
            ; cmp rax, [rsi + cs_raw as i32]
            ; jne >back
            ; mov eax, edi
            ; and eax, 0xfffc
            ; jz >null
        );
        self.descriptor();
        dynasm!(self.ops
            ; .arch x64
            ; cmp rax, [rsi + ss_raw as i32]
            ; jne >back
            ;null:
            ; mov rax, [rbx]
            ; mov r12, rax
            ; shl rax, 16
            ; sar rax, 16
            ; cmp rax, r12
            ; jne >back
            ; mov edi, [rbx + 16]
            ; test dl, 3
            ; jz >same
            ; cmp DWORD [drops], 0
            ; jne >back
            ; test edi, (FLAG_AC | FLAG_IOPL) as i32
            ; jnz >back
            ;same:
            ; test edi, (FLAG_TF | FLAG_NT | FLAG_VM) as i32 | DF
            ; jnz >back
        );
        self.clear_direction();
        dynasm!(self.ops
            ; .arch x64
            ; mov eax, edi
            ; and eax, SYSTEM_FLAGS as i32
            ; mov [flags], rax
        );
        self.spread_flags(RDI, RAX);
        self.load_segment(Seg::CS, RSI, code, RAX);
        self.load_segment(Seg::SS, RSI, stack, RAX);
        dynasm!(self.ops
            ; .arch x64
            ; mov rsp, [rbx + 24]
            ; test dl, 3
            ; jnz >outer
        );
        self.return_registers();
        self.go(false, true);
        dynasm!(self.ops ; .arch x64 ;outer:);
        self.return_registers();
        self.go(true, true);
        dynasm!(self.ops ; .arch x64 ;back:);
        self.return_registers();
        self.leave();
    }

    /// SDM 3A 6.14, through a gate to ring 0.
    fn deliver(&mut self) {
        let gates = self.shortcut(offset_of!(Shortcuts, gates));
        let error = self.shortcut(offset_of!(Shortcuts, error));
        let null = self.shortcut(offset_of!(Shortcuts, null));
        let count = self.shortcut(offset_of!(Shortcuts, counts) + 8 * count::FAULTS);
        let flags = self.cpu(offset_of!(Cpu, flags));
        let enabled = self.slot(offset_of!(Context, interrupt_flag));
        let selector = offset_of!(Segment, selector) as i32;
        let code = self.segment(Seg::CS) + selector;
        let stack = self.segment(Seg::SS) + selector;
        let idtr = self.cpu(offset_of!(Cpu, idtr));
        let idt_limit = idtr + offset_of!(DescriptorTable, limit) as i32;
        let idt_base = idtr + offset_of!(DescriptorTable, base) as i32;
        let tr = self.cpu(offset_of!(Cpu, tr));
        let tr_limit = tr + offset_of!(Segment, limit) as i32;
        let tr_base = tr + offset_of!(Segment, base) as i32;
        let gate_cs = offset_of!(Gate, cs) as i32;
        let allowed = self.shortcut(offset_of!(Shortcuts, enabled));
        dynasm!(self.ops
            ; .arch x64
            ; test DWORD [allowed], KERNEL as i32
            ; jz >slow
        );
        self.borrow_registers();
        dynasm!(self.ops
            ; .arch x64
            ; mov edx, r13d
            ; movzx eax, dl
            ; cmp eax, GATES as i32
            ; jae >back
            ; imul esi, eax, size_of::<Gate>() as i32
            ; add esi, gates
            ; shl eax, 4
            ; movzx ecx, WORD [idt_limit]
            ; lea edi, [rax + 15]
            ; cmp edi, ecx
            ; ja >back
            ; add rax, [idt_base]
        );
        self.look_up(16, false);
        dynasm!(self.ops
            ; .arch x64
            ; mov rcx, [rax]
            ; cmp rcx, [rsi + offset_of!(Gate, low) as i32]
            ; jne >back
            ; mov rax, [rax + 8]
            ; cmp rax, [rsi + offset_of!(Gate, high) as i32]
            ; jne >back
            ; mov rbx, rcx
            // An instruction of ring 3 needs a gate of DPL 3.
            ; mov eax, edx
            ; and eax, SOFTWARE | FROM_USER
            ; cmp eax, SOFTWARE | FROM_USER
            ; jne >entitled
            ; mov rax, rbx
            ; shr rax, 45
            ; not eax
            ; test al, 3
            ; jnz >back
            ;entitled:
            ; movzx eax, WORD [rsi + gate_cs + selector]
        );
        self.descriptor();
        dynasm!(self.ops
            ; .arch x64
            ; cmp rax, [rsi + offset_of!(Gate, cs_raw) as i32]
            ; jne >back
            ; mov rdi, rsp
            ; mov rax, [rsi + offset_of!(Gate, stack) as i32]
            ; test eax, eax
            ; jnz >switch
            ; test edx, FROM_USER
            ; jz >stay
            // RSP0.
            ; mov eax, 4
            ;switch:
            ; lea ecx, [rax + 7]
            ; cmp ecx, [tr_limit]
            ; ja >back
            ; add rax, [tr_base]
        );
        self.look_up(8, false);
        dynasm!(self.ops
            ; .arch x64
            ; mov rdi, [rax]
            ;stay:
            ; and rdi, -16
            ; sub rdi, 48
            ; mov rax, rdi
        );
        self.look_up(48, true);
        // Behind here nothing fails. The lowest word is the error code's, if there is one.
        self.collect_flags(13, RCX);
        dynasm!(self.ops
            ; .arch x64
            ; test edx, SOFTWARE
            ; jnz >software
            ; or r13d, FLAG_RF as i32
            ;software:
            ; mov [rax + 8], r12
            ; movzx ecx, WORD [code]
            ; mov [rax + 16], rcx
            ; mov [rax + 24], r13
            ; mov [rax + 32], rsp
            ; movzx ecx, WORD [stack]
            ; mov [rax + 40], rcx
            ; test edx, HAS_ERROR
            ; jz >bare
            ; mov ecx, [error]
            ; mov [rax], rcx
            ; mov rsp, rdi
            ; jmp >pushed
            ;bare:
            ; lea rsp, [rdi + 8]
            ;pushed:
            ; and DWORD [flags], !(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM) as i32
            // Type 14 is an interrupt gate, 15 a trap gate.
            ; bt rbx, 40
            ; jc >trap
            ; mov QWORD [enabled], 0
            ;trap:
            ; test edx, FROM_USER
            ; jz >inner
        );
        self.load_flat(Seg::SS, null, RAX);
        dynasm!(self.ops ; .arch x64 ;inner:);
        self.load_segment(Seg::CS, RSI, gate_cs, RAX);
        dynasm!(self.ops
            ; .arch x64
            ; inc QWORD [count]
            ; mov r12, [rsi + offset_of!(Gate, target) as i32]
        );
        self.return_registers();
        self.go(false, false);
        dynasm!(self.ops ; .arch x64 ;back:);
        self.return_registers();
        dynasm!(self.ops ; .arch x64 ; slow:);
        self.leave();
    }
}
