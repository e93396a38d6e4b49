//! KVM's own interrupt controllers and timer (KVM_CREATE_IRQCHIP, api.rst 4.24; KVM_CREATE_PIT2,
//! 4.71): 8259s, I/O APIC, local APIC, 8254 and port 0x61.
//!
//! With them the guest's accesses to those never leave the kernel, and neither does `hlt`. Lines
//! are driven by KVM_IRQ_LINE: devices run on the vCPU's thread, where an irqfd would be the same
//! system call with one more indirection.

use std::io;
use std::path::Path;
use std::sync::Arc;

use engine_core::{Error, Interrupts, Unavailable};
use kvm_bindings as kb;
use kvm_ioctls::{Cap, VmFd};

use crate::backend;

/// Pins of the I/O APIC.
const PINS: u32 = 24;
const CASCADE: u32 = 2;

/// The controllers of one VM.
pub(crate) struct KernelIrqchip(Arc<VmFd>);

fn host(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Host {
        operation,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

impl KernelIrqchip {
    /// Creates the controllers and the timer; before the vCPU, whose local APIC is one of them.
    pub(crate) fn create(vm: &Arc<VmFd>) -> Result<Self, Error> {
        vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
        let pit = kb::kvm_pit_config {
            // Port 0x61 as well.
            flags: kb::KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).map_err(host("KVM_CREATE_PIT2"))?;
        vm.set_gsi_routing(&routing())
            .map_err(host("KVM_SET_GSI_ROUTING"))?;
        Ok(KernelIrqchip(Arc::clone(vm)))
    }
}

/// A PC's wiring (KVM_SET_GSI_ROUTING, api.rst 4.52): each line reaches the 8259s and the I/O APIC,
/// the timer's as pin 2 there. KVM's own default gives it pin 0.
fn routing() -> kb::KvmIrqRouting {
    let entry = |gsi: u32, irqchip: u32, pin: u32| kb::kvm_irq_routing_entry {
        gsi,
        type_: kb::KVM_IRQ_ROUTING_IRQCHIP,
        u: kb::kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kb::kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    // Line 2 is the cascade, which no device has.
    let lines = (0..PINS).filter(|&gsi| gsi != CASCADE);
    let entries: Vec<_> = lines
        .flat_map(|gsi| {
            let pic = match gsi {
                0..8 => Some(entry(gsi, kb::KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => Some(entry(gsi, kb::KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => None,
            };
            let pin = if gsi == 0 { CASCADE } else { gsi };
            pic.into_iter()
                .chain([entry(gsi, kb::KVM_IRQCHIP_IOAPIC, pin)])
        })
        .collect();
    kb::KvmIrqRouting::from_entries(&entries).expect("fewer entries than KVM takes")
}

impl Interrupts for KernelIrqchip {
    fn set_line(&self, number: u8, level: bool) {
        // Fails for no number below 24 once the controllers exist; others lead nowhere.
        let set = self.0.set_irq_line(number.into(), level);
        debug_assert!(set.is_ok() || number >= 24, "KVM_IRQ_LINE: {set:?}");
    }
}

/// Finds out whether KVM's interrupt controllers can be used here: by its word, and by a trial in
/// which a line that is raised arrives at the 8259.
///
/// # Errors
/// [`Unavailable`]: which probe failed, what it said and how to mend it.
pub fn probe_irqchip() -> Result<(), Unavailable> {
    let (kvm, found) = backend::open(Path::new(backend::DEVICE))?;
    let refused = |probe: &str, reason: String| Unavailable {
        probe: format!("{probe} ({} backend)", found.backend),
        reason,
        fix: "use --irqchip user".into(),
    };
    for (capability, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
    ] {
        if !kvm.check_extension(capability) {
            let probe = format!("KVM_CHECK_EXTENSION {name}");
            return Err(refused(&probe, "not supported".into()));
        }
    }
    let failed = |error: kvm_ioctls::Error| {
        let error = io::Error::from_raw_os_error(error.errno());
        refused("create a VM for a trial", error.to_string())
    };
    let vm = Arc::new(kvm.create_vm().map_err(failed)?);
    let irqchip = KernelIrqchip::create(&vm)
        .map_err(|error| refused("create interrupt controllers", error.to_string()))?;
    let _vcpu = vm.create_vcpu(0).map_err(failed)?;
    irqchip.set_line(TRIAL, true);
    let mut master = kb::kvm_irqchip {
        chip_id: kb::KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    vm.get_irqchip(&mut master).map_err(failed)?;
    // SAFETY: KVM_GET_IRQCHIP has filled the member that the chip's number names.
    let requested = unsafe { master.chip.pic.irr };
    if requested >> TRIAL & 1 == 0 {
        return Err(refused(
            "raise an interrupt line by KVM_IRQ_LINE",
            format!("it does not arrive at the 8259 (IRR {requested:#04x})"),
        ));
    }
    Ok(())
}

/// The line of the trial.
const TRIAL: u8 = 4;
