//! The guest's CPUID, pinned: the same leaves in every mode, and on every host that can do as much.
//!
//! A translator's block counts and a guest's choice of code path depend on what CPUID says, so it
//! is a constant here. The model is an x86-64 processor with everything of x86-64-v3: SSE to
//! SSE4.2, AVX, AVX2, FMA, F16C, BMI, LZCNT, MOVBE, XSAVE, and with AES, PCLMULQDQ, SHA, ADX,
//! RDRAND, FSGSBASE, PCID, SMEP, SMAP, UMIP, PKU, 1 GiB pages, x2APIC, TSC-deadline and an invariant TSC.
//! It has no AVX-512, MTRRs or machine checks, and no hypervisor bit: an `unaware`
//! guest is not told.
//!
//! Instructions run as themselves in every mode, so one that the host lacks can't be announced: a
//! bit of [`HOSTED`] is there if the host has it too. Whoever compares runs of two hosts compares
//! [`pinned`] first.
//!
//! Processors of one machine differ in their id alone, which [`Place`] adds: they are cores of one
//! package, with one thread each.
//!
//! Layout of the leaves: SDM 2A, CPUID, tables 3-8 and following; APM 3 appendix E for 0x8000_xxxx.

mod topology;

use std::sync::OnceLock;

pub use topology::Place;
use topology::TOPOLOGY;

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
    11, // SEP
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
    17, // PCID
    19, // SSE4.1
    20, // SSE4.2
    21, // x2APIC
    23, // POPCNT
    24, // TSC-deadline
]);
/// Where the host has them too.
const ECX_1_HOSTED: u32 = bits(&[
    1,  // PCLMULQDQ
    12, // FMA
    22, // MOVBE
    25, // AES
    26, // XSAVE
    28, // AVX
    29, // F16C
    30, // RDRAND
]);
const EBX_7: u32 = bits(&[
    0,  // FSGSBASE
    1,  // IA32_TSC_ADJUST
    7,  // SMEP
    9,  // ERMS
    10, // INVPCID
    20, // SMAP
]);
const EBX_7_HOSTED: u32 = bits(&[
    3,  // BMI1
    5,  // AVX2
    6,  // x87 data pointer changes with exceptions alone
    8,  // BMI2
    13, // no FCS and FDS
    18, // RDSEED
    19, // ADX
    23, // CLFLUSHOPT
    24, // CLWB
    29, // SHA
]);
const ECX_7: u32 = bits(&[
    2,  // UMIP
    3,  // PKU
    22, // RDPID
]);
const ECX_7_HOSTED: u32 = bits(&[
    8,  // GFNI
    9,  // VAES
    10, // VPCLMULQDQ
]);
const EDX_7: u32 = bits(&[
    4, // FSRM
]);
/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1. All of them are executed by the VMM.
const EAX_D_1: u32 = bits(&[0, 1, 2]);
/// x87, SSE, AVX and PKRU state.
const XCR0: u32 = 7 | XCR0_PKRU;
const XCR0_AVX: u32 = 1 << 2;
const XCR0_PKRU: u32 = 1 << 9;
/// Size and place of the AVX state in an XSAVE area; without it the area ends there.
const AVX_BYTES: u32 = 256;
const AVX_AT: u32 = 576;
/// As much for PKRU. Where the host has it at all, its place is the host's: the instructions run as
/// themselves under KVM.
const PKRU_BYTES: u32 = 8;
const PKRU_AT: u32 = 2688;
/// The features of leaf 1's ECX whose MSRs the machine keeps: x2APIC and TSC-deadline.
pub const MACHINE_MSRS: u32 = bits(&[21, 24]);
const EDX_8000_0001: u32 = bits(&[
    11, // SYSCALL
    20, // NX
    26, // 1 GiB pages
    27, // RDTSCP
    29, // LM
]);
const ECX_8000_0001: u32 = bits(&[
    0, // LAHF/SAHF in 64-bit mode
]);
const ECX_8000_0001_HOSTED: u32 = bits(&[
    5, // LZCNT
    8, // PREFETCHW
]);
const EDX_8000_0007: u32 = bits(&[
    8, // invariant TSC
]);

/// Features of paging and privilege, [eax, ebx, ecx, edx] of leaf and subleaf 0: no instruction of
/// the host's stands behind them but its virtualization, where an engine uses that. A host that
/// can't virtualize one of them can't have it announced.
pub const VIRTUALIZED: [(u32, [u32; 4]); 4] = [
    (1, [0, 0, bits(&[17]), bits(&[11])]),
    (7, [0, bits(&[0, 1, 7, 10, 20]), bits(&[2, 3]), 0]),
    (0xd, [XCR0_PKRU, 0, 0, 0]),
    (0x8000_0001, [0, 0, 0, bits(&[26])]),
];

const VENDOR: &[u8; 12] = b"GenuineIntel";
const BRAND: &[u8; 48] = b"Trapline pinned x86-64 processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// One leaf, or one subleaf of a leaf that has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub leaf: u32,
    /// ECX, where it matters.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

/// The leaves that are not all zero, in order: leaf, subleaf, and what is there on every host.
const LEAVES: [(u32, Option<u32>, [u32; 4]); 14] = [
    // EBX, EDX, ECX spell the vendor: the one leaf whose text is not in register order.
    (
        0,
        None,
        [MAX_BASIC, le(VENDOR, 0), le(VENDOR, 8), le(VENDOR, 4)],
    ),
    // EBX: CLFLUSH line of 8 quadwords, one logical processor, APIC id 0.
    (1, None, [SIGNATURE, 1 << 16 | 8 << 8, ECX_1, EDX_1]),
    (7, Some(0), [0, EBX_7, ECX_7, EDX_7]),
    // As after reset, with x87 state alone: `with_state` knows better.
    (0xd, Some(0), [0, AVX_AT, 0, 0]),
    (0xd, Some(1), [0, AVX_AT, 0, 0]),
    (0xd, Some(2), [0; 4]),
    (0xd, Some(9), [0; 4]),
    (0x8000_0000, None, [MAX_EXTENDED, 0, 0, 0]),
    (0x8000_0001, None, [0, 0, ECX_8000_0001, EDX_8000_0001]),
    (0x8000_0002, None, brand(0)),
    (0x8000_0003, None, brand(16)),
    (0x8000_0004, None, brand(32)),
    (0x8000_0007, None, [0, 0, 0, EDX_8000_0007]),
    (
        0x8000_0008,
        None,
        [VIRTUAL_BITS << 8 | PHYSICAL_BITS, 0, 0, 0],
    ),
];

/// What a leaf has besides, if the host has it too.
const HOSTED: [(u32, [u32; 4]); 3] = [
    (1, [0, 0, ECX_1_HOSTED, 0]),
    (7, [0, EBX_7_HOSTED, ECX_7_HOSTED, 0]),
    (0x8000_0001, [0, 0, ECX_8000_0001_HOSTED, 0]),
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

/// `cpuid` of the host: [eax, ebx, ecx, edx], zeros beyond its last leaf.
fn host(leaf: u32) -> [u32; 4] {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(leaf & 0x8000_0000).eax < leaf {
        return [0; 4];
    }
    let answer = __cpuid_count(leaf, 0);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// Where PKRU lies in an XSAVE area that is not compacted.
pub fn pkru_at() -> u32 {
    if host(0xd)[0] & XCR0_PKRU == 0 {
        PKRU_AT
    } else {
        std::arch::x86_64::__cpuid_count(0xd, 9).ebx
    }
}

/// Bytes of an XSAVE area for the components in `features`, as bits: as they lie, or compacted.
pub fn xsave_bytes(features: u64, compacted: bool) -> u32 {
    let avx = features & u64::from(XCR0_AVX) != 0;
    let end = AVX_AT + if avx { AVX_BYTES } else { 0 };
    match (features & u64::from(XCR0_PKRU) != 0, compacted) {
        (false, _) => end,
        (true, true) => end + PKRU_BYTES,
        (true, false) => pkru_at() + PKRU_BYTES,
    }
}

fn table() -> &'static [Leaf] {
    static TABLE: OnceLock<Vec<Leaf>> = OnceLock::new();
    TABLE.get_or_init(|| {
        const AVX: u32 = 1 << 28;
        const XSAVE: u32 = 1 << 26;
        // XSAVE means that the host's kernel has to have enabled it.
        let usable = std::arch::is_x86_feature_detected!("avx");
        let [_, _, ecx_1, _] = host(1);
        let avx = usable && ecx_1 & (AVX | XSAVE) == AVX | XSAVE;
        let mut table: Vec<Leaf> = LEAVES
            .iter()
            .map(|&(leaf, subleaf, registers)| Leaf {
                leaf,
                subleaf,
                registers,
            })
            .collect();
        for entry in &mut table {
            let more = HOSTED.iter().find(|(leaf, _)| *leaf == entry.leaf);
            if let Some((leaf, more)) = more {
                let has = host(*leaf);
                for ((register, more), has) in entry.registers.iter_mut().zip(more).zip(has) {
                    *register |= more & has;
                }
            }
            if !avx {
                // Whatever is encoded with VEX, and the state it needs, goes together.
                const FMA_XSAVE_AVX_F16C: u32 = bits(&[12, 26, 28, 29]);
                const BMI1_AVX2_BMI2: u32 = bits(&[3, 5, 8]);
                const VAES_VPCLMULQDQ: u32 = bits(&[9, 10]);
                match (entry.leaf, entry.subleaf) {
                    (1, _) => entry.registers[2] &= !FMA_XSAVE_AVX_F16C,
                    (7, _) => {
                        entry.registers[1] &= !BMI1_AVX2_BMI2;
                        entry.registers[2] &= !VAES_VPCLMULQDQ;
                    }
                    (0xd, _) => entry.registers = [0; 4],
                    (_, _) => {}
                }
            } else {
                match (entry.leaf, entry.subleaf) {
                    (0xd, Some(0)) => {
                        entry.registers = [XCR0, AVX_AT, pkru_at() + PKRU_BYTES, 0];
                    }
                    (0xd, Some(1)) => entry.registers = [EAX_D_1, AVX_AT, 0, 0],
                    (0xd, Some(9)) => entry.registers = [PKRU_BYTES, pkru_at(), 0, 0],
                    (0xd, _) => entry.registers = [AVX_BYTES, AVX_AT, 0, 0],
                    (_, _) => {}
                }
            }
        }
        table
    })
}

/// What `cpuid` answers after reset: [eax, ebx, ecx, edx].
///
/// A leaf beyond the largest basic or extended one reads as the largest basic leaf, as Intel
/// processors do (SDM 2A, CPUID: "INPUT EAX = ... exceeds").
pub fn pinned(leaf: u32, subleaf: u32) -> [u32; 4] {
    let leaf = match leaf {
        0..=MAX_BASIC | 0x8000_0000..=MAX_EXTENDED => leaf,
        _ => MAX_BASIC,
    };
    let found = table()
        .iter()
        .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|index| index == subleaf));
    found.map_or([0; 4], |entry| entry.registers)
}

/// As [`pinned`], with what follows from a processor's place among others and its state: CR4.OSXSAVE shows in leaf 1 and XCR0
/// in the sizes of leaf 0xd (SDM 1 13.2).
pub fn with_state(place: Place, leaf: u32, subleaf: u32, osxsave: bool, xcr0: u64) -> [u32; 4] {
    let mut registers = pinned(leaf, subleaf);
    place.adapt(leaf, subleaf, &mut registers);
    match (leaf, subleaf) {
        (1, _) => registers[2] |= u32::from(osxsave) << 27,
        (0..=0xc | 0x8000_0000..=MAX_EXTENDED, _) => {}
        (_, 0 | 1) if registers != [0; 4] => registers[1] = xsave_bytes(xcr0, subleaf == 1),
        (_, _) => {}
    }
    registers
}

/// Every leaf that the processor at `place` has, zeros included, in order: what an engine that must
/// list them all feeds to its host.
pub fn leaves(place: Place) -> impl Iterator<Item = Leaf> {
    (0..=MAX_BASIC)
        .chain(0x8000_0000..=MAX_EXTENDED)
        .flat_map(move |leaf| {
            let topology = TOPOLOGY.iter().find(|(topology, _)| *topology == leaf);
            if let Some(&(_, subleaves)) = topology.filter(|_| place.count > 1) {
                return (0..subleaves)
                    .map(|subleaf| Leaf {
                        leaf,
                        subleaf: Some(subleaf),
                        registers: with_state(place, leaf, subleaf, false, 0),
                    })
                    .collect();
            }
            let mut listed: Vec<Leaf> = table()
                .iter()
                .copied()
                .filter(|entry| entry.leaf == leaf)
                .collect();
            for entry in &mut listed {
                place.adapt(leaf, entry.subleaf.unwrap_or(0), &mut entry.registers);
            }
            if listed.is_empty() {
                vec![Leaf {
                    leaf,
                    subleaf: None,
                    registers: [0; 4],
                }]
            } else {
                listed
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_and_brand_spell_themselves() {
        let [max, b, c, d] = pinned(0, 0);
        assert_eq!(max, MAX_BASIC);
        let vendor: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!(vendor, b"GenuineIntel");
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| pinned(leaf, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.starts_with(b"Trapline pinned"));
    }

    #[test]
    fn no_hypervisor_bit_and_no_osxsave_is_announced() {
        let ecx = pinned(1, 0)[2];
        for bit in [27, 31] {
            assert_eq!(ecx >> bit & 1, 0, "bit {bit}");
        }
    }

    #[test]
    fn no_avx_512_is_announced_and_nothing_the_host_lacks() {
        let [_, ebx, _, _] = pinned(7, 0);
        for bit in [16, 17, 21, 26, 27, 28, 30, 31] {
            assert_eq!(ebx >> bit & 1, 0, "bit {bit}");
        }
        assert_eq!(pinned(7, 1), [0; 4]);
        for (leaf, more) in HOSTED {
            let announced = pinned(leaf, 0);
            for ((announced, more), has) in announced.iter().zip(more).zip(host(leaf)) {
                assert_eq!(announced & more & !has, 0);
            }
        }
    }

    #[test]
    fn avx_comes_with_the_state_that_it_needs() {
        let ecx = pinned(1, 0)[2];
        let (xsave, avx) = (ecx >> 26 & 1, ecx >> 28 & 1);
        assert_eq!(xsave, avx);
        assert_eq!(pinned(0xd, 0)[0], 0x207 * avx);
        assert_eq!(with_state(Place::SOLE, 1, 0, true, 7)[2] >> 27 & 1, 1);
        if avx == 1 {
            assert_eq!(with_state(Place::SOLE, 0xd, 0, true, 7)[1], 832);
            assert_eq!(with_state(Place::SOLE, 0xd, 0, true, 3)[1], 576);
            // What there can be at most is what there is with all of it.
            let [size, at, _, _] = pinned(0xd, 9);
            assert_eq!((size, at), (8, pkru_at()));
            let most = pinned(0xd, 0)[2];
            assert_eq!(most, at + size);
            assert_eq!(with_state(Place::SOLE, 0xd, 0, true, 0x207)[1], most);
            assert_eq!(with_state(Place::SOLE, 0xd, 1, true, 0x207)[1], 840);
            assert_eq!(with_state(Place::SOLE, 0xd, 1, true, 0x203)[1], 584);
        }
    }

    #[test]
    fn unlisted_leaves_are_zero_and_the_table_is_sorted() {
        assert_eq!(pinned(2, 0), [0; 4]);
        // Beyond the last: as the last basic one.
        assert_eq!(pinned(0x4000_0000, 0), pinned(MAX_BASIC, 0));
        assert_eq!(pinned(0xffff_ffff, 3), [0; 4]);
        assert!(
            LEAVES
                .windows(2)
                .all(|pair| (pair[0].0, pair[0].1) < (pair[1].0, pair[1].1))
        );
        assert_eq!(leaves(Place::SOLE).count(), 14 + 9 + 3);
    }
}
