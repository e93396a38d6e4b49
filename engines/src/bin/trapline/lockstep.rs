//! `trapline run --lockstep`: a guest under the translator, held against a reference.

use std::sync::Arc;

use anyhow::bail;
use engine_core::lockstep::{self, Lockstep};
use engine_core::{CpuState, Error, GuestRam, Vcpu};
use engines::{Boot, Runs, Setup};

use crate::cli;

/// The mode that has KVM's vCPU.
const HARDWARE: &str = "hardware";

/// The other side, over a copy of guest memory.
pub(crate) struct Reference {
    vcpu: Box<dyn Vcpu>,
    copy: Arc<GuestRam>,
}

impl Reference {
    /// Copies `memory` and makes the reference's vCPU over the copy; the translator's is made by
    /// `boot`.
    ///
    /// # Errors
    /// The arguments ask for more than can be compared, or this host has no such reference.
    pub(crate) fn prepare(
        which: cli::Reference,
        arguments: &cli::Run,
        memory: &GuestRam,
        boot: Boot,
        setup: Setup,
    ) -> anyhow::Result<Reference> {
        if arguments.smp > 1 {
            bail!("--lockstep compares one vCPU: leave out --smp");
        }
        let boot = match which {
            cli::Reference::Instructions => boot,
            cli::Reference::Hardware => {
                let Some(mode) = engines::find(HARDWARE) else {
                    bail!("there is no mode {HARDWARE}");
                };
                if let Err(unavailable) = (mode.probe)() {
                    bail!("mode {HARDWARE} is unavailable: {unavailable}");
                }
                let Runs::Vcpu(boot) = mode.runs else {
                    bail!("mode {HARDWARE} has no vCPU");
                };
                boot
            }
        };
        let copy = engine_core::memory::create(arguments.memory)?;
        lockstep::copy(memory, &copy)?;
        let vcpu = boot(Arc::clone(&copy), setup)?.remove(0);
        Ok(Reference { vcpu, copy })
    }

    /// Puts the one vCPU of `vcpus`, which is in state `entry`, and this one into lockstep.
    ///
    /// # Errors
    /// An engine's.
    pub(crate) fn attach(
        mut self,
        mut vcpus: Vec<Box<dyn Vcpu>>,
        memory: &Arc<GuestRam>,
        entry: &CpuState,
    ) -> Result<Vec<Box<dyn Vcpu>>, Error> {
        self.vcpu.set_state(entry)?;
        let subject = vcpus.remove(0);
        let pair = Lockstep::new(subject, Arc::clone(memory), self.vcpu, self.copy)?;
        Ok(vec![Box::new(pair)])
    }
}
