//! One VM with its vCPUs, each behind [`Vcpu`].
//!
//! KVM_RUN's exit is read from the shared kvm_run page rather than from kvm-ioctls' own exit
//! enum, which leaves out the item size of a port access and the details of an internal error.
//!
//! Invariant: `kvm_run` is only looked at between two KVM_RUN ioctls, on the thread that runs it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32};

use engine_core::cpuid::Place;
use engine_core::kick::KickHandle;
use engine_core::tally::HostStat;
use engine_core::{
    CpuState, Doorbells, Error, Exit, ExitReason, GuestRam, GuestVirt, Interrupts, Irqchip,
    Stepping, Supply, Unavailable, Vcpu,
};
use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::access::access;
use crate::backend::{self, Backend, DEVICE};
use crate::doorbell::KvmDoorbells;
use crate::irqchip::KernelIrqchip;
use crate::kick::KvmKick;
use crate::msr::{self, Answer};
use crate::posted::Posted;
use crate::stats::Statistics;
use crate::{cpuid, registers};

// Not wrapped by kvm-ioctls (api.rst 4.16).
ioctl_iow_nr!(KVM_INTERRUPT, kb::KVMIO, 0x86, kb::kvm_interrupt);

/// Where KVM on Intel keeps four pages of its own, above any RAM (api.rst 4.37, 4.40).
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Longest x86 instruction.
const INSTRUCTION_BYTES: usize = 15;

/// How to set up the VM.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device node.
    pub device: PathBuf,
    /// Whose interrupt controllers.
    pub irqchip: Irqchip,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            device: DEVICE.into(),
            irqchip: Irqchip::default(),
        }
    }
}

/// A vCPU of a VM, through /dev/kvm.
pub struct KvmVcpu {
    // Fields drop in this order: the VM last, and RAM after everything that maps it.
    vcpu: VcpuFd,
    statistics: Vec<Statistics>,
    kick: Arc<KvmKick>,
    backend: Backend,
    /// The answer that the last exit waits for.
    answer: Answer,
    /// What the last exit wants IA32_APIC_BASE to be.
    base_written: Option<u64>,
    controller: Option<Arc<KernelIrqchip>>,
    /// Writes that wait for the next exit.
    posted: Option<Posted>,
    /// The exit in kvm_run has not been told yet: such writes came first.
    held: bool,
    /// Every instruction ends the run.
    stepping: Option<Stepping>,
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
}

fn host(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Host {
        operation,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

impl KvmVcpu {
    /// Creates a VM over `ram` with one vCPU, in KVM's reset state.
    ///
    /// # Errors
    /// As [`KvmVcpu::several`].
    pub fn new(ram: Arc<GuestRam>, options: Options) -> Result<Self, Error> {
        let one = Self::several(ram, options, 1)?.pop();
        Ok(one.expect("as many as were asked for"))
    }

    /// Creates a VM over `ram` and its `count` vCPUs, in KVM's reset state.
    ///
    /// # Errors
    /// [`Error`]: the probe's words if KVM can't be used, or the ioctl that failed.
    pub fn several(ram: Arc<GuestRam>, options: Options, count: u8) -> Result<Vec<Self>, Error> {
        let (kvm, found) = backend::open(&options.device)
            .map_err(|unavailable: Unavailable| Error::Engine(unavailable.to_string()))?;
        KvmKick::prepare().map_err(|source| Error::Host {
            operation: "sigaction",
            source,
        })?;
        let kvm = Arc::new(kvm);
        let vm = Arc::new(kvm.create_vm().map_err(host("KVM_CREATE_VM"))?);
        if found.backend == Backend::Intel {
            vm.set_identity_map_address(IDENTITY_MAP)
                .map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
            vm.set_tss_address(TSS).map_err(host("KVM_SET_TSS_ADDR"))?;
        }
        map_ram(&vm, &ram)?;
        let (controller, machine_msrs) = match options.irqchip {
            Irqchip::User => (None, msr::leave(&kvm, &vm)),
            Irqchip::Kernel => (Some(Arc::new(KernelIrqchip::create(&vm)?)), true),
        };
        let supported = kvm
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        let create = |place: Place| {
            let vcpu = vm
                .create_vcpu(place.id.into())
                .map_err(host("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpuid::entries(place, machine_msrs, &supported))
                .map_err(host("KVM_SET_CPUID2"))?;
            // The VM's own are told with the first vCPU's.
            let of_vm = (place.id == 0).then(|| Statistics::open(&*vm));
            let statistics = if found.statistics {
                // A kernel may know the capability and still refuse, under a seccomp filter say:
                // statistics are an extra, the guest runs without them.
                let all = of_vm.into_iter().chain([Statistics::open(&vcpu)]);
                all.flatten().collect()
            } else {
                Vec::new()
            };
            Ok(KvmVcpu {
                vcpu,
                statistics,
                kick: Arc::new(KvmKick::default()),
                backend: found.backend,
                answer: Answer::default(),
                base_written: None,
                controller: controller.clone(),
                posted: None,
                held: false,
                stepping: None,
                kvm: Arc::clone(&kvm),
                vm: Arc::clone(&vm),
                ram: Arc::clone(&ram),
            })
        };
        Place::all(count).map(create).collect()
    }

    /// The implementation that runs this guest.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Takes writes that waited for the exit in kvm_run, and that exit with them if it is one more of
    /// them; else it is held. False if it is none that a device sees.
    #[cold]
    fn posted_first(&mut self) -> bool {
        let Some(posted) = &mut self.posted else {
            return false;
        };
        let run = self.vcpu.get_kvm_run();
        let unseen = [
            kb::KVM_EXIT_IRQ_WINDOW_OPEN,
            kb::KVM_EXIT_INTR,
            kb::KVM_EXIT_SET_TPR,
        ];
        if unseen.contains(&run.exit_reason) {
            return false;
        }
        posted.take();
        let last = !posted.any() && run.exit_reason == kb::KVM_EXIT_IO;
        self.held = !(last && posted.join(&access(run)));
        true
    }

    /// Enters the guest. True if it came back with an exit, false if it was interrupted.
    fn enter(&mut self) -> Result<bool, Error> {
        if let Some(posted) = &mut self.posted {
            posted.allow();
        }
        if self.answer != Answer::None {
            let accepted = self.answer == Answer::Write(true);
            self.answer.give(self.vcpu.get_kvm_run());
            if let Some(base) = self.base_written.take().filter(|_| accepted) {
                msr::tell_base(&self.vcpu, base).map_err(host("KVM_SET_SREGS"))?;
            }
        }
        let immediate_exit: *const AtomicU8 =
            (&raw mut self.vcpu.get_kvm_run().immediate_exit).cast();
        // SAFETY: the kvm_run page stays mapped as long as `self.vcpu`, which outlives the guard.
        // KVM reads the byte only on entry, and everyone else writes it through this atomic.
        let Some(running) = (unsafe { self.kick.enter(immediate_exit) }) else {
            return Ok(false);
        };
        match self.vcpu.run() {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                running.interrupted();
                Ok(false)
            }
            Err(error) => Err(host("KVM_RUN")(error)),
        }
    }

    /// Ends the access that the last exit was for, without entering the guest: a KVM_RUN with
    /// immediate_exit does that and no more (api.rst 5, immediate_exit).
    /// True if the same instruction has left once more.
    fn complete(&mut self) -> Result<bool, Error> {
        self.answer.give(self.vcpu.get_kvm_run());
        self.vcpu.set_kvm_immediate_exit(1);
        let ran = self.vcpu.run().map(drop);
        self.vcpu.set_kvm_immediate_exit(0);
        match ran {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(false),
            Err(error) => Err(host("KVM_RUN")(error)),
        }
    }

    /// Where the guest is and which bytes lie there: the end of an error message.
    fn location(&self) -> String {
        let Ok(state) = self.state() else {
            return String::new();
        };
        let linear = GuestVirt(state.segments[CpuState::CS].base.wrapping_add(state.rip));
        let mut bytes = [0; INSTRUCTION_BYTES];
        let read = self
            .vcpu
            .translate_gva(linear.0)
            .ok()
            .filter(|found| found.valid != 0);
        let count = read.map_or(0, |found| {
            let start = GuestAddress(found.physical_address);
            // An instruction at the end of RAM is shorter.
            self.ram.read(&mut bytes, start).unwrap_or(0)
        });
        let text: Vec<String> = bytes[..count]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!(" at rip {:#x}, bytes {}", state.rip, text.join(" "))
    }

    fn internal_error(&mut self) -> String {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: the exit reason says that `internal` is the union's valid member.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let name = match internal.suberror {
            kb::KVM_INTERNAL_ERROR_EMULATION => "emulation failed",
            kb::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
            kb::KVM_INTERNAL_ERROR_DELIVERY_EV => "exit during event delivery",
            kb::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "unexpected exit reason",
            _ => "unknown suberror",
        };
        format!(
            "KVM_EXIT_INTERNAL_ERROR ({} backend): {name} (suberror {}){}",
            self.backend,
            internal.suberror,
            self.location()
        )
    }
}

/// One memory slot per region.
fn map_ram(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (slot, region) in ram.iter().enumerate() {
        let slot = kb::kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped at that address with that size, and `KvmVcpu` keeps the
        // RAM alive until the VM is gone.
        unsafe { vm.set_user_memory_region(slot) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        // KVM's trap flag goes with the place that it was set for.
        if self.stepping.is_some() && !self.held {
            self.set_stepping(self.stepping)?;
        }
        if !std::mem::take(&mut self.held) && !self.enter()? {
            return Ok(Exit::Interrupted);
        }
        if self.posted.as_ref().is_some_and(Posted::any) && self.posted_first() {
            let posted = self.posted.as_ref().expect("just looked at");
            return Ok(posted.exit());
        }
        let backend = self.backend;
        match self.vcpu.get_kvm_run().exit_reason {
            kb::KVM_EXIT_IO | kb::KVM_EXIT_MMIO => Ok(access(self.vcpu.get_kvm_run())),
            kb::KVM_EXIT_X86_RDMSR | kb::KVM_EXIT_X86_WRMSR => {
                self.base_written = msr::base_written(self.vcpu.get_kvm_run());
                Ok(self.answer.exit(&mut self.vcpu))
            }
            kb::KVM_EXIT_HLT => Ok(Exit::Hlt),
            kb::KVM_EXIT_IRQ_WINDOW_OPEN => Ok(Exit::InterruptWindow),
            kb::KVM_EXIT_SHUTDOWN => Ok(Exit::Shutdown),
            kb::KVM_EXIT_DEBUG => Ok(Exit::Stepped),
            // The guest lowered its task priority: the run loop looks at pending interrupts again.
            kb::KVM_EXIT_INTR | kb::KVM_EXIT_SET_TPR => Ok(Exit::Interrupted),
            kb::KVM_EXIT_INTERNAL_ERROR => Ok(Exit::Internal {
                message: self.internal_error(),
            }),
            kb::KVM_EXIT_FAIL_ENTRY => {
                let run = self.vcpu.get_kvm_run();
                // SAFETY: the exit reason says that `fail_entry` is the union's valid member.
                let failure = unsafe { run.__bindgen_anon_1.fail_entry };
                let reason = failure.hardware_entry_failure_reason;
                let message = format!(
                    "KVM_EXIT_FAIL_ENTRY ({backend} backend): reason {reason:#x}{}",
                    self.location()
                );
                Ok(Exit::Internal { message })
            }
            other => Ok(Exit::Internal {
                message: format!(
                    "KVM exit reason {other} ({backend} backend){}",
                    self.location()
                ),
            }),
        }
    }

    fn state(&self) -> Result<CpuState, Error> {
        let regs = self.vcpu.get_regs().map_err(host("KVM_GET_REGS"))?;
        let sregs = self.vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        Ok(registers::to_state(&regs, &sregs))
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        let old = self.vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        let sregs = registers::to_sregs(state, &old);
        self.vcpu.set_sregs(&sregs).map_err(host("KVM_SET_SREGS"))?;
        self.vcpu
            .set_regs(&registers::to_regs(state))
            .map_err(host("KVM_SET_REGS"))?;
        // Without an in-kernel irqchip KVM_RUN takes CR8 from here (api.rst 5, cr8).
        self.vcpu.get_kvm_run().cr8 = state.cr8;
        Ok(())
    }

    fn interruptible(&mut self) -> bool {
        let run = self.vcpu.get_kvm_run();
        let ready = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        // An exit that is held has not been answered yet.
        ready && !self.answer.faults() && !self.held
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        if !self.interruptible() {
            return Err(Error::Engine("the vCPU takes no interrupt now".into()));
        }
        let interrupt = kb::kvm_interrupt { irq: vector.into() };
        // SAFETY: the ioctl reads one kvm_interrupt and keeps no reference.
        if unsafe { ioctl_with_ref(&self.vcpu, KVM_INTERRUPT(), &interrupt) } < 0 {
            return Err(Error::Host {
                operation: "KVM_INTERRUPT",
                source: io::Error::last_os_error(),
            });
        }
        // KVM queues one interrupt at a time, and says so again only at the next exit.
        self.vcpu.get_kvm_run().ready_for_interrupt_injection = 0;
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), Error> {
        self.vcpu.nmi().map_err(host("KVM_NMI"))
    }

    fn nmi_blocked(&mut self) -> bool {
        let events = self.vcpu.get_vcpu_events();
        events.is_ok_and(|events| events.nmi.masked != 0)
    }

    fn init(&mut self) -> Result<(), Error> {
        self.complete()?;
        self.answer = Answer::None;
        // Nothing pending, nothing in service: INIT forgets both.
        let events = kb::kvm_vcpu_events {
            flags: kb::KVM_VCPUEVENT_VALID_NMI_PENDING | kb::KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        self.vcpu
            .set_vcpu_events(&events)
            .map_err(host("KVM_SET_VCPU_EVENTS"))?;
        let debug = kb::kvm_debugregs {
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Default::default()
        };
        self.vcpu
            .set_debug_regs(&debug)
            .map_err(host("KVM_SET_DEBUGREGS"))?;
        self.set_state(&CpuState::after_init())
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.vcpu.get_kvm_run().request_interrupt_window = wanted.into();
    }

    fn controller(&self) -> Option<Arc<dyn Interrupts>> {
        let controller = self.controller.as_ref()?;
        Some(Arc::clone(controller) as Arc<dyn Interrupts>)
    }

    fn post_writes(&mut self, ports: &[u16], postable: &Arc<AtomicU32>) {
        let postable = Arc::clone(postable);
        // A KVM that won't is one where each write leaves.
        self.posted = Posted::new(&self.kvm, &self.vm, &self.vcpu, ports, postable)
            .ok()
            .flatten();
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        let vm = Arc::clone(&self.vm);
        Some(Arc::new(KvmDoorbells::new(vm, self.controller.is_some())))
    }

    fn kick_handle(&self) -> KickHandle {
        Arc::clone(&self.kick) as KickHandle
    }

    fn task_priority(&mut self) -> u8 {
        self.vcpu.get_kvm_run().cr8 as u8
    }

    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error> {
        self.vcpu.get_kvm_run().cr8 = priority.into();
        Ok(())
    }

    fn set_stepping(&mut self, stepping: Option<Stepping>) -> Result<(), Error> {
        /// DR7: the first breakpoint, on execution.
        const LOCAL_0: u64 = 1 << 10 | 1;
        let mut debug = kb::kvm_guest_debug::default();
        if stepping.is_some() {
            debug.control = kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_SINGLESTEP;
        }
        if let Some(Stepping::Towards(address)) = stepping {
            debug.control |= kb::KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[0] = address;
            debug.arch.debugreg[7] = LOCAL_0;
        }
        self.stepping = stepping;
        let set = self.vcpu.set_guest_debug(&debug);
        set.map_err(host("KVM_SET_GUEST_DEBUG"))
    }

    fn supply(&mut self, answer: Supply<'_>) -> Result<(), Error> {
        match answer {
            Supply::Nothing => {}
            Supply::Data(bytes) => match access(self.vcpu.get_kvm_run()) {
                Exit::PioIn { data, .. } | Exit::MmioRead { data, .. } => {
                    data.copy_from_slice(bytes);
                }
                // Of the two kinds of access, a write wants no data.
                _ => {}
            },
            Supply::Msr(value) => self.answer.read(value),
            Supply::Accepted(accepted) => self.answer.write(accepted),
        }
        self.held = self.complete()?;
        Ok(())
    }

    fn exit_name(&self, reason: ExitReason) -> &'static str {
        match reason {
            ExitReason::PioIn => "KVM_EXIT_IO in",
            ExitReason::PioOut => "KVM_EXIT_IO out",
            ExitReason::MmioRead => "KVM_EXIT_MMIO read",
            ExitReason::MmioWrite => "KVM_EXIT_MMIO write",
            ExitReason::MsrRead => "KVM_EXIT_X86_RDMSR",
            ExitReason::MsrWrite => "KVM_EXIT_X86_WRMSR",
            ExitReason::Hlt => "KVM_EXIT_HLT",
            ExitReason::InterruptWindow => "KVM_EXIT_IRQ_WINDOW_OPEN",
            ExitReason::Shutdown => "KVM_EXIT_SHUTDOWN",
            ExitReason::Interrupted => "KVM_EXIT_INTR",
            ExitReason::Stepped => "KVM_EXIT_DEBUG",
            ExitReason::Internal => "KVM_EXIT_INTERNAL_ERROR",
            // The translator's, which this engine never counts.
            ExitReason::Helper
            | ExitReason::Cpuid
            | ExitReason::Msr
            | ExitReason::ControlRegister
            | ExitReason::GuestFault
            | ExitReason::Interrupt
            | ExitReason::TlbMiss
            | ExitReason::Bounce
            | ExitReason::WindowFill
            | ExitReason::WindowDrop
            | ExitReason::WindowMiss
            | ExitReason::Translate
            | ExitReason::DirectMiss
            | ExitReason::Chain
            | ExitReason::IndirectMiss
            | ExitReason::SmcFlush
            | ExitReason::CacheFlush => reason.name(),
        }
    }

    fn host_stats(&mut self) -> Vec<HostStat> {
        let mut stats = Vec::with_capacity(64);
        for statistics in &mut self.statistics {
            statistics.read_into(&mut stats);
        }
        stats
    }
}
