//! What a PC's BIOS would have left in low memory: interrupt vectors and its data area (BIOS Boot
//! Specification and the IBM PC/AT Technical Reference name the places).
//!
//! Kernels that are entered in protected mode read where conventional memory ends (Xen puts its
//! trampoline below), and go back to real mode to ask for services. There are none here: each call
//! returns with carry set and AH 86h, "function not supported", instead of running off at address 0.
//!
//! Invariant: nothing of this lies where [`super::tables`] or boot information does.

use vm_memory::{Bytes, GuestAddress};

use super::LoadError;
use crate::GuestRam;

/// KiB of conventional memory; the last of 640 is the extended data area.
pub(super) const CONVENTIONAL_KIB: u16 = 639;

const VECTORS: usize = 256;
/// Software services: video to clock.
const SERVICES: std::ops::RangeInclusive<usize> = 0x10..=0x1a;
const SEGMENT: u16 = 0xf000;
/// Where the PC/AT's BIOS has its dummy interrupt handler.
const DUMMY: u16 = 0xff53;
const REFUSE: u16 = 0xff58;

const DATA_AREA: u64 = 0x400;
const EXTENDED: u64 = CONVENTIONAL_KIB as u64 * 1024;

/// Writes vectors, their handlers and both data areas.
pub(super) fn write(ram: &GuestRam) -> Result<(), LoadError> {
    let vectors: Vec<u8> = (0..VECTORS)
        .flat_map(|vector| {
            let offset = if SERVICES.contains(&vector) {
                REFUSE
            } else {
                DUMMY
            };
            [offset.to_le_bytes(), SEGMENT.to_le_bytes()].concat()
        })
        .collect();
    let handler = |offset: u16| u64::from(SEGMENT) * 16 + u64::from(offset);
    for (at, bytes) in [
        (0, vectors),
        (DATA_AREA, data_area()),
        // Its size in KiB.
        (EXTENDED, vec![1]),
        // iret
        (handler(DUMMY), vec![0xcf]),
        // mov ah, 86h; stc; retf 2: carry goes back in the flags, not those that int has pushed.
        (handler(REFUSE), vec![0xb4, 0x86, 0xf9, 0xca, 2, 0]),
    ] {
        ram.write_slice(&bytes, GuestAddress(at))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

fn data_area() -> Vec<u8> {
    /// A coprocessor, one serial port.
    const EQUIPMENT: u16 = 1 << 1 | 1 << 9;
    const COM1: u16 = 0x3f8;
    const CRTC: u16 = 0x3d4;
    let mut bytes = vec![0; 0x100];
    let mut put = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    put(0x00, COM1);
    put(0x0e, (EXTENDED >> 4) as u16);
    put(0x10, EQUIPMENT);
    put(0x13, CONVENTIONAL_KIB);
    // Text mode 3 of 80 columns and 25 rows.
    put(0x49, 3);
    put(0x4a, 80);
    put(0x63, CRTC);
    put(0x84, 24);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_memory_is_where_kernels_look_for_it() {
        let ram = crate::memory::create(2).expect("guest memory");
        write(&ram).expect("it fits");
        let word = |at: u64| ram.read_obj::<u16>(GuestAddress(at)).expect("RAM");
        assert_eq!((word(0x413), word(0x40e)), (639, 0x9fc0));
        assert_eq!(word(0x9fc00) & 0xff, 1);
        // int 15h leads to the refusal, int 8 to an iret.
        assert_eq!((word(0x15 * 4), word(0x15 * 4 + 2)), (REFUSE, SEGMENT));
        let dummy = u64::from(word(8 * 4 + 2)) * 16 + u64::from(word(8 * 4));
        assert_eq!(word(dummy) & 0xff, 0xcf);
    }
}
