//! IDENTIFY DEVICE (ATA/ATAPI-6 8.15): 256 words about the disk.

use super::command::MOST_MULTIPLE;
use super::{Ata, Geometry};
use crate::storage::SECTOR;

/// Write cache, in words 82 and 85.
const WRITE_CACHE: u16 = 1 << 5;
/// FLUSH CACHE EXT, FLUSH CACHE and 48-bit addresses, in words 83 and 86.
const FLUSH_AND_WIDE: u16 = 1 << 13 | 1 << 12 | 1 << 10;
/// What makes words 83, 84 and 87 valid.
const VALID: u16 = 1 << 14;

impl Ata {
    /// The disk's answer.
    pub(super) fn identify(&self) -> [u8; SECTOR as usize] {
        let sectors = self.storage.sectors();
        let native = Geometry::of(sectors);
        let Geometry {
            cylinders,
            heads,
            sectors: track,
        } = self.geometry;
        let mut words = [0u16; 256];
        words[0] = 1 << 6; // fixed
        words[1] = native.cylinders;
        words[3] = native.heads.into();
        words[6] = native.sectors.into();
        text(&mut words[10..20], self.storage.id());
        text(&mut words[23..27], "1");
        text(&mut words[27..47], "TRAPLINE DISK");
        words[47] = 0x8000 | u16::from(MOST_MULTIPLE);
        words[48] = 1; // 32-bit accesses to the data register
        words[49] = 1 << 11 | 1 << 9; // IORDY, LBA; no DMA
        words[50] = VALID;
        words[51] = 2 << 8; // PIO mode 2
        words[53] = 0b11; // words 54 to 58 and 64 to 70 are valid
        words[54] = cylinders;
        words[55] = heads.into();
        words[56] = track.into();
        let current = u32::from(cylinders) * u32::from(heads) * u32::from(track);
        put(&mut words[57..59], current.into());
        if self.multiple != 0 {
            words[59] = 1 << 8 | u16::from(self.multiple);
        }
        put(&mut words[60..62], sectors.min(0x0fff_ffff));
        words[64] = 0b11; // PIO modes 3 and 4
        words[67] = 120; // ns per cycle, without and with IORDY
        words[68] = 120;
        words[80] = 0b111_0000; // ATA/ATAPI-4 to 6
        words[82] = WRITE_CACHE;
        words[83] = VALID | FLUSH_AND_WIDE;
        words[84] = VALID;
        words[85] = if self.write_cache { WRITE_CACHE } else { 0 };
        words[86] = FLUSH_AND_WIDE;
        words[87] = VALID;
        words[93] = VALID | 1 << 13 | 1; // device 0, alone
        put(&mut words[100..104], sectors);

        let mut bytes = [0; SECTOR as usize];
        for (to, word) in bytes.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        // Word 255: a signature, and what makes all bytes add up to zero.
        bytes[510] = 0xa5;
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        bytes[511] = 0u8.wrapping_sub(sum);
        bytes
    }
}

/// A number, its low word first.
fn put(words: &mut [u16], value: u64) {
    for (index, word) in words.iter_mut().enumerate() {
        *word = (value >> (16 * index)) as u16;
    }
}

/// Text, padded with spaces; the first character of each pair is the high byte.
fn text(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().filter(|byte| (0x20..0x7f).contains(byte));
    for word in words {
        let mut next = || u16::from(bytes.next().unwrap_or(b' '));
        *word = next() << 8 | next();
    }
}
