//! MSRs that the machine keeps, on their way out of KVM (KVM_CAP_X86_USER_SPACE_MSR, api.rst 7.21;
//! KVM_X86_SET_MSR_FILTER, 4.97).
//!
//! Without controllers of its own KVM answers IA32_APIC_BASE and IA32_TSC_DEADLINE all the same, so
//! a filter denies them; x2APIC's registers can't be filtered, but raise #GP, which is asked to
//! leave too. Every other access that would raise #GP leaves as well and is answered by #GP.
//!
//! Invariant: an exit that waits for its answer gets it before the next KVM_RUN.

use engine_core::Exit;
use engine_core::clock;
use engine_core::devices::lapic;
use kvm_bindings as kb;
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;

/// Lets the guest's accesses to the machine's MSRs leave. False if this KVM can't.
pub(crate) fn leave(kvm: &Kvm, vm: &VmFd) -> bool {
    if !kvm.check_extension(Cap::X86UserSpaceMsr) || !kvm.check_extension(Cap::X86MsrFilter) {
        return false;
    }
    let capability = kb::kvm_enable_cap {
        cap: kb::KVM_CAP_X86_USER_SPACE_MSR,
        args: [
            (kb::KVM_MSR_EXIT_REASON_INVAL | kb::KVM_MSR_EXIT_REASON_FILTER).into(),
            0,
            0,
            0,
        ],
        ..Default::default()
    };
    // A clear bit denies.
    let ranges = [lapic::APIC_BASE, lapic::TSC_DEADLINE].map(|base| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count: 1,
        bitmap: &[0],
    });
    vm.enable_cap(&capability).is_ok()
        && vm
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .is_ok()
}

/// What a KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Answer {
    #[default]
    None,
    /// The value, or #GP.
    Read(Option<u64>),
    /// Whether it is allowed, or #GP.
    Write(bool),
}

impl Answer {
    /// Answers a read that waits.
    pub(crate) fn read(&mut self, value: Option<u64>) {
        if let Answer::Read(answer) = self {
            *answer = value;
        }
    }

    /// Answers a write that waits.
    pub(crate) fn write(&mut self, accepted: bool) {
        if let Answer::Write(answer) = self {
            *answer = accepted;
        }
    }

    /// The exit that `vcpu` left with; its answer comes to lie here.
    pub(crate) fn exit<'a>(&'a mut self, vcpu: &mut VcpuFd) -> Exit<'a> {
        let run = vcpu.get_kvm_run();
        let write = run.exit_reason == kb::KVM_EXIT_X86_WRMSR;
        // SAFETY: the exit reason says that `msr` is the union's valid member.
        let msr = unsafe { run.__bindgen_anon_1.msr };
        let (index, priority) = (msr.index, run.cr8 as u8);
        *self = if write {
            Answer::Write(false)
        } else {
            Answer::Read(None)
        };
        match self {
            Answer::Read(answer) => Exit::MsrRead {
                index,
                answer,
                priority,
            },
            Answer::Write(accepted) => Exit::MsrWrite {
                index,
                value: msr.data,
                tsc: if index == lapic::TSC_DEADLINE {
                    guest_tsc(vcpu)
                } else {
                    0
                },
                accepted,
            },
            Answer::None => unreachable!("set above"),
        }
    }

    /// True when the access is going to raise #GP.
    pub(crate) fn faults(self) -> bool {
        matches!(self, Answer::Read(None) | Answer::Write(false))
    }

    /// Hands the answer to KVM.
    pub(crate) fn give(&mut self, run: &mut kb::kvm_run) {
        let (error, data) = match std::mem::take(self) {
            Answer::None => return,
            Answer::Read(Some(value)) => (0, value),
            Answer::Write(true) => (0, 0),
            Answer::Read(None) | Answer::Write(false) => (1, 0),
        };
        let msr = &mut run.__bindgen_anon_1;
        // SAFETY: the last exit was for an MSR, so that is the union's valid member.
        let msr = unsafe { &mut msr.msr };
        msr.error = error;
        msr.data = data;
    }
}

/// What a KVM_EXIT_X86_WRMSR wants IA32_APIC_BASE to be, if it is for that.
pub(crate) fn base_written(run: &kb::kvm_run) -> Option<u64> {
    // SAFETY: asked at exits for MSRs alone, at which `msr` is the union's valid member.
    let msr = unsafe { run.__bindgen_anon_1.msr };
    let write = run.exit_reason == kb::KVM_EXIT_X86_WRMSR;
    (write && msr.index == lapic::APIC_BASE).then_some(msr.data)
}

/// Lets KVM know of IA32_APIC_BASE, for CPUID, which has no local APIC while that is switched off.
pub(crate) fn tell_base(vcpu: &VcpuFd, base: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.apic_base = base;
    vcpu.set_sregs(&sregs)
}

/// The guest's time-stamp counter. KVM starts it at 0, and the guest may set it.
fn guest_tsc(vcpu: &VcpuFd) -> u64 {
    let entry = kb::kvm_msr_entry {
        index: TSC,
        ..Default::default()
    };
    let Ok(mut msrs) = kb::Msrs::from_entries(&[entry]) else {
        return clock::tsc();
    };
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice()[0].data,
        // A KVM that does not tell: the host's, which is right where nothing is offset.
        Ok(_) | Err(_) => clock::tsc(),
    }
}
