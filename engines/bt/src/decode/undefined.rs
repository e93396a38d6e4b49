//! Bytes that are no instruction: whether they are too long, and how many of them matter.
//!
//! The decoder says of all of them that they are none. What a processor raises differs: #GP for more
//! than 15 bytes, whatever else is wrong (SDM 2A 2.3.11); a page fault if it needs bytes that can't be
//! fetched; #UD for the rest, as soon as that is clear.

use iced_x86::{Decoder, DecoderError};

use super::OPTIONS;

const LONGEST: usize = 15;

/// True if the instruction at the start of `bytes`, which is none, has more than 15 bytes.
///
/// Most prefixes do nothing but make it longer: those that are repeated, segments, and LOCK, with which it is
/// none. It is looked at without them, and so ends within what the decoder is ready to read.
pub(super) fn too_long(bytes: &[u8], width: u32) -> bool {
    let Some(bytes) = bytes.first_chunk::<LONGEST>() else {
        return false;
    };
    let rex = |byte: u8| width == 64 && byte & 0xf0 == 0x40;
    let idle = |byte: u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0);
    let prefix = |byte: u8| idle(byte) || rex(byte) || matches!(byte, 0x66 | 0x67 | 0xf2 | 0xf3);
    let count = bytes.iter().take_while(|&&byte| prefix(byte)).count();
    if count == LONGEST {
        return true;
    }
    let (prefixes, rest) = bytes.split_at(count);
    let matters = |at: usize| match prefixes[at] {
        byte if idle(byte) => false,
        // Only right before the opcode.
        byte if rex(byte) => at + 1 == count,
        byte => !prefixes[at + 1..].contains(&byte),
    };
    let mut shorter: Vec<u8> = (0..count)
        .filter(|&at| matters(at))
        .map(|at| prefixes[at])
        .collect();
    shorter.extend(rest);
    let mut decoder = Decoder::new(width, &shorter, OPTIONS);
    let invalid = decoder.decode().is_invalid();
    invalid && decoder.last_error() == DecoderError::NoMoreBytes && !hopeless(&shorter, width)
}

/// True if no byte behind `bytes`, which end too early for an instruction, makes a difference: they
/// begin none, and no more is fetched. The decoder asks for a ModRM byte even behind opcodes that are
/// undefined.
pub(super) fn hopeless(bytes: &[u8], width: u32) -> bool {
    let mut longer = [bytes, &[0]].concat();
    (0..=u8::MAX).all(|next| {
        longer[bytes.len()] = next;
        let mut decoder = Decoder::new(width, &longer, OPTIONS);
        decoder.decode().is_invalid() && decoder.last_error() != DecoderError::NoMoreBytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_more_than_15_bytes_end_is_too_long_whatever_else_is_wrong() {
        // lock mov rax, moffs64 behind two segments and two REX; the same, a byte shorter.
        let sixteen = b"\x65\xf3\x66\xf0\x64\x4d\x4b\xa1\x01\x02\x03\x04\x05\x06\x07\x08";
        assert!(too_long(sixteen, 64));
        assert!(!too_long(&[&sixteen[1..], b"\x90"].concat(), 64));
        // lock and a segment before mov dword [rax + rcx + disp32], imm32 with all other prefixes.
        let long = b"\xf0\x65\xf2\x66\x67\x48\xc7\x84\x08\x01\x02\x03\x04\x05\x06\x07\x08";
        assert!(too_long(long, 64) && too_long(&long[1..], 64));
        assert!(!too_long(&long[2..], 64));
        // Nothing that begins so is an instruction.
        assert!(!too_long(b"\x65\xf0\x66\x67\xf2\xf3\x06aaaaaaaaaa", 64));
    }

    #[test]
    fn a_prefix_of_an_instruction_is_never_hopeless() {
        // mov rax, imm64; vmovapd ymm4, ymm8; an AES round; vgatherdpd; fstp; cmpxchg16b.
        for whole in [
            &b"\x48\xb8\x01\x02\x03\x04\x05\x06\x07\x08"[..],
            b"\xc4\xc1\x7d\x28\xe0",
            b"\x66\x0f\x38\xdc\xc1",
            b"\xc4\xe2\xdd\x92\x04\x0a",
            b"\x66\x2e\xdb\xbc\x24\x01\x00\x00\x00",
            b"\xf0\x48\x0f\xc7\x0e",
        ] {
            for length in 1..whole.len() {
                assert!(!hopeless(&whole[..length], 64), "{:x?}", &whole[..length]);
            }
        }
        assert!(hopeless(b"\x06", 64) && !hopeless(b"\x06", 32));
        assert!(hopeless(b"\x0f\x04", 64));
    }
}
