//! Ring-3 code on its own: it runs until something concerns a kernel, and there is none.
//!
//! Exceptions aren't delivered but returned, as under an exception bitmap with every bit set (SDM
//! 3C 25.6.3); `hlt` ends the run, and `int n` finds gates as a Unix kernel sets them up: vectors
//! 3 and 4 may be raised by ring 3, others are #GP.

use engine_core::Error;
use iced_x86::{Instruction, Mnemonic};

use super::{BtVcpu, Stop};
use crate::{
    context::Context,
    fault::{self, Fault},
    system,
    x87::{self, FDP, FIP, FOP, FSW},
};

/// ES in the low byte of FSW: an unmasked exception waits (SDM 1 8.1.3.3).
const ERROR_SUMMARY: u8 = 1 << 7;

/// Why ring-3 code stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserStop {
    /// `hlt`, at which RIP still points.
    Halt,
    /// An exception. RIP points to the instruction for a fault and behind it for a trap.
    Exception {
        /// Its vector.
        vector: u8,
        /// Error code, for those that push one.
        error: Option<u32>,
        /// The address that CR2 holds, for page faults.
        address: Option<u64>,
    },
    /// It was kicked.
    Interrupted,
}

/// x87, MMX, SSE and AVX registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// x87 tag word, two bits for each physical register (SDM 1 8.1.7).
    pub ftw: u16,
    /// ST0 to ST7, little-endian.
    pub st: [[u8; 10]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// YMM0 to YMM15, lowest word first.
    pub ymm: [[u64; 4]; 16],
}

impl Extended {
    /// MM0 to MM7: the fractions of the physical registers, wherever the stack's top is.
    pub fn mm(&self) -> [u64; 8] {
        let top = usize::from(self.fsw >> 11 & 7);
        std::array::from_fn(|physical| {
            let st = &self.st[(physical + 8 - top) % 8];
            u64::from_le_bytes(std::array::from_fn(|byte| st[byte]))
        })
    }
}

impl BtVcpu {
    /// Runs ring-3 code until it stops.
    ///
    /// # Errors
    /// [`Error::Engine`] for whatever the translator can't do, [`Error::Host`] if the host refuses.
    pub fn run_user(&mut self) -> Result<UserStop, Error> {
        self.intercept = true;
        self.core.exact_flags = true;
        self.core.answers_hidden = true;
        self.core.forget_modes();
        let stop = self.go();
        self.intercept = false;
        self.core.exact_flags = false;
        self.core.answers_hidden = false;
        self.core.forget_modes();
        match stop? {
            Stop::Halt => Ok(UserStop::Halt),
            Stop::Exception(Fault {
                vector,
                error,
                address,
            }) => Ok(UserStop::Exception {
                vector,
                error,
                address,
            }),
            Stop::Interrupted | Stop::Stepped => Ok(UserStop::Interrupted),
            Stop::Internal(message) => Err(Error::Engine(message)),
            Stop::Port
            | Stop::Answered
            | Stop::InString { .. }
            | Stop::OutString { .. }
            | Stop::Read { .. }
            | Stop::Write { .. }
            | Stop::Window
            | Stop::ReadMsr { .. }
            | Stop::WriteMsr { .. }
            | Stop::Shutdown => Err(Error::Engine("ring 3 reached a device".into())),
        }
    }

    /// What ends the run at `instr`, before it is executed.
    pub(super) fn intercepted(&mut self, instr: &Instruction) -> Option<Stop> {
        use Mnemonic::*;
        let trap = |vector| {
            let fault = Fault::plain(vector);
            Some((Stop::Exception(fault), true))
        };
        let (stop, past) = match instr.mnemonic() {
            Hlt => Some((Stop::Halt, false)),
            Int3 => trap(fault::BP),
            Into if self.core.rflags() >> 11 & 1 == 1 => trap(fault::OF),
            Int1 => trap(fault::DB),
            Int if matches!(instr.immediate8(), fault::BP | fault::OF) => trap(instr.immediate8()),
            Int => {
                let error = u32::from(instr.immediate8()) << 3 | 2;
                let refused = Fault {
                    error: Some(error),
                    ..Fault::gp()
                };
                Some((Stop::Exception(refused), false))
            }
            _ => None,
        }?;
        if past {
            self.core.rip = instr.next_ip();
        }
        Some(stop)
    }

    /// Forgets all translations, since memory has changed behind the translator's back, and kicks
    /// that nobody has answered.
    pub fn forget_code(&mut self) {
        self.doorbell.answer();
        self.settle_x87();
        self.cache.empty(&mut self.core.mmu);
        self.core.flush();
        self.core.code_writes.clear();
        self.core.forget_traps();
    }

    /// Sets XCR0, as xsetbv would.
    pub fn set_xcr0(&mut self, value: u64) {
        self.core.set_xcr0(value);
    }

    /// x87 as after finit, with empty registers of value 0; SSE and AVX as after reset.
    pub fn reset_extended(&mut self) {
        let context = self.core.context();
        x87::reset(&mut context.x87);
        x87::store(context);
        context.mxcsr = 0x1f80;
        context.xmm.0 = [[0; 2]; 16];
        context.upper = 0;
    }

    /// The registers as they are now.
    pub fn extended(&mut self) -> Extended {
        let context: *mut Context = self.core.context();
        x87::fetch(context);
        let context = self.core.context();
        let area = &context.x87.0;
        let half = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
        Extended {
            fcw: half(x87::FCW),
            fsw: half(FSW),
            ftw: x87::full_tags(area),
            st: std::array::from_fn(|register| {
                std::array::from_fn(|byte| area[x87::ST + 16 * register + byte])
            }),
            mxcsr: context.mxcsr,
            ymm: std::array::from_fn(|register| self.core.ymm(register)),
        }
    }

    /// Turns the address of the last x87 instruction, which the host's CPU knows as one of
    /// translated code, into the guest's, and so what belongs to it: the data pointer, and the opcode, for the
    /// translated one's operand is another. A host's CPU that keeps these two for unmasked
    /// exceptions alone has those of the last such exception, or what the guest loaded.
    pub(super) fn settle_x87(&mut self) {
        let context: *mut Context = self.core.context();
        x87::fetch(context);
        let area = &mut self.core.context().x87.0;
        let word =
            |area: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|b| area[at + b]));
        let ip = word(area, FIP);
        let code = self.arena.code()..self.arena.code() + self.arena.code_bytes() as u64;
        if !code.contains(&ip) || self.settled_ip == Some(ip) {
            return;
        }
        let (operand, unmasked) = (word(area, FDP), area[FSW] & ERROR_SUMMARY != 0);
        let guest = match self.cache.mark(ip).map(|(mark, _)| mark.ip) {
            Some(crate::site::Ip::At(guest)) => guest,
            Some(crate::site::Ip::Target) | None => 0,
        };
        let kept = x87::kept_for_exceptions();
        // A guest may have code where the host has its.
        self.settled_ip = code.contains(&guest).then_some(guest);
        let data = self.operand_of(operand, unmasked || kept);
        // SAFETY: translated code can be read, and behind its end nobody looks: an x87 instruction is there.
        let translated = x87::opcode(|at| Some(unsafe { *((ip + at) as *const u8) }), true);
        let area = &mut self.core.context().x87.0;
        area[FIP..FIP + 8].copy_from_slice(&guest.to_le_bytes());
        area[FDP..FDP + 8].copy_from_slice(&data.to_le_bytes());
        let last = u16::from_le_bytes([area[FOP], area[FOP + 1]]);
        if last != 0 && (!kept || translated == Some(last)) {
            let opcode = self.core.x87_opcode(guest).unwrap_or(0);
            let area = &mut self.core.context().x87.0;
            area[FOP..FOP + 2].copy_from_slice(&opcode.to_le_bytes());
        }
        x87::store(context);
    }

    /// The guest's address of an operand that the x87 data pointer has as `host`: what a TLB holds still, if the
    /// guest would be `shown` it, or, outside of all memory that translated code finds operands in, the
    /// address itself, which is an offset in the window or was loaded by the guest. Nobody knows where an operand
    /// in the bounce buffer came from.
    fn operand_of(&mut self, host: u64, shown: bool) -> u64 {
        let context = self.core.context();
        let first = std::ptr::from_ref(context) as u64;
        if (first..first + size_of_val(context) as u64).contains(&host) {
            return 0;
        }
        if !self.core.mmu.is_ram_at(host) {
            return host;
        }
        let known = self.core.mmu.address_of(host).filter(|_| shown);
        known.unwrap_or(0)
    }

    /// The system instructions that show x87 pointers see the guest's.
    pub(super) fn settle_for(&mut self, instr: &Instruction) {
        if system::stores_x87_pointers(instr) {
            self.settle_x87();
        }
    }
}
