//! What a guest has to do: memory, page walks and the few instructions that functions are made of, with
//! nothing kept from one access to the next.

use crate::layout::{
    CR0_WP, CR4_SMAP, CR4_SMEP, FRAME, LARGE, NO_EXECUTE, PAGE, PRESENT, RAM_BYTES, USER, WRITABLE,
};
use crate::step::Step;

/// Error code bits of a page fault.
const PROTECTION: u64 = 1;
const WRITE: u64 = 2;
const RING_3: u64 = 4;
const FETCH: u64 = 16;

/// A page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) error: u64,
    pub(crate) at: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// What each vCPU has of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// Everything that was computed so far.
    pub(crate) sum: u64,
}

pub(crate) struct Model {
    pub(crate) memory: Vec<u8>,
    /// Of the vCPU whose turn it is.
    pub(crate) registers: Registers,
}

/// Takes a value into a sum, as the guest does.
pub(crate) const FACTOR: i32 = 0x0100_01b3;

impl Model {
    pub(crate) fn new() -> Model {
        Model {
            memory: vec![0; RAM_BYTES],
            registers: Registers::default(),
        }
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_le_bytes(self.memory[at..at + 8].try_into().expect("8 bytes"))
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn fold(&mut self, value: u64) {
        self.registers.sum = self.registers.sum.wrapping_mul(FACTOR as u64) ^ value;
    }

    /// Does one step. The guest folds what comes of it, a page fault's error code and address included.
    pub(crate) fn step(&mut self, step: Step) {
        let done = match step {
            Step::End | Step::Invlpg(_) | Step::Invpcid { .. } | Step::Wait(_) | Step::Pass(_) => {
                return;
            }
            Step::Device { from, to } => {
                let from = from as usize;
                let bytes = self.memory[from..from + PAGE as usize].to_vec();
                return self.put(to, &bytes);
            }
            Step::Store { at, value } => return self.put(at, &value.to_le_bytes()),
            Step::Patch { at, value } => return self.put(at, &value.to_le_bytes()),
            Step::Cr0(value) => {
                self.registers.cr0 = value;
                return;
            }
            Step::Cr3(value) => {
                self.registers.cr3 = value;
                return;
            }
            Step::Cr4(value) => {
                self.registers.cr4 = value;
                return;
            }
            Step::Call(at) => self.call(at, false),
            Step::CallUser(at) | Step::CallSysret(at) => self.call(at, true),
            Step::Load(at) => self.load(at, false),
            Step::LoadUser(at) => self.load(at, true),
            Step::Write { at, value } => self.store(at, value, false),
            Step::WriteUser { at, value } => self.store(at, value, true),
            Step::Copy { from, to, bytes } => self.copy(from, to, bytes),
        };
        match done {
            Ok(value) => self.fold(value.into()),
            Err(fault) => {
                self.fold(fault.error);
                self.fold(fault.at);
            }
        }
    }

    /// The physical address behind a linear one.
    fn walk(&self, at: u64, access: Access, user: bool) -> Result<u64, Fault> {
        let mut rights = WRITABLE | USER;
        let mut executable = true;
        let mut table = self.registers.cr3 & FRAME;
        let fault = |protection: u64| {
            let error = protection
                | match access {
                    Access::Read => 0,
                    Access::Write => WRITE,
                    Access::Fetch => FETCH,
                }
                | if user { RING_3 } else { 0 };
            Fault { error, at }
        };
        let mut level = 3;
        let (entry, bytes) = loop {
            let entry = self.word(table + (at >> (12 + 9 * level) & 0x1ff) * 8);
            if entry & PRESENT == 0 {
                return Err(fault(0));
            }
            rights &= entry;
            executable &= entry & NO_EXECUTE == 0;
            if level == 0 || level == 1 && entry & LARGE != 0 {
                break (entry, PAGE << (9 * level));
            }
            table = entry & FRAME;
            level -= 1;
        };
        let users = rights & USER != 0;
        let allowed = match access {
            Access::Read | Access::Write if user && !users => false,
            Access::Read | Access::Write
                if !user && users && self.registers.cr4 & CR4_SMAP != 0 =>
            {
                false
            }
            Access::Read => true,
            Access::Write => rights & WRITABLE != 0 || !user && self.registers.cr0 & CR0_WP == 0,
            Access::Fetch if user => users && executable,
            Access::Fetch => executable && !(users && self.registers.cr4 & CR4_SMEP != 0),
        };
        if !allowed {
            return Err(fault(PROTECTION));
        }
        Ok((entry & FRAME & !(bytes - 1)) + (at & (bytes - 1)))
    }

    fn bytes<const N: usize>(&self, at: u64, access: Access, user: bool) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        for (byte, at) in bytes.iter_mut().zip(at..) {
            *byte = self.memory[self.walk(at, access, user)? as usize];
        }
        Ok(bytes)
    }

    fn load(&self, at: u64, user: bool) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.bytes(at, Access::Read, user)?))
    }

    fn store(&mut self, at: u64, value: u32, user: bool) -> Result<u32, Fault> {
        let phys = self.walk(at, Access::Write, user)?;
        self.put(phys, &value.to_le_bytes());
        Ok(0)
    }

    fn copy(&mut self, from: u64, to: u64, bytes: u64) -> Result<u32, Fault> {
        for byte in 0..bytes {
            let [value] = self.bytes(from + byte, Access::Read, false)?;
            let phys = self.walk(to + byte, Access::Write, false)?;
            self.put(phys, &[value]);
        }
        Ok(0)
    }

    /// Runs a function on the sum, till it returns.
    fn call(&mut self, at: u64, user: bool) -> Result<u32, Fault> {
        let mut eax = self.registers.sum as u32;
        let mut ecx = 0u32;
        let mut stack = Vec::new();
        let mut ip = at;
        for _ in 0..100_000 {
            let fetch = |at: u64| self.bytes::<1>(at, Access::Fetch, user).map(|byte| byte[0]);
            let double = |at: u64| {
                let bytes = self.bytes(at, Access::Fetch, user)?;
                Ok(u32::from_le_bytes(bytes))
            };
            // From the byte behind an instruction of so many.
            let relative = |bytes: u64| {
                let by = double(ip + bytes - 4)?;
                Ok((ip + bytes).wrapping_add(by as i32 as u64))
            };
            let first = fetch(ip)?;
            match first {
                // add eax, imm32
                0x05 => {
                    eax = eax.wrapping_add(double(ip + 1)?);
                    ip += 5;
                }
                // mov ecx, imm32
                0xb9 => {
                    ecx = double(ip + 1)?;
                    ip += 5;
                }
                // ret
                0xc3 => match stack.pop() {
                    Some(next) => ip = next,
                    None => return Ok(eax),
                },
                // call, jmp
                0xe8 => {
                    let next = relative(5)?;
                    stack.push(ip + 5);
                    ip = next;
                }
                0xe9 => ip = relative(5)?,
                // jne rel8
                0x75 => {
                    let by = fetch(ip + 1)? as i8 as u64;
                    ip = (ip + 2).wrapping_add(if ecx == 0 { 0 } else { by });
                }
                _ => {
                    let second = fetch(ip + 1)?;
                    match (first, second) {
                        // imul eax, eax, imm32
                        (0x69, 0xc0) => {
                            eax = eax.wrapping_mul(double(ip + 2)?);
                            ip += 6;
                        }
                        // add eax, [rip+disp32]
                        (0x03, 0x05) => {
                            eax = eax.wrapping_add(self.load(relative(6)?, user)?);
                            ip += 6;
                        }
                        // dec ecx
                        (0xff, 0xc9) => {
                            ecx = ecx.wrapping_sub(1);
                            ip += 2;
                        }
                        // jmp [rip+disp32], push [rip+disp32]
                        (0xff, 0x25 | 0x35) => {
                            let bytes = self.bytes(relative(6)?, Access::Read, user)?;
                            let target = u64::from_le_bytes(bytes);
                            if second == 0x25 {
                                ip = target;
                            } else {
                                stack.push(target);
                                ip += 6;
                            }
                        }
                        // add dword [rip+disp32], imm8
                        (0x83, 0x05) => {
                            let by = double(ip + 2)?;
                            let add = fetch(ip + 6)? as i8 as u32;
                            let at = (ip + 7).wrapping_add(by as i32 as u64);
                            let phys = self.walk(at, Access::Write, user)?;
                            let value = (self.word(phys) as u32).wrapping_add(add);
                            self.put(phys, &value.to_le_bytes());
                            ip += 7;
                        }
                        _ => panic!("{first:02x} {second:02x} at {ip:#x} is in no function"),
                    }
                }
            }
        }
        panic!("the function at {at:#x} does not end");
    }
}
