//! Doorbells and interrupts by eventfd: KVM_IOEVENTFD (api.rst 4.59) and KVM_IRQFD (4.75).
//!
//! A write that an ioeventfd matches is answered in the kernel, which signals the descriptor and
//! runs the guest on. An irqfd with a second descriptor to resample is a level-triggered line: the
//! kernel lowers it when the guest ends the interrupt, and says so.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::path::Path;
use std::sync::Arc;

use engine_core::{Doorbells, GuestPhys, Irqchip, Unavailable};
use kvm_ioctls::{Cap, IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::backend;
use crate::irqchip::KernelIrqchip;

/// The doorbells of one VM.
pub(crate) struct KvmDoorbells {
    vm: Arc<VmFd>,
    /// Lines are KVM's to drive.
    lines: bool,
}

impl KvmDoorbells {
    pub(crate) fn new(vm: Arc<VmFd>, lines: bool) -> Self {
        KvmDoorbells { vm, lines }
    }
}

/// A copy as kvm-ioctls takes it. KVM keeps what is behind the descriptor, and not the copy.
fn copy(event: BorrowedFd<'_>) -> io::Result<EventFd> {
    let copy = event.try_clone_to_owned()?;
    // SAFETY: the descriptor is owned, and ownership goes over.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

fn said(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> io::Error {
    move |error| {
        let error = io::Error::from_raw_os_error(error.errno());
        io::Error::new(error.kind(), format!("{operation}: {error}"))
    }
}

impl Doorbells for KvmDoorbells {
    fn listen(&self, address: GuestPhys, value: u32, event: BorrowedFd<'_>) -> io::Result<()> {
        let event = copy(event)?;
        self.vm
            .register_ioevent(&event, &IoEventAddress::Mmio(address.0), value)
            .map_err(said("KVM_IOEVENTFD"))
    }

    fn interrupt(
        &self,
        number: u8,
        event: BorrowedFd<'_>,
        ended: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        if !self.lines {
            return Ok(false);
        }
        let (event, ended) = (copy(event)?, copy(ended)?);
        self.vm
            .register_irqfd_with_resample(&event, &ended, number.into())
            .map_err(said("KVM_IRQFD"))?;
        Ok(true)
    }
}

/// Where the trial's doorbell is: above any RAM, and no device's.
const TRIAL: GuestPhys = GuestPhys(0xfeb0_f050);
const TRIAL_LINE: u8 = 5;

/// Finds out whether doorbells by eventfd can be used here with those interrupt controllers: by
/// KVM's word, and by a trial on a VM that never runs.
///
/// # Errors
/// [`Unavailable`]: which probe failed, what it said and how to mend it.
pub fn probe_doorbells(irqchip: Irqchip) -> Result<(), Unavailable> {
    let (kvm, found) = backend::open(Path::new(backend::DEVICE))?;
    let refused = |probe: &str, reason: String| Unavailable {
        probe: format!("{probe} ({} backend)", found.backend),
        reason,
        fix: "use --doorbell exit".into(),
    };
    let lines = irqchip == Irqchip::Kernel;
    let wanted = [
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", true),
        (Cap::Irqfd, "KVM_CAP_IRQFD", lines),
        (Cap::IrqfdResample, "KVM_CAP_IRQFD_RESAMPLE", lines),
    ];
    for (capability, name, wanted) in wanted {
        if wanted && !kvm.check_extension(capability) {
            let probe = format!("KVM_CHECK_EXTENSION {name}");
            return Err(refused(&probe, "not supported".into()));
        }
    }
    let failed = |error: kvm_ioctls::Error| {
        let error = io::Error::from_raw_os_error(error.errno());
        refused("create a VM for a trial", error.to_string())
    };
    let vm = Arc::new(kvm.create_vm().map_err(failed)?);
    if lines {
        KernelIrqchip::create(&vm)
            .map_err(|error| refused("create interrupt controllers", error.to_string()))?;
    }
    let trial = || {
        use std::os::fd::AsFd;
        let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        let doorbells = KvmDoorbells::new(Arc::clone(&vm), lines);
        let (bell, signal, ended) = (event()?, event()?, event()?);
        doorbells.listen(TRIAL, 0, bell.as_fd())?;
        doorbells.interrupt(TRIAL_LINE, signal.as_fd(), ended.as_fd())?;
        io::Result::Ok(())
    };
    trial().map_err(|error| refused("doorbell by eventfd", error.to_string()))
}
