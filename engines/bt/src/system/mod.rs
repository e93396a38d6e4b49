//! Instructions that the runtime executes: privileged ones, segment loads, far transfers, strings.
//!
//! One call executes one instruction with the registers settled in the [`Context`]; faults leave
//! everything as it was. Files: `flow` (far transfers, interrupts, syscall), `control` (control
//! registers, MSRs), `segment`, `string`.
//!
//! [`Context`]: crate::context::Context

mod control;
mod flow;
mod segment;
mod string;

use engine_core::ExitReason;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::{
    core::{Core, Flushed, Shutdown},
    cpu::{Bits, CR4_TSD, FLAG_AC, FLAG_ID, FLAG_IF, FLAG_IOPL, FLAG_NT, FLAG_RF, Seg},
    decode::data_segment,
    fault::{self, Fault},
    mmu::Access,
};

const FLAG_ZF: u64 = 1 << 6;

/// CR4.UMIP isn't announced: sgdt and its kin work in every ring.
const UNPRIVILEGED_STORES: &[Mnemonic] = &[
    Mnemonic::Sgdt,
    Mnemonic::Sidt,
    Mnemonic::Sldt,
    Mnemonic::Str,
    Mnemonic::Smsw,
];

/// What is left to do after an instruction.
#[derive(Debug)]
pub(crate) enum Step {
    /// Nothing; go on after it.
    Next,
    /// RIP has been set.
    Jump,
    /// Let the run loop look at interrupts, after it.
    Yield,
    /// It isn't finished: execute it again.
    Again,
    /// Wait for an interrupt, after it.
    Halt,
    /// Read a port into AL, AX or EAX, after it.
    In { port: u16, size: u8 },
    /// Write to a port, after it.
    Out { port: u16, size: u8, value: u32 },
    /// Read `count` items from a port for `ins`, into memory from `address` on; then it isn't
    /// finished if it repeats.
    InString {
        port: u16,
        size: u8,
        address: u64,
        count: u64,
    },
    /// Write an element of a string to device memory; registers have moved past it.
    WriteDevice { phys: u64, size: u8, value: u64 },
    /// Read an element of a string from device memory, for `finish_device_read`.
    ReadDevice { phys: u64, size: u8 },
    /// Write `count` items to a port for `outs`, from memory at `address`, which can be read.
    OutString {
        port: u16,
        size: u8,
        address: u64,
        count: u64,
    },
}

/// Why an instruction wasn't executed.
#[derive(Debug)]
pub(crate) enum Trap {
    Fault(Fault),
    Shutdown,
    /// The translator has no idea: an error of the engine, not of the guest.
    Unsupported(String),
}

impl From<Fault> for Trap {
    fn from(fault: Fault) -> Trap {
        Trap::Fault(fault)
    }
}

impl From<Shutdown> for Trap {
    fn from(_: Shutdown) -> Trap {
        Trap::Shutdown
    }
}

/// Which counter an instruction belongs to.
pub(crate) fn reason(instr: &Instruction) -> ExitReason {
    use Mnemonic::*;
    match instr.mnemonic() {
        Cpuid => ExitReason::Cpuid,
        Rdmsr | Wrmsr => ExitReason::Msr,
        Mov if (0..2).any(|operand| instr.op_register(operand).is_cr()) => {
            ExitReason::ControlRegister
        }
        Clts | Lmsw | Smsw => ExitReason::ControlRegister,
        _ => ExitReason::Helper,
    }
}

impl Core {
    /// Executes `instr`, which lies at RIP.
    ///
    /// # Errors
    /// See [`Trap`].
    pub(crate) fn execute(&mut self, instr: &Instruction) -> Result<Step, Trap> {
        use Mnemonic::*;
        if self.cpu.bits() == Bits::Bits16 {
            return Err(Trap::Unsupported("16-bit code".into()));
        }
        let system = (0..instr.op_count()).any(|operand| {
            let register = instr.op_register(operand);
            register.is_cr() || register.is_dr()
        });
        let mnemonic = instr.mnemonic();
        let privileged = system
            || matches!(
                mnemonic,
                Hlt | Rdmsr
                    | Wrmsr
                    | Lgdt
                    | Lidt
                    | Lldt
                    | Ltr
                    | Lmsw
                    | Clts
                    | Invlpg
                    | Invd
                    | Wbinvd
                    | Swapgs
                    | Sysret
                    | Sysretq
                    | Sysexit
                    | Sysexitq
            );
        if privileged && self.cpu.cpl() != 0 && !UNPRIVILEGED_STORES.contains(&mnemonic) {
            return Err(Fault::gp().into());
        }
        if instr.is_string_instruction() {
            return self.string(instr);
        }
        match mnemonic {
            Cli | Sti => self.interrupt_flag(mnemonic == Sti)?,
            Pushf | Pushfd | Pushfq => self.pushf(instr)?,
            Popf | Popfd | Popfq => self.popf(instr)?,
            Hlt => return Ok(Step::Halt),
            Cpuid => {
                let leaf = self.gpr(0) as u32;
                let subleaf = self.gpr(1) as u32;
                let values = self.cpuid(leaf, subleaf);
                for (register, value) in [0, 3, 1, 2].into_iter().zip(values) {
                    self.set_gpr(register, value.into());
                }
            }
            Rdtsc | Rdtscp => {
                if self.cpu.cr4 & CR4_TSD != 0 && self.user() {
                    return Err(Fault::gp().into());
                }
                // SAFETY: reads a counter.
                let tsc = unsafe { std::arch::x86_64::_rdtsc() };
                self.set_gpr(0, tsc & 0xffff_ffff);
                self.set_gpr(2, tsc >> 32);
                if mnemonic == Rdtscp {
                    self.set_gpr(1, self.cpu.tsc_aux & 0xffff_ffff);
                }
            }
            // No performance counter is announced.
            Rdpmc => return Err(Fault::gp().into()),
            In => {
                let size = instr.op0_register().size() as u8;
                let port = self.port(instr, 1);
                self.check_port(port, size)?;
                return Ok(Step::In { port, size });
            }
            Out => {
                let size = instr.op1_register().size() as u8;
                let port = self.port(instr, 0);
                self.check_port(port, size)?;
                return Ok(Step::Out {
                    port,
                    size,
                    value: self.gpr(0) as u32,
                });
            }
            Mov => return self.mov_system(instr),
            Push => {
                let selector = self.segment_of(instr.op0_register()).selector;
                let size = -instr.stack_pointer_increment();
                self.push(selector.into(), size as u32)?;
            }
            Pop => {
                let size = instr.stack_pointer_increment() as u32;
                let selector = self.peek(0, size)? as u16;
                let index = segment_index(instr.op0_register());
                self.load_segment(index, selector)?;
                self.pop_bytes(size.into());
                self.cpu.shadow = index == Seg::SS;
            }
            Lss | Lfs | Lgs | Lds | Les => {
                let size = instr.op0_register().size();
                let address = self.operand_address(instr);
                let offset = self.load(address, size as u32)?;
                let selector = self.load(address.wrapping_add(size as u64), 2)? as u16;
                let index = match mnemonic {
                    Lss => Seg::SS,
                    Lfs => Seg::FS,
                    Lgs => Seg::GS,
                    Lds => Seg::DS,
                    _ => Seg::ES,
                };
                self.load_segment(index, selector)?;
                let register = instr.op0_register().full_register().number();
                self.set_gpr_sized(register, offset, size as u32);
            }
            Lgdt | Lidt => {
                let address = self.operand_address(instr);
                let limit = self.load(address, 2)? as u16;
                let wide = self.cpu.bits() == Bits::Bits64;
                let base = self.load(address.wrapping_add(2), if wide { 8 } else { 4 })?;
                let table = engine_core::DescriptorTable { base, limit };
                if mnemonic == Lgdt {
                    self.cpu.gdtr = table;
                } else {
                    self.cpu.idtr = table;
                }
            }
            Sgdt | Sidt => {
                let table = if mnemonic == Sgdt {
                    self.cpu.gdtr
                } else {
                    self.cpu.idtr
                };
                let address = self.operand_address(instr);
                let wide = self.cpu.bits() == Bits::Bits64;
                let mut image = [0u8; 10];
                image[..2].copy_from_slice(&table.limit.to_le_bytes());
                image[2..].copy_from_slice(&table.base.to_le_bytes());
                let user = self.user();
                self.write(address, &image[..if wide { 10 } else { 6 }], user)?;
            }
            Lldt => {
                let selector = self.value(instr, 0)? as u16;
                self.cpu.ldtr = if selector & !3 == 0 {
                    engine_core::Segment {
                        selector,
                        ..Default::default()
                    }
                } else {
                    let segment = self.system_descriptor(selector)?;
                    if segment.attributes & 0x1f != 2 {
                        return Err(Fault::selector(fault::GP, selector).into());
                    }
                    segment
                };
            }
            Ltr => {
                let selector = self.value(instr, 0)? as u16;
                if selector & !3 == 0 {
                    return Err(Fault::gp().into());
                }
                let mut segment = self.system_descriptor(selector)?;
                if segment.attributes & 0x1f != 9 {
                    return Err(Fault::selector(fault::GP, selector).into());
                }
                segment.attributes |= 2;
                let at = self
                    .cpu
                    .gdtr
                    .base
                    .wrapping_add(u64::from(selector & !7) + 5);
                let busy = self.mmu.read_int::<1>(&self.cpu, at, false)? as u8 | 2;
                self.write(at, &[busy], false)?;
                self.cpu.tr = segment;
            }
            Sldt => self.store(instr, self.cpu.ldtr.selector.into())?,
            Str => self.store(instr, self.cpu.tr.selector.into())?,
            Smsw => self.store(instr, self.cpu.cr0)?,
            Lmsw => {
                // PE can be set but not cleared this way.
                let value = self.value(instr, 0)? & 0xf;
                let cr0 = self.cpu.cr0;
                self.set_cr0(cr0 & !0xe | value | cr0 & 1)?;
            }
            Clts => self.set_cr0(self.cpu.cr0 & !crate::cpu::CR0_TS)?,
            Invlpg => {
                let address = self.operand_address(instr);
                let span = self.mmu.invalidate(address);
                self.flushed = match self.flushed {
                    Flushed::Nothing => Flushed::Page(span),
                    Flushed::Page(_) | Flushed::Everything => Flushed::Everything,
                };
            }
            Invd | Wbinvd => {}
            Rdmsr => {
                let value = self.read_msr(self.gpr(1) as u32)?;
                self.set_gpr(0, value & 0xffff_ffff);
                self.set_gpr(2, value >> 32);
            }
            Wrmsr => {
                let value = self.gpr(0) & 0xffff_ffff | self.gpr(2) << 32;
                self.write_msr(self.gpr(1) as u32, value)?;
            }
            Swapgs => {
                let base = self.cpu.segments[Seg::GS].base;
                let kernel = std::mem::replace(&mut self.cpu.kernel_gs_base, base);
                self.set_segment_base(Seg::GS, kernel);
            }
            Xlatb => {
                let index = self.gpr(0) & 0xff;
                let base = self.gpr(3).wrapping_add(index);
                let narrow = instr.memory_base() == Register::EBX;
                let base = if narrow { base & 0xffff_ffff } else { base };
                let address = self.linear(base, instr.memory_segment());
                let value = self.load(address, 1)?;
                self.set_gpr_sized(0, value, 1);
            }
            Iretd | Iretq | Syscall | Sysret | Sysretq | Int | Int3 | Int1 | Into | Jmp | Call
            | Retf | Sysenter | Sysexit | Sysexitq => return self.flow(instr),
            Enter => self.enter(instr)?,
            Leave => self.leave_narrow()?,
            Lar | Lsl => {
                let selector = self.value(instr, 1)? as u16;
                let found = self.rights_or_limit(selector, mnemonic == Lsl)?;
                self.set_arithmetic(FLAG_ZF, if found.is_some() { FLAG_ZF } else { 0 });
                if let Some(value) = found {
                    let register = instr.op0_register();
                    let number = register.full_register().number();
                    self.set_gpr_sized(number, value, register.size().min(4) as u32);
                }
            }
            Verr | Verw => {
                let selector = self.value(instr, 0)? as u16;
                let good = self.accessible(selector, mnemonic == Verw)?;
                self.set_arithmetic(FLAG_ZF, if good { FLAG_ZF } else { 0 });
            }
            _ => return Err(Trap::Unsupported("not implemented".into())),
        }
        Ok(Step::Next)
    }

    fn interrupt_flag(&mut self, set: bool) -> Result<(), Fault> {
        if self.cpu.cpl() > self.cpu.iopl() {
            return Err(Fault::gp());
        }
        if set {
            self.cpu.shadow = !self.interrupts_enabled();
        }
        self.set_interrupts(set);
        Ok(())
    }

    fn pushf(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let size = -instr.stack_pointer_increment() as u32;
        self.push(self.rflags() & !(FLAG_RF | crate::cpu::FLAG_VM), size)
    }

    fn popf(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let size = instr.stack_pointer_increment() as u32;
        let value = self.peek(0, size)?;
        let cpl = self.cpu.cpl();
        let mut writable = crate::context::NATIVE_FLAGS | FLAG_NT | FLAG_AC | FLAG_ID;
        writable |= crate::cpu::FLAG_TF;
        if cpl == 0 {
            writable |= FLAG_IOPL;
        }
        if cpl <= self.cpu.iopl() {
            writable |= FLAG_IF;
        }
        if size == 2 {
            writable &= 0xffff;
        }
        let old = self.rflags();
        self.pop_bytes(size.into());
        self.set_rflags(old & !writable & !FLAG_RF | value & writable);
        Ok(())
    }

    /// SDM 2A, ENTER. RSP and RBP change at the end alone, so a fault leaves them.
    fn enter(&mut self, instr: &Instruction) -> Result<(), Trap> {
        let level = instr.immediate8_2nd() & 31;
        let wide = self.cpu.bits() == Bits::Bits64;
        let size: u32 = match instr.code() {
            iced_x86::Code::Enterw_imm16_imm8 => 2,
            _ if wide => 8,
            _ => 4,
        };
        let step = u64::from(size);
        let user = self.user();
        let mut down = 0u64;
        let mut push = |core: &mut Core, value: u64| {
            down = down.wrapping_sub(step);
            let address = core.stack_address(down);
            core.write(address, &value.to_le_bytes()[..size as usize], user)
                .map_err(on_stack)?;
            Ok::<u64, Fault>(down)
        };
        let frame = push(self, self.gpr(5))?;
        let frame = self.gpr(4).wrapping_add(frame);
        let mut outer = self.gpr(5);
        for _ in 1..level {
            outer = outer.wrapping_sub(step);
            let at = if wide { outer } else { outer & 0xffff_ffff };
            let value = self
                .load(self.linear(at, Register::SS), size)
                .map_err(on_stack)?;
            push(self, value)?;
        }
        if level > 0 {
            push(self, frame)?;
        }
        let down = down.wrapping_sub(instr.immediate16().into());
        // The new top of the stack has to be writable, whether anything goes there or not.
        self.probe_write(self.stack_address(down), size, user)
            .map_err(on_stack)?;
        self.set_gpr_sized(5, frame, size);
        self.pop_bytes(down);
        Ok(())
    }

    /// leave with a 16-bit operand: the rest of RBP stays.
    fn leave_narrow(&mut self) -> Result<(), Fault> {
        let wide = self.cpu.bits() == Bits::Bits64;
        let frame = self.gpr(5);
        let at = if wide { frame } else { frame & 0xffff_ffff };
        let value = self
            .load(self.linear(at, Register::SS), 2)
            .map_err(on_stack)?;
        self.set_gpr_sized(4, frame.wrapping_add(2), if wide { 8 } else { 4 });
        self.set_gpr_sized(5, value, 2);
        Ok(())
    }

    fn port(&self, instr: &Instruction, operand: u32) -> u16 {
        if instr.op_kind(operand) == OpKind::Immediate8 {
            instr.immediate8().into()
        } else {
            self.gpr(2) as u16
        }
    }

    /// IOPL, then the TSS's I/O permission bitmap (SDM 1 19.5).
    fn check_port(&self, port: u16, size: u8) -> Result<(), Fault> {
        if self.cpu.cpl() <= self.cpu.iopl() {
            return Ok(());
        }
        let tr = &self.cpu.tr;
        let map = self
            .mmu
            .read_int::<2>(&self.cpu, tr.base.wrapping_add(0x66), false)?;
        let at = map + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return Err(Fault::gp());
        }
        let bits = self
            .mmu
            .read_int::<2>(&self.cpu, tr.base.wrapping_add(at), false)?;
        let mask = (1u64 << size) - 1;
        if bits >> (port % 8) & mask != 0 {
            Err(Fault::gp())
        } else {
            Ok(())
        }
    }

    fn segment_of(&self, register: Register) -> engine_core::Segment {
        self.cpu.segments[segment_index(register)]
    }

    /// Adds the segment's base, as the current mode does.
    fn linear(&self, offset: u64, segment: Register) -> u64 {
        let base = self.segment_of(segment).base;
        match self.cpu.bits() {
            Bits::Bits64 if matches!(segment, Register::FS | Register::GS) => {
                offset.wrapping_add(base)
            }
            Bits::Bits64 => offset,
            Bits::Bits32 | Bits::Bits16 => offset.wrapping_add(base) & 0xffff_ffff,
        }
    }

    /// Linear address of the memory operand.
    fn operand_address(&self, instr: &Instruction) -> u64 {
        let value = |register: Register| match register {
            Register::None => 0,
            register => {
                let value = self.gpr(register.full_register().number());
                match register.size() {
                    2 => value & 0xffff,
                    4 => value & 0xffff_ffff,
                    _ => value,
                }
            }
        };
        if instr.is_ip_rel_memory_operand() {
            return self.linear(instr.ip_rel_memory_address(), instr.memory_segment());
        }
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let offset = value(base)
            .wrapping_add(value(index).wrapping_mul(instr.memory_index_scale().into()))
            .wrapping_add(instr.memory_displacement64());
        let width = if base != Register::None {
            base.size()
        } else {
            index.size()
        };
        let offset = match width {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ if self.cpu.bits() != Bits::Bits64 => offset & 0xffff_ffff,
            _ => offset,
        };
        self.linear(offset, instr.memory_segment())
    }

    fn load(&self, address: u64, size: u32) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.mmu
            .read(&self.cpu, address, &mut bytes[..size as usize], self.user())?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a general register or memory operand.
    fn value(&self, instr: &Instruction, operand: u32) -> Result<u64, Fault> {
        if instr.op_kind(operand) == OpKind::Register {
            Ok(self.gpr(instr.op_register(operand).full_register().number()))
        } else {
            let size = instr.memory_size().size().min(8) as u32;
            self.load(self.operand_address(instr), size)
                .map_err(|fault| self.on_operand(instr, fault))
        }
    }

    /// Writes operand 0: a register in its size, memory as 16 bits (sldt, str, smsw).
    fn store(&mut self, instr: &Instruction, value: u64) -> Result<(), Fault> {
        if instr.op0_kind() == OpKind::Register {
            let register = instr.op0_register();
            let number = register.full_register().number();
            self.set_gpr_sized(number, value, register.size() as u32);
            Ok(())
        } else {
            let address = self.operand_address(instr);
            let user = self.user();
            self.write(address, &(value as u16).to_le_bytes(), user)
                .map_err(|fault| self.on_operand(instr, fault))
        }
    }

    /// What a fault becomes in the segment of the memory operand.
    fn on_operand(&self, instr: &Instruction, fault: Fault) -> Fault {
        if data_segment(instr, self.cpu.bits()) == Register::SS {
            on_stack(fault)
        } else {
            fault
        }
    }

    fn stack_address(&self, offset: u64) -> u64 {
        let wide = self.cpu.bits() == Bits::Bits64;
        let rsp = self.gpr(4).wrapping_add(offset);
        self.linear(if wide { rsp } else { rsp & 0xffff_ffff }, Register::SS)
    }

    /// Reads the stack at RSP plus `offset`.
    fn peek(&self, offset: u64, size: u32) -> Result<u64, Fault> {
        self.load(self.stack_address(offset), size)
            .map_err(on_stack)
    }

    fn pop_bytes(&mut self, bytes: u64) {
        let rsp = self.gpr(4).wrapping_add(bytes);
        let size = if self.cpu.bits() == Bits::Bits64 {
            8
        } else {
            4
        };
        self.set_gpr_sized(4, rsp, size);
    }

    fn push(&mut self, value: u64, size: u32) -> Result<(), Fault> {
        let address = self.stack_address(0u64.wrapping_sub(size.into()));
        let user = self.user();
        self.write(address, &value.to_le_bytes()[..size as usize], user)
            .map_err(on_stack)?;
        self.pop_bytes(0u64.wrapping_sub(size.into()));
        Ok(())
    }

    /// Checks that `size` bytes at `address` could be written.
    pub(crate) fn probe_write(&self, address: u64, size: u32, user: bool) -> Result<(), Fault> {
        self.mmu.walk(&self.cpu, address, Access::Write, user)?;
        let last = address.wrapping_add(u64::from(size) - 1);
        if last & !0xfff != address & !0xfff {
            self.mmu
                .walk(&self.cpu, last & !0xfff, Access::Write, user)?;
        }
        Ok(())
    }
}

/// What a fault becomes where the stack segment is used: #SS for addresses that aren't canonical.
pub(crate) fn on_stack(fault: Fault) -> Fault {
    if fault.vector == fault::GP {
        Fault::selector(fault::SS, 0)
    } else {
        fault
    }
}

/// Index of a segment register in [`engine_core::CpuState::segments`].
fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => Seg::ES,
        Register::CS => Seg::CS,
        Register::SS => Seg::SS,
        Register::FS => Seg::FS,
        Register::GS => Seg::GS,
        _ => Seg::DS,
    }
}
