//! The pinned CPUID as KVM wants it (KVM_SET_CPUID2, api.rst 4.20).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Every leaf of [`engine_core::cpuid`]. None depends on the subleaf, so no entry is flagged as
/// indexed; leaves that are not listed KVM answers as an Intel processor does, with the last basic
/// leaf, which is all zeros.
pub(crate) fn entries() -> CpuId {
    let entries: Vec<kvm_cpuid_entry2> = engine_core::cpuid::leaves()
        .map(|(function, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).expect("fewer leaves than KVM_MAX_CPUID_ENTRIES")
}
