//! Copies to and from guest memory by the runtime, in pieces that other vCPUs see whole.
//!
//! An aligned access of up to 8 bytes is atomic (SDM 3A 8.1.1), and what the runtime does in an
//! instruction's stead must be so too. Copies here move naturally aligned pieces of up to 8 bytes
//! with one instruction each, in rising order. Longer accesses promise nothing as a whole, but no
//! aligned 8 bytes of theirs are torn either.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Size of the next piece, given the guest's address and the bytes that are left.
fn piece(at: usize, left: usize) -> usize {
    let aligned = 1 << at.trailing_zeros().min(3);
    let fits = 1 << left.ilog2().min(3);
    usize::min(aligned, fits)
}

/// Writes `bytes` to guest memory at `to`.
///
/// # Safety
/// `to` leads to as many bytes of guest memory, which nobody borrows.
pub(crate) unsafe fn write(to: *mut u8, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        // SAFETY: within the caller's range, and aligned, as `piece` says.
        unsafe {
            let at = to.add(done);
            let from = bytes.as_ptr().add(done);
            let size = piece(at as usize, bytes.len() - done);
            match size {
                8 => (*at.cast::<AtomicU64>())
                    .store(from.cast::<u64>().read_unaligned(), Ordering::Relaxed),
                4 => (*at.cast::<AtomicU32>())
                    .store(from.cast::<u32>().read_unaligned(), Ordering::Relaxed),
                2 => (*at.cast::<AtomicU16>())
                    .store(from.cast::<u16>().read_unaligned(), Ordering::Relaxed),
                _ => (*at.cast::<AtomicU8>()).store(from.read(), Ordering::Relaxed),
            }
            done += size;
        }
    }
}

/// Reads guest memory at `from` into `bytes`.
///
/// # Safety
/// As [`write()`].
pub(crate) unsafe fn read(from: *const u8, bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let words = if (from as usize + done).is_multiple_of(8) {
            (bytes.len() - done) / 8
        } else {
            0
        };
        for _ in 0..words {
            // SAFETY: within the caller's range, and aligned.
            unsafe {
                bytes
                    .as_mut_ptr()
                    .add(done)
                    .cast::<u64>()
                    .write_unaligned((*from.add(done).cast::<AtomicU64>()).load(Ordering::Relaxed));
            }
            done += 8;
        }
        if done == bytes.len() {
            return;
        }
        // SAFETY: within the caller's range, and aligned, as `piece` says.
        unsafe {
            let at = from.add(done);
            let to = bytes.as_mut_ptr().add(done);
            let size = piece(at as usize, bytes.len() - done);
            match size {
                8 => to
                    .cast::<u64>()
                    .write_unaligned((*at.cast::<AtomicU64>()).load(Ordering::Relaxed)),
                4 => to
                    .cast::<u32>()
                    .write_unaligned((*at.cast::<AtomicU32>()).load(Ordering::Relaxed)),
                2 => to
                    .cast::<u16>()
                    .write_unaligned((*at.cast::<AtomicU16>()).load(Ordering::Relaxed)),
                _ => to.write((*at.cast::<AtomicU8>()).load(Ordering::Relaxed)),
            }
            done += size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_arrive_whole_at_every_offset_and_length() {
        let source: Vec<u8> = (1..=64).collect();
        let mut memory = [0u64; 16];
        let base = memory.as_mut_ptr().cast::<u8>();
        for offset in 0..8 {
            for length in 0..=64 {
                memory = [0; 16];
                let mut back = vec![0; length];
                // SAFETY: 8 + 64 bytes of 128.
                unsafe {
                    write(base.add(offset), &source[..length]);
                    read(base.add(offset), &mut back);
                }
                assert_eq!(back, source[..length]);
                let written: usize = memory
                    .iter()
                    .map(|word| 8 - word.to_le_bytes().iter().filter(|&&byte| byte == 0).count())
                    .sum();
                assert_eq!(written, length);
            }
        }
    }

    #[test]
    fn aligned_words_are_single_pieces() {
        assert_eq!(piece(0x1000, 8), 8);
        assert_eq!(piece(0x1004, 8), 4);
        assert_eq!(piece(0x1000, 7), 4);
        assert_eq!(piece(0x1001, 8), 1);
        assert_eq!(piece(0x1002, 3), 2);
    }
}
