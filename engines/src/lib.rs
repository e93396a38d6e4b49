//! Registry of modes, and the VMM binary `trapline`.
//!
//! A mode is an engine running an image of one flavour; it is one row of [`MODES`] and nothing
//! else knows the engines by name. `native` is the baseline and not a mode.

pub mod floors;
pub mod jail;

use std::sync::Arc;

use engine_core::peripherals::Family;
use engine_core::{Error, GuestRam, Irqchip, Unavailable, Vcpu};

/// An engine that this host can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// What stands behind the engine, where there is a choice; part of every label.
    pub backend: Option<&'static str>,
}

/// How an engine is set up; each takes what concerns it.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Whose interrupt controllers the guest has.
    pub irqchip: Irqchip,
    /// How many vCPUs: 1 to [`Mode::cpus`].
    pub cpus: u8,
    /// The translator's.
    pub translator: bt::Options,
}

impl Default for Setup {
    /// One vCPU, the VMM's interrupt controllers.
    fn default() -> Self {
        Setup {
            irqchip: Irqchip::default(),
            cpus: 1,
            translator: bt::Options::default(),
        }
    }
}

/// Creates an engine's vCPUs over one guest memory. They are numbered in order; a state is set for
/// the first, and for others when they are started.
pub type Boot = fn(Arc<GuestRam>, Setup) -> Result<Vec<Box<dyn Vcpu>>, Error>;

/// Finds out whether doorbells can be eventfds with those interrupt controllers.
pub type ProbeDoorbells = fn(Irqchip) -> Result<(), Unavailable>;

/// How an engine runs a guest.
#[derive(Clone, Copy, Debug)]
pub enum Runs {
    /// As vCPUs over guest memory, by the run loop of `engine-core`.
    Vcpu(Boot),
    /// As processes of its own, by the run loop of `pv`.
    Processes,
}

/// A way to run a guest.
#[derive(Debug)]
pub struct Mode {
    /// Its name on the command line, in csv and in reports.
    pub name: &'static str,
    /// What runs the guest.
    pub engine: &'static str,
    /// How the guest reaches its machine.
    pub flavour: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// The embedded image of that flavour.
    pub image: fn() -> &'static [u8],
    /// Whether this host can run it.
    pub probe: fn() -> Result<Available, Unavailable>,
    /// Whether this host's kernel takes doorbells for it ([`Doorbell::Eventfd`]), with those
    /// interrupt controllers; `None` where the engine knows only exits.
    ///
    /// [`Doorbell::Eventfd`]: engine_core::Doorbell::Eventfd
    pub eventfd_doorbells: Option<ProbeDoorbells>,
    /// Whether this host's kernel has interrupt controllers for it; `None` where the engine knows
    /// only the VMM's.
    pub kernel_irqchip: Option<fn() -> Result<(), Unavailable>>,
    /// The most vCPUs that a guest can have.
    pub cpus: u8,
    /// What runs it.
    pub runs: Runs,
}

impl Mode {
    /// Whether guest code is translated.
    pub fn translates(&self) -> bool {
        self.engine == "bt"
    }

    /// The devices that the flavour's drivers are for.
    pub fn family(&self) -> Family {
        match self.flavour {
            "hybrid" => Family::Virtio,
            _ => Family::Emulated,
        }
    }

    /// What its process may still do while the guest runs.
    pub fn jail(&self) -> jail::Jail {
        match self.engine {
            "kvm" => jail::Jail::Kvm,
            _ => jail::Jail::Process,
        }
    }
}

/// The most vCPUs of any mode: what local APIC ids of four bits tell apart.
pub const MOST_CPUS: u8 = 16;

/// Every mode, in the order in which reports name them.
pub static MODES: &[Mode] = &[
    Mode {
        name: "full",
        engine: "bt",
        flavour: "unaware",
        about: "privileged code is recompiled on the fly to run unprivileged",
        image: images::unaware,
        // Translation needs nothing that an ordinary process doesn't have.
        probe: || Ok(Available { backend: None }),
        eventfd_doorbells: None,
        kernel_irqchip: None,
        cpus: MOST_CPUS,
        runs: Runs::Vcpu(translated),
    },
    Mode {
        name: "hardware",
        engine: "kvm",
        flavour: "unaware",
        about: "privileged instructions run in the processor's virtual context, through /dev/kvm",
        image: images::unaware,
        probe: kvm_host,
        // Its devices have none.
        eventfd_doorbells: None,
        kernel_irqchip: Some(kvm::probe_irqchip),
        cpus: MOST_CPUS,
        runs: Runs::Vcpu(in_hardware),
    },
    Mode {
        name: "para",
        engine: "pv",
        flavour: "aware",
        about: "the guest knows its host: commands instead of privileged instructions",
        image: images::aware,
        probe: || pv::probe().map(|()| Available { backend: None }),
        eventfd_doorbells: None,
        kernel_irqchip: None,
        cpus: 1,
        runs: Runs::Processes,
    },
    Mode {
        name: "hybrid",
        engine: "kvm",
        flavour: "hybrid",
        about: "as hardware for privileged instructions, with paravirtual drivers for I/O",
        image: images::hybrid,
        probe: kvm_host,
        eventfd_doorbells: Some(kvm::probe_doorbells),
        kernel_irqchip: Some(kvm::probe_irqchip),
        cpus: MOST_CPUS,
        runs: Runs::Vcpu(in_hardware),
    },
    Mode {
        name: "hybrid-bt",
        engine: "bt",
        flavour: "hybrid",
        about: "as full for privileged instructions, with paravirtual drivers for I/O",
        image: images::hybrid,
        probe: || Ok(Available { backend: None }),
        eventfd_doorbells: None,
        kernel_irqchip: None,
        cpus: MOST_CPUS,
        runs: Runs::Vcpu(translated),
    },
];

/// The translator's vCPUs.
fn translated(ram: Arc<GuestRam>, setup: Setup) -> Result<Vec<Box<dyn Vcpu>>, Error> {
    let vcpus = bt::BtVcpu::several(ram, setup.translator, setup.cpus)?;
    Ok(vcpus
        .into_iter()
        .map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>)
        .collect())
}

/// KVM's vCPUs. The VMM's interrupt controllers are the default: they are the same in every mode, and
/// each access is counted.
fn in_hardware(ram: Arc<GuestRam>, setup: Setup) -> Result<Vec<Box<dyn Vcpu>>, Error> {
    let options = kvm::Options {
        irqchip: setup.irqchip,
        ..kvm::Options::default()
    };
    let vcpus = kvm::KvmVcpu::several(ram, options, setup.cpus)?;
    Ok(vcpus
        .into_iter()
        .map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>)
        .collect())
}

/// Whether KVM runs guests here.
fn kvm_host() -> Result<Available, Unavailable> {
    kvm::probe().map(|host| Available {
        backend: Some(host.backend.name()),
    })
}

/// The mode called `name`.
pub fn find(name: &str) -> Option<&'static Mode> {
    MODES.iter().find(|mode| mode.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for mode in MODES {
            let found = find(mode.name).unwrap();
            assert!(std::ptr::eq(found, mode));
        }
        assert!(find("native").is_none());
    }

    #[test]
    fn every_image_can_be_loaded() {
        for mode in MODES {
            match mode.runs {
                Runs::Vcpu(_) => engine_core::loader::check((mode.image)()).unwrap(),
                Runs::Processes => pv::check((mode.image)()).unwrap(),
            }
        }
    }
}
