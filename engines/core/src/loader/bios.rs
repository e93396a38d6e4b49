//! What a PC's BIOS would have left in low memory: interrupt vectors and its data area (BIOS Boot
//! Specification and the IBM PC/AT Technical Reference name the places).
//!
//! Kernels that are entered in protected mode read where conventional memory ends (Xen puts its
//! trampoline below), and go back to real mode to ask for services. There are none here: each call
//! returns with carry set and AH 86h, "function not supported", instead of running off at address 0.
//!
//! INIT brings the boot processor to F000:FFF0, as a jump of its own does, and so does a reset by any port
//! if there is a shutdown code in CMOS 0Fh. Code there does what a PC/AT's does then: with 5 and 0Ah it goes
//! on at the far pointer in 40:67, after an end of interrupt to both 8259s with 5. A machine that was suspended to memory waits for
//! the clock's alarm there and goes on at the waking vector (ACPI specification 16.3.2.3); any other is reset.
//!
//! Kernels find the descriptors that they are entered with, and the vectors of real mode: Multiboot 3.2 says
//! that neither table need be there, and boot loaders leave theirs, so some take exceptions by their own IDT
//! before they have a GDT (GRUB's debugger does).
//!
//! Invariant: nothing of this lies where [`super::tables`] or boot information does.

use vm_memory::{Bytes, GuestAddress};

use super::LoadError;
use crate::{CpuState, DescriptorTable, GuestRam};

/// KiB of conventional memory; the last of 640 is the extended data area.
pub(super) const CONVENTIONAL_KIB: u16 = 639;

const VECTORS: usize = 256;
/// Software services: video to clock.
const SERVICES: std::ops::RangeInclusive<usize> = 0x10..=0x1a;
const SEGMENT: u16 = 0xf000;
/// Where the PC/AT's BIOS has its dummy interrupt handler.
const DUMMY: u16 = 0xff53;
const REFUSE: u16 = 0xff58;

/// Vectors of the 8259s' lines: the timer's, the rest of the first one's, the second one's.
const TICK_VECTOR: usize = 0x08;
const MASTER_VECTORS: std::ops::RangeInclusive<usize> = 0x09..=0x0f;
const SLAVE_VECTORS: std::ops::RangeInclusive<usize> = 0x70..=0x77;
/// Where the PC/AT's BIOS handles the timer's ticks.
const TICK: u16 = 0xfea5;
/// Handlers that end service and do nothing else.
const MASTER: u16 = 0xff60;
const SLAVE: u16 = 0xff68;

/// Descriptors: none, flat code, flat data.
const DESCRIPTORS: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Where they are, between two handlers.
const GDT: u16 = 0xfee0;
/// Below the boot information.
const STACK: u64 = 0x6000;

/// Where the PC/AT's BIOS begins its self test.
const POST: u16 = 0xe05b;
/// The reset vector, at which its last paragraph begins.
const RESET: u16 = 0xfff0;

const DATA_AREA: u64 = 0x400;
const EXTENDED: u64 = CONVENTIONAL_KIB as u64 * 1024;

/// Writes vectors, their handlers and both data areas.
pub(super) fn write(ram: &GuestRam) -> Result<(), LoadError> {
    let vectors: Vec<u8> = (0..VECTORS)
        .flat_map(|vector| {
            let offset = match vector {
                TICK_VECTOR => TICK,
                _ if SERVICES.contains(&vector) => REFUSE,
                _ if MASTER_VECTORS.contains(&vector) => MASTER,
                _ if SLAVE_VECTORS.contains(&vector) => SLAVE,
                _ => DUMMY,
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
        (handler(TICK), tick()),
        // push ax; mov al, 20h; out 20h, al; pop ax; iret, and the second with out A0h, al.
        (
            handler(MASTER),
            vec![0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf],
        ),
        (
            handler(SLAVE),
            vec![0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf],
        ),
        (handler(GDT), DESCRIPTORS.map(u64::to_le_bytes).concat()),
        (handler(POST), after_reset()),
        (handler(RESET), last_paragraph()),
    ] {
        ram.write_slice(&bytes, GuestAddress(at))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

/// Has a kernel find the tables, in `state` at its entry, and a stack.
pub(super) fn hand_over(state: &mut CpuState) {
    state.gdtr = DescriptorTable {
        base: u64::from(SEGMENT) * 16 + u64::from(GDT),
        limit: size_of_val(&DESCRIPTORS) as u16 - 1,
    };
    state.idtr = DescriptorTable {
        base: 0,
        limit: VECTORS as u16 * 4 - 1,
    };
    state.gpr[4] = STACK;
}

/// What runs at the reset vector: real-mode code.
fn after_reset() -> Vec<u8> {
    const STATUS: [u8; 2] = (crate::devices::power::EVENTS + 1).to_le_bytes();
    const VECTOR: [u8; 2] = (super::tables::WAKING_VECTOR as u16).to_le_bytes();
    let code: &[&[u8]] = &[
        &[0xfa],                                           //         cli
        &[0x66, 0xb8, 0x10, 0, 0, 0],                      //         mov eax, 10h: caches on
        &[0x0f, 0x22, 0xc0],                               //         mov cr0, eax
        &[0xb9, 0x30, 0x00, 0x8e, 0xd1],                   //         mov cx, 30h; mov ss, cx
        &[0xbc, 0x00, 0x01],                               //         mov sp, 100h
        &[0x31, 0xc9, 0x8e, 0xd9],                         //         xor cx, cx; mov ds, cx
        &[0xb0, 0x0f, 0xe6, 0x70, 0xe4, 0x71, 0x88, 0xc4], //         ah = CMOS 0Fh
        &[0xb0, 0x0f, 0xe6, 0x70, 0xb0, 0x00, 0xe6, 0x71], //         CMOS 0Fh = 0
        &[0x80, 0xfc, 0x0a, 0x74, 0x0b],                   //         cmp ah, 0Ah; je resume
        &[0x80, 0xfc, 0x05, 0x75, 0x0a],                   //         cmp ah, 5; jne wakes
        &[0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20],             //         EOI to both 8259s
        &[0xff, 0x2e, 0x67, 0x04],                         // resume: jmp far [467h]
        &[0xba, STATUS[0], STATUS[1], 0xec],               // wakes:  WAK_STS?
        &[0xa8, 0x80, 0x74, 0x2e],                         //         test al, 80h; jz reset
        &[0xb0, 0x0b, 0xe6, 0x70, 0xe4, 0x71],             // wait:   the clock's alarm is enabled?
        &[0xa8, 0x20, 0x74, 0x2a],                         //         test al, 20h; jz halt
        &[0xb0, 0x0c, 0xe6, 0x70, 0xe4, 0x71],             //         has it come?
        &[0xa8, 0x20, 0x74, 0xec],                         //         test al, 20h; jz wait
        &[0xb9, 0x00, 0xf0, 0x8e, 0xd9],                   //         mov cx, 0F000h; mov ds, cx
        &[0x66, 0xa1, VECTOR[0], VECTOR[1]],               //         eax = the waking vector
        &[0x66, 0x85, 0xc0, 0x74, 0x0c],                   //         test eax, eax; jz reset
        &[0x89, 0xc1, 0x83, 0xe1, 0x0f],                   //         cx = ax & 0Fh
        &[0x66, 0xc1, 0xe8, 0x04],                         //         shr eax, 4
        &[0x50, 0x51, 0xcb],                               //         to ax:cx
        &[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee],             // reset:  CF9h = hard reset
        &[0xf4, 0xeb, 0xfd],                               // halt:   hlt; jmp back
    ];
    code.concat()
}

/// Counts the timer's ticks of a day in 40:6C and days in 40:70, and tells int 1Ch.
fn tick() -> Vec<u8> {
    let code: &[&[u8]] = &[
        &[0x1e, 0x50],                                     //      push ds; push ax
        &[0x31, 0xc0, 0x8e, 0xd8],                         //      xor ax, ax; mov ds, ax
        &[0x66, 0xff, 0x06, 0x6c, 0x04],                   //      inc dword [46Ch]
        &[0x66, 0x81, 0x3e, 0x6c, 0x04, 0xb0, 0, 0x18, 0], //      cmp dword [46Ch], 1800B0h
        &[0x72, 0x0d],                                     //      jb told
        &[0x66, 0xc7, 0x06, 0x6c, 0x04, 0, 0, 0, 0],       //      mov dword [46Ch], 0
        &[0xfe, 0x06, 0x70, 0x04],                         //      inc byte [470h]
        &[0xcd, 0x1c],                                     // told: int 1Ch
        &[0xb0, 0x20, 0xe6, 0x20],                         //      mov al, 20h; out 20h, al
        &[0x58, 0x1f, 0xcf],                               //      pop ax; pop ds; iret
    ];
    code.concat()
}

/// A jump to the self test, the BIOS's date, and the model byte of a PC/AT.
fn last_paragraph() -> Vec<u8> {
    let mut bytes = vec![0xea];
    bytes.extend(POST.to_le_bytes());
    bytes.extend(SEGMENT.to_le_bytes());
    bytes.extend(b"01/01/99\0");
    bytes.extend([0xfc, 0]);
    bytes
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
        // int 15h leads to the refusal, others to what ends with an iret.
        assert_eq!((word(0x15 * 4), word(0x15 * 4 + 2)), (REFUSE, SEGMENT));
        for (vector, bytes) in [(3, 1), (8, 44), (9, 7), (0xf, 7), (0x70, 9), (0x77, 9)] {
            let first = u64::from(word(vector * 4 + 2)) * 16 + u64::from(word(vector * 4));
            assert_eq!(word(first + bytes - 1) & 0xff, 0xcf, "{vector:x}");
        }
        // The last paragraph ends with the model byte.
        assert_eq!(last_paragraph().len(), 16);
        assert_eq!(word(0xf_fffe) & 0xff, 0xfc);
    }
}
