//! Ring-3 snippets: 64-bit code with memory of its own, run by the translator until `hlt` or an
//! exception.
//!
//! One [`Bench`] serves any number of cases, each of which finds fresh memory and registers as a
//! processor has them after reset and finit. There is no kernel: exceptions end the run and are the
//! result. System registers are as a 64-bit operating system sets them for its processes: paging
//! with NX, AVX state enabled, FSGSBASE and UMIP on, alignment checks possible, IOPL 0, SYSCALL off.
//! What UMIP hides is answered as Linux answers it.
//!
//! Pages of a large range get memory when they are first touched.
//!
//! Invariant: nothing of a case is left when the next one starts.

mod memory;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use engine_core::{Error, GuestRam, Vcpu, kick::Watch};

use crate::{BtVcpu, Extended, Options, UserStop, fault};
use memory::Memory;
#[doc(hidden)]
pub use memory::enter;

const CODE_CACHE: usize = 4 << 20;

/// A snippet and its memory.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// Machine code.
    pub code: Vec<u8>,
    /// Address of its first byte, where it starts.
    pub load: u64,
    /// Zeroed memory besides the code's: (address, bytes). Readable, writable and executable, in
    /// whole pages, as all memory of a case.
    pub map: Vec<(u64, u64)>,
    /// Contents: (address, bytes). Their pages are mapped too.
    pub mem: Vec<(u64, Vec<u8>)>,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At `hlt` or in an exception.
    Stop(UserStop),
    /// Not before the time limit.
    Limit,
}

/// The registers at the end.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Everything else.
    pub extended: Extended,
}

/// A case could not be run.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// No code.
    #[error("no code")]
    Empty,
    /// Memory where there can be none.
    #[error("{bytes:#x} bytes at {address:#x} are not canonical user memory")]
    Address {
        /// First byte.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// More memory than there is.
    #[error("the case needs more than {mib} MiB of memory")]
    Memory {
        /// What there is.
        mib: u64,
    },
    /// The engine gave up; it has been replaced.
    #[error("the engine failed: {0}")]
    Engine(#[from] Error),
}

/// A virtual machine for snippets.
pub struct Bench {
    vcpu: BtVcpu,
    watch: Watch,
    memory: Memory,
}

impl Bench {
    /// A bench whose cases may run for `limit`.
    ///
    /// # Errors
    /// [`Error`] if the host has no room for it.
    pub fn new(limit: Duration) -> Result<Bench, Error> {
        let memory = Memory::new()?;
        Ok(Bench {
            vcpu: vcpu(memory.ram())?,
            watch: Watch::new(limit),
            memory,
        })
    }

    /// Runs one case.
    ///
    /// # Errors
    /// See [`CaseError`].
    pub fn run(&mut self, case: &Case) -> Result<Outcome, CaseError> {
        self.memory.clear()?;
        self.memory.lay_out(case)?;
        self.vcpu.forget_code();
        self.vcpu.reset_extended();
        self.vcpu.set_state(&memory::start(case.load))?;
        self.watch.start(self.vcpu.kick_handle());
        let stop = loop {
            match self.vcpu.run_user() {
                Ok(UserStop::Exception {
                    vector: fault::PF,
                    address: Some(address),
                    ..
                }) if self.memory.waits(address) => {
                    if let Err(error) = self.memory.touch(address) {
                        self.watch.stop();
                        return Err(error);
                    }
                }
                stop => break stop,
            }
        };
        self.watch.stop();
        let outcome = stop.and_then(|stop| {
            let state = self.vcpu.state()?;
            Ok(Outcome {
                end: match stop {
                    UserStop::Interrupted => End::Limit,
                    stop => End::Stop(stop),
                },
                gpr: state.gpr,
                rip: state.rip,
                rflags: state.rflags,
                extended: self.vcpu.extended(),
            })
        });
        if outcome.is_err() {
            self.vcpu = vcpu(self.memory.ram())?;
        }
        Ok(outcome?)
    }

    /// The vCPU, for tests that set it up in ways that nobody else needs.
    #[doc(hidden)]
    pub fn vcpu_for_tests(&mut self) -> &mut BtVcpu {
        &mut self.vcpu
    }

    /// Memory of the last case, as it is now; None where nothing is mapped.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Option<()> {
        self.memory.read(address, bytes)
    }
}

fn vcpu(ram: &Arc<GuestRam>) -> Result<BtVcpu, Error> {
    let options = Options {
        code_cache: CODE_CACHE,
        ..Options::default()
    };
    let mut vcpu = BtVcpu::new(Arc::clone(ram), options)?;
    let xsave = engine_core::cpuid::pinned(1, 0)[2] >> 26 & 1 == 1;
    if xsave {
        vcpu.set_xcr0(7);
    }
    Ok(vcpu)
}
