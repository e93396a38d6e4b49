//! The guest's CPUID, pinned: the same leaves in every mode and on every host.
//!
//! A translator's block counts and a guest's choice of code path depend on what CPUID says, so it
//! is a constant here. The model is an x86-64 baseline processor with SSE3, SSSE3, SSE4.1, SSE4.2,
//! POPCNT, CMPXCHG16B, LAHF/SAHF, NX, SYSCALL, RDTSCP and an invariant TSC. It has no AVX, XSAVE,
//! PCID, MTRRs, SYSENTER or machine checks, and no hypervisor bit: an `unaware` guest is not told.
//!
//! Layout of the leaves: SDM 2A, CPUID, tables 3-8 and following; APM 3 appendix E for 0x8000_xxxx.

/// Width of a guest-physical address in bits.
pub const PHYSICAL_BITS: u32 = 40;
/// Width of a guest-virtual address in bits.
pub const VIRTUAL_BITS: u32 = 48;
/// First guest-physical address that the processor cannot form.
pub const PHYSICAL_MEMORY_LIMIT: u64 = 1 << PHYSICAL_BITS;

/// Family 6, model 0x1a, stepping 5: an early Core, which promises nothing that is missing here.
const SIGNATURE: u32 = 0x0001_06a5;

const EDX_1: u32 = bits(&[
    0,  // FPU
    2,  // DE
    3,  // PSE
    4,  // TSC
    5,  // MSR
    6,  // PAE
    8,  // CX8
    9,  // APIC
    13, // PGE
    15, // CMOV
    16, // PAT
    19, // CLFSH
    23, // MMX
    24, // FXSR
    25, // SSE
    26, // SSE2
]);
const ECX_1: u32 = bits(&[
    0,  // SSE3
    9,  // SSSE3
    13, // CMPXCHG16B
    19, // SSE4.1
    20, // SSE4.2
    23, // POPCNT
]);
const EDX_8000_0001: u32 = bits(&[
    11, // SYSCALL
    20, // NX
    27, // RDTSCP
    29, // LM
]);
const ECX_8000_0001: u32 = bits(&[
    0, // LAHF/SAHF in 64-bit mode
]);
const EDX_8000_0007: u32 = bits(&[
    8, // invariant TSC
]);

const VENDOR: &[u8; 12] = b"GenuineIntel";
const BRAND: &[u8; 48] = b"Trapline pinned x86-64 processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const MAX_BASIC: u32 = 7;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// The leaves that are not all zero: (leaf, [eax, ebx, ecx, edx]), sorted. None depends on the subleaf.
const LEAVES: [(u32, [u32; 4]); 9] = [
    // EBX, EDX, ECX spell the vendor: the one leaf whose text is not in register order.
    (0, [MAX_BASIC, le(VENDOR, 0), le(VENDOR, 8), le(VENDOR, 4)]),
    // EBX: CLFLUSH line of 8 quadwords, one logical processor, APIC id 0.
    (1, [SIGNATURE, 1 << 16 | 8 << 8, ECX_1, EDX_1]),
    (0x8000_0000, [MAX_EXTENDED, 0, 0, 0]),
    (0x8000_0001, [0, 0, ECX_8000_0001, EDX_8000_0001]),
    (0x8000_0002, brand(0)),
    (0x8000_0003, brand(16)),
    (0x8000_0004, brand(32)),
    (0x8000_0007, [0, 0, 0, EDX_8000_0007]),
    (0x8000_0008, [VIRTUAL_BITS << 8 | PHYSICAL_BITS, 0, 0, 0]),
];

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < positions.len() {
        mask |= 1 << positions[index];
        index += 1;
    }
    mask
}

const fn le<const N: usize>(text: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]])
}

const fn brand(at: usize) -> [u32; 4] {
    [
        le(BRAND, at),
        le(BRAND, at + 4),
        le(BRAND, at + 8),
        le(BRAND, at + 12),
    ]
}

/// What `cpuid` answers: [eax, ebx, ecx, edx].
///
/// A leaf beyond the largest basic or extended one reads as the largest basic leaf, as Intel
/// processors do (SDM 2A, CPUID: "INPUT EAX = ... exceeds"); here that leaf is all zeros.
pub fn pinned(leaf: u32, _subleaf: u32) -> [u32; 4] {
    match LEAVES.binary_search_by_key(&leaf, |entry| entry.0) {
        Ok(index) => LEAVES[index].1,
        Err(_) => [0; 4],
    }
}

/// Every leaf that exists, zeros included, in order: what an engine that must list them all feeds
/// to its host.
pub fn leaves() -> impl Iterator<Item = (u32, [u32; 4])> {
    (0..=MAX_BASIC)
        .chain(0x8000_0000..=MAX_EXTENDED)
        .map(|leaf| (leaf, pinned(leaf, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_and_brand_spell_themselves() {
        let [max, b, c, d] = pinned(0, 0);
        assert_eq!(max, 7);
        let vendor: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!(vendor, b"GenuineIntel");
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| pinned(leaf, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.starts_with(b"Trapline pinned"));
    }

    #[test]
    fn no_hypervisor_avx_xsave_or_pcid_is_announced() {
        let ecx = pinned(1, 0)[2];
        for bit in [17, 26, 27, 28, 31] {
            assert_eq!(ecx >> bit & 1, 0, "bit {bit}");
        }
    }

    #[test]
    fn unlisted_leaves_are_zero_and_the_table_is_sorted() {
        assert_eq!(pinned(0x4000_0000, 0), [0; 4]);
        assert_eq!(pinned(0xffff_ffff, 3), [0; 4]);
        assert!(LEAVES.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(leaves().count(), 8 + 9);
    }
}
