//! Privileged instructions that need no runtime in the common case.
//!
//! Some act on slots and go on behind themselves; what is uncommon leaves for the runtime before
//! anything has changed, as if the instruction were the runtime's from the start. Those that change
//! the privilege end their block and jump to a stub of [`crate::transitions`].
//!
//! Invariant: code of this kind is only made for 64-bit code that nobody debugs; see [`inline`] and
//! [`changes_privilege`].

use std::mem::offset_of;

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{Cold, Lower, memory::Address, stack::Source, strings};
use crate::{
    context::Context,
    cpu::{Bits, Cpu, FLAG_AC, FLAG_DF, FLAG_ID, FLAG_IF, FLAG_IOPL, FLAG_NT, FLAG_TF, Seg},
    decode::{Insn, Mode},
    fault::Fault,
    privileged::{LEAVES, Leaf, Privileged, Shortcuts, count},
    site::{Homes, Kind, Port},
    transitions::{FROM_USER, HAS_ERROR, SOFTWARE},
};

/// True if `instr` is lowered to code of its own that goes on behind it.
pub(crate) fn inline(instr: &Instruction, mode: Mode) -> bool {
    if !usual(mode) {
        return false;
    }
    match instr.code() {
        _ if strings::inline(instr) => true,
        Code::Rdtscp => mode.tsc,
        Code::Rdpid_r64 => true,
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => instr.op0_kind() == OpKind::Register,
        Code::Cpuid | Code::Pushfq => true,
        _ if matches!(instr.mnemonic(), Mnemonic::In | Mnemonic::Out) => true,
        Code::Popfq => mode.ring_0 || mode.user && !mode.interrupts,
        Code::Swapgs | Code::Invlpg_m => mode.ring_0,
        Code::Mov_r64_cr => {
            mode.ring_0
                && matches!(
                    instr.op1_register(),
                    Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
                )
        }
        Code::Mov_cr_r64 => {
            mode.ring_0 && matches!(instr.op0_register(), Register::CR2 | Register::CR8)
        }
        _ => false,
    }
}

/// True if `instr` ends its block in a stub.
fn changes_privilege(instr: &Instruction, mode: Mode) -> bool {
    let known = mode.ring_0 || mode.user;
    usual(mode)
        && match instr.code() {
            Code::Syscall => known,
            Code::Sysretq | Code::Iretq => mode.ring_0,
            Code::Int3 | Code::Int_imm8 => known,
            _ => false,
        }
}

fn usual(mode: Mode) -> bool {
    mode.bits == Bits::Bits64 && !mode.single && !mode.exact && mode.limited == 0
}

impl Lower<'_> {
    fn cpu(&self, offset: usize) -> i32 {
        self.layout.privileged + (offset_of!(Privileged, cpu) + offset) as i32
    }

    pub(super) fn shortcut(&self, offset: usize) -> i32 {
        self.layout.privileged + (offset_of!(Privileged, shortcuts) + offset) as i32
    }

    pub(super) fn privileged(&mut self, insn: &Insn) -> Result<(), String> {
        match insn.instr.code() {
            Code::Cpuid => {
                self.cpuid(insn);
                Ok(())
            }
            Code::Pushfq => self.push_flags(insn),
            Code::Popfq => self.pop_flags(insn),
            Code::Swapgs => {
                self.swap_bases(insn);
                Ok(())
            }
            Code::Rdtscp | Code::Rdpid_r64 => {
                self.read_processor(insn);
                Ok(())
            }
            Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
                self.read_selector(insn);
                Ok(())
            }
            _ if strings::inline(&insn.instr) => self.string(insn),
            Code::Invlpg_m => self.invalidate(insn),
            Code::Mov_r64_cr => self.read_control(insn),
            Code::Mov_cr_r64 => {
                self.write_control(insn);
                Ok(())
            }
            _ => self.call_for_port(insn),
        }
    }

    /// Leaves for the runtime, which executes `insn`, if `condition` (as jcc encodes it) holds.
    pub(super) fn unless(&mut self, insn: &Insn, condition: u8) {
        let index = (self.first_system + self.system.len()) as u32;
        self.system.push(insn.instr);
        self.asm.extend([0x0f, 0x80 | condition]);
        let patch = self.position();
        self.asm.push_i32(0);
        let site = self.add_site(insn.instr.ip(), Kind::System { index });
        self.cold.push(Cold::Exit { site, patch });
    }

    /// Makes the host's flags free for use.
    pub(super) fn free_flags(&mut self, insn: &Insn, busy: u16) {
        if insn.live_in != 0 && !self.homes.lazy {
            self.save_flags(busy);
            self.need(insn.reads);
        }
    }

    fn cpuid(&mut self, insn: &Insn) {
        const NE: u8 = 5;
        const AT: i32 = offset_of!(Leaf, values) as i32;
        self.free_flags(insn, 0);
        self.need(insn.reads);
        let at = self.take(0, insn);
        let leaves = self.shortcut(offset_of!(Shortcuts, leaves));
        let counter = self.shortcut(offset_of!(Shortcuts, counts) + 8 * count::CPUID);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rd(at), eax
            ; shr Rd(at), 26
            ; xor Rd(at), eax
            ; and Rd(at), LEAVES as i32 - 1
            ; shl Rd(at), 5
            ; cmp eax, [Rq(at) + leaves]
        );
        self.unless(insn, NE);
        dynasm!(self.asm
            ; .arch x64
            ; inc QWORD [counter]
            ; mov eax, [Rq(at) + leaves + AT]
            ; mov ebx, [Rq(at) + leaves + AT + 4]
            ; mov ecx, [Rq(at) + leaves + AT + 8]
            ; mov edx, [Rq(at) + leaves + AT + 12]
        );
        self.homes.spilled &= !insn.writes;
    }

    fn push_flags(&mut self, insn: &Insn) -> Result<(), String> {
        // pushfq on the host's side would cost several times as much.
        if !self.homes.lazy {
            self.save_flags(0);
        }
        self.need(insn.reads);
        let value = self.take(0, insn);
        let other = self.take(1 << value, insn);
        let system = self.cpu(offset_of!(Cpu, flags));
        let direction = self.layout.slot(offset_of!(Context, direction));
        let interrupts = self.layout.slot(offset_of!(Context, interrupt_flag));
        let lazy = self.layout.lazy_flags();
        dynasm!(self.asm
            ; .arch x64
            ; movzx Rd(value), BYTE [lazy + 1]
            ; movzx Rd(other), BYTE [lazy]
            ; or Rd(value), [system]
            ; shl Rd(other), 11
            ; or Rd(value), [direction]
            ; or Rd(value), [interrupts]
            ; or Rd(value), Rd(other)
            // Set already where lahf was.
            ; or Rd(value), 2
        );
        self.store_push(insn, Source::Register(value), 8, 1 << value)?;
        self.move_rsp(-8);
        Ok(())
    }

    fn pop_flags(&mut self, insn: &Insn) -> Result<(), String> {
        const E: u8 = 4;
        const NE: u8 = 5;
        self.need(insn.reads);
        let value = self.load_stack(insn, Address::Stack(0), 8, 0)?;
        self.need(insn.reads);
        let other = self.take(1 << value, insn);
        let mut held = FLAG_DF | FLAG_TF | FLAG_NT | FLAG_AC | FLAG_ID;
        if self.mode.ring_0 {
            held |= FLAG_IOPL;
        }
        let system = self.cpu(offset_of!(Cpu, flags));
        let direction = self.layout.slot(offset_of!(Context, direction));
        let interrupts = self.layout.slot(offset_of!(Context, interrupt_flag));
        dynasm!(self.asm
            ; .arch x64
            ; mov Rd(other), Rd(value)
            ; xor Rd(other), [system]
            ; xor Rd(other), [direction]
            ; test Rd(other), held as i32
        );
        self.unless(insn, NE);
        // One store: a load of what two have written would wait for both.
        dynasm!(self.asm
            ; .arch x64
            ; mov Rd(other), Rd(value)
            ; and Rd(other), 0xd5
            ; shl Rd(other), 8
            ; bt Rd(value), 11
            ; adc Rd(other), 0
            ; mov [self.layout.lazy_flags()], Rq(other)
        );
        self.homes.lazy = true;
        self.move_rsp(8);
        if self.mode.interrupts {
            // Where IF stays, the flags pushed next need not wait for this store.
            dynasm!(self.asm
                ; .arch x64
                ; mov Rd(other), Rd(value)
                ; and Rd(other), FLAG_IF as i32
                ; cmp Rd(other), [interrupts]
            );
            self.asm.extend([0x70 | E, 0]);
            let over = self.position();
            // An interrupt that waits gets in behind it, if it may.
            let wanted = self.layout.slot(offset_of!(Context, window_wanted));
            dynasm!(self.asm
                ; .arch x64
                ; mov [interrupts], Rq(other)
                ; test [wanted], Rd(other)
            );
            self.leave_for_window(insn);
            let length = (self.position() - over) as u8;
            self.asm.patch(over - 1, [length]);
        }
        Ok(())
    }

    /// rdtscp and rdpid: what tells a thread which processor it runs on.
    fn read_processor(&mut self, insn: &Insn) {
        let aux = self.cpu(offset_of!(Cpu, tsc_aux));
        if insn.instr.code() == Code::Rdtscp {
            // rdtscp waits for what is before it (SDM 2B); its register is the host's.
            dynasm!(self.asm ; .arch x64 ; lfence ; rdtsc ; mov ecx, [aux]);
        } else {
            let number = insn.instr.op0_register().number() as u8;
            dynasm!(self.asm ; .arch x64 ; mov Rd(number), [aux]);
        }
        self.homes.spilled &= !insn.writes;
    }

    fn read_selector(&mut self, insn: &Insn) {
        let segment = insn.instr.op1_register().number();
        let at = size_of::<engine_core::Segment>() * segment
            + offset_of!(engine_core::Segment, selector);
        let slot = self.cpu(offset_of!(Cpu, segments) + at);
        let number = insn.instr.op0_register().number() as u8;
        dynasm!(self.asm ; .arch x64 ; movzx Rd(number), WORD [slot]);
        self.homes.spilled &= !insn.writes;
    }

    fn swap_bases(&mut self, insn: &Insn) {
        let first = self.take(0, insn);
        let second = self.take(1 << first, insn);
        let kernel = self.cpu(offset_of!(Cpu, kernel_gs_base));
        let segment =
            size_of::<engine_core::Segment>() * Seg::GS + offset_of!(engine_core::Segment, base);
        let base = self.cpu(offset_of!(Cpu, segments) + segment);
        let slot = self.layout.slot(offset_of!(Context, segment_base)) + 8 * Seg::GS as i32;
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(first), [kernel]
            ; mov Rq(second), [slot]
            ; mov [kernel], Rq(second)
            ; mov [slot], Rq(first)
            ; mov [base], Rq(first)
        );
    }

    /// Counts an access to a control register, without touching the flags.
    fn count_control(&mut self, insn: &Insn, busy: u16) {
        let counter = self.shortcut(offset_of!(Shortcuts, counts) + 8 * count::CONTROL);
        let scratch = self.take(busy, insn);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(scratch), [counter]
            ; lea Rq(scratch), [Rq(scratch) + 1]
            ; mov [counter], Rq(scratch)
        );
    }

    fn read_control(&mut self, insn: &Insn) -> Result<(), String> {
        let slot = self.cpu(match insn.instr.op1_register() {
            Register::CR0 => offset_of!(Cpu, cr0),
            Register::CR2 => offset_of!(Cpu, cr2),
            Register::CR3 => offset_of!(Cpu, cr3),
            Register::CR4 => offset_of!(Cpu, cr4),
            Register::CR8 => offset_of!(Cpu, cr8),
            _ => return Err("no such register".into()),
        });
        self.count_control(insn, 0);
        let number = insn.instr.op0_register().number() as u8;
        dynasm!(self.asm ; .arch x64 ; mov Rq(number), [slot]);
        self.homes.spilled &= !insn.writes;
        Ok(())
    }

    fn write_control(&mut self, insn: &Insn) {
        const NE: u8 = 5;
        const A: u8 = 7;
        let number = insn.instr.op1_register().number() as u8;
        if insn.instr.op0_register() == Register::CR2 {
            self.need(insn.reads);
            self.count_control(insn, 0);
            self.need(insn.reads);
            let slot = self.cpu(offset_of!(Cpu, cr2));
            dynasm!(self.asm ; .arch x64 ; mov [slot], Rq(number));
            return;
        }
        let matters = self.shortcut(offset_of!(Shortcuts, priority_matters));
        let slot = self.cpu(offset_of!(Cpu, cr8));
        self.free_flags(insn, 0);
        self.need(insn.reads);
        dynasm!(self.asm ; .arch x64 ; cmp Rq(number), 15);
        self.unless(insn, A);
        dynasm!(self.asm ; .arch x64 ; cmp DWORD [matters], 0);
        self.unless(insn, NE);
        self.count_control(insn, 0);
        self.need(insn.reads);
        dynasm!(self.asm ; .arch x64 ; mov [slot], Rq(number));
    }

    /// Ends the block in a stub, if there is one for `insn`.
    pub(super) fn transition(&mut self, insn: &Insn) -> bool {
        if !changes_privilege(&insn.instr, self.mode) {
            return false;
        }
        let index = (self.first_system + self.system.len()) as u32;
        self.system.push(insn.instr);
        let stubs = self.transitions();
        let (next, ip) = (insn.instr.next_ip(), insn.instr.ip());
        self.meet();
        let site = self.add_site(ip, Kind::System { index });
        self.store_site(site, 0);
        let stub = match insn.instr.code() {
            Code::Syscall => {
                self.load_constant(12, next);
                stubs.syscall
            }
            Code::Sysretq => stubs.sysret,
            Code::Iretq => stubs.iret,
            _ => {
                let vector = if insn.instr.code() == Code::Int3 {
                    crate::fault::BP
                } else {
                    insn.instr.immediate8()
                };
                self.load_constant(12, next);
                self.load_delivery(i32::from(vector) | SOFTWARE);
                stubs.deliver
            }
        };
        self.jump_to(0xe9, stub);
        true
    }

    /// Leaves for a port, if that is what `insn` is about.
    pub(super) fn port(&mut self, insn: &Insn) -> bool {
        match port(&insn.instr) {
            Some(port) => {
                self.exit(insn.instr.ip(), Kind::Port(port));
                true
            }
            None => false,
        }
    }

    /// Has a port accessed, and goes on.
    fn call_for_port(&mut self, insn: &Insn) -> Result<(), String> {
        let port = port(&insn.instr).ok_or("nothing of its own")?;
        self.free_flags(insn, 0);
        // What is read there is written to the register's own slot.
        self.need(insn.reads | insn.writes);
        let site = self.add_site(insn.instr.ip(), Kind::Port(port));
        self.store_site(site, 0);
        // Who may access all ports is told by the mode; others are looked at by the runtime.
        let entitled = self.mode.interrupts;
        let target = if entitled {
            self.layout.callout
        } else {
            self.layout.exit
        };
        self.jump_to(0xe9, target);
        let resume = self.address(self.position());
        self.sites[site].kind = Kind::Port(Port { resume, ..port });
        Ok(())
    }

    /// Raises `fault` at `ip`, in a stub where that may be.
    pub(super) fn raise(&mut self, ip: u64, fault: Fault) {
        let known = usual(self.mode) && (self.mode.ring_0 || self.mode.user);
        if !known || fault.address.is_some() {
            self.exit(ip, Kind::Fault(fault));
            return;
        }
        self.meet();
        let site = self.add_site(ip, Kind::Fault(fault));
        self.store_site(site, 0);
        self.load_constant(12, ip);
        let mut delivery = i32::from(fault.vector);
        if let Some(error) = fault.error {
            let slot = self.shortcut(offset_of!(Shortcuts, error));
            dynasm!(self.asm ; .arch x64 ; mov DWORD [slot], error as i32);
            delivery |= HAS_ERROR;
        }
        self.load_delivery(delivery);
        let stub = self.transitions().deliver;
        self.jump_to(0xe9, stub);
    }

    fn load_delivery(&mut self, delivery: i32) {
        let from = if self.mode.user { FROM_USER } else { 0 };
        dynasm!(self.asm ; .arch x64 ; mov r13d, delivery | from);
    }

    /// Code out of line that raises a fault where things were at `homes`.
    pub(super) fn cold_raise(&mut self, patch: usize, homes: Homes, ip: u64, fault: Fault) {
        self.bind(patch, self.position());
        self.homes = homes;
        self.raise(ip, fault);
    }

    /// Everything where the stubs expect it ([`Homes::MEETING`]).
    fn meet(&mut self) {
        if !self.homes.lazy {
            self.save_flags(0);
        }
        self.need(!Homes::MEETING.spilled);
        self.spill(12);
        self.spill(13);
    }

    fn store_site(&mut self, site: usize, phase: u64) {
        let number = crate::site::number(self.first_site + site, phase);
        dynasm!(self.asm ; .arch x64 ; mov QWORD [self.layout.site()], number);
    }

    /// The place after `insn`, an sti's shadow, where a waiting interrupt gets in.
    pub(super) fn interrupt_window(&mut self, insn: &Insn) {
        const RCX: u8 = 1;
        let wanted = self.layout.slot(offset_of!(Context, window_wanted));
        let flags_free = insn.live_out == 0 || self.homes.lazy;
        if flags_free || self.pinned >> RCX & 1 == 1 {
            if !flags_free {
                self.save_flags(0);
            }
            dynasm!(self.asm ; .arch x64 ; cmp DWORD [wanted], 0);
            return self.leave_for_window(insn);
        }
        self.spill(RCX);
        dynasm!(self.asm ; .arch x64 ; mov ecx, [wanted]);
        // jrcxz, over the jump.
        self.asm.extend([0xe3, 5, 0xe9]);
        self.patch_window(insn);
    }

    /// Leaves behind `insn` if the zero flag is clear.
    fn leave_for_window(&mut self, insn: &Insn) {
        self.asm.extend([0x0f, 0x85]);
        self.patch_window(insn);
    }

    /// The rel32 of a jump that leaves behind `insn`.
    fn patch_window(&mut self, insn: &Insn) {
        let patch = self.position();
        self.asm.push_i32(0);
        let site = self.add_site(insn.instr.next_ip(), Kind::Window);
        self.cold.push(Cold::Exit { site, patch });
    }
}

/// The port that `instr` accesses, if that is what it does.
fn port(instr: &Instruction) -> Option<Port> {
    let (write, value, port) = match instr.mnemonic() {
        Mnemonic::In => (false, instr.op0_register(), 1),
        Mnemonic::Out => (true, instr.op1_register(), 0),
        _ => return None,
    };
    Some(Port {
        number: (instr.op_kind(port) == OpKind::Immediate8).then(|| instr.immediate8()),
        size: value.size() as u8,
        write,
        next: instr.next_ip(),
        resume: 0,
    })
}
