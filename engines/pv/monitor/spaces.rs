//! Spaces: the user processes behind pinned roots, and what the kernel does with the current one.

use crate::hypercall::errno::{EINVAL, ENOENT, ENOSYS};
use crate::hypercall::layout::{USER_CS, USER_END, USER_SS};
use crate::hypercall::{Registers, feature, iret, segment, vcpu_op};
use crate::memory::Errno;
use crate::wire::k;
use crate::{State, events, vmm};

/// Where a stopped process waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// In the gate, without registers of its own.
    Fresh,
    /// In a guest system call.
    Call,
    /// In the gate, its registers in the frame at this address; `call` if it was in a system call.
    Signal {
        /// Address on U's signal stack.
        frame: u64,
        /// The frame's rax waits for the result.
        call: bool,
    },
    /// It runs.
    Running,
}

/// A space.
pub(crate) struct Space {
    /// Frame of its root; `u64::MAX` while the slot is free.
    pub(crate) root: u64,
    pub(crate) pid: u32,
    /// The notification that waits for an answer.
    pub(crate) id: u64,
    /// What the gate needs to map and to return.
    pub(crate) key: u64,
    pub(crate) stop: Stop,
    /// It has lost its registers: only a fresh register file continues it.
    pub(crate) broken: bool,
    /// Result for the system call that waits.
    pub(crate) result: i64,
    /// The page fault that the kernel was told of, with its error code.
    pub(crate) faulted: Option<(u64, u64)>,
    /// Which records of mapped entries are valid: those with this number.
    pub(crate) epoch: u32,
    /// Something may be mapped in the process.
    pub(crate) mapped: bool,
    /// Commands that wait on its page.
    pub(crate) queued: usize,
    /// Bases that the next entry sets: bit 0 FS, bit 1 GS.
    pub(crate) bases: u32,
    pub(crate) fs: u64,
    pub(crate) gs: u64,
}

impl Space {
    pub(crate) const FREE: Space = Space {
        root: u64::MAX,
        pid: 0,
        id: 0,
        key: 0,
        stop: Stop::Fresh,
        broken: false,
        result: 0,
        faulted: None,
        epoch: 1,
        mapped: false,
        queued: 0,
        bases: 0,
        fs: 0,
        gs: 0,
    };
}

fn user_address(address: u64) -> bool {
    address < USER_END
}

impl State {
    fn current(&self) -> Result<usize, Errno> {
        self.current.ok_or(-ENOENT)
    }

    pub(crate) fn iret(&mut self, form: u64, argument: u64) -> Result<i64, Errno> {
        if form == iret::KERNEL {
            return self.iret_kernel(argument);
        }
        let slot = self.current()?;
        if self.spaces[slot].broken && form != iret::START {
            self.upcall_failsafe();
        }
        let stop = self.spaces[slot].stop;
        let value = match (form, stop) {
            (iret::START, _) => {
                let registers: Registers = self.read(argument)?;
                check_registers(&registers)?;
                if !user_address(registers.gpr[4]) {
                    return Err(-EINVAL);
                }
                self.to_gate(slot);
                self.start_afresh(slot, &registers);
                self.spaces[slot].faulted = None;
                self.spaces[slot].broken = false;
                0
            }
            (iret::RESUME, Stop::Call | Stop::Signal { call: true, .. }) => argument as i64,
            (iret::RESUME_FRAME, Stop::Signal { call: false, .. }) => {
                let registers = match argument {
                    0 => crate::upcall::frame().registers,
                    pointer => self.read(pointer)?,
                };
                check_registers(&registers)?;
                self.set_registers(slot, &registers);
                0
            }
            (iret::CONTINUE, Stop::Call | Stop::Signal { .. }) => self.spaces[slot].result,
            _ => return Err(-EINVAL),
        };
        if self.spaces[slot].queued != 0 {
            self.to_gate(slot);
        }
        if self.spaces[slot].broken {
            self.upcall_failsafe();
        }
        if let Stop::Signal { call: true, .. } = self.spaces[slot].stop
            && let Some(mut registers) = self.registers(slot)
        {
            registers.gpr[0] = value as u64;
            self.set_registers(slot, &registers);
        }
        self.run(slot, value)
    }

    pub(crate) fn vcpu_op(&mut self, command: u64, vcpu: u64, argument: u64) -> Result<i64, Errno> {
        if vcpu != 0 {
            return Err(-ENOENT);
        }
        match command {
            vcpu_op::SET_SINGLESHOT_TIMER => Ok(events::arm(argument.max(1))),
            vcpu_op::STOP_SINGLESHOT_TIMER => Ok(events::arm(0)),
            vcpu_op::GET_REGISTERS => {
                let place = self.writable::<Registers>(argument)?;
                let slot = self.current()?;
                self.to_gate(slot);
                place.put(self.registers(slot).ok_or(-EINVAL)?);
                Ok(0)
            }
            vcpu_op::SET_RESULT => {
                let slot = self.current()?;
                match self.spaces[slot].stop {
                    Stop::Call | Stop::Signal { call: true, .. } => {
                        self.spaces[slot].result = argument as i64;
                        Ok(0)
                    }
                    Stop::Fresh | Stop::Signal { .. } | Stop::Running => Err(-EINVAL),
                }
            }
            _ => Err(-ENOSYS),
        }
    }

    pub(crate) fn set_segment_base(&mut self, which: u64, base: u64) -> Result<i64, Errno> {
        // SAFETY: mapped at the start, read-only.
        let info = unsafe { &*(k::START_INFO as *const crate::hypercall::StartInfo) };
        if info.features & feature::SEGMENT_BASE == 0 {
            return Err(-ENOSYS);
        }
        let canonical = (base as i64) << 16 >> 16 == base as i64;
        if !canonical {
            return Err(-EINVAL);
        }
        match which {
            segment::FS => {
                let slot = self.current()?;
                self.spaces[slot].fs = base;
                self.spaces[slot].bases |= 1;
            }
            segment::GS_USER => {
                let slot = self.current()?;
                self.spaces[slot].gs = base;
                self.spaces[slot].bases |= 2;
            }
            // SAFETY: the feature bit says that the host allows it; the monitor does not use GS.
            segment::GS_KERNEL => unsafe {
                core::arch::asm!("wrgsbase {}", in(reg) base, options(nomem, nostack));
            },
            _ => return Err(-EINVAL),
        }
        if which != segment::GS_KERNEL {
            // The bases are set by the gate: a process in a system call has to go there.
            let slot = self.current()?;
            self.to_gate(slot);
        }
        Ok(0)
    }

    /// A process for a new space, or the error of the kernel's call.
    pub(crate) fn create_process(&mut self, slot: usize) -> Result<(), Errno> {
        let pid = vmm::call(crate::wire::vmm::SPACE_CREATE, slot as u64);
        if pid < 0 {
            return Err(pid);
        }
        self.spaces[slot].pid = pid as u32;
        self.await_birth(slot);
        Ok(())
    }

    /// Ends the process of a space, which keeps its root.
    pub(crate) fn destroy_process(&mut self, slot: usize) {
        vmm::call(crate::wire::vmm::SPACE_DESTROY, slot as u64);
        let Space { root, epoch, .. } = self.spaces[slot];
        self.spaces[slot] = Space {
            root,
            epoch: epoch + 1,
            ..Space::FREE
        };
    }
}

fn check_registers(registers: &Registers) -> Result<(), Errno> {
    let Registers { rip, cs, ss, .. } = registers;
    let well = *cs == USER_CS.into() && *ss == USER_SS.into() && user_address(*rip);
    if well { Ok(()) } else { Err(-EINVAL) }
}
