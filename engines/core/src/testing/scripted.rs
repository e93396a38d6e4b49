//! A vCPU without an engine: a closure says what its guest does next. For tests of the run loop and
//! of what goes between vCPUs.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::kick::{Kick, KickHandle};
use crate::{CpuState, Error, Exit, GuestPhys, Vcpu};

/// What a scripted guest does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes to a port.
    Out(u16, u32),
    /// Writes a word to memory that is a device's.
    Write(u64, u32),
    /// Reads a word from there, to [`Seen::read`].
    Read(u64),
    /// Runs until somebody wants something of the vCPU.
    Compute,
    /// Halts.
    Halt,
    /// Breaks beyond help.
    Shutdown,
}

/// What has happened to a scripted vCPU.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Vectors that were delivered.
    pub vectors: Vec<u8>,
    /// How many NMIs were.
    pub nmis: usize,
    /// How often INIT came.
    pub inits: usize,
    /// The state that was last set.
    pub state: CpuState,
    /// How often one was set, but by INIT.
    pub starts: usize,
    /// What the last [`Step::Read`] read.
    pub read: u32,
    /// Steps so far.
    pub steps: usize,
    /// Interrupts are enabled; the script may change it.
    pub interruptible: bool,
    /// NMIs are blocked; the script may change it.
    pub nmi_blocked: bool,
}

type Script = Box<dyn FnMut(&mut Seen) -> Step + Send>;

/// The vCPU.
pub struct Scripted {
    script: Script,
    seen: Seen,
    bell: Arc<Bell>,
    window: bool,
    data: [u8; 4],
    /// The last exit was a read.
    reads: bool,
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Kick for Bell {
    /// Takes a lock: these are not kicked from signal handlers.
    fn kick(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

impl Bell {
    fn take(&self, wait: bool) -> bool {
        let mut rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        while wait && !*rung {
            rung = self
                .changed
                .wait(rung)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut *rung)
    }
}

impl Scripted {
    /// A vCPU that does what `script` says.
    pub fn new(script: impl FnMut(&mut Seen) -> Step + Send + 'static) -> Self {
        Scripted {
            script: Box::new(script),
            seen: Seen::default(),
            bell: Arc::default(),
            window: false,
            data: [0; 4],
            reads: false,
        }
    }

    /// As [`Scripted::new`], to be handed to a [`Crew`](crate::Crew).
    pub fn boxed(script: impl FnMut(&mut Seen) -> Step + Send + 'static) -> Box<dyn Vcpu> {
        Box::new(Self::new(script))
    }
}

impl Vcpu for Scripted {
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        if std::mem::take(&mut self.reads) {
            self.seen.read = u32::from_le_bytes(self.data);
        }
        if self.bell.take(false) {
            return Ok(Exit::Interrupted);
        }
        if self.window && self.seen.interruptible {
            return Ok(Exit::InterruptWindow);
        }
        let step = (self.script)(&mut self.seen);
        self.seen.steps += 1;
        Ok(match step {
            Step::Out(port, value) => {
                self.data = value.to_le_bytes();
                let data = &self.data;
                Exit::PioOut {
                    port,
                    size: 4,
                    data,
                }
            }
            Step::Write(addr, value) => {
                self.data = value.to_le_bytes();
                let data = &self.data;
                Exit::MmioWrite {
                    addr: GuestPhys(addr),
                    data,
                }
            }
            Step::Read(addr) => {
                self.reads = true;
                let data = &mut self.data;
                Exit::MmioRead {
                    addr: GuestPhys(addr),
                    data,
                    priority: self.seen.state.cr8 as u8,
                }
            }
            Step::Compute => {
                self.bell.take(true);
                Exit::Interrupted
            }
            Step::Halt => Exit::Hlt,
            Step::Shutdown => Exit::Shutdown,
        })
    }

    fn state(&self) -> Result<CpuState, Error> {
        Ok(self.seen.state)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.seen.state = *state;
        self.seen.starts += 1;
        Ok(())
    }

    fn interruptible(&mut self) -> bool {
        self.seen.interruptible
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        if !self.seen.interruptible {
            return Err(Error::Engine(format!("vector {vector} while masked")));
        }
        self.seen.vectors.push(vector);
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), Error> {
        self.seen.nmis += 1;
        Ok(())
    }

    fn nmi_blocked(&mut self) -> bool {
        self.seen.nmi_blocked
    }

    fn init(&mut self) -> Result<(), Error> {
        self.seen.state = CpuState::after_init();
        self.seen.inits += 1;
        Ok(())
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.window = wanted;
    }

    fn kick_handle(&self) -> KickHandle {
        Arc::clone(&self.bell) as KickHandle
    }

    fn task_priority(&mut self) -> u8 {
        self.seen.state.cr8 as u8
    }

    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error> {
        self.seen.state.cr8 = priority.into();
        Ok(())
    }
}
