//! Where a block's bytes are put together. An assembler of this crate's own, so that what writes a byte is
//! inlined where one is written.

use dynasmrt::{AssemblyOffset, DynasmApi};

/// Bytes of code, without labels.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    pub ops: Vec<u8>,
}

impl Extend<u8> for Buffer {
    #[inline]
    fn extend<T: IntoIterator<Item = u8>>(&mut self, bytes: T) {
        self.ops.extend(bytes);
    }
}

impl<'a> Extend<&'a u8> for Buffer {
    #[inline]
    fn extend<T: IntoIterator<Item = &'a u8>>(&mut self, bytes: T) {
        self.ops.extend(bytes);
    }
}

impl DynasmApi for Buffer {
    #[inline]
    fn offset(&self) -> AssemblyOffset {
        AssemblyOffset(self.ops.len())
    }

    #[inline]
    fn push(&mut self, byte: u8) {
        self.ops.push(byte);
    }

    fn align(&mut self, alignment: usize, with: u8) {
        let end = self.ops.len().next_multiple_of(alignment);
        self.ops.resize(end, with);
    }
}
