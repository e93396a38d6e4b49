//! What the VMM says at entry: `hvm_start_info` of the PVH boot protocol (Xen
//! public/arch-x86/hvm/start_info.h). Read once and copied, since it may lie where the arena goes.

use programs::session::LINE;

/// Value of the first field.
const MAGIC: u32 = 0x336e_c578;
/// A memory map entry's type: usable RAM.
const RAM: u32 = 1;

/// Physical memory that can be read.
pub trait Memory {
    /// The byte at a physical address; `None` beyond what can be reached.
    fn byte(&self, address: u64) -> Option<u8>;

    /// A little-endian number of up to 8 bytes.
    fn number(&self, address: u64, bytes: u64) -> Option<u64> {
        (0..bytes).rev().try_fold(0, |value, index| {
            let byte = self.byte(address.checked_add(index)?)?;
            Some(value << 8 | u64::from(byte))
        })
    }
}

/// What the kernel wants to know.
#[derive(Debug, PartialEq, Eq)]
pub struct StartInfo {
    /// Where the usable memory that holds the address asked about ends, 0 if it is not usable.
    pub usable_end: u64,
    /// The command line, cut where it is too long.
    pub command_line: [u8; LINE],
    /// Its length.
    pub length: usize,
}

impl StartInfo {
    /// Reads the structure at `address`; `within` is an address that should be usable memory.
    ///
    /// # Errors
    /// What is wrong with it, in words for the console.
    pub fn read(memory: &impl Memory, address: u64, within: u64) -> Result<Self, &'static str> {
        const BEYOND: &str = "the start info lies beyond memory that can be reached";
        let field = |offset, bytes| memory.number(address + offset, bytes).ok_or(BEYOND);
        if field(0, 4)? != MAGIC.into() {
            return Err("no start info: was the image not entered by PVH?");
        }
        if field(4, 4)? < 1 {
            return Err("the start info is of version 0 and has no memory map");
        }
        let mut info = StartInfo {
            usable_end: 0,
            command_line: [0; LINE],
            length: 0,
        };
        let text = field(24, 8)?;
        if text != 0 {
            for (index, slot) in info.command_line.iter_mut().enumerate() {
                *slot = memory.byte(text + index as u64).ok_or(BEYOND)?;
                if *slot == 0 {
                    break;
                }
                info.length = index + 1;
            }
        }
        let map = field(40, 8)?;
        for index in 0..field(48, 4)? {
            let entry = map + 24 * index;
            let number = |offset, bytes| memory.number(entry + offset, bytes).ok_or(BEYOND);
            let (start, size, kind) = (number(0, 8)?, number(8, 8)?, number(16, 4)?);
            let end = start.saturating_add(size);
            if kind == u64::from(RAM) && (start..end).contains(&within) {
                info.usable_end = end;
            }
        }
        Ok(info)
    }

    /// The command line.
    pub fn command_line(&self) -> &[u8] {
        self.command_line.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes([u8; 512]);

    impl Memory for Bytes {
        fn byte(&self, address: u64) -> Option<u8> {
            self.0.get(usize::try_from(address).ok()?).copied()
        }
    }

    impl Bytes {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// Start info at 16, command line at 100, map of two entries at 200.
    fn sample() -> Bytes {
        let mut bytes = Bytes([0; 512]);
        bytes.put(16, &MAGIC.to_le_bytes());
        bytes.put(20, &1u32.to_le_bytes());
        bytes.put(16 + 24, &100u64.to_le_bytes());
        bytes.put(16 + 40, &200u64.to_le_bytes());
        bytes.put(16 + 48, &2u32.to_le_bytes());
        bytes.put(100, b"run alu 0 1\0junk");
        for (index, (start, size)) in [(0u64, 0xa_0000u64), (0x10_0000, 0xff0_0000)]
            .into_iter()
            .enumerate()
        {
            bytes.put(200 + 24 * index, &start.to_le_bytes());
            bytes.put(208 + 24 * index, &size.to_le_bytes());
            bytes.put(216 + 24 * index, &RAM.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn finds_memory_and_command_line() {
        let info = StartInfo::read(&sample(), 16, 0x40_0000).unwrap();
        assert_eq!(info.usable_end, 0x1000_0000);
        assert_eq!(info.command_line(), b"run alu 0 1");
    }

    #[test]
    fn memory_that_is_reserved_is_not_used() {
        let mut bytes = sample();
        bytes.put(216 + 24, &2u32.to_le_bytes());
        let info = StartInfo::read(&bytes, 16, 0x40_0000).unwrap();
        assert_eq!(info.usable_end, 0);
    }

    #[test]
    fn malformed_start_info_is_refused() {
        for (at, bytes) in [
            (16, &[0u8; 4][..]),      // no magic
            (20, &[0; 4]),            // version 0
            (16 + 24, &[0xff; 8]),    // command line beyond memory
            (16 + 40, &[0, 0, 1, 0]), // map beyond memory
            (16 + 48, &[0xff; 4]),    // map too long for memory
        ] {
            let mut info = sample();
            info.put(at, bytes);
            assert!(StartInfo::read(&info, 16, 0).is_err(), "at {at}");
        }
        assert!(StartInfo::read(&sample(), 500, 0).is_err());
        assert!(StartInfo::read(&sample(), 1 << 40, 0).is_err());
    }

    #[test]
    fn a_long_command_line_is_cut() {
        let mut bytes = sample();
        bytes.put(256, &[b'x'; 256]);
        bytes.put(16 + 24, &256u64.to_le_bytes());
        let info = StartInfo::read(&bytes, 16, 0).unwrap();
        assert_eq!(info.command_line(), [b'x'; LINE]);
    }
}
