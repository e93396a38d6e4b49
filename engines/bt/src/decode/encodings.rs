//! Machine code for tests: nearly every instruction there is.

/// Every opcode of every map with most ModRM bytes, some SIB bytes and immediates, under the prefixes
/// that change what they are.
pub(crate) fn every(mut visit: impl FnMut(&[u8])) {
    const PREFIXES: [&[u8]; 11] = [
        b"",
        b"\x66",
        b"\xf2",
        b"\xf3",
        b"\x48",
        b"\x41",
        b"\x44",
        b"\x4f",
        b"\x66\x48",
        b"\xf0",
        b"\x67",
    ];
    const MAPS: [&[u8]; 4] = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"];
    const TAILS: [[u8; 9]; 3] = [
        [0x24, 0, 0, 0, 0, 0, 0, 0, 0],
        [0x8b, 0x21, 0x25, 0x27, 0x29, 1, 2, 3, 4],
        [0xe5, 1, 9, 17, 1, 1, 1, 1, 1],
    ];
    let mut bytes = Vec::new();
    let mut visit = |head: &[&[u8]], opcode: u8, modrm: u8, tail: &[u8]| {
        bytes.clear();
        head.iter().for_each(|part| bytes.extend_from_slice(part));
        bytes.extend([opcode, modrm]);
        bytes.extend_from_slice(tail);
        visit(&bytes);
    };
    for opcode in 0..=u8::MAX {
        for modrm in (0..=u8::MAX).filter(|modrm| modrm % 8 != 1 && modrm % 4 != 2) {
            for (prefix, map) in PREFIXES
                .iter()
                .flat_map(|prefix| MAPS.map(|map| (prefix, map)))
            {
                for tail in &TAILS {
                    visit(&[prefix, map], opcode, modrm, tail);
                }
            }
            for (map, last) in (1..=3u8).flat_map(|map| (0..=7u8).map(move |last| (map, last))) {
                for first in [0xe0, 0x40] {
                    let vex = [0xc4, first | map, 0x78 & !(last << 3) | last];
                    visit(&[&vex], opcode, modrm, &TAILS[1]);
                }
            }
        }
    }
}
