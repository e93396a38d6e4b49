//! Bytes that are no instruction: whether they are too long, and how many of them matter.
//!
//! The decoder says of all of them that they are none. What a processor raises differs: #GP for more
//! than 15 bytes, whatever else is wrong (SDM 2A 2.3.11); a page fault if it needs bytes that can't be
//! fetched; #UD for the rest, as soon as that is clear.

use iced_x86::{Decoder, DecoderError};

use super::OPTIONS;

/// Bytes of the longest instruction.
pub(super) const LONGEST: usize = 15;

/// True if the instruction at the start of `bytes`, which is none, has more than 15 bytes.
pub(super) fn too_long(bytes: &[u8], width: u32) -> bool {
    bytes
        .first_chunk::<LONGEST>()
        .is_some_and(|bytes| ends_behind(bytes, width))
}

/// True if an instruction that begins with all of `bytes`, and is none or can't be told yet, has more bytes,
/// which a processor fetches before it says so.
///
/// An undefined opcode has the operands that its place in the opcode map gives it, and they count ([`Shape`]).
///
/// Most prefixes do nothing but make it longer: those that are repeated, segments, and LOCK, with which it is
/// none. It is looked at without them, and so ends within what the decoder is ready to read.
pub(super) fn ends_behind(bytes: &[u8], width: u32) -> bool {
    let rex = |byte: u8| width == 64 && byte & 0xf0 == 0x40;
    let idle = |byte: u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0);
    let prefix = |byte: u8| idle(byte) || rex(byte) || matches!(byte, 0x66 | 0x67 | 0xf2 | 0xf3);
    let count = bytes.iter().take_while(|&&byte| prefix(byte)).count();
    if count >= bytes.len().min(LONGEST) {
        return true;
    }
    let (prefixes, rest) = bytes.split_at(count);
    if rest.starts_with(&[0x0f, 0x0f]) {
        // 3DNow!, whose opcodes are at the end, is nothing that a guest has.
        return false;
    }
    if let Some(shape) = Shape::of(rest, width) {
        return shape.length(prefixes, rest, width) > rest.len();
    }
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

/// What an undefined opcode is followed by (SDM 2D appendix A), as processors count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Bytes up to the opcode, with it.
    opcode: usize,
    modrm: bool,
    immediate: Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Immediate {
    Bytes(usize),
    /// As wide as operands are, but four bytes at most.
    Operand,
    /// An offset as wide as operands are, and a selector.
    Far,
}

impl Shape {
    /// The shape of what `bytes`, which no prefix begins, begin with; None if that follows from elsewhere.
    fn of(bytes: &[u8], width: u32) -> Option<Shape> {
        let shape = |opcode, modrm, immediate| {
            Some(Shape {
                opcode,
                modrm,
                immediate,
            })
        };
        let byte = |at: usize| bytes.get(at).copied();
        let vex = |at: usize| width == 64 || byte(at).is_none_or(|next| next >> 6 == 3);
        // Map and length of what leads to the opcode.
        let (map, lead) = match (byte(0)?, byte(1)) {
            (0xc4, Some(next)) if vex(1) => (next & 0x1f, 3),
            (0xc5, _) if vex(1) => (1, 2),
            // Three-byte opcodes begin with all of these; most maps have nothing in them.
            (0x0f, Some(0x38 | 0x39 | 0x3c | 0x3d)) => (2, 2),
            (0x0f, Some(0x3a | 0x3b | 0x3e | 0x3f)) => (3, 2),
            (0x0f, _) => (1, 1),
            _ => (0, 0),
        };
        let legacy = lead < 2;
        match (map, byte(lead)) {
            (2, _) => shape(lead + 1, true, Immediate::Bytes(0)),
            (3, _) => shape(lead + 1, true, Immediate::Bytes(1)),
            (1, Some(opcode)) => match opcode {
                // Moves of control registers have a ModRM byte that is never memory's.
                0x20..=0x27 | 0x38..=0x3f => None,
                0x04..=0x0c | 0x0e | 0x0f | 0x30..=0x37 | 0x77 => None,
                0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf => None,
                0x80..=0x8f if legacy => None,
                0x80..=0x8f => shape(lead + 1, false, Immediate::Bytes(4)),
                0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => {
                    shape(lead + 1, true, Immediate::Bytes(1))
                }
                _ => shape(lead + 1, true, Immediate::Bytes(0)),
            },
            (0, Some(opcode)) if lead == 0 => match opcode {
                0x82 | 0xc6 => shape(1, true, Immediate::Bytes(1)),
                0x8c..=0x8f | 0xfe | 0xff => shape(1, true, Immediate::Bytes(0)),
                0xc7 => shape(1, true, Immediate::Operand),
                0x9a | 0xea if width == 64 => shape(1, false, Immediate::Far),
                0xd4 | 0xd5 if width == 64 => shape(1, false, Immediate::Bytes(1)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Bytes of it, of which `rest` are the first, or as many as are certain.
    fn length(self, prefixes: &[u8], rest: &[u8], width: u32) -> usize {
        let rex_w = width == 64 && prefixes.last().is_some_and(|last| last & 0xf8 == 0x48);
        let wide =
            |prefix: u8| rex_w && prefix == 0x66 || (width == 16) == prefixes.contains(&prefix);
        let operand = match (self.immediate, wide(0x66)) {
            (Immediate::Bytes(bytes), _) => bytes,
            (Immediate::Operand, wide) => 2 << u32::from(wide),
            (Immediate::Far, wide) => 2 + (2 << u32::from(wide)),
        };
        let address = |modrm: u8| {
            let sib = rest.get(self.opcode + 1).copied();
            1 + address_bytes(modrm, sib, width == 64 || wide(0x67))
        };
        let modrm = rest.get(self.opcode).copied();
        let memory = if self.modrm {
            modrm.map_or(1, address)
        } else {
            0
        };
        self.opcode + memory + operand
    }
}

/// Bytes of a memory operand behind its ModRM byte (SDM 2A 2.1.5).
fn address_bytes(modrm: u8, sib: Option<u8>, wide: bool) -> usize {
    let (mode, base) = (modrm >> 6, modrm & 7);
    match (mode, wide) {
        (3, _) => 0,
        (0, false) => 2 * usize::from(base == 6),
        (1, false) => 1,
        (_, false) => 2,
        (_, true) => {
            let has_sib = base == 4;
            let base = if has_sib { sib.unwrap_or(0) & 7 } else { base };
            let displacement = match mode {
                0 => 4 * usize::from(base == 5),
                1 => 1,
                _ => 4,
            };
            usize::from(has_sib) + displacement
        }
    }
}

/// True if no byte behind `bytes`, which end too early for an instruction, makes a difference: they
/// begin none, and no more is fetched. The decoder asks for a ModRM byte even behind opcodes that are
/// undefined.
fn hopeless(bytes: &[u8], width: u32) -> bool {
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
    fn undefined_opcodes_have_the_operands_of_their_place_in_the_map() {
        // As Ice Lake counts them, with [rax + rax + disp32] where there is a ModRM byte.
        let lengths: [(&[u8], u32, usize); 16] = [
            (b"\x0f\x38\x5a\x84\0", 64, 9),
            (b"\x0f\x3a\x39\x84\0", 64, 10),
            (b"\x0f\x6c\x84\0", 64, 8),
            (b"\x0f\x72\x84\0", 64, 9),
            (b"\xc4\xe1\x78\xa4\x84\0", 64, 11),
            (b"\xc4\xe2\x78\xc0\x84\0", 64, 10),
            (b"\xc4\xe3\x78\xc0\x84\0", 64, 11),
            (b"\xc5\xf8\x7a\x84\0", 64, 9),
            (b"\xc5\xf8\x88\x84\0", 64, 7),
            (b"\x82\x84\0", 64, 8),
            (b"\xea\x84\0", 64, 7),
            (b"\xd5\x84\0", 64, 2),
            // Of 32-bit code: [bp], [bp + disp8] and [bp + disp16] behind an address-size prefix.
            (b"\x67\x0f\x38\x5a\x06", 32, 7),
            (b"\x67\x0f\x38\x5a\x46", 32, 6),
            (b"\x67\x0f\x38\x5a\x86", 32, 7),
            (b"\x67\x0f\x38\x5a\xc6", 32, 5),
        ];
        for (code, width, length) in lengths {
            for prefixes in 0..=14 {
                let bytes = [&vec![0x2e; prefixes], code, &[0xf4; 20]].concat();
                let more = prefixes + length > LONGEST;
                assert_eq!(
                    too_long(&bytes, width),
                    more,
                    "{prefixes} before {code:02x?}"
                );
            }
        }
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
