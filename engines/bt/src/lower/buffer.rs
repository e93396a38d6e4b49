//! Where a block's bytes are put together. An assembler of this crate's own: it has room for any block, so what
//! writes a byte asks for no more, and is inlined where one is written.
//!
//! Invariant: what doesn't fit is counted and otherwise lost; [`Buffer::fits`] says so.

use dynasmrt::{AssemblyOffset, DynasmApi};

/// A power of two, so that every index can be made to fit.
const ROOM: usize = 64 << 10;

/// Bytes of code, without labels.
pub(crate) struct Buffer {
    bytes: Box<[u8; ROOM]>,
    length: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        let bytes = vec![0; ROOM].into_boxed_slice();
        Buffer {
            bytes: bytes.try_into().expect("as long as it was made"),
            length: 0,
        }
    }
}

impl Buffer {
    pub(super) fn clear(&mut self) {
        self.length = 0;
    }

    /// Nothing is lost.
    pub(super) fn fits(&self) -> bool {
        self.length <= ROOM
    }

    /// What there is.
    pub(crate) fn code(&self) -> &[u8] {
        &self.bytes[..self.length.min(ROOM)]
    }

    #[inline]
    pub(super) fn length(&self) -> usize {
        self.length
    }

    #[inline]
    pub(super) fn array<const N: usize>(&mut self, bytes: [u8; N]) {
        if let Some(place) = self.bytes.get_mut(self.length..self.length + N) {
            place.copy_from_slice(&bytes);
        }
        self.length += N;
    }

    pub(super) fn slice(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if let Some(place) = self.bytes.get_mut(self.length..end) {
            place.copy_from_slice(bytes);
        }
        self.length = end;
    }

    /// Changes bytes that are there.
    pub(super) fn patch<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        if let Some(place) = self.bytes.get_mut(at..at + N) {
            place.copy_from_slice(&bytes);
        }
    }
}

impl Extend<u8> for Buffer {
    #[inline]
    fn extend<T: IntoIterator<Item = u8>>(&mut self, bytes: T) {
        bytes.into_iter().for_each(|byte| self.push(byte));
    }
}

impl<'a> Extend<&'a u8> for Buffer {
    #[inline]
    fn extend<T: IntoIterator<Item = &'a u8>>(&mut self, bytes: T) {
        bytes.into_iter().for_each(|&byte| self.push(byte));
    }
}

impl DynasmApi for Buffer {
    #[inline]
    fn offset(&self) -> AssemblyOffset {
        AssemblyOffset(self.length)
    }

    #[inline]
    fn push(&mut self, byte: u8) {
        self.bytes[self.length % ROOM] = byte;
        self.length += 1;
    }

    #[inline]
    fn push_i32(&mut self, value: i32) {
        self.array(value.to_le_bytes());
    }

    #[inline]
    fn push_u32(&mut self, value: u32) {
        self.array(value.to_le_bytes());
    }

    #[inline]
    fn push_i64(&mut self, value: i64) {
        self.array(value.to_le_bytes());
    }

    #[inline]
    fn push_u64(&mut self, value: u64) {
        self.array(value.to_le_bytes());
    }

    fn align(&mut self, alignment: usize, with: u8) {
        while !self.length.is_multiple_of(alignment) {
            self.push(with);
        }
    }
}
