//! What a PC's firmware would have left in memory about processors and interrupts: ACPI tables (ACPI
//! specification 5.2) and a MultiProcessor table (Intel MultiProcessor Specification 1.4, chapter 4),
//! for bare-metal kernels, which are entered without firmware.
//!
//! They say what is there and no more: local APICs, the I/O APIC, the timer's line at its pin 2 and
//! the power-management timer. No sleep states, no power button, no code (the DSDT is empty).
//!
//! Invariant: all of it lies in the last page range below 1 MiB that a kernel searches, every
//! table's bytes add up to 0.

use vm_memory::{Bytes, GuestAddress};

use super::LoadError;
use crate::{GuestRam, cpuid};

/// Physical address of the RSDP.
pub(super) const RSDP: u64 = 0xf_0000;
const MP_POINTER: u64 = RSDP + 0x40;
const MP_TABLE: u64 = RSDP + 0x80;
const RSDT: u64 = RSDP + 0x400;
const XSDT: u64 = RSDP + 0x440;
const FADT: u64 = RSDP + 0x480;
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
        (DSDT, table(b"DSDT", 1, &[])),
        (MADT, madt(cpus)),
    ] {
        ram.write_slice(&bytes, GuestAddress(at))
            .map_err(|_| LoadError::NoRoom)?;
    }
    Ok(())
}

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

/// The fixed description table, revision 3: where the timer is, and that a PC's old devices are
/// there.
fn fadt() -> Vec<u8> {
    const HEADER: usize = 36;
    const SIZE: usize = 244;
    const SCI: u16 = 9;
    const PM_TIMER_BYTES: u8 = 4;
    /// Devices on the LPC or ISA bus, and a keyboard controller.
    const LEGACY_AND_8042: u16 = 0b11;
    let port = crate::devices::pm_timer::PORT;
    let mut body = vec![0; SIZE - HEADER];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER..offset - HEADER + bytes.len()].copy_from_slice(bytes);
    };
    put(40, &(DSDT as u32).to_le_bytes());
    put(46, &SCI.to_le_bytes());
    put(76, &u32::from(port).to_le_bytes());
    put(91, &[PM_TIMER_BYTES]);
    put(109, &LEGACY_AND_8042.to_le_bytes());
    put(140, &DSDT.to_le_bytes());
    // X_PM_TMR_BLK as a generic address: system I/O, 32 bits, at offset 0, accessed as such.
    put(208, &[1, 32, 0, 3]);
    put(212, &u64::from(port).to_le_bytes());
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
            assert_eq!(kinds[ids.len()..], [1, 2]);
            let fadt = find(&ram, b"FACP");
            assert_eq!((fadt.len(), word(&fadt, 76), fadt[91]), (244, 0x608, 4));
            assert!(table_at(&ram, word(&fadt, 40).into()).starts_with(b"DSDT"));
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
