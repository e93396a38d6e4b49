//! The pinned CPUID as KVM wants it (KVM_SET_CPUID2, api.rst 4.20).

use engine_core::cpuid::{Leaf, Place, VIRTUALIZED};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Takes what the other subleaves of leaf 0xd say of PKRU away, if it has been left out of the first.
fn without_pkru(entries: &mut Vec<kvm_cpuid_entry2>) {
    const PKRU: u32 = 9;
    let first = |entry: &&mut kvm_cpuid_entry2| (entry.function, entry.index) == (0xd, 0);
    let Some(entry) = entries.iter_mut().find(first) else {
        return;
    };
    if entry.eax >> PKRU & 1 == 0 {
        if entry.ecx != 0 {
            entry.ecx = engine_core::cpuid::xsave_bytes(entry.eax.into(), false);
        }
        entries.retain(|entry| (entry.function, entry.index) != (0xd, PKRU));
    }
}

/// Every leaf of [`engine_core::cpuid`] for the vCPU at `place`. What follows from the vCPU's state (OSXSAVE, the sizes of
/// leaf 0xd) KVM keeps up to date itself; leaves that are not listed it answers as an Intel
/// processor does, with the last basic leaf.
///
/// The features that need MSRs of the machine ([`engine_core::cpuid::MACHINE_MSRS`]) are left out
/// unless the guest's accesses to those reach it. What KVM itself has to virtualize is announced
/// only if `supported` (KVM_GET_SUPPORTED_CPUID) has it.
pub(crate) fn entries(place: Place, machine_msrs: bool, supported: &CpuId) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = engine_core::cpuid::leaves(place)
        .map(
            |Leaf {
                 leaf,
                 subleaf,
                 registers: [eax, ebx, ecx, edx],
             }| kvm_cpuid_entry2 {
                function: leaf,
                index: subleaf.unwrap_or(0),
                flags: subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            },
        )
        .collect();
    if !machine_msrs {
        for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx &= !engine_core::cpuid::MACHINE_MSRS;
        }
    }
    for entry in entries.iter_mut().filter(|entry| entry.index == 0) {
        let Some((leaf, bits)) = VIRTUALIZED.iter().find(|(leaf, _)| *leaf == entry.function)
        else {
            continue;
        };
        let known = supported
            .as_slice()
            .iter()
            .find(|known| known.function == *leaf && known.index == 0);
        let has = known.map_or([0; 4], |known| [known.eax, known.ebx, known.ecx, known.edx]);
        let registers = [
            &mut entry.eax,
            &mut entry.ebx,
            &mut entry.ecx,
            &mut entry.edx,
        ];
        for ((register, bits), has) in registers.into_iter().zip(bits).zip(has) {
            *register &= !bits | has;
        }
    }
    without_pkru(&mut entries);
    CpuId::from_entries(&entries).expect("fewer leaves than KVM_MAX_CPUID_ENTRIES")
}
