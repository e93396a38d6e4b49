//! What tells the processors of one machine apart: ids, counts and shared caches (SDM 2A, CPUID,
//! leaves 1, 4 and 0xb). A processor that is alone says none of it.

use super::bits;

/// Which of a machine's processors one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, which is its local APIC's id.
    pub id: u8,
    /// How many there are.
    pub count: u8,
}

/// EDX of leaf 1: EBX counts logical processors (HTT).
const EDX_1_SEVERAL: u32 = bits(&[28]);
/// Leaf 4 of a processor that is one of several: caches of 64-byte lines as (EAX, EBX, ECX), each a
/// core's own but for the last.
const CACHES: [(u32, u32, u32); 4] = [
    // L1 data and L1 instruction: 32 KiB in 8 ways of 64 sets.
    (1 << 8 | 1 << 5 | 1, 7 << 22 | 63, 63),
    (1 << 8 | 1 << 5 | 2, 7 << 22 | 63, 63),
    // L2: 1 MiB in 16 ways of 1024 sets. L3: 16 MiB in 16 ways of 16384 sets.
    (1 << 8 | 2 << 5 | 3, 15 << 22 | 63, 1023),
    (1 << 8 | 3 << 5 | 3, 15 << 22 | 63, 16383),
];

impl Place {
    /// The one processor of a machine.
    pub const SOLE: Place = Place { id: 0, count: 1 };

    /// The processors of a machine of `count`, in order.
    pub fn all(count: u8) -> impl Iterator<Item = Place> {
        (0..count).map(move |id| Place { id, count })
    }

    /// Bits of an id that tell the cores of the package apart.
    fn id_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }

    /// Puts in what only this processor answers.
    pub(super) fn adapt(self, leaf: u32, subleaf: u32, registers: &mut [u32; 4]) {
        let (id, count) = (u32::from(self.id), u32::from(self.count));
        if count == 1 {
            // Nothing to tell apart: the table's own answers.
            return;
        }
        match leaf {
            1 => {
                registers[1] = registers[1] & 0xffff | count << 16 | id << 24;
                registers[3] |= EDX_1_SEVERAL;
            }
            4 => {
                // Bits 31:26: ids of cores in the package; 25:14: of those that share the cache.
                let ids = (1 << self.id_bits()) - 1;
                let cache = CACHES.get(subleaf as usize);
                *registers = cache.map_or([0; 4], |&(eax, ebx, ecx)| {
                    let shared = if eax >> 5 & 7 == 3 { ids } else { 0 };
                    [eax | ids << 26 | shared << 14, ebx, ecx, 0]
                });
            }
            0xb => {
                let (shift, number, kind) = match subleaf {
                    0 => (0, 1, 1 << 8),
                    1 => (self.id_bits(), count, 2 << 8),
                    _ => (0, 0, 0),
                };
                *registers = [shift, number, kind | subleaf & 0xff, id];
            }
            _ => {}
        }
    }
}

/// Subleaves of the leaves that [`Place`] makes.
pub(super) const TOPOLOGY: [(u32, u32); 2] = [(4, CACHES.len() as u32 + 1), (0xb, 3)];

#[cfg(test)]
mod tests {
    use super::super::{Leaf, leaves, pinned, with_state};
    use super::*;

    #[test]
    fn processors_of_a_machine_differ_in_their_ids_alone() {
        let of = |id, leaf, subleaf| with_state(Place { id, count: 6 }, leaf, subleaf, false, 1);
        assert_eq!(of(5, 1, 0)[1], 5 << 24 | 6 << 16 | 8 << 8);
        assert_eq!(of(5, 1, 0)[3] >> 28 & 1, 1);
        assert_eq!(of(5, 0xb, 0), [0, 1, 1 << 8, 5]);
        assert_eq!(of(5, 0xb, 1), [3, 6, 2 << 8 | 1, 5]);
        assert_eq!(of(5, 0xb, 2), [0, 0, 2, 5]);
        assert_eq!(of(0, 4, 3)[0], 7 << 26 | 7 << 14 | 1 << 8 | 3 << 5 | 3);
        assert_eq!(of(0, 4, 4), [0; 4]);
        assert_eq!(of(3, 7, 0), pinned(7, 0));
        for leaf in [1, 4, 0xb] {
            assert_eq!(with_state(Place::SOLE, leaf, 0, false, 1), pinned(leaf, 0));
        }
        let listed: Vec<Leaf> = leaves(Place { id: 5, count: 6 }).collect();
        assert_eq!(listed.len(), 14 + 9 + 3 + 4 + 2);
        for entry in listed.iter().filter(|entry| entry.leaf != 0xd) {
            let subleaf = entry.subleaf.unwrap_or(0);
            assert_eq!(entry.registers, of(5, entry.leaf, subleaf), "{entry:?}");
        }
    }
}
