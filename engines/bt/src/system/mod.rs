//! Instructions that the runtime executes: privileged ones, segment loads, far transfers, strings.
//!
//! One call executes one instruction with the registers settled in the [`Context`]; faults leave
//! everything as it was.
//!
//! | file | what |
//! |---|---|
//! | `control` | control registers, MSRs |
//! | `debug` | single steps, breakpoints, alignment checks |
//! | `deliver` | interrupts and exceptions through IDT and IVT |
//! | `device` | device memory under these instructions |
//! | `fast_calls` | syscall, sysenter and their returns |
//! | `flow` | far transfers |
//! | `gate` | call gates, task gates, TSSs as branch targets |
//! | `hidden` | what UMIP forbids, answered as an operating system does |
//! | `iret` | iret in all its forms |
//! | `legacy` | decimal arithmetic, bound, arpl |
//! | `masked` | AVX, element by element |
//! | `nmi` | non-maskable interrupts |
//! | `operand` | memory operands: addresses, limits, loads and stores |
//! | `ports` | ports, and who may access them |
//! | `segment` | segment registers and descriptors |
//! | `stack` | pushes and pops, near branches of 16-bit code |
//! | `string` | string instructions |
//! | `tables` | registers of descriptor tables and of the task |
//! | `task` | hardware task switches |
//! | `xstate` | XSAVE and its kin |
//!
//! [`Context`]: crate::context::Context

mod control;
mod debug;
mod deliver;
mod device;
mod fast_calls;
mod flow;
mod gate;
mod hidden;
mod iret;
mod legacy;
mod masked;
mod nmi;
mod operand;
mod ports;
mod segment;
mod stack;
mod string;
mod tables;
mod task;
mod xstate;

pub(crate) use flow::drops;
pub(crate) use segment::null_stack;
pub(crate) use xstate::stores_x87_pointers;

pub(crate) use debug::Debugging;
pub(crate) use device::DeviceLog;
use engine_core::ExitReason;
use engine_core::devices::lapic::owns_msr;
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
pub(crate) use nmi::Nmi;

use crate::{
    core::{Core, Flushed, Shutdown},
    cpu::{CR4_TSD, CR4_UMIP, FLAG_AC, Seg},
    fault::{self, Fault},
};

const FLAG_ZF: u64 = 1 << 6;

/// Privileged only under CR4.UMIP.
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
    /// A register that the machine keeps.
    ReadMsr {
        index: u32,
    },
    WriteMsr {
        index: u32,
        value: u64,
    },
    /// Wait for an interrupt, after it.
    Halt,
    /// Read a port into AL, AX or EAX, after it.
    In {
        port: u16,
        size: u8,
    },
    /// Write to a port, after it.
    Out {
        port: u16,
        size: u8,
        value: u32,
    },
    /// Read `count` items from a port for `ins`, into memory from `address` on; then it isn't
    /// finished if it repeats.
    InString {
        port: u16,
        size: u8,
        address: u64,
        count: u64,
    },
    /// Write an element of a string to device memory; registers have moved past it.
    WriteDevice {
        phys: u64,
        size: u8,
        value: u64,
    },
    /// Read an element of a string from device memory, for `finish_device_read`.
    ReadDevice {
        phys: u64,
        size: u8,
    },
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
        Int | Int3 | Int1 => ExitReason::GuestFault,
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
                    | Invpcid
                    | Invd
                    | Wbinvd
                    | Swapgs
                    | Sysexit
                    | Sysexitq
            );
        let of_descriptors = matches!(
            mnemonic,
            Sldt | Str | Lldt | Ltr | Lar | Lsl | Verr | Verw | Arpl
        );
        if of_descriptors && self.cpu.real_addressing() {
            return Err(Fault::ud().into());
        }
        let hidden = self.cpu.cr4 & CR4_UMIP != 0 && UNPRIVILEGED_STORES.contains(&mnemonic);
        if (privileged || hidden) && self.cpu.cpl() != 0 {
            if hidden && self.answers_hidden {
                self.answer_hidden(instr)?;
                return Ok(Step::Next);
            }
            return Err(Fault::gp().into());
        }
        if instr.is_string_instruction() {
            self.device_values.clear();
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
                let tsc = self.tsc();
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
            Push | Pop | Pusha | Pushad | Popa | Popad | Enter | Leave => self.stack(instr)?,
            Ret => return self.near_return(instr),
            Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => return self.count_down(instr),
            Daa | Das | Aaa | Aas | Aam | Aad | Salc => self.decimal(instr)?,
            Bound => self.bound(instr)?,
            Arpl => self.arpl(instr)?,
            Lss | Lfs | Lgs | Lds | Les => {
                let size = instr.op0_register().size();
                let address = self.operand(instr, size as u32 + 2, false)?;
                let offset = self.load_part(instr, address, size as u32)?;
                let selector = address.wrapping_add(size as u64);
                let selector = self.load_part(instr, selector, 2)? as u16;
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
            Lgdt | Lidt => self.load_table_register(instr)?,
            Sgdt | Sidt => self.store_table_register(instr)?,
            Lldt => self.load_ldt(instr)?,
            Ltr => self.load_task(instr)?,
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
                    _ => Flushed::Everything,
                };
            }
            Invd | Wbinvd => {}
            Invpcid => self.invpcid(instr)?,
            Clac | Stac => {
                if self.cpu.cpl() != 0 {
                    return Err(Fault::ud().into());
                }
                self.cpu.flags =
                    self.cpu.flags & !FLAG_AC | if mnemonic == Stac { FLAG_AC } else { 0 };
                if mnemonic == Clac {
                    self.mmu.close_guarded();
                }
            }
            Rdmsr => {
                let index = self.gpr(1) as u32;
                if owns_msr(index) {
                    return Ok(Step::ReadMsr { index });
                }
                let value = self.read_msr(index)?;
                self.set_gpr(0, value & 0xffff_ffff);
                self.set_gpr(2, value >> 32);
            }
            Wrmsr => {
                let value = self.gpr(0) & 0xffff_ffff | self.gpr(2) << 32;
                let index = self.gpr(1) as u32;
                if owns_msr(index) {
                    return Ok(Step::WriteMsr { index, value });
                }
                self.write_msr(index, value)?;
            }
            Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => self.segment_base(instr)?,
            Rdpid => {
                let register = instr.op0_register().full_register().number();
                self.set_gpr(register, self.cpu.tsc_aux & 0xffff_ffff);
            }
            Rdpkru | Wrpkru => self.key_rights(mnemonic == Wrpkru)?,
            Xgetbv => self.xgetbv()?,
            Xsetbv => self.xsetbv()?,
            Fxsave | Fxsave64 => self.fxsave(instr)?,
            Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 => self.xsave(instr)?,
            Xrstor | Xrstor64 => self.xrstor(instr)?,
            Fnsave | Fnstenv => self.x87_environment(instr)?,
            Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd | Vpgatherdd | Vpgatherdq
            | Vpgatherqd | Vpgatherqq => self.gather(instr)?,
            Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => self.masked_elements(instr)?,
            Vmaskmovdqu => self.masked_bytes(instr)?,
            Swapgs => {
                let base = self.cpu.segments[Seg::GS].base;
                let kernel = std::mem::replace(&mut self.cpu.kernel_gs_base, base);
                self.set_segment_base(Seg::GS, kernel);
            }
            Xlatb => {
                let index = self.gpr(0) & 0xff;
                let base = self.gpr(3).wrapping_add(index);
                let base = match instr.memory_base() {
                    Register::BX => base & 0xffff,
                    Register::EBX => base & 0xffff_ffff,
                    _ => base,
                };
                let address = self.data(base, instr.memory_segment(), 1, false)?;
                let value = self.load(address, 1)?;
                self.set_gpr_sized(0, value, 1);
            }
            Jmp | Call if !far(instr) => return self.near_branch(instr),
            Iret | Iretd | Iretq | Syscall | Sysret | Sysretq | Int | Int3 | Int1 | Into | Jmp
            | Call | Retf | Sysenter | Sysexit | Sysexitq => return self.flow(instr),
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
            _ if instr.flow_control() == FlowControl::ConditionalBranch => {
                return self.conditional_branch(instr);
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

/// True if `instr` names a segment to branch to.
fn far(instr: &Instruction) -> bool {
    use Code::*;
    matches!(instr.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || matches!(
            instr.code(),
            Jmp_m1616 | Jmp_m1632 | Jmp_m1664 | Call_m1616 | Call_m1632 | Call_m1664
        )
}
