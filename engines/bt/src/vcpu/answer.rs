//! Instructions that the runtime executes, and the answers to exits that they wait for.

use engine_core::devices::lapic;
use iced_x86::Instruction;

use super::{BtVcpu, Stop, access::Transfer};
use crate::fault::Fault;
use crate::system::{self, Step, Trap};

/// An exit that waits for its answer.
pub(super) enum Pending {
    Nothing,
    /// Delivering an interrupt ended in a triple fault.
    Shutdown,
    In {
        size: u8,
    },
    InString {
        instr: Instruction,
        address: u64,
        count: u64,
    },
    /// A string instruction waits for an element from device memory.
    StringRead {
        instr: Instruction,
    },
    Device(Transfer),
    /// An instruction that the runtime executes waits for device memory.
    SystemRead {
        instr: Instruction,
        phys: u64,
        len: usize,
    },
    /// It has ended, and what it wrote to devices goes out.
    SystemWrites {
        writes: std::vec::IntoIter<(u64, usize, [u8; 8])>,
    },
    /// `rdmsr` waits for its value, at the instruction still.
    ReadMsr {
        next: u64,
    },
    /// `wrmsr` waits to be allowed, at the instruction still.
    WriteMsr {
        next: u64,
        /// IA32_APIC_BASE, with this bit 11.
        apic: Option<bool>,
    },
}

impl BtVcpu {
    pub(super) fn system(&mut self, instr: &Instruction) -> Result<(), Stop> {
        self.counts.add(system::reason(instr));
        if self.intercept
            && let Some(stop) = self.intercepted(instr)
        {
            return Err(stop);
        }
        self.settle_for(instr);
        if instr.is_string_instruction() && !self.core.logs_devices(instr) {
            return self.execute(instr);
        }
        self.core.mmu.devices.get_mut().start();
        let executed = self.execute(instr);
        let devices = self.core.mmu.devices.get_mut();
        if let Some((phys, len)) = devices.wanted() {
            self.pending = Pending::SystemRead {
                instr: *instr,
                phys,
                len,
            };
            return Err(Stop::Read { phys, len });
        }
        let writes = devices.end();
        executed?;
        self.send(writes.into_iter()).map_or(Ok(()), Err)
    }

    /// Leaves to write to a device, if there is something left to write.
    fn send(&mut self, mut writes: std::vec::IntoIter<(u64, usize, [u8; 8])>) -> Option<Stop> {
        let (phys, len, value) = writes.next()?;
        self.data = value;
        self.pending = Pending::SystemWrites { writes };
        Some(Stop::Write { phys, len })
    }

    fn execute(&mut self, instr: &Instruction) -> Result<(), Stop> {
        let step = match self.core.execute(instr) {
            Ok(step) => step,
            Err(Trap::Fault(fault)) if fault == Fault::waiting() => return Ok(()),
            Err(Trap::Fault(fault)) => {
                // What it would have written is not, and an exception asks no device.
                let _ = self.core.mmu.devices.get_mut().end();
                return self.raise(fault);
            }
            Err(Trap::Shutdown) => return Err(Stop::Shutdown),
            Err(Trap::Unsupported(message)) => {
                return Err(Stop::Internal(format!(
                    "{message}: `{instr}` at rip {:#x}",
                    self.core.rip
                )));
            }
        };
        let next = instr.next_ip();
        match step {
            Step::Next => self.core.rip = next,
            Step::Yield => {
                self.core.rip = next;
                return Err(Stop::Interrupted);
            }
            Step::Jump | Step::Again => {}
            Step::Halt => {
                self.core.rip = next;
                if self.core.trap_due() || self.core.nmi_due() {
                    return Ok(());
                }
                return Err(Stop::Halt);
            }
            Step::ReadMsr { index } => {
                self.msr = None;
                self.pending = Pending::ReadMsr { next };
                return Err(Stop::ReadMsr { index });
            }
            Step::WriteMsr { index, value } => {
                self.accepted = false;
                let apic = (index == lapic::APIC_BASE).then_some(value >> 11 & 1 == 1);
                self.pending = Pending::WriteMsr { next, apic };
                return Err(Stop::WriteMsr { index, value });
            }
            Step::In { port, size } => {
                self.core.rip = next;
                self.read_port(port, size);
                return Err(Stop::Port);
            }
            Step::Out { port, size, value } => {
                self.core.rip = next;
                self.write_port(port, size, value);
                return Err(Stop::Port);
            }
            Step::InString {
                port,
                size,
                address,
                count,
            } => {
                self.pending = Pending::InString {
                    instr: *instr,
                    address,
                    count,
                };
                self.strings.clear();
                self.strings.resize(count as usize * usize::from(size), 0);
                return Err(Stop::InString { port, size });
            }
            Step::WriteDevice { phys, size, value } => {
                return Err(self.write_element(instr, phys, size, value));
            }
            Step::ReadDevice { phys, size } => {
                self.pending = Pending::StringRead { instr: *instr };
                let len = size.into();
                return Err(Stop::Read { phys, len });
            }
            Step::OutString {
                port,
                size,
                address,
                count,
            } => {
                self.strings.resize(count as usize * usize::from(size), 0);
                let user = self.core.user();
                let (mmu, cpu) = (&self.core.mmu, &self.core.cpu);
                if let Err(fault) = mmu.read(cpu, address, &mut self.strings, user) {
                    return self.raise(fault);
                }
                if !self.core.finish_port_string(instr, false, count) {
                    self.core.rip = next;
                }
                return Err(Stop::OutString { port, size });
            }
        }
        Ok(())
    }

    /// Leaves to write one element of a string to a device.
    pub(super) fn write_element(
        &mut self,
        instr: &Instruction,
        phys: u64,
        size: u8,
        value: u64,
    ) -> Stop {
        if !self.core.goes_on(instr) {
            self.core.rip = instr.next_ip();
        }
        self.data = value.to_le_bytes();
        let len = size.into();
        Stop::Write { phys, len }
    }

    /// Takes in the answer to the exit that `run` returned last.
    #[inline]
    pub(super) fn answer(&mut self) -> Option<Stop> {
        // What waits may be large: it is moved only when there is something.
        if let Pending::Nothing = self.pending {
            return None;
        }
        if let Pending::In { size } = self.pending {
            self.pending = Pending::Nothing;
            self.take_port(size);
            return None;
        }
        self.take_answer()
    }

    fn take_answer(&mut self) -> Option<Stop> {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => None,
            Pending::Shutdown => Some(Stop::Shutdown),
            Pending::SystemRead { instr, phys, len } => {
                let value = self.data;
                self.core.mmu.devices.get_mut().answer(phys, len, value);
                self.system(&instr).err()
            }
            Pending::SystemWrites { writes } => self.send(writes),
            Pending::In { size } => {
                self.take_port(size);
                None
            }
            Pending::ReadMsr { next } => {
                let Some(value) = self.msr else {
                    return self.raise(Fault::gp()).err();
                };
                self.core.set_gpr(0, value & 0xffff_ffff);
                self.core.set_gpr(2, value >> 32);
                self.core.rip = next;
                None
            }
            Pending::WriteMsr { next, apic } => {
                if !self.accepted {
                    return self.raise(Fault::gp()).err();
                }
                if let Some(on) = apic {
                    self.core.cpu.apic_off = !on;
                    self.core.remember_leaves();
                }
                self.core.rip = next;
                None
            }
            Pending::InString {
                instr,
                address,
                count,
            } => {
                let user = self.core.user();
                // Probed before the exit; should the mapping be gone, the data is lost with it.
                self.core.mmu.devices.get_mut().start();
                let _ = self.core.write(address, &self.strings, user);
                let mut writes = self.core.mmu.devices.get_mut().end();
                if !writes.is_empty() {
                    // A device gets item by item.
                    self.core.mmu.devices.get_mut().start();
                    let item = self.strings.len() / count as usize;
                    for (at, value) in (address..).step_by(item).zip(self.strings.chunks(item)) {
                        let _ = self.core.write(at, value, user);
                    }
                    writes = self.core.mmu.devices.get_mut().end();
                }
                if !self.core.finish_port_string(&instr, true, count) {
                    self.core.rip = instr.next_ip();
                }
                self.send(writes.into_iter())
            }
            Pending::StringRead { instr } => {
                let value = u64::from_le_bytes(self.data);
                match self.core.finish_device_read(&instr, value) {
                    Ok(Step::WriteDevice { phys, size, value }) => {
                        Some(self.write_element(&instr, phys, size, value))
                    }
                    Ok(Step::ReadDevice { phys, size }) => {
                        self.pending = Pending::StringRead { instr };
                        let len = size.into();
                        Some(Stop::Read { phys, len })
                    }
                    Ok(Step::Again) => None,
                    Ok(_) => {
                        self.core.rip = instr.next_ip();
                        None
                    }
                    // Checked before the device was asked; should the mapping be gone, the
                    // instruction faults as it would have without the device.
                    Err(Trap::Fault(fault)) => self.raise(fault).err(),
                    Err(Trap::Shutdown) => Some(Stop::Shutdown),
                    Err(Trap::Unsupported(message)) => Some(Stop::Internal(message)),
                }
            }
            Pending::Device(mut transfer) => {
                self.take_device(&mut transfer);
                self.transfer(transfer).err()
            }
        }
    }
}
