//! What a PC's firmware would have left in memory about processors and interrupts: ACPI tables (ACPI
//! specification 5.2) and a MultiProcessor table (Intel MultiProcessor Specification 1.4, chapter 4),
//! for bare-metal kernels, which are entered without firmware.
//!
//! They say what is there and no more: local APICs, the I/O APIC, the timer's line at its pin 2, the
//! power-management registers and the reset register. No buttons, no devices: all that the DSDT names
//! is how to switch the machine off.
//!
//! Invariant: all of it lies in the last page range below 1 MiB that a kernel searches, every
//! table's bytes add up to 0.

use vm_memory::{Bytes, GuestAddress};

use super::LoadError;
use crate::devices::power;
use crate::{GuestRam, cpuid};

/// Physical address of the RSDP.
pub(super) const RSDP: u64 = 0xf_0000;
const MP_POINTER: u64 = RSDP + 0x40;
const MP_TABLE: u64 = RSDP + 0x80;
const RSDT: u64 = RSDP + 0x400;
const XSDT: u64 = RSDP + 0x440;
const FADT: u64 = RSDP + 0x480;
const FACS: u64 = RSDP + 0x580;
/// Where a system that was suspended wants to go on, below 1 MiB.
pub(super) const WAKING_VECTOR: u64 = FACS + 12;
const DSDT: u64 = RSDP + 0x5c0;
const MADT: u64 = RSDP + 0x600;

const OEM: &[u8; 6] = b"TRAPLN";
const PRODUCT: &[u8; 8] = b"TRAPLINE";

const LAPIC: u32 = crate::devices::lapic::BASE.0 as u32;
const IOAPIC: u32 = crate::devices::ioapic::BASE.0 as u32;
/// Of the I/O APIC, as its register shows it after reset.
const IOAPIC_ID: u8 = 0;
/// The timer's line, and its pin at the I/O APIC.
const TIMER: (u8, u8) = (0, 2);
const ISA_LINES: u8 = 16;

/// Writes the tables of a machine with `cpus` processors.
pub(super) fn write(ram: &GuestRam, cpus: u8) -> Result<(), LoadError> {
    let mp_table = mp_table(cpus);
    for (at, bytes) in [
        (RSDP, rsdp()),
        (MP_POINTER, mp_pointer()),
        (MP_TABLE, mp_table),
        (
            RSDT,
            table(
                b"RSDT",
                1,
                &[FADT, MADT].map(|at| (at as u32).to_le_bytes()).concat(),
            ),
        ),
        (
            XSDT,
            table(b"XSDT", 1, &[FADT, MADT].map(u64::to_le_bytes).concat()),
        ),
        (FADT, fadt()),
        (FACS, facs()),
        (DSDT, table(b"DSDT", 1, &DEFINITIONS)),
        (MADT, madt(cpus)),
    ] {
        ram.write_slice(&bytes, GuestAddress(at))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

/// `Name (_S5_, Package (4) { 0, 0, 0, 0 })` (ACPI specification 7.4.2, 20.2): the first is SLP_TYP.
const DEFINITIONS: [u8; 12] = {
    const NAME: u8 = 0x08;
    const PACKAGE: u8 = 0x12;
    const ZERO: u8 = 0x00;
    assert!(power::OFF == ZERO);
    // Six bytes from the length on, four elements.
    [
        NAME, b'_', b'S', b'5', b'_', PACKAGE, 6, 4, ZERO, ZERO, ZERO, ZERO,
    ]
};

/// Makes `bytes` add up to 0 by the one at `at`.
fn sum_up(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = bytes[at].wrapping_sub(sum);
}

/// The root pointer, of ACPI 2.0 and of 1.0 in its first 20 bytes.
fn rsdp() -> Vec<u8> {
    let mut bytes = b"RSD PTR \0".to_vec();
    bytes.extend(OEM);
    bytes.push(2);
    bytes.extend((RSDT as u32).to_le_bytes());
    sum_up(&mut bytes, 8);
    bytes.extend(36u32.to_le_bytes());
    bytes.extend(XSDT.to_le_bytes());
    bytes.extend([0; 4]);
    sum_up(&mut bytes, 32);
    bytes
}

/// A system description table: its header, then `body`.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = signature.to_vec();
    bytes.extend((36 + body.len() as u32).to_le_bytes());
    bytes.extend([revision, 0]);
    bytes.extend(OEM);
    bytes.extend(PRODUCT);
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(b"TRAP");
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(body);
    sum_up(&mut bytes, 9);
    bytes
}

/// The firmware control structure: the waking vector, which is the guest's to write.
fn facs() -> Vec<u8> {
    const LENGTH: u32 = 64;
    let mut bytes = b"FACS".to_vec();
    bytes.extend(LENGTH.to_le_bytes());
    bytes.resize(LENGTH as usize, 0);
    bytes[32] = 1;
    bytes
}

/// The fixed description table, revision 3: where the power-management registers are, and that a PC's
/// old devices are there.
fn fadt() -> Vec<u8> {
    const HEADER: usize = 36;
    const SIZE: usize = 244;
    const EVENT_BYTES: u8 = 4;
    const CONTROL_BYTES: u8 = 2;
    const PM_TIMER_BYTES: u8 = 4;
    /// No state is entered by reading a port (P_LVL2_LAT, P_LVL3_LAT).
    const NO_STATES: [u16; 2] = [101, 1001];
    const CENTURY: u8 = 0x32;
    /// WBINVD, PROC_C1, no fixed power and sleep buttons, no fixed RTC status, RESET_REG_SUP.
    const FLAGS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10;
    const RESET_PORT: u64 = 0xcf9;
    const RESET_VALUE: u8 = 6;
    /// Devices on the LPC or ISA bus, and a keyboard controller.
    const LEGACY_AND_8042: u16 = 0b11;
    /// A generic address: system I/O, this many bits, at offset 0, accessed as such.
    fn port(port: u64, bits: u8) -> Vec<u8> {
        let access = match bits {
            8 => 1,
            16 => 2,
            _ => 3,
        };
        [&[1, bits, 0, access][..], &port.to_le_bytes()].concat()
    }
    let mut body = vec![0; SIZE - HEADER];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER..offset - HEADER + bytes.len()].copy_from_slice(bytes);
    };
    put(36, &(FACS as u32).to_le_bytes());
    put(40, &(DSDT as u32).to_le_bytes());
    put(46, &u16::from(power::IRQ).to_le_bytes());
    put(56, &u32::from(power::EVENTS).to_le_bytes());
    put(64, &u32::from(power::CONTROL).to_le_bytes());
    put(76, &u32::from(power::TIMER).to_le_bytes());
    put(88, &[EVENT_BYTES, CONTROL_BYTES]);
    put(91, &[PM_TIMER_BYTES]);
    put(96, &NO_STATES[0].to_le_bytes());
    put(98, &NO_STATES[1].to_le_bytes());
    put(108, &[CENTURY]);
    put(109, &LEGACY_AND_8042.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &port(RESET_PORT, 8));
    put(128, &[RESET_VALUE]);
    put(140, &DSDT.to_le_bytes());
    put(148, &port(power::EVENTS.into(), 32));
    put(172, &port(power::CONTROL.into(), 16));
    put(208, &port(power::TIMER.into(), 32));
    table(b"FACP", 3, &body)
}

/// The interrupt controllers.
fn madt(cpus: u8) -> Vec<u8> {
    let mut body = LAPIC.to_le_bytes().to_vec();
    // There are 8259s too.
    body.extend(1u32.to_le_bytes());
    for cpu in 0..cpus {
        body.extend([0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    body.extend([1, 12, IOAPIC_ID, 0]);
    body.extend(IOAPIC.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The timer's line is another pin; edges and levels are the bus's.
    body.extend([2, 10, 0, TIMER.0]);
    body.extend(u32::from(TIMER.1).to_le_bytes());
    body.extend([0, 0]);
    // The system control interrupt is a level, active high.
    body.extend([2, 10, 0, power::IRQ]);
    body.extend(u32::from(power::IRQ).to_le_bytes());
    body.extend([0b1101, 0]);
    table(b"APIC", 1, &body)
}

fn mp_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((MP_TABLE as u32).to_le_bytes());
    // One paragraph, version 1.4, a table of its own.
    bytes.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    sum_up(&mut bytes, 10);
    bytes
}

fn mp_table(cpus: u8) -> Vec<u8> {
    const PROCESSOR: u8 = 0;
    const BUS: u8 = 1;
    const IO_APIC: u8 = 2;
    const LINE: u8 = 3;
    const LOCAL_LINE: u8 = 4;
    const NMI: u8 = 1;
    const EXTERNAL: u8 = 3;
    const ALL: u8 = 0xff;
    let [signature, _, _, features] = cpuid::pinned(1, 0);
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for cpu in 0..cpus {
        let boots = u8::from(cpu == 0) << 1;
        let mut entry = vec![PROCESSOR, cpu, 0x14, 1 | boots];
        entry.extend(signature.to_le_bytes());
        entry.extend(features.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![BUS, 0];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut ioapic = vec![IO_APIC, IOAPIC_ID, 0x11, 1];
    ioapic.extend(IOAPIC.to_le_bytes());
    entries.push(ioapic);
    // Line 2 is the 8259s' cascade.
    for line in (0..ISA_LINES).filter(|&line| line != 2) {
        let pin = if line == TIMER.0 { TIMER.1 } else { line };
        entries.push(vec![LINE, 0, 0, 0, 0, line, IOAPIC_ID, pin]);
    }
    entries.push(vec![LOCAL_LINE, EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![LOCAL_LINE, NMI, 0, 0, 0, 0, ALL, 1]);

    let count = entries.len() as u16;
    let entries = entries.concat();
    let mut bytes = b"PCMP".to_vec();
    bytes.extend((44 + entries.len() as u16).to_le_bytes());
    bytes.extend([4, 0]);
    bytes.extend(PRODUCT);
    bytes.extend(b"MACHINE     ");
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(LAPIC.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(entries);
    sum_up(&mut bytes, 7);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn bytes(ram: &GuestRam, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "the table at {at:#x}");
        bytes
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// A table by its address, all of it.
    fn table_at(ram: &GuestRam, at: u64) -> Vec<u8> {
        let length: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        bytes(ram, at, length as usize)
    }

    /// The table with that signature, by way of the root pointer.
    fn find(ram: &GuestRam, signature: &[u8]) -> Vec<u8> {
        let root = bytes(ram, RSDP, 36);
        bytes(ram, RSDP, 20);
        assert_eq!(&root[..8], b"RSD PTR ");
        let short = table_at(ram, word(&root, 16).into());
        let long = table_at(ram, word(&root, 24).into());
        let listed: Vec<u64> = short[36..]
            .chunks_exact(4)
            .map(|at| word(at, 0).into())
            .collect();
        let again: Vec<u64> = long[36..]
            .chunks_exact(8)
            .map(|at| u64::from_le_bytes(at.try_into().unwrap()))
            .collect();
        assert_eq!(listed, again);
        let mut tables = listed.into_iter().map(|at| table_at(ram, at));
        tables.find(|table| table.starts_with(signature)).unwrap()
    }

    #[test]
    fn acpi_tables_name_processors_controllers_and_the_timer() {
        for cpus in [1, 16] {
            let ram = memory::create(1).unwrap();
            write(&ram, cpus).unwrap();
            let madt = find(&ram, b"APIC");
            assert_eq!(word(&madt, 36), 0xfee0_0000);
            let (mut entries, mut ids, mut kinds) = (&madt[44..], Vec::new(), Vec::new());
            while let [kind, length, rest @ ..] = entries {
                kinds.push(*kind);
                if *kind == 0 {
                    ids.push(rest[1]);
                }
                entries = &entries[usize::from(*length)..];
            }
            assert_eq!(ids, (0..cpus).collect::<Vec<u8>>());
            assert_eq!(kinds[ids.len()..], [1, 2, 2]);
            let fadt = find(&ram, b"FACP");
            assert_eq!((fadt.len(), word(&fadt, 76), fadt[91]), (244, 0x608, 4));
            assert!(table_at(&ram, word(&fadt, 40).into()).starts_with(b"DSDT"));
            assert_eq!((word(&fadt, 56), word(&fadt, 64)), (0x600, 0x604));
            let mut facs = [0; 64];
            ram.read_slice(&mut facs, GuestAddress(word(&fadt, 36).into()))
                .unwrap();
            assert_eq!((&facs[..4], word(&facs, 4)), (&b"FACS"[..], 64));
            // Nothing lies over it.
            assert_eq!((facs[32], &facs[33..]), (1, &[0; 31][..]));
        }
    }

    #[test]
    fn the_multiprocessor_table_names_them_too() {
        let ram = memory::create(1).unwrap();
        write(&ram, 16).unwrap();
        let pointer = bytes(&ram, MP_POINTER, 16);
        assert_eq!(&pointer[..4], b"_MP_");
        let at = u64::from(word(&pointer, 4));
        let length: u16 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let table = bytes(&ram, at, length.into());
        assert!(at + u64::from(length) <= RSDT);
        let mut entries = &table[44..];
        let mut counts = [0; 5];
        while let [kind, ..] = entries {
            counts[usize::from(*kind)] += 1;
            entries = &entries[if *kind == 0 { 20 } else { 8 }..];
        }
        assert_eq!(counts, [16, 1, 1, 15, 2]);
        let total: u16 = counts.iter().sum();
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), total);
    }
}
