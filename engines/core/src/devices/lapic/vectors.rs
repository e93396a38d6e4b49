//! A set of 256 vectors in the layout of the local APIC's IRR, ISR and TMR.

/// Eight words of 32 vectors each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vectors([u32; 8]);

impl Vectors {
    pub(super) fn put(&mut self, vector: u8, present: bool) {
        let bit = 1 << (vector % 32);
        let word = &mut self.0[usize::from(vector / 32)];
        *word = if present { *word | bit } else { *word & !bit };
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 32)] >> (vector % 32) & 1 == 1
    }

    pub(super) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some(word as u8 * 32 + 31 - self.0[word].leading_zeros() as u8)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }

    /// Word `index` of 8.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.0[index & 7]
    }
}
